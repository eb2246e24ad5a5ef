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
    Quantized,
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


class Balanced(NamedTuple):
    """One consumer, or a stack of them, of the inputs that a scale is sought for.

    Attributes:
        weight: ``[S, O, I]``.
        moment: ``sum x x^T`` ``[S, I, I]`` of the inputs of each matrix, or its diagonal ``[S, I]``.
        scheme: How the stack is to be rounded; None where it stays as it is, like a router: it is rescaled only.
    """

    weight: Tensor
    moment: Tensor
    scheme: Scheme | None


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


class AWQResult(NamedTuple):
    """A balance group that was rounded.

    Attributes:
        balance: The scale that producers are to be divided by, see :func:`scale_producer`.
        quantized: For each member what stands for its weights *times the scale*; None where it is not rounded.
        status: For each member what was done to each matrix.
    """

    balance: Balance
    quantized: tuple[Quantized | None, ...]
    status: tuple[tuple[str, ...], ...]


def scale_consumer(weight_SOI: Tensor, scale_ZI: Tensor) -> Tensor:
    """Return ``W s`` in the type of the weights."""
    return (weight_SOI.to(scale_ZI.dtype) * scale_ZI[:, None, :]).to(weight_SOI.dtype)


def scale_producer(weight: Tensor, scale_ZI: Tensor) -> Tensor:
    """Return the weights of what makes x, so that it makes ``x / s``.

    Args:
        weight: The weight ``[I]`` of a norm, for a scale that all share, or rows that make x, ``[S, I, ...]``.
        scale_ZI: s.

    Returns:
        In the type of the weights.
    """
    if weight.dim() == 1:
        if scale_ZI.shape[0] != 1:
            raise ValueError(
                f"a norm makes the input of all, but there are {scale_ZI.shape[0]} scales: search with shared"
            )
        return (weight.to(scale_ZI.dtype) / scale_ZI[0]).to(weight.dtype)
    return (weight.to(scale_ZI.dtype) / scale_ZI[:, :, None]).to(weight.dtype)


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


def _check(members: Sequence[Balanced], shared: bool) -> list[Balanced]:
    rounded = [member for member in members if member.scheme is not None]
    if not rounded:
        raise ValueError("a balance group needs a member that is to be rounded: all schemes are None")
    for member in members:
        check_stack(member.weight)
        slots, _, columns = member.weight.shape
        if columns != members[0].weight.shape[2]:
            raise ValueError(
                f"members of a balance group have one input, got {columns} and {members[0].weight.shape[2]}"
            )
        if tuple(member.moment.shape) not in ((slots, columns), (slots, columns, columns)):
            raise ValueError(f"moments {tuple(member.moment.shape)} do not fit weights {tuple(member.weight.shape)}")
        if not shared and slots != members[0].weight.shape[0]:
            raise ValueError("members with a scale for each matrix must have as many matrices as one another")
        diagonal = diagonal_of(member.moment)
        if not bool((diagonal.isfinite() & (diagonal >= 0)).all()):
            raise ValueError("moments of inputs must be finite, and at least 0 on the diagonal")
    return rounded


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

    Args:
        square_ZI: ``sum x_j^2`` of the inputs.
        size_ZI: From :func:`column_sizes`.
        power_of_two: Round them to powers of two.
        points: How many, the identity among them, at least 1.

    Returns:
        ``[points, Z, I]`` between ``1 / WIDEST`` and :data:`WIDEST`, the identity first with r NaN.
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
        moment: Of their inputs, see :class:`Balanced`.
        scheme: How they are to be rounded.

    Returns:
        ``[points, S]``.
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


