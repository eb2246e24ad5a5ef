"""Which weights of a matrix stay: exactly so many, ties by index.

Legend: S matrices, O outputs (rows), I inputs (columns), C candidates of one choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.plan.formats import MaskScope, Pattern, WeightFormat, round_half_up


@dataclass(frozen=True)
class Selection:
    """How many weights become zero, and among which they are chosen.

    Attributes:
        sparsity: Share of zeros, in ``[0, 1)``; None with a pattern.
        pattern: n zeros in m neighbours along the input; None with a sparsity.
        scope: Without a pattern, the weights compete within an output row, or within the whole matrix.
    """

    sparsity: float | None = None
    pattern: Pattern | None = None
    scope: MaskScope = "row"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(f"give either sparsity or pattern, got sparsity={self.sparsity}, pattern={self.pattern}")
        if isinstance(self.pattern, int):
            raise ValueError(f"pattern is the number {self.pattern}: put quotes around it, YAML reads 2:4 as 124")
        self.check_columns(8)  # which every pattern divides

    @property
    def counts(self) -> tuple[int, int] | None:
        """Zeros and size of a group of neighbours, or None without a pattern."""
        if self.pattern is None:
            return None
        zeros, size = self.pattern.split(":")
        return int(zeros), int(size)

    def check_columns(self, columns: int) -> None:
        """Raise where rows of this length cannot be cut into the pattern's groups."""
        WeightFormat(sparsity=self.sparsity, pattern=self.pattern, scope=self.scope).check(1, columns)


def keep_largest(score_XC: Tensor, keep: int | Tensor) -> Tensor:
    """Mark the largest scores along the last dimension; of equal ones those with the lower index.

    Args:
        score_XC: Finite scores, ``[..., C]``.
        keep: How many, in ``[0, C]``; the same everywhere, or int64 ``[...]``.

    Returns:
        Bool ``[..., C]`` with exactly ``keep`` true in each row.

    Cost: a partial sort, and no index of 8 bytes for every weight; a whole sort where the numbers differ.
    """
    count = score_XC.shape[-1]
    if isinstance(keep, Tensor):
        keep = keep[..., None]
        threshold = score_XC.sort(dim=-1).values.gather(-1, (count - keep).clamp(max=count - 1))
    elif keep <= 0 or keep >= count:
        return torch.full_like(score_XC, keep > 0, dtype=torch.bool)
    else:
        threshold = score_XC.kthvalue(count - keep + 1, dim=-1, keepdim=True).values
    above = score_XC > threshold
    level = score_XC == threshold
    room = keep - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


def keep_in_groups(score_SOI: Tensor, zeros: int, size: int) -> Tensor:
    """Mark in every group of neighbours along the input all but a number of the smallest.

    Args:
        score_SOI: Finite scores; I divisible by ``size``.
        zeros: Smallest ones of each group that go.
        size: Neighbours in a group.

    Returns:
        Bool ``[S, O, I]``.
    """
    groups = score_SOI.unflatten(-1, (-1, size))
    # How many of its group stand before each: a few comparisons are faster than very many sorts of four numbers.
    place = torch.arange(size, device=score_SOI.device)
    rank = torch.zeros_like(groups, dtype=torch.int8)
    for other in range(size):
        rival = groups[..., other : other + 1]
        rank += (rival > groups) | ((rival == groups) & (other < place))
    return (rank < size - zeros).flatten(-2)


def lowest_where_gone(score_SOI: Tensor, old_keep_SOI: Tensor | None) -> Tensor:
    """Put weights that are gone already below all others, so that they go first and masks are nested.

    Args:
        score_SOI: Finite scores.
        old_keep_SOI: False where a weight is gone; None where there was no mask.
    """
    if old_keep_SOI is None:
        return score_SOI
    check_mask(score_SOI, old_keep_SOI)
    return score_SOI.masked_fill(~old_keep_SOI, -torch.finfo(score_SOI.dtype).max)


def check_mask(weight_SOI: Tensor, keep_SOI: Tensor | None) -> None:
    """Raise unless a mask fits the weights."""
    if keep_SOI is not None and (keep_SOI.shape != weight_SOI.shape or keep_SOI.dtype != torch.bool):
        raise ValueError(
            f"keep {tuple(keep_SOI.shape)} {keep_SOI.dtype} does not fit weights {tuple(weight_SOI.shape)}: "
            "expected a bool for each"
        )


def keep_mask(score_SOI: Tensor, selection: Selection) -> Tensor:
    """Choose the weights that stay: those with the largest scores.

    Args:
        score_SOI: Scores, larger = keep.
        selection: How many, and among which.

    Returns:
        Bool ``[S, O, I]``; exactly ``n`` of ``m`` false with a pattern, else exactly ``round(sparsity * I)`` of every
        row, or ``round(sparsity * O * I)`` of every matrix.

    Raises:
        ValueError: A score is not finite, or the pattern does not divide the input size.

    Source: 2104.08378 for n:m; a comparison within rows rather than matrices: 2306.11695, section 3.
    """
    outputs, columns = score_SOI.shape[-2:]
    selection.check_columns(columns)
    if not bool(score_SOI.isfinite().all()):
        raise ValueError("scores of weights are not finite: look for NaN or infinity in the weights and statistics")
    if selection.counts is not None:
        return keep_in_groups(score_SOI, *selection.counts)
    assert selection.sparsity is not None
    if selection.scope == "row":
        return keep_largest(score_SOI, columns - round_half_up(selection.sparsity * columns))
    size = outputs * columns
    kept = keep_largest(score_SOI.flatten(-2), size - round_half_up(selection.sparsity * size))
    return kept.unflatten(-1, (outputs, columns))
