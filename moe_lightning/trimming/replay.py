"""A decision that was made before, done again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ModelShape, NoviceExperts
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.novices import NOVICE_NEEDS, novice_values


@dataclass
class Replay(Method):
    """Apply the edits of a plan; only the values of novices are measured anew.

    Attributes:
        plan: The plan. It holds whole edits, so nothing is scored.
    """

    plan: CompressionPlan

    @property
    def needs(self) -> frozenset[str]:
        """What the novices' vectors need."""
        kinds = [edit.novice for edit in self.plan.edits if isinstance(edit, NoviceExperts)]
        unknown = sorted(set(kinds) - set(NOVICE_NEEDS))
        if unknown:
            raise ValueError(f"the plan has unknown novices {unknown}: known are {', '.join(NOVICE_NEEDS)}")
        return frozenset().union(*(NOVICE_NEEDS[kind] for kind in kinds))

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Return the plan's edits; see :meth:`Method.propose`."""
        return self.plan.edits

    def fill(self, edit: Edit, statistics: Statistics) -> dict[str, Tensor]:
        """Return the novices' vectors; see :meth:`Method.fill`."""
        if not isinstance(edit, NoviceExperts):
            return {}
        return {"novices": novice_values(edit.novice, statistics, edit.layer, edit.experts)}

    def describe(self) -> dict[str, Any]:
        """Return the origin of the plan that is replayed."""
        return {"method": "Replay", "origin": self.plan.origin}
