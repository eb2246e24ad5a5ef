"""Scales between a layer and its consumers, so that inputs that matter fall on finer grids; then ranges cut short.

``W x = (W s) (x / s)`` for any positive s. The producer of x takes the division, *every* consumer of x the product:
then nothing changes before rounding, and after it the columns with large s have smaller errors.

Legend: S matrices, O outputs, I inputs, G groups along the input, X inputs of a group, Z scales (1 or S).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.slimming.hessian import check_stack, output_error, work_type
from moe_lightning.slimming.rounding import (
    Scheme,
    decode,
    dequantize,
    encode,
    make_grid,
    round_to_nearest,
)

POINTS = 20
"""Scales that are tried, the identity among them."""

CLIPS = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's range that are tried; the whole comes first and wins where all are equal."""

PSEUDO_TOKENS = 8
"""Tokens of uniform inputs that are added to those measured, so that a few tokens do not decide alone."""

WIDEST = 16
"""Scales lie between its inverse and this: further apart, one column's grid is ruined for another's."""

_SMALLEST = 1e-4


class Balance(NamedTuple):
    """The scale of a balance group.

    Attributes:
        scale: s ``[Z, I]``, positive.
        ratio: r that it was made with, ``[Z]``; NaN for the identity.
        loss: Squared error of the outputs with it, ``[Z]``.
        identity_loss: That of rounding to nearest, ``[Z]``, never smaller.
    """

    scale: Tensor
    ratio: Tensor
    loss: Tensor
    identity_loss: Tensor


def scale_moment(moment: Tensor, scale_ZI: Tensor) -> Tensor:
    """Return the moments of ``x / s``: of ``sum x x^T`` ``[S, I, I]`` or of its diagonal ``[S, I]``."""
    if moment.dim() == 2:
        return moment / scale_ZI.square().to(moment.dtype)
    scale_ZI = scale_ZI.to(moment.dtype)
    return moment / scale_ZI[:, :, None] / scale_ZI[:, None, :]


@contextmanager
def smoothed(moment: Tensor, tokens_S: Tensor) -> Iterator[None]:
    """Add tokens to moments in place that have every input as large as the mean, and take them away at the end.

    With few tokens, columns whose inputs happened to be small would get grids so coarse that other tokens pay for it.

    Args:
        moment: ``sum x x^T`` ``[S, I, I]`` or its diagonal ``[S, I]``.
        tokens_S: Tokens that each is the sum over.
    """
    diagonal_SI = diagonal_of(moment)
    before_SI = diagonal_SI.clone()
    share_S = PSEUDO_TOKENS / tokens_S.to(moment.device, moment.dtype).clamp(min=1)
    diagonal_SI += (before_SI.mean(1) * share_S)[:, None]
    try:
        yield
    finally:
        diagonal_SI.copy_(before_SI)


def diagonal_of(moment: Tensor) -> Tensor:
    """Return ``sum x_j^2`` of moments, ``[S, I]``."""
    return moment if moment.dim() == 2 else moment.diagonal(dim1=-2, dim2=-1)


def _relative(size_ZI: Tensor) -> Tensor:
    """Divide by the mean of each row; rows of zeros become ones, and nothing gets near zero."""
    mean_Z1 = size_ZI.mean(1, keepdim=True)
    return torch.where(mean_Z1 > 0, size_ZI / torch.where(mean_Z1 > 0, mean_Z1, 1.0), 1.0).clamp(min=_SMALLEST)


def column_sizes(weight_SOI: Tensor, scheme: Scheme) -> Tensor:
    """Return the sum over rows of each column's weights, in units of the largest of their groups: ``[S, I]``."""
    groups_SOGX = weight_SOI.to(work_type(weight_SOI)).abs().unflatten(-1, (-1, scheme.group_of(weight_SOI.shape[-1])))
    largest_SOG1 = groups_SOGX.amax(-1, keepdim=True)
    return (groups_SOGX / torch.where(largest_SOG1 > 0, largest_SOG1, 1.0)).flatten(-2).sum(1)


