"""What a compression method is: what it needs to know, what it decides, what it fills in. No Lightning here."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self

from torch import Tensor

from moe_lightning.architectures import OpenExperts
from moe_lightning.plan import Edit, ModelShape
from moe_lightning.schedules import Schedule
from moe_lightning.statistics import Statistics


class Method(ABC):
    """A way to compress a model. Children are dataclasses: YAML, Python and tests build them alike."""

    # No annotated attributes here: the YAML parser evaluates those of a base class among the names of the child's
    # module, and where one fails it takes every option of the child unchecked.

    @property
    def granularity(self) -> Literal["model", "layer"]:
        """Whether the method decides for the whole model at once, or is asked layer by layer (`Slimming`)."""
        return "model"

    @property
    def schedule(self) -> Schedule | None:
        """How much is taken as a training run goes on; None where everything is taken at once."""
        return None

    def at_share(self, share: float) -> Self:
        """Return the method with a number in the place of its schedule.

        Args:
            share: What is to be gone by then, as the schedule counts it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no schedule")

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Groups of statistics that the method reads."""

    @abstractmethod
    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Decide. No side effect and no model, so that a decision can be tried out on saved statistics.

        Args:
            shape: Shape of the model as it is now.
            statistics: What was measured on it.

        Returns:
            The edits, ascending by layer.

        Raises:
            ValueError: The budget does not fit the shape.
        """

    def low_rank_wants(self, edits: Sequence[Edit]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Return which experts need a low-rank fit, which takes second moments: by layer, pairs (expert, rank)."""
        return {}

    def settle(self, edits: tuple[Edit, ...], statistics: Statistics) -> tuple[Edit, ...]:
        """Return the edits as the fits in ``statistics.fits`` leave them."""
        return edits

    def fill(self, edit: Edit, statistics: Statistics, weights: OpenExperts | None = None) -> dict[str, Tensor]:
        """Return the values of the parameters that an edit makes.

        Args:
            edit: One of the edits proposed.
            statistics: What was measured.
            weights: The layer's experts before the edit, one slot for each of ``layout.real``; None where it has none.

        Returns:
            By kind of parameter. For novices, in the order of the edit: ``novices`` ``[experts of the edit, hidden]``,
            ``novice_in`` and ``novice_out`` ``[sum of ranks, hidden]``. For merged experts, in the order of the groups:
            ``gate_up_proj`` ``[groups, 2 * intermediate, hidden]``, ``down_proj``. For channels: ``channels``, int64
            ``[slots, width]``, ascending, and ``bias`` ``[slots, hidden]``.
        """
        return {}

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the method reads how much the model suffers when each layer alone is trimmed."""
        return False

    def trial(self, shape: ModelShape, statistics: Statistics, layer: int) -> tuple[Edit, ...]:
        """Return the edits that trim one layer alone, for measuring its sensitivity."""
        raise NotImplementedError(f"{type(self).__name__} measures no sensitivity")

    def __str__(self) -> str:
        """Return the method with the options that are not the defaults."""
        changed = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, item.name) != item.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def describe(self) -> dict[str, Any]:
        """Return the method's name and options as plain types, for the plan's origin."""
        return {"method": type(self).__name__, **vars(self)}
