"""From scores and a budget to the experts that stay."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moe_lightning.criteria.counts import (
    Scope,
    cheapest_counts,
    removed_in_all,
    removed_in_layer,
    round_half_up,
)


class Ranking(Protocol):
    """Who goes first in each layer."""

    def lowest(self, row: int, count: int) -> tuple[int, ...]:
        """Return the ``count`` experts of a layer that go, ascending by number."""

    def next_cost(self, level: int) -> list[float]:
        """Return what it costs in each layer to let one expert go beyond ``level``; infinite where there is none."""


class ScoreRanking:
    """Experts by their scores: the lowest go, of equal ones the first."""

    def __init__(self, score_LE: Tensor, candidates: Sequence[Sequence[int]], criterion: str = "score") -> None:
        """Sort the experts.

        Args:
            score_LE: Scores, ``[layers, experts]``, larger = keep.
            candidates: For each layer the experts to choose from.
            criterion: Its name, for messages.

        Raises:
            ValueError: A candidate's score is not a number.
        """
        self.sorted: list[list[tuple[float, int]]] = []
        for row, experts in enumerate(candidates):
            scored = [(float(score_LE[row, expert]), expert) for expert in experts]
            strange = [expert for score, expert in scored if not math.isfinite(score)]
            if strange:
                raise ValueError(
                    f"criterion {criterion!r} has no finite score for experts {strange} in row {row} of the "
                    "statistics: the model's outputs overflow on the calibration data, or (residual:RANK) there was "
                    "too little of it to hold some out: collect in float32, or on more or other text"
                )
            self.sorted.append(sorted(scored))

    @property
    def scores(self) -> list[list[float]]:
        """Scores of each layer's candidates, ascending."""
        return [[score for score, _ in row] for row in self.sorted]

    def lowest(self, row: int, count: int) -> tuple[int, ...]:
        """Return the experts that go; see :meth:`Ranking.lowest`."""
        return tuple(sorted(expert for _, expert in self.sorted[row][:count]))

    def next_cost(self, level: int) -> list[float]:
        """Return the score of the next expert of each layer; see :meth:`Ranking.next_cost`."""
        return [row[level][0] if level < len(row) else math.inf for row in self.sorted]

    def trial_count(self, row: int, count: int, room: int) -> int:
        """Return how many experts a trial of one layer lets go.

        At least one, and as many more as it takes for their scores to add up to something: the weight of a layer is
        measured per unit of removed score, and of dead experts nothing can be learned about the living.

        Args:
            row: The layer.
            count: Experts that the layer-wise budget lets go.
            room: Experts that may go.
        """
        scores = self.scores[row]
        count = min(max(count, 1), room)
        while count < room and sum(scores[:count]) <= 0:
            count += 1
        return count


def layer_weights(ranking: ScoreRanking, trial_counts: Sequence[int], divergences: Sequence[float]) -> list[float]:
    """Weigh layers by what trimming them alone did to the model: loss per unit of removed score.

    Args:
        ranking: The experts' order.
        trial_counts: Experts that each layer's trial let go.
        divergences: KL of the intact model to the one with only that layer trimmed, nats per token.

    Returns:
        One weight a layer, not negative. Zero where the removed scores do not add up to more than zero, or where
        trimming changed nothing.

    Raises:
        ValueError: A divergence is not finite.
    """
    weights = []
    for scores, count, divergence in zip(ranking.scores, trial_counts, divergences, strict=True):
        if not math.isfinite(divergence):
            raise ValueError(f"scope=sensitivity: the measured divergences {list(divergences)} are not finite")
        removed = sum(scores[:count])
        weights.append(min(max(divergence, 0.0) / removed, sys.float_info.max) if removed > 0 else 0.0)
    return weights


