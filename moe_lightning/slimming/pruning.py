"""Fewer non-zero weights: magnitude, Wanda, SparseGPT.

Legend: S matrices, O outputs, I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.criteria.selection import round_half_up
from moe_lightning.slimming.hessian import (
    DAMPING,
    check_hessian,
    check_stack,
    feed_errors_back,
    inverse_factor,
    work_type,
)
from moe_lightning.slimming.masks import Selection, keep_in_groups, keep_largest, keep_mask

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


def prune_by_magnitude(weight_SOI: Tensor, selection: Selection) -> Pruned:
    """Zero the weights of smallest magnitude: the score is ``|w|``.

    Args:
        weight_SOI: Weights.
        selection: How many, and among which.

    Source: 1506.02626. The released code of 2406.02500 keeps the smallest and zeroes the largest; this does not.
    """
    check_stack(weight_SOI)
    keep_SOI = keep_mask(weight_SOI.to(work_type(weight_SOI)).abs(), selection)
    return Pruned(weight_SOI.masked_fill(~keep_SOI, 0), keep_SOI, ("magnitude",) * len(weight_SOI))


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


def _by_norm(weight_SOI: Tensor, norm_SI: Tensor, selection: Selection, name: str) -> Pruned:
    check_stack(weight_SOI)
    slots, _, columns = weight_SOI.shape
    if tuple(norm_SI.shape) != (slots, columns):
        raise ValueError(f"{name}: norms {tuple(norm_SI.shape)} do not fit weights {tuple(weight_SOI.shape)}")
    if not bool((norm_SI.isfinite() & (norm_SI >= 0)).all()):
        raise ValueError(f"{name}: norms of inputs must be finite and at least 0: give ||X_j||, not its square's sum")
    keep_SOI = keep_mask(wanda_score(weight_SOI, norm_SI), selection)
    empty = (norm_SI <= 0).all(1).tolist()
    status = tuple("magnitude fallback: no input reached it" if none else name for none in empty)
    return Pruned(weight_SOI.masked_fill(~keep_SOI, 0), keep_SOI, status)


def prune_by_wanda(weight_SOI: Tensor, norm_SI: Tensor, selection: Selection) -> Pruned:
    """Zero the weights with the smallest ``|W_ij| ||X_j||``; nothing makes up for them.

    Args:
        weight_SOI: Weights.
        norm_SI: ``||X_j|| = sqrt(sum x_j^2)`` over the tokens that reach each matrix.
        selection: How many, and among which; the paper compares within a row.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2306.11695, equation 1.
    """
    return _by_norm(weight_SOI, norm_SI, selection, "wanda")


def prune_by_router_wanda(weight_SOI: Tensor, gated_norm_SI: Tensor, selection: Selection) -> Pruned:
    """Zero the weights with the smallest ``|W_ij| ||g X_j||``: tokens count by their routing weight.

    Args:
        weight_SOI: Weights.
        gated_norm_SI: ``sqrt(sum (g x_j)^2)`` over the tokens that reach each matrix.
        selection: How many, and among which.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2410.12013 (MoE-Pruner), section 3.2.
    """
    return _by_norm(weight_SOI, gated_norm_SI, selection, "router wanda")


def _keep_in_block(cost_SOX: Tensor, selection: Selection, first: int) -> Tensor:
    """Choose in a block of columns so that the counts of all blocks together are exact."""
    assert selection.sparsity is not None
    outputs, width = cost_SOX.shape[1:]
    size = width
    ends = (first, first + width)
    if selection.scope == "matrix":
        size, ends = outputs * width, (outputs * first, outputs * (first + width))
    zeros = round_half_up(selection.sparsity * ends[1]) - round_half_up(selection.sparsity * ends[0])
    if selection.scope == "row":
        return keep_largest(cost_SOX, size - zeros)
    return keep_largest(cost_SOX.flatten(1), size - zeros).unflatten(1, (outputs, width))


def prune_by_sparse_gpt(
    weight_SOI: Tensor,
    hessian_SII: Tensor,
    selection: Selection,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Pruned:
    """Zero the weights that cost least, and let those that are still free make up for them.

    Columns go one after another. The cost of a weight is that of optimal brain surgery on the columns from its own on,
    ``w^2 / [H^-1]_jj = w^2 / U_jj^2``. With a pattern, each group of neighbours is chosen from as the columns before it
    left it; else each block of columns, which has its own share of the zeros.

    Args:
        weight_SOI: Weights.
        hessian_SII: ``sum x x^T`` over the tokens that reach each matrix; zero and rank one are fine.
        selection: How many, and among which; scope ``matrix`` compares all rows of a block, as released.
        damping: Share of the mean of H's diagonal that is added to it; grows tenfold until H can be inverted.
        block: Columns that are chosen from together; with a pattern it makes no difference.

    Returns:
        What is left; a matrix without a Hessian is pruned by magnitude, block by block, and its status says so.

    Raises:
        ValueError: Shapes that do not fit, or values that are not finite.

    Source: 2301.00774, algorithm 1.
    Cost: ``S (O I^2 + 2/3 I^3)`` multiply-adds; memory for about 4 more Hessians and 3 copies of the weights in fp32.
    """
    check_stack(weight_SOI)
    check_hessian(weight_SOI, hessian_SII)
    columns = weight_SOI.shape[2]
    selection.check_columns(columns)
    if block < 1 or block % 8:
        raise ValueError(f"block must be a positive multiple of 8, got {block}: the default is {BLOCK}")
    dtype = work_type(weight_SOI)
    inverse = inverse_factor(hessian_SII, damping=damping, dtype=dtype)
    spread_SI = inverse.factor.diagonal(dim1=-2, dim2=-1)
    weight_SIO = weight_SOI.to(dtype).mT.clone(memory_format=torch.contiguous_format)
    keep_SIO = torch.empty_like(weight_SIO, dtype=torch.bool)
    width = block if selection.counts is None else selection.counts[1]

    def compress(column: int) -> Tensor:
        if column % width == 0:
            end = min(column + width, columns)
            cost_SXO = (weight_SIO[:, column:end] / spread_SI[:, column:end, None]).square()
            if selection.counts is not None:
                keep_SOX = keep_in_groups(cost_SXO.mT, *selection.counts)
            else:
                keep_SOX = _keep_in_block(cost_SXO.mT, selection, column)
            keep_SIO[:, column:end] = keep_SOX.mT
        return weight_SIO[:, column] * keep_SIO[:, column]

    feed_errors_back(weight_SIO, inverse.factor, block, compress)
    weight = weight_SIO.mT.to(weight_SOI.dtype).contiguous()
    return Pruned(weight, keep_SIO.mT.contiguous(), inverse.statuses("sparsegpt", "magnitude"))