def search_scale(
    members: Sequence[Balanced], *, shared: bool = True, power_of_two: bool = False, points: int = POINTS
) -> Balance:
    """Find the scale with which rounding changes the outputs of a balance group least.

    ``s = x^r / w^(1 - r)`` with the root mean square x of each input and the mean w of each column's weights in units
    of their groups' largest, both over all members that are rounded, divided by their means; r on a grid in [0, 1], and
    the identity. The error is ``tr(D H D^T)``, which a diagonal H makes cheap and leaves the products of inputs out of.

    Args:
        members: Every consumer of one input.
        shared: One scale for all matrices, as behind a norm; else one for each, as between up and down of an expert.
        power_of_two: Round s to powers of two: then rescaling is exact in every floating-point type.
        points: Scales to try, the identity among them.

    Returns:
        The scale. Where nothing is better than the identity, or no input reached the group, the identity.

    Raises:
        ValueError: Members that do not fit each other, or values that are not finite.

    Source: 2306.00978, equation 5; the term in w is that of the released code. The paper takes the mean of ``|x|``, and
    measures the output of the whole block.
    Cost: ``points`` times a rounding of all members, and of ``S O I^2`` more for full moments.
    """
    rounded = _check(members, shared)
    sizes, squares = [], []
    for weight, moment, scheme in rounded:
        assert scheme is not None
        size_SI, square_SI = column_sizes(weight, scheme), diagonal_of(moment)
        sizes.append(size_SI.sum(0, keepdim=True) if shared else size_SI)
        squares.append(square_SI.sum(0, keepdim=True) if shared else square_SI)
    scales, ratios = candidate_scales(
        torch.stack(squares).sum(0), torch.stack(sizes).sum(0), power_of_two=power_of_two, points=points
    )
    losses = []
    for weight, moment, scheme in rounded:
        assert scheme is not None
        loss = rounding_losses(scales, weight, moment, scheme)
        losses.append(loss.sum(1, keepdim=True) if shared else loss)
    return best_scale(scales, ratios, torch.stack(losses).sum(0))


def search_clip(weight_SOI: Tensor, moment: Tensor, scheme: Scheme) -> Tensor:
    """Find for every group of every row the share of its range with which rounding changes the outputs least.

    Groups are taken one by one: products of inputs of different groups are left out.

    Args:
        weight_SOI: Weights, times the scale if there is one.
        moment: Of their inputs, see :class:`Balanced`, divided by the scale if there is one.
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


def round_by_awq(
    members: Sequence[Balanced],
    *,
    shared: bool = True,
    clip: bool = True,
    power_of_two: bool = False,
    points: int = POINTS,
) -> AWQResult:
    """Find a balance group's scale, then every range, and round.

    Nothing is written: members that are not rounded are to be given to :func:`scale_consumer`, and the producer of the
    input to :func:`scale_producer`.

    Args:
        members: Every consumer of one input.
        shared: One scale for all matrices, as behind a norm; else one for each.
        clip: Search for shorter ranges.
        power_of_two: Round the scale to powers of two: then rescaling is exact in every floating-point type.
        points: Scales to try, the identity among them.

    Returns:
        Scale and codes. A matrix that no input reached is rounded to nearest with the scale of its group.

    Source: 2306.00978. That a mixture of experts needs the router in the group is ours: without it about half of the
    tokens are routed elsewhere.
    """
    balance = search_scale(members, shared=shared, power_of_two=power_of_two, points=points)
    quantized: list[Quantized | None] = []
    status = []
    for weight, moment, scheme in members:
        if scheme is None:
            quantized.append(None)
            status.append(("rescaled only",) * len(weight))
            continue
        wide_SOI = weight.to(balance.scale.dtype) * balance.scale[:, None, :]
        share = search_clip(wide_SOI, scale_moment(moment, balance.scale), scheme) if clip else 1.0
        quantized.append(round_to_nearest(wide_SOI, scheme, share))
        empty = (diagonal_of(moment) <= 0).all(1).tolist()
        status.append(tuple("rtn fallback: no input reached it" if none else "awq" for none in empty))
    return AWQResult(balance, tuple(quantized), tuple(status))