def counts_over_layers(
    ranking: ScoreRanking, removed: int, room: Sequence[int], weights: Sequence[float] | None = None
) -> list[int]:
    """Solve a budget that holds over all layers.

    Args:
        ranking: The experts' order.
        removed: Experts that go in all, at most the sum of ``room``.
        room: Experts of each layer that may go.
        weights: What a unit of score is worth in each layer, not negative; None takes raw scores.

    Returns:
        Experts that go in each layer: of all choices that respect ``room`` the one with the smallest weighted sum of
        scores. Of equal costs the lower score goes first, then the first layer.

    Source: 2406.02500 (raw scores, global); the weights are ours.
    """
    scores = ranking.scores
    weights = [1.0] * len(scores) if weights is None else weights
    costs = [[weight * score for score in row] for weight, row in zip(weights, scores, strict=True)]
    return cheapest_counts(costs, removed, room, ties=scores)


def kept_experts(
    score_LE: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    ratio: float | None = None,
    keep: float | None = None,
    scope: Scope = "layer",
    floor: int = 0,
    weights: Sequence[float] | None = None,
) -> list[tuple[int, ...]]:
    """Choose the experts that stay. Ties go by layer, then by expert: the same on all machines.

    Args:
        score_LE: Scores, ``[layers, experts]``, larger = keep.
        candidates: For each layer the experts to choose from.
        ratio: Share to remove, in [0, 1); counts round as ``floor(x + 0.5)``.
        keep: Number to keep a layer; under ``global`` and ``sensitivity`` the mean over layers.
        scope: ``layer`` holds the budget in each layer, ``global`` over all layers with raw scores, ``sensitivity``
            over all layers with scores times ``weights``.
        floor: Experts that every layer keeps at least.
        weights: One a layer, for ``sensitivity``.

    Returns:
        For each layer the experts that stay, ascending.

    Raises:
        ValueError: The floor and the budget exclude each other, or ``keep`` is more than there are.

    Source: 2406.02500 (layer-wise and global Expert Drop); the lowest scores go, of equal ones the first.
    """
    ranking = ScoreRanking(score_LE, candidates)
    sizes = [len(experts) for experts in candidates]
    room = [max(size - floor, 0) for size in sizes]
    if scope == "layer":
        counts = layer_counts(sizes, room, ratio, keep, floor)
    else:
        removed = removed_in_all(sizes, ratio, keep)
        check_room(sizes, room, removed, floor)
        counts = counts_over_layers(ranking, removed, room, weights if scope == "sensitivity" else None)
    return [
        tuple(sorted(set(experts) - set(ranking.lowest(row, count))))
        for row, (experts, count) in enumerate(zip(candidates, counts, strict=True))
    ]


def layer_counts(
    sizes: Sequence[int], room: Sequence[int], ratio: float | None, keep: float | None, floor: int
) -> list[int]:
    """Return how many experts go in each layer by a budget that holds in each.

    Raises:
        ValueError: A layer has fewer experts than ``keep``, or would keep fewer than the floor.
    """
    if keep is not None and any(keep > size for size in sizes):
        raise ValueError(f"keep={keep:g} is more than the {min(sizes)} experts of a layer: keep fewer")
    counts = [removed_in_layer(size, ratio, keep) for size in sizes]
    for size, space, count in zip(sizes, room, counts, strict=True):
        if count > space:
            raise ValueError(
                f"the budget keeps {size - count} of {size} experts in a layer but every layer must keep {floor}: "
                f"keep at least {floor}"
            )
    return counts


def check_room(sizes: Sequence[int], room: Sequence[int], removed: int, floor: int) -> None:
    """Check that a budget over all layers leaves every layer its floor.

    Raises:
        ValueError: It does not; the message says what would.
    """
    if removed > sum(room):
        raise ValueError(
            f"the budget keeps {sum(sizes) - removed} experts in {len(sizes)} layers but every layer must keep "
            f"{floor}: keep at least {sum(sizes) - sum(room)}"
        )


__all__ = [
    "Ranking",
    "Scope",
    "ScoreRanking",
    "check_room",
    "counts_over_layers",
    "kept_experts",
    "layer_counts",
    "layer_weights",
    "round_half_up",
]
