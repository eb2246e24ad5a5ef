"""NAEE: every subset of a layer's experts is tried out, by arithmetic on sums of pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lightning.statistics import Statistics, register_criterion
from moe_lightning.statistics.subsets import subset_number

MOST_SUBSETS = 100_000
"""Subsets of one layer that are tried out at most."""

# Sums of the same numbers in another order differ in their last bits; errors as near as this are equal.
_EQUAL = 1e-12


@register_criterion("naee", {"routing", "outputs"}, "NAEE, 2402.14800: exhaustive subsets of a layer", selector=True)
def naee(statistics: Statistics, seed: int) -> Tensor:
    """Refuse: NAEE chooses whole sets of experts, and no expert has a score of its own.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "criterion 'naee' chooses whole sets of experts and gives no scores: use it in ExpertDrop or Novices with "
        "scope=layer, or compare the scores of another criterion"
    )


@register_criterion("naee_dense", {"subsets"}, "NAEE, 2402.14800: every subset run", selector=True)
def naee_dense(statistics: Statistics, seed: int) -> Tensor:
    """Refuse: NAEE chooses whole sets of experts, and no expert has a score of its own.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "criterion 'naee_dense' chooses whole sets of experts and gives no scores: use it in ExpertDrop with "
        "scope=layer and router=slice, or compare the scores of another criterion"
    )


def check_subsets(sizes: Sequence[int], counts: Sequence[int]) -> None:
    """Check that the subsets of every layer can be tried out.

    Args:
        sizes: Experts of each layer.
        counts: Experts of them that go.

    Raises:
        ValueError: A layer has more than 100 000 subsets.
    """
    for size, count in zip(sizes, counts, strict=True):
        number = math.comb(size, count)
        if number > MOST_SUBSETS:
            raise ValueError(
                f"criterion=naee tries out all subsets, and {count} of {size} experts are {number:,} of them, more "
                f"than {MOST_SUBSETS:,}: use another criterion, e.g. residual, or remove fewer experts"
            )


def pair_errors(statistics: Statistics, row: int, experts: Sequence[int], constants_CH: Tensor | None) -> Tensor:
    """Return how the errors of replaced experts add up, pair by pair.

    Args:
        statistics: What was measured: ``output_gram``; with constants ``gate_product_sum`` and ``pair_output_sum`` too.
        row: The layer's row.
        experts: C original numbers of experts.
        constants_CH: What stands for each expert, ``[C, hidden]``; None stands for zero.

    Returns:
        ``[C, C]`` with ``sum_t g_i g_j <E_i - v_i, E_j - v_j>``. Its sum over a set of experts is the squared error of
        the layer's output, summed over tokens, when the set is replaced and the router stays.

    Source: ours; the objective is that of 2402.14800.
    """
    numbers = torch.tensor(experts, dtype=torch.long)
    rows, columns = numbers[:, None], numbers[None, :]
    gram_CC = statistics["output_gram"][row, rows, columns]
    if constants_CH is None:
        return gram_CC
    gates_CC = statistics["gate_product_sum"][row, rows, columns]
    # Entry (i, j) of the sums is sum g_i g_j E_i; crossed (i, j) is its inner product with the constant of j.
    crossed_CC = (statistics["pair_output_sum"][row, rows, columns] * constants_CH[None, :, :]).sum(-1)
    return gram_CC - crossed_CC - crossed_CC.T + gates_CC * (constants_CH @ constants_CH.T)


def best_subset(errors_CC: Tensor, count: int) -> tuple[tuple[int, ...], float]:
    """Find the set of experts whose replacement costs least.

    Args:
        errors_CC: From :func:`pair_errors`.
        count: Size of the set.

    Returns:
        Places of the experts in it, ascending, and its error. Of equal sets the first in the order of their places.

    Raises:
        ValueError: The errors are not finite.

    Source: 2402.14800, which runs the layer once for each subset; the sums of pairs give the same numbers.
    """
    size = errors_CC.shape[0]
    if not bool(torch.isfinite(errors_CC).all()):
        raise ValueError(
            "criterion=naee: the sums of the experts' outputs are not finite: collect in float32 or on other text"
        )
    subsets = torch.tensor(list(itertools.combinations(range(size), count)), dtype=torch.long)
    members = torch.zeros(len(subsets), size, dtype=torch.float64).scatter_(1, subsets, 1.0)
    error = ((members @ errors_CC) * members).sum(1)
    near = error.min() + _EQUAL * errors_CC.abs().sum()
    best = int((error <= near).nonzero()[0])
    return tuple(subsets[best].tolist()), float(error[best])


class SubsetRanking:
    """Sets of experts by the error of the layer's output; see :class:`moe_lightning.criteria.selection.Ranking`."""

    def __init__(self, errors: Sequence[Tensor], candidates: Sequence[Sequence[int]]) -> None:
        """Keep what the sets are made of.

        Args:
            errors: For each layer :func:`pair_errors` of its candidates.
            candidates: For each layer the experts to choose from.
        """
        self._errors = list(errors)
        self._candidates = [tuple(experts) for experts in candidates]

    def lowest(self, row: int, count: int) -> tuple[int, ...]:
        """Return the set of a size whose replacement costs least.

        Raises:
            ValueError: There are too many sets of that size.
        """
        return tuple(self._candidates[row][place] for place in self._best(row, count)[0])

    def next_cost(self, level: int) -> list[float]:
        """Return by how much the error of the best set grows from ``level`` experts to one more."""
        return [
            self._best(row, level + 1)[1] - self._best(row, level)[1] if level < len(experts) else math.inf
            for row, experts in enumerate(self._candidates)
        ]

    def _best(self, row: int, count: int) -> tuple[tuple[int, ...], float]:
        check_subsets([len(self._candidates[row])], [count])
        return best_subset(self._errors[row], count)


class DenseRanking:
    """Sets of experts by the measured error of the layer's output with the router choosing among the others."""

    def __init__(self, errors_LS: Tensor, candidates: Sequence[Sequence[int]]) -> None:
        """Keep the errors.

        Args:
            errors_LS: ``subset_error`` of the statistics.
            candidates: For each layer the experts to choose from.
        """
        self._errors = errors_LS.tolist()
        self._candidates = [tuple(experts) for experts in candidates]

    def lowest(self, row: int, count: int) -> tuple[int, ...]:
        """Return the set of a size whose deletion costs least; of equal ones the first."""
        return self._best(row, count)[0]

    def next_cost(self, level: int) -> list[float]:
        """Return by how much the error of the best set grows from ``level`` experts to one more."""
        return [
            self._best(row, level + 1)[1] - self._best(row, level)[1] if level + 1 < len(experts) else math.inf
            for row, experts in enumerate(self._candidates)
        ]

    def _best(self, row: int, count: int) -> tuple[tuple[int, ...], float]:
        experts = self._candidates[row]
        best: tuple[tuple[int, ...], float] | None = None
        for removed in itertools.combinations(experts, count):
            stays = tuple(expert for expert in experts if expert not in removed)
            error = self._errors[row][subset_number(stays)]
            if best is None or error < best[1]:
                best = (removed, error)
        assert best is not None
        return best
