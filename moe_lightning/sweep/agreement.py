"""How far criteria agree: on the order of the experts, and on who stays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_lightning.criteria.selection import ScoreRanking


def kendall_tau(one: Tensor, other: Tensor) -> float:
    """Return Kendall's rank correlation of two lists of scores, in the form for ties (tau-b).

    Args:
        one: Scores ``[n]``.
        other: Scores of the same experts ``[n]``.

    Returns:
        From -1 (reversed) to 1 (the same order); NaN where all scores of a list are equal.

    Source: Kendall (1945).

    >>> kendall_tau(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))
    0.3333333333333333
    """
    upper = torch.triu_indices(len(one), len(one), 1)
    first = (one[upper[0]] - one[upper[1]]).sign()
    second = (other[upper[0]] - other[upper[1]]).sign()
    norm = math.sqrt(float(first.abs().sum()) * float(second.abs().sum()))
    return float((first * second).sum()) / norm if norm else math.nan


def agreements(
    scores: Mapping[str, Tensor], candidates: Sequence[Sequence[int]], kept: Sequence[int]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Compare criteria pair by pair.

    Args:
        scores: ``[layers, experts]`` by criterion.
        candidates: Experts of each layer that are compared.
        kept: How many of them stay in each layer.

    Returns:
        For each pair the mean over the layers of Kendall's tau, and the share of the experts that both keep. NaN where
        no layer has anything to compare.
    """
    found = {}
    for one, other in itertools.combinations(scores, 2):
        taus, shares = [], []
        for row, (experts, count) in enumerate(zip(candidates, kept, strict=True)):
            tau = kendall_tau(scores[one][row, list(experts)], scores[other][row, list(experts)])
            taus += [] if math.isnan(tau) else [tau]
            if 0 < count < len(experts):
                sets = [_kept(scores[name], row, experts, count) for name in (one, other)]
                shares.append(len(sets[0] & sets[1]) / count)
        found[one, other] = (_mean(taus), _mean(shares))
    return found


def _kept(score_LE: Tensor, row: int, experts: Sequence[int], count: int) -> set[int]:
    ranking = ScoreRanking(score_LE[row : row + 1], [experts])
    return set(experts) - set(ranking.lowest(0, len(experts) - count))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
