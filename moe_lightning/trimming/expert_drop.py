"""Expert Drop: experts and their router rows go."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.criteria.selection import Scope, kept_counts, kept_experts
from moe_lightning.method import Method
from moe_lightning.plan import Edit, KeepExperts, ModelShape
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.trimming.budget import check_budget


@dataclass
class ExpertDrop(Method):
    """Delete the experts that score lowest, and their router rows.

    On Mixtral this equals masking their router logits with minus infinity. Every layer keeps at least as many experts
    as the router picks.

    Attributes:
        ratio: Share of the experts to drop, in [0, 1). Give this or keep.
        keep: Experts to keep a layer; with scope=global the mean over layers.
        criterion: How experts are scored.
        scope: layer holds the budget in each layer, global over all layers.
        seed: Seed of criterion=random.

    Source: 2406.02500, Expert Drop. The released script keeps 6 of Mixtral's 8, scope global.
    """

    ratio: float | None = None
    keep: float | None = None
    criterion: str = "soft_routing"
    scope: Scope = "layer"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_budget("ExpertDrop", self.ratio, self.keep, self.criterion, self.scope)

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion needs."""
        return criterion_named(self.criterion).needs

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Keep the best experts; see :meth:`Method.propose`."""
        candidates = [layout.router for layout in shape.layouts]
        counts, _ = kept_counts(candidates, self.ratio, self.keep, self.scope)
        for layout, count in zip(shape.layouts, counts, strict=True):
            if count < shape.top_k:
                each = f"layer {layout.layer}" if self.scope == "layer" else "a layer, on average,"
                raise ValueError(
                    f"ExpertDrop: {each} would keep {count} expert(s) but the router picks {shape.top_k}: "
                    f"set keep to at least {shape.top_k} or ratio to at most "
                    f"{1 - shape.top_k / len(layout.router):g}"
                )
        score = statistics.score(self.criterion, self.seed)
        kept = kept_experts(score, candidates, ratio=self.ratio, keep=self.keep, scope=self.scope, floor=shape.top_k)
        return tuple(
            KeepExperts(layout.layer, experts)
            for layout, experts in zip(shape.layouts, kept, strict=True)
            if experts != layout.router
        )
