"""Novices: experts give way to constants, the router stays."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_lightning.criteria.selection import Scope, kept_experts
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ModelShape, NoviceExperts
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.trimming.budget import check_budget

NoviceKind = Literal["mean", "zero", "gate2_mean"]

NOVICE_NEEDS: dict[str, frozenset[str]] = {
    "mean": frozenset({"outputs"}),
    "zero": frozenset(),
    "gate2_mean": frozenset({"routing", "outputs"}),
}


def novice_values(kind: str, statistics: Statistics, layer: int, experts: tuple[int, ...]) -> Tensor:
    """Compute the vectors that stand for experts.

    Args:
        kind: ``mean`` (``sum E / N``), ``zero``, or ``gate2_mean`` (``sum g^2 E / sum g^2``, the constant with the
            least squared error of the weighted output).
        statistics: What was measured.
        layer: Number of the layer in the original model.
        experts: Original numbers of the experts.

    Returns:
        ``[len(experts), hidden]`` float64. An expert that no token reached gets zeros, and a warning.

    Raises:
        ValueError: Unknown kind.

    Source: 2507.00390 (``mean``); ``gate2_mean`` is ours.
    """
    if kind not in NOVICE_NEEDS:
        raise ValueError(f"unknown novice {kind!r}: choose one of {', '.join(NOVICE_NEEDS)}")
    if kind == "zero":
        return torch.zeros(len(experts), statistics.shape.hidden_size, dtype=torch.float64, device="cpu")
    at = (statistics.row(layer), list(experts))
    weight = statistics["output_count" if kind == "mean" else "gate_square_sum"][at]
    unreached = [expert for expert, amount in zip(experts, weight.tolist(), strict=True) if amount == 0]
    if unreached:
        warnings.warn(
            f"layer {layer}: no calibration token reached experts {unreached}; their novices are zero. "
            "More calibration batches would reach them",
            stacklevel=2,
        )
    if kind == "mean":
        return statistics["output_mean"][at]
    return torch.where(
        weight.unsqueeze(-1) > 0, statistics["gate2_output_sum"][at] / weight.clamp(min=1e-300)[:, None], 0.0
    )


@dataclass
class Novices(Method):
    """Replace the experts that score lowest by novices: one vector each, weighted by the unchanged router.

    Attributes:
        ratio: Share of the experts to replace, in [0, 1). Give this or keep.
        keep: Real experts to keep a layer; with scope=global the mean over layers.
        criterion: How experts are scored.
        scope: layer holds the budget in each layer, global over all layers.
        novice: What stands for an expert: mean (of its outputs), zero, or gate2_mean (least squared error).
        seed: Seed of criterion=random.

    Source: 2507.00390; the defaults are the released ones.
    """

    ratio: float | None = None
    keep: float | None = None
    criterion: str = "mone"
    scope: Scope = "layer"
    novice: NoviceKind = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_budget("Novices", self.ratio, self.keep, self.criterion, self.scope)
        if self.novice not in get_args(NoviceKind):
            raise ValueError(
                f"Novices: unknown novice {self.novice!r}: choose one of {', '.join(get_args(NoviceKind))}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion and the vectors need."""
        return criterion_named(self.criterion).needs | NOVICE_NEEDS[self.novice]

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Keep the best real experts; see :meth:`Method.propose`."""
        candidates = [layout.real for layout in shape.layouts]
        score = statistics.score(self.criterion, self.seed)
        kept = kept_experts(score, candidates, ratio=self.ratio, keep=self.keep, scope=self.scope)
        edits = []
        for layout, experts in zip(shape.layouts, kept, strict=True):
            replaced = tuple(expert for expert in layout.real if expert not in experts)
            if replaced:
                edits.append(NoviceExperts(layout.layer, replaced, self.novice))
        return tuple(edits)

    def fill(self, edit: Edit, statistics: Statistics) -> dict[str, Tensor]:
        """Return the novices' vectors; see :meth:`Method.fill`."""
        if not isinstance(edit, NoviceExperts):
            return {}
        return {"novices": novice_values(edit.novice, statistics, edit.layer, edit.experts)}
