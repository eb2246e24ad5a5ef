"""Expert Drop: experts go, with their router rows or without."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from moe_lightning.criteria.counts import Scope
from moe_lightning.method import Method
from moe_lightning.plan import Edit, KeepExperts, ModelShape
from moe_lightning.schedules import RatioSchedule
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.trimming.budget import (
    Compatible,
    ExpertBudget,
    Of,
    Room,
    check_of,
    ratio_at_end,
    refuse_schedule,
)
from moe_lightning.trimming.whole_experts import WholeExperts, trial_options


@dataclass
class ExpertDrop(Method):
    """Delete the experts that score lowest.

    With ``router=slice`` their router rows go as well. On Mixtral, which lets the weights of the chosen experts add up
    to one, this equals masking their router logits with minus infinity; where a model does not, the surviving weights
    grow. With ``router=keep`` the router stays as it is, and a dropped expert contributes nothing.

    Give exactly one of ratio, keep, parameters and bytes.

    Attributes:
        ratio: Share of the experts to drop, in [0, 1); in fit also a schedule, {start: 0, end: 0.5, steps: 400,
            every: 100}, of those of the original model.
        keep: Experts to keep a layer; with scope=global and scope=sensitivity the mean over layers.
        parameters: Drop as few experts as leave the model at most this many parameters. In scope=layer the layers may
            then differ by one expert: the extra ones go where the next-lowest score is smallest.
        bytes: The same for the bytes of the parameters.
        criterion: How experts are scored. naee tries out all sets of a layer: what the layer loses with router=keep,
            which only resembles what it loses with router=slice, where tokens go to other experts; naee_dense runs all
            of those (up to 10 experts a layer).
        scope: layer holds the budget in each layer, global over all layers by raw scores, sensitivity over all layers
            by scores weighted with what trimming each layer alone does to the model.
        router: slice deletes the router rows of the dropped experts, keep leaves them.
        allow_fewer_than_top_k: Let layers keep fewer experts than the router picks; it then picks all of them.
        floor: Experts that every layer keeps at least; by default as many as the router picks, or one where fewer
            are allowed.
        compatible: uniform refuses what leaves layers with different numbers of experts, for engines that want them
            alike.
        seed: Seed of criterion=random.
        of: What ratio is a share of: the experts that are left, or those of the original model.

    Source: 2406.02500, Expert Drop. The released script keeps 6 of Mixtral's 8, scope global.
    """

    ratio: float | RatioSchedule | None = None
    keep: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    criterion: str = "soft_routing"
    scope: Scope = "layer"
    router: Literal["slice", "keep"] = "slice"
    allow_fewer_than_top_k: bool = False
    floor: int | None = None
    compatible: Compatible = "any"
    seed: int = 0
    of: Of = "left"

    def __post_init__(self) -> None:
        """Check the options."""
        self._budget()
        check_of("ExpertDrop", self.of, self.ratio)
        if self.router not in ("slice", "keep"):
            raise ValueError(f"ExpertDrop: unknown router {self.router!r}: choose slice or keep")
        if self.router == "keep" and "subsets" in criterion_named(self.criterion).needs:
            raise ValueError(
                f"ExpertDrop: criterion={self.criterion} is the error with the rows gone: set router=slice, or "
                "criterion=naee, which is exact for router=keep"
            )

    def _budget(self) -> ExpertBudget:
        return ExpertBudget(
            "ExpertDrop",
            ratio_at_end(self.ratio),
            self.keep,
            self.parameters,
            self.bytes,
            self.criterion,
            self.scope,
            self.compatible,
            self.floor,
            lowest_floor=1,
        )

    @property
    def schedule(self) -> RatioSchedule | None:
        """How the ratio grows in a run; None where it is one number."""
        return self.ratio if isinstance(self.ratio, RatioSchedule) else None

    def at_share(self, share: float) -> Self:
        """Return the method with a ratio in the place of its schedule; see :meth:`Method.at_share`."""
        return dataclasses.replace(self, ratio=share, of="original")

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion needs."""
        return criterion_named(self.criterion).needs

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the model is to be measured with each layer trimmed alone."""
        return self.scope == "sensitivity"

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Keep the best experts; see :meth:`Method.propose`."""
        return self._choice(shape, statistics).edits()

    def trial(self, shape: ModelShape, statistics: Statistics, layer: int) -> tuple[Edit, ...]:
        """Drop experts of one layer alone; see :meth:`Method.trial`."""
        return self._choice(shape, statistics).trial(layer)

    def _choice(self, shape: ModelShape, statistics: Statistics) -> WholeExperts:
        refuse_schedule("ExpertDrop", self.ratio)
        original = shape.num_experts if self.of == "original" else None
        candidates = [
            tuple(expert for expert in layout.router if expert not in layout.absent) for layout in shape.layouts
        ]

        def edits_of(removed: Sequence[tuple[int, ...]]) -> tuple[Edit, ...]:
            return tuple(
                self._edit(shape, layout.layer, tuple(expert for expert in experts if expert not in goers))
                for layout, experts, goers in zip(shape.layouts, candidates, removed, strict=True)
                if goers
            )

        room = self._room(shape, [len(experts) for experts in candidates])
        return WholeExperts(
            dataclasses.replace(self._budget(), original=original),
            self.seed,
            shape,
            statistics,
            candidates,
            room,
            edits_of,
            trial_options=trial_options(self.describe()),
        )

    def _edit(self, shape: ModelShape, layer: int, experts: tuple[int, ...]) -> KeepExperts:
        return KeepExperts(layer, experts, self.router, len(experts) < shape.top_k)

    def _room(self, shape: ModelShape, sizes: list[int]) -> Room:
        picks, floor = shape.top_k, self.floor
        if floor is not None and floor < picks and not self.allow_fewer_than_top_k:
            raise ValueError(
                f"ExpertDrop: floor={floor} but the router picks {picks}: set floor to at least {picks}, or "
                "allow_fewer_than_top_k=True"
            )
        if floor is None:
            floor = 1 if self.allow_fewer_than_top_k else picks
        # A layer that is below the floor already stays as it is.
        floors = [min(floor, size) for size in sizes]
        if self.floor is None and not self.allow_fewer_than_top_k:
            return Room(sizes, floors, f"the router picks {picks}", "set allow_fewer_than_top_k=True, or ")
        reason = f"floor={floor}" if self.floor is not None else "a layer keeps at least one"
        return Room(sizes, floors, reason, "lower the floor, or " if floor > 1 else "")
