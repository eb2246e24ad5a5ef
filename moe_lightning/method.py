"""What a compression method is: what it needs to know, what it decides, what it fills in. No Lightning here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from moe_lightning.plan import Edit, ModelShape
from moe_lightning.statistics import Statistics


class Method(ABC):
    """A way to compress a model. Children are dataclasses: YAML, Python and tests build them alike."""

    # No annotated attributes here: the YAML parser evaluates those of a base class among the names of the child's
    # module, and where one fails it takes every option of the child unchecked.

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

    def fill(self, edit: Edit, statistics: Statistics) -> dict[str, Tensor]:
        """Return the values of the parameters that an edit makes.

        Args:
            edit: One of the edits proposed.
            statistics: What was measured.

        Returns:
            By kind of parameter: ``novices`` is ``[experts of the edit, hidden]``, in the order of the edit.
        """
        return {}

    def describe(self) -> dict[str, Any]:
        """Return the method's name and options as plain types, for the plan's origin."""
        return {"method": type(self).__name__, **vars(self)}
