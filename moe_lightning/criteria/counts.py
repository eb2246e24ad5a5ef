"""How many experts go in each layer: pure arithmetic on numbers of experts and on what the next one would cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

from moe_lightning.plan.formats import round_half_up

Scope = Literal["layer", "global", "sensitivity"]


def removed_in_layer(size: int, ratio: float | None, keep: float | None, original: int | None = None) -> int:
    """Return how many of a layer's experts go by a budget that holds in that layer.

    Args:
        size: Experts of the layer to choose from.
        ratio: Share to remove; None where ``keep`` is given.
        keep: Number to keep, not more than ``size``.
        original: Experts of the layer that ``ratio`` is a share of, where some are gone already; None for ``size``.
    """
    if original is not None:
        return max(0, size - (original - round_half_up((ratio or 0.0) * original)))
    return round_half_up((ratio or 0.0) * size if keep is None else size - keep)


def removed_in_all(sizes: Sequence[int], ratio: float | None, keep: float | None, original: int | None = None) -> int:
    """Return how many experts go in all layers together.

    Args:
        sizes: Experts of each layer to choose from.
        ratio: Share to remove; None where ``keep`` is given.
        keep: Mean number to keep over the layers.
        original: Experts of each layer that ``ratio`` is a share of, where some are gone already; None for ``sizes``.

    Raises:
        ValueError: More would be kept than there are.

    Source: 2406.02500, ``round((M - n) * L)``: the number that goes is what is rounded.
    """
    total = sum(sizes)
    if original is not None:
        whole = original * len(sizes)
        return max(0, total - (whole - round_half_up((ratio or 0.0) * whole)))
    removed = round_half_up((ratio or 0.0) * total if keep is None else total - (keep or 0) * len(sizes))
    if removed < 0:
        raise ValueError(f"keep={keep} is more than the mean of {total / len(sizes):g} experts a layer: keep fewer")
    return removed


def even_counts(removed: int, room: Sequence[int], next_cost: Callable[[int], Sequence[float]]) -> list[int]:
    """Spread removals over layers so that their numbers differ by at most one, except where a layer has no more room.

    Args:
        removed: Experts that go in all, at most the sum of ``room``.
        room: Experts of each layer that may go.
        next_cost: From a level to what it costs in each layer to let one expert go beyond that level; asked only where
            a level cannot be completed. The extra removals go where that is smallest, of equal ones to the first layer.

    Returns:
        Number of experts that go in each layer.
    """
    level = 0
    while sum(min(level + 1, space) for space in room) <= removed and level < max(room, default=0):
        level += 1
    counts = [min(level, space) for space in room]
    extra = removed - sum(counts)
    if extra:
        cost = next_cost(level)
        open_rows = sorted((cost[row], row) for row, space in enumerate(room) if space > level)
        for _, row in open_rows[:extra]:
            counts[row] += 1
    return counts


def cheapest_counts(
    costs: Sequence[Sequence[float]], removed: int, room: Sequence[int], ties: Sequence[Sequence[float]] | None = None
) -> list[int]:
    """Choose how many experts go in each layer so that the sum of their costs is the smallest possible.

    Args:
        costs: For each layer what each of its experts costs, ascending: the first ones go first.
        removed: Experts that go in all, at most the sum of ``room``.
        room: Experts of each layer that may go.
        ties: Numbers like ``costs`` that decide between layers where the costs are equal; then the first layer does.

    Returns:
        Number of experts that go in each layer. Costs ascend in a layer, so that each further removal costs as much
        as the one before or more, and taking the cheapest next one is exact.
    """
    ties = costs if ties is None else ties
    counts = [0] * len(costs)
    heap = [(costs[row][0], ties[row][0], row) for row, space in enumerate(room) if space > 0]
    heapq.heapify(heap)
    for _ in range(removed):
        _, _, row = heapq.heappop(heap)
        counts[row] += 1
        if counts[row] < room[row]:
            heapq.heappush(heap, (costs[row][counts[row]], ties[row][counts[row]], row))
    return counts