def candidate_scales(
    square_ZI: Tensor, size_ZI: Tensor, *, power_of_two: bool, points: int
) -> tuple[Tensor, tuple[float, ...]]:
    """Return the scales to try, and the r that each was made with.

    ``s = x^r / w^(1 - r)`` with the root mean square x of each input and the mean w of each column's weights in units
    of their groups' largest, both over all matrices of a balance group, divided by their means; r on a grid in [0, 1],
    and the identity.

    Args:
        square_ZI: ``sum x_j^2`` of the inputs.
        size_ZI: From :func:`column_sizes`.
        power_of_two: Round them to powers of two.
        points: How many, the identity among them, at least 1.

    Returns:
        ``[points, Z, I]`` between ``1 / WIDEST`` and :data:`WIDEST`, the identity first with r NaN.

    Source: 2306.00978, equation 5; the term in w is that of the released code. The paper takes the mean of ``|x|``.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1, the identity, got {points}")
    w_ZI = _relative(size_ZI)
    x_ZI = _relative(square_ZI.sqrt()).to(w_ZI.dtype)
    ratios = [step / max(points - 2, 1) for step in range(points - 1)]
    found = [torch.ones_like(x_ZI)]
    for ratio in ratios:
        scale_ZI = (x_ZI**ratio / w_ZI ** (1 - ratio)).clamp(min=_SMALLEST)
        # The middle between the largest and the smallest becomes 1.
        found.append(scale_ZI / (scale_ZI.amax(1, keepdim=True) * scale_ZI.amin(1, keepdim=True)).sqrt())
    scales = torch.stack(found).clamp(1 / WIDEST, WIDEST)
    return scales.log2().round().exp2() if power_of_two else scales, (torch.nan, *ratios)


def rounding_losses(scales: Tensor, weight_SOI: Tensor, moment: Tensor, scheme: Scheme) -> Tensor:
    """Return the squared error of the outputs of each matrix with each scale.

    Args:
        scales: ``[points, Z, I]``.
        weight_SOI: Weights.
        moment: ``sum x x^T`` ``[S, I, I]`` of the inputs of each matrix, or its diagonal ``[S, I]``.
        scheme: How they are to be rounded.

    Returns:
        ``[points, S]``.

    Cost: ``points`` times a rounding, and ``S O I^2`` more for full moments. The paper measures the output of the whole
    block.
    """
    wide_SOI = weight_SOI.to(scales.dtype)
    rows = []
    for scale_ZI in scales:
        back_SOI = dequantize(round_to_nearest(wide_SOI * scale_ZI[:, None, :], scheme)).to(scales.dtype)
        rows.append(output_error(wide_SOI, back_SOI / scale_ZI[:, None, :], moment))
    return torch.stack(rows)


def best_scale(scales: Tensor, ratios: Sequence[float], loss: Tensor) -> Balance:
    """Choose the scale with the smallest loss; of equal ones the first, which is the identity.

    Args:
        scales: ``[points, Z, I]``.
        ratios: r of each.
        loss: ``[points, Z]``.
    """
    best_Z = torch.where(loss.isfinite(), loss, torch.inf).argmin(0)
    place_Z = torch.arange(scales.shape[1], device=scales.device)
    ratio_Z = torch.tensor(ratios, dtype=scales.dtype, device=scales.device)[best_Z]
    return Balance(scales[best_Z, place_Z], ratio_Z, loss[best_Z, place_Z], loss[0])


def search_clip(weight_SOI: Tensor, moment: Tensor, scheme: Scheme) -> Tensor:
    """Find for every group of every row the share of its range with which rounding changes the outputs least.

    Groups are taken one by one: products of inputs of different groups are left out.

    Args:
        weight_SOI: Weights, times the scale if there is one.
        moment: Of their inputs, see :func:`rounding_losses`, divided by the scale if there is one.
        scheme: How they are to be rounded.

    Returns:
        ``[S, O, G]`` in ``(0, 1]``; 1 where nothing is better, or where no input reached the group.

    Source: 2306.00978, released code. There weights are cut off at a share of the largest on both sides; here a share
    of the range is covered, so that the grid's zero keeps its place.
    Cost: 11 times a rounding, and of ``S O I X`` more for full moments.
    """
    check_stack(weight_SOI)
    dtype = work_type(weight_SOI)
    size = scheme.group_of(weight_SOI.shape[-1])
    weight_SOGX = weight_SOI.to(dtype).unflatten(-1, (-1, size))
    if moment.dim() == 3:
        blocks = moment.to(dtype).unflatten(2, (-1, size)).unflatten(1, (-1, size))
        moment_SGXX = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    else:
        moment_SGX = moment.to(dtype).unflatten(-1, (-1, size))
    best_SOG = torch.full_like(weight_SOGX[..., 0], torch.inf)
    clip_SOG = torch.ones_like(best_SOG)
    for clip in CLIPS:
        scale, zero = (table[..., None] for table in make_grid(weight_SOGX, scheme, clip))
        codes = encode(weight_SOGX, scale, zero, scheme.max_code)
        change_SGOX = (decode(codes, scale, zero, dtype) - weight_SOGX).transpose(1, 2)
        if moment.dim() == 3:
            loss_SGO = ((change_SGOX @ moment_SGXX) * change_SGOX).sum(-1)
        else:
            loss_SGO = (change_SGOX.square() @ moment_SGX[..., None])[..., 0]
        loss_SOG = loss_SGO.transpose(1, 2)
        better = loss_SOG < best_SOG
        clip_SOG = torch.where(better, clip, clip_SOG)
        best_SOG = torch.where(better, loss_SOG, best_SOG)
    return clip_SOG
