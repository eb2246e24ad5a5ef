"""Fewer non-zero weights: magnitude, Wanda, SparseGPT.

Legend: S matrices, O outputs, I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.plan.formats import round_half_up
from moe_lightning.slimming.hessian import (
    DAMPING,
    check_hessian,
    check_stack,
    feed_errors_back,
    inverse_factor,
    joined,
    portions,
    work_type,
)
from moe_lightning.slimming.masks import (
    Selection,
    check_mask,
    keep_in_groups,
    keep_largest,
    keep_mask,
    lowest_where_gone,
)

BLOCK = 128
"""Columns among which SparseGPT chooses where there is no pattern; a multiple of every n:m group."""


class Pruned(NamedTuple):
    """What is left of a stack of matrices.

    Attributes:
        weight: ``[S, O, I]`` in the type of the weights given, zero where ``keep`` is false.
        keep: Bool ``[S, O, I]``.
        status: What was done to each matrix, S entries.
    """

    weight: Tensor
    keep: Tensor
    status: tuple[str, ...]


def _masked(weight_SOI: Tensor, keep_SOI: Tensor, old_keep_SOI: Tensor | None, status: tuple[str, ...]) -> Pruned:
    # Where more are gone than are to go, some of them count as kept: they stay zero even so.
    live_SOI = keep_SOI if old_keep_SOI is None else keep_SOI & old_keep_SOI
    return Pruned(weight_SOI.masked_fill(~live_SOI, 0), keep_SOI, status)


def prune_by_magnitude(weight_SOI: Tensor, selection: Selection, keep_SOI: Tensor | None = None) -> Pruned:
    """Zero the weights of smallest magnitude: the score is ``|w|``.

    Args:
        weight_SOI: Weights.
        selection: How many, and among which.
        keep_SOI: False for weights that are gone already; they go first and stay zero.

    Source: 1506.02626. The released code of 2406.02500 keeps the smallest and zeroes the largest; this does not.
    """
    check_stack(weight_SOI)
    score_SOI = lowest_where_gone(weight_SOI.to(work_type(weight_SOI)).abs(), keep_SOI)
    return _masked(weight_SOI, keep_mask(score_SOI, selection), keep_SOI, ("magnitude",) * len(weight_SOI))


def wanda_score(weight_SOI: Tensor, norm_SI: Tensor) -> Tensor:
    """Return ``|W_ij| ||X_j||``, and below zero where that is zero, in the order of the magnitudes.

    A matrix that no token reached is so pruned by magnitude, and inputs that no token used go first, the small ones
    before the large ones, instead of all by index.

    Args:
        weight_SOI: Weights, finite.
        norm_SI: ``||X_j||``, at least 0.

    Returns:
        ``[S, O, I]`` in fp32 or float64.
    """
    size_SOI = weight_SOI.to(work_type(weight_SOI)).abs()
    # In units of the largest norm: how many tokens there were must not lead out of fp32's range.
    largest_S1 = norm_SI.amax(1, keepdim=True)
    unit_SI = (norm_SI / torch.where(largest_S1 > 0, largest_S1, 1.0)).to(size_SOI.dtype)
    score_SOI = size_SOI * unit_SI[:, None, :]
    return torch.where(score_SOI > 0, score_SOI, size_SOI - size_SOI.amax((1, 2), keepdim=True) - 1)


def _by_norm(
    weight_SOI: Tensor, norm_SI: Tensor, selection: Selection, old_keep_SOI: Tensor | None, name: str
) -> Pruned:
    check_stack(weight_SOI)
    slots, _, columns = weight_SOI.shape
    if tuple(norm_SI.shape) != (slots, columns):
        raise ValueError(f"{name}: norms {tuple(norm_SI.shape)} do not fit weights {tuple(weight_SOI.shape)}")
    if not bool((norm_SI.isfinite() & (norm_SI >= 0)).all()):
        raise ValueError(f"{name}: norms of inputs must be finite and at least 0: give ||X_j||, not its square's sum")
    keep_SOI = keep_mask(lowest_where_gone(wanda_score(weight_SOI, norm_SI), old_keep_SOI), selection)
    empty = (norm_SI <= 0).all(1).tolist()
    status = tuple("magnitude fallback: no input reached it" if none else name for none in empty)
    return _masked(weight_SOI, keep_SOI, old_keep_SOI, status)


def prune_by_wanda(weight_SOI: Tensor, norm_SI: Tensor, selection: Selection, keep_SOI: Tensor | None = None) -> Pruned:
    """Zero the weights with the smallest ``|W_ij| ||X_j||``; nothing makes up for them.

    Args:
        weight_SOI: Weights.
        norm_SI: ``||X_j|| = sqrt(sum x_j^2)`` over the tokens that reach each matrix.
        selection: How many, and among which; the paper compares within a row.
        keep_SOI: False for weights that are gone already; they go first and stay zero.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2306.11695, equation 1.
    """
    return _by_norm(weight_SOI, norm_SI, selection, keep_SOI, "wanda")


def prune_by_router_wanda(
    weight_SOI: Tensor, gated_norm_SI: Tensor, selection: Selection, keep_SOI: Tensor | None = None
) -> Pruned:
    """Zero the weights with the smallest ``|W_ij| ||g X_j||``: tokens count by their routing weight.

    Args:
        weight_SOI: Weights.
        gated_norm_SI: ``sqrt(sum (g x_j)^2)`` over the tokens that reach each matrix.
        selection: How many, and among which.
        keep_SOI: False for weights that are gone already; they go first and stay zero.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2410.12013 (MoE-Pruner), section 3.2.
    """
    return _by_norm(weight_SOI, gated_norm_SI, selection, keep_SOI, "router wanda")


class _Shares:
    """Says which weights of a block of columns stay, so that the counts of all blocks together are exact.

    Every block has its share of the zeros. Those that are there already take up of it, and where a block holds more of
    them than its share the others get fewer.
    """

    def __init__(self, selection: Selection, keep_SOI: Tensor | None, outputs: int, columns: int) -> None:
        assert selection.sparsity is not None
        self.sparsity = selection.sparsity
        self.by_row = selection.scope == "row"
        # Weights of a column that compete, and of a line: a row, or a whole matrix.
        self.each = 1 if self.by_row else outputs
        self.columns = columns
        self.gone_SOI = None if keep_SOI is None else ~keep_SOI
        self.done: Tensor | None = None

    def _zeros_before(self, column: int) -> int:
        return round_half_up(self.sparsity * self.each * column)

    def _gone(self, first: int, last: int) -> Tensor:
        assert self.gone_SOI is not None
        return self.gone_SOI[:, :, first:last].sum(-1 if self.by_row else (1, 2))

    def _zeros(self, first: int, last: int) -> int | Tensor:
        share = self._zeros_before(last)
        if self.gone_SOI is None:
            return share - self._zeros_before(first)
        here, later = self._gone(first, last), self._gone(last, self.columns)
        done = torch.zeros_like(here) if self.done is None else self.done
        left = self._zeros_before(self.columns) - done
        wanted = torch.maximum(torch.minimum(share - done, left - later), here)
        # What the other blocks can take at most, and what there is to give.
        least = (left - self.each * (self.columns - last)).clamp(min=0)
        zeros = torch.maximum(torch.minimum(wanted, left.clamp(max=self.each * (last - first))), least)
        self.done = done + zeros
        return zeros

    def keep(self, cost_SOX: Tensor, first: int) -> Tensor:
        """Choose in the next block, which begins at column ``first``."""
        outputs, width = cost_SOX.shape[1:]
        keep = self.each * width - self._zeros(first, first + width)
        if self.by_row:
            return keep_largest(cost_SOX, keep)
        return keep_largest(cost_SOX.flatten(1), keep).unflatten(1, (outputs, width))


def prune_by_sparse_gpt(
    weight_SOI: Tensor,
    hessian_SII: Tensor,
    selection: Selection,
    keep_SOI: Tensor | None = None,
    *,
    damping: float = DAMPING,
    tokens: Tensor | None = None,
    block: int = BLOCK,
    at_once: int | None = None,
) -> Pruned:
    """Zero the weights that cost least, and let those that are still free make up for them.

    Columns go one after another. The cost of a weight is that of optimal brain surgery on the columns from its own on,
    ``w^2 / [H^-1]_jj = w^2 / U_jj^2``. With a pattern, each group of neighbours is chosen from as the columns before it
    left it; else each block of columns, which has its own share of the zeros.

    Args:
        weight_SOI: Weights.
        hessian_SII: ``sum x x^T`` over the tokens that reach each matrix; zero and rank one are fine.
        selection: How many, and among which; scope ``matrix`` compares all rows of a block, as released.
        keep_SOI: False for weights that are gone already; they go first and stay zero.
        damping: Share of the mean of H's diagonal that is added to it at least; grows tenfold until H can be inverted.
        tokens: Tokens that each H is the sum over, ``[S]``; then few of them are damped more.
        block: Columns that are chosen from together; with a pattern it makes no difference.
        at_once: Matrices to work on at once; None for what is fastest for their size.

    Returns:
        What is left; a matrix without a Hessian is pruned by magnitude, block by block, and its status says so.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2301.00774, algorithm 1.
    Cost: ``S (O I^2 + 2/3 I^3)`` multiply-adds; memory for 2 more Hessians and 3 copies of the weights in fp32.
    """
    check_stack(weight_SOI)
    check_hessian(weight_SOI, hessian_SII)
    columns = weight_SOI.shape[2]
    selection.check_columns(columns)
    if block < 1 or block % 8:
        raise ValueError(f"block must be a positive multiple of 8, got {block}: the default is {BLOCK}")
    check_mask(weight_SOI, keep_SOI)
    parts = [
        _sparse_gpt(
            weight_SOI[part],
            hessian_SII[part],
            selection,
            None if keep_SOI is None else keep_SOI[part],
            damping,
            None if tokens is None else tokens[part],
            block,
        )
        for part in portions(weight_SOI, at_once)
    ]
    return Pruned(
        joined([part.weight for part in parts]),
        joined([part.keep for part in parts]),
        tuple(status for part in parts for status in part.status),
    )


def _sparse_gpt(
    weight_SOI: Tensor,
    hessian_SII: Tensor,
    selection: Selection,
    old_keep_SOI: Tensor | None,
    damping: float,
    tokens_S: Tensor | None,
    block: int,
) -> Pruned:
    _, outputs, columns = weight_SOI.shape
    dtype = work_type(weight_SOI)
    inverse = inverse_factor(hessian_SII, damping=damping, tokens_S=tokens_S, dtype=dtype)
    spread_SI = inverse.factor.diagonal(dim1=-2, dim2=-1).clone()
    weight_SIO = weight_SOI.to(dtype).mT.clone(memory_format=torch.contiguous_format)
    keep_SIO = torch.empty_like(weight_SIO, dtype=torch.bool)
    old_keep_SIO = None if old_keep_SOI is None else old_keep_SOI.mT.contiguous()
    width = block if selection.counts is None else selection.counts[1]
    shares = None if selection.counts is not None else _Shares(selection, old_keep_SOI, outputs, columns)

    def compress(column: int) -> Tensor:
        if column % width == 0:
            end = min(column + width, columns)
            cost_SXO = (weight_SIO[:, column:end] / spread_SI[:, column:end, None]).square()
            old_SOX = None if old_keep_SIO is None else old_keep_SIO[:, column:end].mT
            cost_SOX = lowest_where_gone(cost_SXO.mT, old_SOX)
            if shares is not None:
                keep_SOX = shares.keep(cost_SOX, column)
            else:
                assert selection.counts is not None
                keep_SOX = keep_in_groups(cost_SOX, *selection.counts)
            keep_SIO[:, column:end] = keep_SOX.mT
        kept_SO = weight_SIO[:, column] * keep_SIO[:, column]
        return kept_SO if old_keep_SIO is None else kept_SO * old_keep_SIO[:, column]

    feed_errors_back(weight_SIO, inverse.factor, block, compress)
    status = inverse.statuses("sparsegpt", "magnitude")
    del inverse  # before one more copy of the weights
    weight = weight_SIO.mT.to(weight_SOI.dtype).contiguous()
    return Pruned(weight, keep_SIO.mT.contiguous(), status)
