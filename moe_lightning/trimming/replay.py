"""A decision that was made before, done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lightning.architectures import OpenExperts
from moe_lightning.method import Method
from moe_lightning.plan import (
    CompressionPlan,
    Edit,
    KeepChannels,
    MergeExperts,
    ModelShape,
    NoviceExperts,
    sizes_of_model,
)
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.channel_drop import CHANNEL_NEEDS, kept_channels
from moe_lightning.trimming.merge import MERGE_NEEDS, merged_weights
from moe_lightning.trimming.novices import NOVICE_NEEDS, low_rank_wants, novice_parameters


@dataclass
class Replay(Method):
    """Apply the edits of a plan; only the values that they make are measured anew.

    Attributes:
        plan: The plan. It holds whole edits, so nothing is scored.
    """

    plan: CompressionPlan

    @property
    def needs(self) -> frozenset[str]:
        """What the values of novices, merged experts and channels need."""
        kinds = [edit.novice for edit in self.plan.edits if isinstance(edit, NoviceExperts)]
        unknown = sorted(set(kinds) - set(NOVICE_NEEDS))
        if unknown:
            raise ValueError(f"the plan has unknown novices {unknown}: known are {', '.join(NOVICE_NEEDS)}")
        needs = frozenset[str]().union(*(NOVICE_NEEDS[kind] for kind in kinds))
        if any(isinstance(edit, MergeExperts) for edit in self.plan.edits):
            needs |= MERGE_NEEDS
        if any(isinstance(edit, KeepChannels) for edit in self.plan.edits):
            needs |= CHANNEL_NEEDS
        return needs

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Return the plan's edits; see :meth:`Method.propose`.

        Raises:
            ValueError: The plan says that it was made for a model of other sizes.
        """
        history = self.plan.origin.get("history") or [self.plan.origin]
        made_for = history[0].get("model") if isinstance(history[0], dict) else None
        here = sizes_of_model(shape)
        if isinstance(made_for, dict) and made_for != here:
            others = [f"{name} {made_for.get(name)} (here {size})" for name, size in here.items()]
            raise ValueError(f"the plan was made for another model: {', '.join(others)}")
        return self.plan.edits

    def low_rank_wants(self, edits: Sequence[Edit]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Return the maps to fit. One that does not beat the constant becomes zero: the plan says its rank."""
        return low_rank_wants(edits)

    def fill(self, edit: Edit, statistics: Statistics, weights: OpenExperts | None = None) -> dict[str, Tensor]:
        """Return the values that the edit makes; see :meth:`Method.fill`."""
        if isinstance(edit, NoviceExperts):
            return novice_parameters(edit, statistics)
        if isinstance(edit, MergeExperts):
            assert weights is not None
            return merged_weights(edit.groups, statistics, edit.layer, weights, edit.align)
        if isinstance(edit, KeepChannels):
            assert weights is not None
            return kept_channels(statistics, edit.layer, edit.width, weights)
        return {}

    def describe(self) -> dict[str, Any]:
        """Return the origin of the plan that is replayed."""
        return {"method": "Replay", "origin": self.plan.origin}
