"""The options that all methods for whole experts share, and the numbers of experts that they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lightning.criteria.counts import Scope, even_counts, removed_in_all, removed_in_layer
from moe_lightning.criteria.selection import ScoreRanking, counts_over_layers
from moe_lightning.plan import CompressionPlan, Edit, ModelShape
from moe_lightning.schedules import RatioSchedule
from moe_lightning.statistics import criterion_named

Compatible = Literal["any", "uniform"]

EditsOf = Callable[[Sequence[int]], Sequence[Edit]]
"""From the number of experts that go in each layer to the edits."""

NextCost = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class Room:
    """What a budget has to choose from.

    Attributes:
        sizes: For each MoE layer how many experts there are to choose from.
        floors: How many of them each layer keeps at least.
        reason: Why it does, for messages.
        advice: How to keep fewer, for messages; empty where there is no way.
    """

    sizes: Sequence[int]
    floors: Sequence[int]
    reason: str
    advice: str = ""

    @property
    def removable(self) -> list[int]:
        """How many may go in each layer."""
        return [max(size - floor, 0) for size, floor in zip(self.sizes, self.floors, strict=True)]


@dataclass(frozen=True)
class ExpertBudget:
    """How many experts go, and where the number holds: exactly one of the first four.

    Attributes:
        owner: Name of the method, for messages.
        ratio: Share to remove, in [0, 1); counts round as ``floor(x + 0.5)``.
        keep: Experts to keep a layer; under scopes over all layers the mean.
        parameters: Parameters that the model has at most afterwards; as few experts as possible go.
        bytes: Bytes that they take at most afterwards.
        criterion: Name of the criterion.
        scope: Where the budget holds.
        compatible: ``uniform`` refuses what would leave layers with different numbers of experts.
        floor: Experts that every layer keeps at least; None leaves it to the method.
        lowest_floor: Smallest floor that the method can do.
        original: Experts of a layer of the original model, where ``ratio`` is a share of those; None where it is one
            of those that are left.
    """

    owner: str
    ratio: float | None
    keep: float | None
    parameters: int | None
    bytes: int | None
    criterion: str
    scope: Scope
    compatible: Compatible
    floor: int | None
    lowest_floor: int = 0
    original: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: None or several budgets, one out of range, an unknown name, or options that exclude each other;
                the message names the option.
        """
        self._check_amounts()
        for name, value, known in (
            ("scope", self.scope, get_args(Scope)),
            ("compatible", self.compatible, get_args(Compatible)),
        ):
            if value not in known:
                raise ValueError(f"{self.owner}: unknown {name} {value!r}: choose one of {', '.join(known)}")
        self._check_floor()
        try:
            selector = criterion_named(self.criterion).selector
        except ValueError as error:
            raise ValueError(f"{self.owner}: {error}") from None
        if selector and self.scope != "layer":
            raise ValueError(
                f"{self.owner}: criterion={self.criterion} chooses whole sets of one layer's experts: set scope=layer, "
                f"got scope={self.scope}"
            )
        if self.compatible == "uniform" and self.scope != "layer":
            raise ValueError(
                f"{self.owner}: compatible=uniform wants as many experts in every layer, and scope={self.scope} "
                "spreads them unevenly: set scope=layer, or compatible=any"
            )

    def _check_amounts(self) -> None:
        options = {name: getattr(self, name) for name in ("ratio", "keep", "parameters", "bytes")}
        given = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
        if sum(value is not None for value in options.values()) != 1:
            raise ValueError(
                f"{self.owner} needs exactly one of ratio, keep, parameters and bytes, got {given or 'none of them'}"
            )
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            raise ValueError(
                f"{self.owner}: ratio must lie in [0, 1), got {self.ratio}: 0.25 removes a quarter of the experts"
            )
        if self.keep is not None and not 0 <= self.keep < math.inf:
            raise ValueError(f"{self.owner}: keep must not be negative and must be a number, got {self.keep}")
        if self.keep is not None and self.scope == "layer" and self.keep != int(self.keep):
            raise ValueError(f"{self.owner}: keep must be a whole number with scope=layer, got {self.keep}")
        for name in ("parameters", "bytes"):
            value = options[name]
            if value is not None and (isinstance(value, bool) or value != int(value) or value <= 0):
                raise ValueError(
                    f"{self.owner}: {name} must be a whole number above 0, what the model may have, got {value}"
                )

    def _check_floor(self) -> None:
        floor = self.floor
        if floor is None:
            return
        if isinstance(floor, bool) or floor != int(floor) or floor < self.lowest_floor:
            raise ValueError(
                f"{self.owner}: floor must be a whole number of experts, at least {self.lowest_floor}, got {floor}"
            )
        if self.keep is not None and self.keep < floor:
            raise ValueError(f"{self.owner}: keep={self.keep:g} is below floor={floor}: keep more, or lower the floor")

    @property
    def target(self) -> tuple[str, int] | None:
        """Name and value of the size to reach; None where the budget is a number of experts."""
        name = "parameters" if self.parameters is not None else "bytes"
        value = getattr(self, name)
        return None if value is None else (name, int(value))

    def removed_in_layer(self, size: int) -> int:
        """Return how many of a layer's experts go where the budget is a ratio or a number."""
        return removed_in_layer(size, self.ratio, self.keep, self.original)

    def layer_counts(self, shape: ModelShape, room: Room, edits_of: EditsOf, next_cost: NextCost) -> list[int]:
        """Solve the budget layer by layer.

        Args:
            shape: Shape of the model.
            room: What there is to choose from.
            edits_of: The edits that given numbers of removals lead to.
            next_cost: What one more removal beyond a level costs in each layer; asked for one level at most.

        Returns:
            How many experts go in each layer. For a target they may differ by one between layers: the extra ones go
            where the next expert costs least.

        Raises:
            ValueError: The budget leaves a layer fewer than its floor, or the target is out of reach.
        """
        removable = room.removable
        if self.target is None:
            if self.keep is not None and any(self.keep > size for size in room.sizes):
                raise ValueError(
                    f"{self.owner}: keep={self.keep:g} is more than the {min(room.sizes)} experts of a layer: "
                    "keep fewer"
                )
            counts = [self.removed_in_layer(size) for size in room.sizes]
            self._check_floors(shape, room, counts)
            return counts
        self._check_reach(shape, room, edits_of)
        level = _fewest(
            max(removable), lambda level: self._fits(shape, edits_of([min(level, space) for space in removable]))
        )
        if level == 0:
            return [0] * len(removable)
        below = sum(min(level - 1, space) for space in removable)
        extra = _fewest(
            sum(min(level, space) for space in removable) - below,
            lambda extra: self._fits(shape, edits_of(even_counts(below + extra, removable, next_cost))),
        )
        return even_counts(below + extra, removable, next_cost)

    def counts_over_layers(
        self, shape: ModelShape, room: Room, edits_of: EditsOf, ranking: ScoreRanking, weights: Sequence[float] | None
    ) -> list[int]:
        """Solve the budget over all layers.

        Args:
            shape: Shape of the model.
            room: What there is to choose from.
            edits_of: The edits that given numbers of removals lead to.
            ranking: The experts' order.
            weights: Worth of a unit of score in each layer; None takes raw scores.

        Returns:
            How many experts go in each layer.

        Raises:
            ValueError: The budget leaves layers fewer than their floors, or the target is out of reach.
        """
        removable = room.removable
        if self.target is None:
            try:
                removed = removed_in_all(room.sizes, self.ratio, self.keep, self.original)
            except ValueError as error:
                raise ValueError(f"{self.owner}: {error}") from None
            if removed > sum(removable):
                total, layers = sum(room.sizes), len(room.sizes)
                least = (total - sum(removable)) / layers
                raise ValueError(
                    f"{self.owner}: a layer, on average, would keep {(total - removed) / layers:g} expert(s) but "
                    f"{room.reason}: {room.advice}{self._limits(least, sum(removable) / total)}"
                )
            return counts_over_layers(ranking, removed, removable, weights)
        self._check_reach(shape, room, edits_of)
        removed = _fewest(
            sum(removable),
            lambda removed: self._fits(shape, edits_of(counts_over_layers(ranking, removed, removable, weights))),
        )
        return counts_over_layers(ranking, removed, removable, weights)

    def check_uniform(self, before: ModelShape, edits: Sequence[Edit], kept: Sequence[int]) -> None:
        """Refuse uneven layers where ``compatible`` says so.

        Args:
            before: Shape of the model.
            edits: What was decided.
            kept: How many of the experts to choose from each layer keeps.

        Raises:
            ValueError: The layers would differ; the message says what would not.
        """
        layers = CompressionPlan(tuple(edits)).check(before).layouts
        if self.compatible == "any" or len({layout.same_for_all() for layout in layers}) < 2:
            return
        alike = len({layout.same_for_all() for layout in before.layouts}) < 2
        advice = f"set keep={min(kept)}" if alike else "start from a model whose layers are alike"
        numbers = ", ".join(f"layer {layout.layer}: {len(layout.real)} of {len(layout.router)}" for layout in layers)
        raise ValueError(
            f"{self.owner}: compatible=uniform wants as many experts in every layer, but these real experts and router "
            f"rows would be left: {numbers}; {advice}, or compatible=any"
        )

    def _check_floors(self, shape: ModelShape, room: Room, counts: Sequence[int]) -> None:
        for row, (size, floor, count) in enumerate(zip(room.sizes, room.floors, counts, strict=True)):
            if size - count < floor:
                most = min(space / size for space, size in zip(room.removable, room.sizes, strict=True) if size)
                raise ValueError(
                    f"{self.owner}: layer {shape.layouts[row].layer} would keep {size - count} expert(s) but "
                    f"{room.reason}: {room.advice}{self._limits(max(room.floors), most)}"
                )

    def _limits(self, least: float, most: float) -> str:
        """Return advice: the smallest number to keep in a layer, or the largest share of those left to remove."""
        if self.original is None:
            return f"set keep to at least {least:g} or ratio to at most {most:g}"
        # The ratio is a share of the original's experts, and keep does not go with that.
        return f"set ratio to at most {(self.original - least) / self.original:g}"

    def _fits(self, shape: ModelShape, edits: Sequence[Edit]) -> bool:
        name, target = self.target or ("parameters", 0)
        return bool(getattr(CompressionPlan(tuple(edits)).check(shape), name) <= target)

    def _check_reach(self, shape: ModelShape, room: Room, edits_of: EditsOf) -> None:
        name, target = self.target or ("parameters", 0)
        smallest = getattr(CompressionPlan(tuple(edits_of(room.removable))).check(shape), name)
        if smallest > target:
            raise ValueError(
                f"{self.owner}: {name}={target:,} is out of reach: with all experts gone that may go ({room.reason}) "
                f"the model still has {smallest:,}: {room.advice}set {name} to at least {smallest}"
            )


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the smallest number from 0 to ``most`` that fits, by bisection; ``most`` fits and all above one that does.

    A removal never makes a model larger, so sizes fall with the number removed.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


Of = Literal["left", "original"]
"""What a ratio is a share of: the experts that are left, or those of the original model."""


def ratio_at_end(ratio: float | RatioSchedule | None) -> float | None:
    """Return a ratio as a number: of a schedule its end."""
    return ratio.end if isinstance(ratio, RatioSchedule) else ratio


def check_of(owner: str, of: str, ratio: float | RatioSchedule | None) -> None:
    """Check what a ratio is a share of.

    Raises:
        ValueError: Another word, or there is no ratio that it would be about.
    """
    if of not in get_args(Of):
        raise ValueError(f"{owner}: unknown of={of!r}: choose one of {', '.join(get_args(Of))}")
    if of == "original" and ratio is None:
        raise ValueError(f"{owner}: of=original says what ratio is a share of: set ratio, or leave of out")


def refuse_schedule(owner: str, ratio: float | RatioSchedule | None) -> None:
    """Raise ValueError for a schedule where there is no training run that could follow it."""
    if isinstance(ratio, RatioSchedule):
        raise ValueError(
            f"{owner}: ratio is a schedule, which takes a training run to follow: give the method to the callback "
            f"Compress in fit, or a number here, e.g. ratio={ratio.end}"
        )
