"""Rounding in which the columns that are still free make up for the error of those that are done.

Legend: S matrices, O outputs, I inputs, G groups along the input, X inputs of a group. Transposed: ``[S, I, O]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.slimming.hessian import (
    DAMPING,
    InverseFactor,
    check_hessian,
    check_stack,
    feed_errors_back,
    inverse_factor,
    joined,
    portions,
    work_type,
)
from moe_lightning.slimming.masks import check_mask
from moe_lightning.slimming.rounding import Quantized, Scheme, decode, encode, make_grid

_SEGMENT = 128


class GPTQResult(NamedTuple):
    """A stack of rounded matrices, and what was done.

    Attributes:
        quantized: Codes, scales and zeros, with the inputs in their own order.
        status: What was done to each matrix, S entries.
    """

    quantized: Quantized
    status: tuple[str, ...]


def round_by_gptq(
    weight_SOI: Tensor,
    hessian_SII: Tensor,
    scheme: Scheme,
    keep_SOI: Tensor | None = None,
    *,
    desc_act: bool = False,
    static_groups: bool | None = None,
    damping: float = DAMPING,
    tokens: Tensor | None = None,
    at_once: int | None = None,
) -> GPTQResult:
    """Round column after column, each error fed back into the columns that follow.

    Args:
        weight_SOI: Weights.
        hessian_SII: ``sum x x^T`` over the tokens that reach each matrix; zero and rank one are fine.
        scheme: How to round.
        keep_SOI: False for weights that were pruned: they get the code of zero, and the others make up for errors.
        desc_act: Begin with the inputs of largest ``H_jj``, by index where equal. Groups are of neighbours even so.
        static_groups: Take each group's grid from the weights as given, rather than as earlier columns left them when
            the group's turn comes. None: where ``desc_act`` is on, which cannot do without.
        damping: Share of the mean of H's diagonal that is added to it at least; grows tenfold until H can be inverted.
        tokens: Tokens that each H is the sum over, ``[S]``; then few of them are damped more.
        at_once: Matrices to work on at once; None for what is fastest for their size.

    Returns:
        The codes; a matrix without a Hessian is rounded to nearest, and its status says so.

    Raises:
        ValueError: Shapes or options that do not fit, or values that are not finite.

    Source: 2210.17323, algorithm 1; order and static groups as in the released code. There, an input that no token
        used has its weights set to zero, which leaves nothing of an expert without tokens; here they are rounded.
    Cost: ``S (O I^2 + 2/3 I^3)`` multiply-adds; memory for 2 more Hessians and 2 copies of the weights in fp32.
    """
    check_stack(weight_SOI)
    check_hessian(weight_SOI, hessian_SII)
    if desc_act and static_groups is False:
        raise ValueError("desc_act takes the columns of a group at different times: it needs static_groups")
    check_mask(weight_SOI, keep_SOI)
    static = desc_act if static_groups is None else static_groups
    if keep_SOI is not None:
        weight_SOI = weight_SOI.masked_fill(~keep_SOI, 0)
    parts: list[Quantized] = []
    statuses: list[str] = []
    for part in portions(weight_SOI, at_once):
        mask = None if keep_SOI is None else keep_SOI[part]
        seen = None if tokens is None else tokens[part]
        quantized, inverse = _gptq(weight_SOI[part], hessian_SII[part], scheme, mask, desc_act, static, damping, seen)
        parts.append(quantized)
        statuses += inverse.statuses("gptq", "rtn")
    return GPTQResult(Quantized(*(joined(list(tables)) for tables in zip(*parts, strict=True))), tuple(statuses))


def _gptq(
    weight_SOI: Tensor,
    hessian_SII: Tensor,
    scheme: Scheme,
    keep_SOI: Tensor | None,
    desc_act: bool,
    static: bool,
    damping: float,
    tokens_S: Tensor | None,
) -> tuple[Quantized, InverseFactor]:
    slots, _, columns = weight_SOI.shape
    size = scheme.group_of(columns)
    dtype = work_type(weight_SOI)
    weight_SIO = weight_SOI.to(dtype).mT
    keep_SIO = None if keep_SOI is None else keep_SOI.mT
    # The grid that is in use: all groups' grids if they are known beforehand.
    scale_SGO, zero_SGO = (table.mT.contiguous() for table in make_grid(_grouped(weight_SIO, size), scheme))
    order_SI: Tensor | None = None
    if desc_act:
        order_SI = hessian_SII.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        weight_SIO = weight_SIO.gather(1, order_SI[:, :, None].expand_as(weight_SIO))
        if keep_SIO is not None:
            keep_SIO = keep_SIO.gather(1, order_SI[:, :, None].expand_as(keep_SIO))
    else:
        weight_SIO = weight_SIO.clone(memory_format=torch.contiguous_format)
        keep_SIO = None if keep_SIO is None else keep_SIO.contiguous()
    inverse = inverse_factor(hessian_SII, damping=damping, tokens_S=tokens_S, order_SI=order_SI, dtype=dtype)
    codes_SIO = torch.empty_like(weight_SIO, dtype=torch.uint8)
    slot_S = torch.arange(slots, device=weight_SOI.device)

    def compress(column: int) -> Tensor:
        if order_SI is not None:
            group_S = order_SI[:, column] // size
            scale_SO, zero_SO = scale_SGO[slot_S, group_S], zero_SGO[slot_S, group_S]
        else:
            group = column // size
            if not static and column % size == 0:
                ahead_SXO = weight_SIO[:, column : column + size]
                if keep_SIO is not None:
                    # Errors of the columns before have gone to places that are to be zero.
                    ahead_SXO = ahead_SXO * keep_SIO[:, column : column + size]
                scale_SO1, zero_SO1 = make_grid(_grouped(ahead_SXO, size), scheme)
                scale_SGO[:, group], zero_SGO[:, group] = scale_SO1[..., 0], zero_SO1[..., 0]
            scale_SO, zero_SO = scale_SGO[:, group], zero_SGO[:, group]
        codes_SO = encode(weight_SIO[:, column], scale_SO, zero_SO, scheme.max_code)
        if keep_SIO is not None:
            codes_SO = torch.where(keep_SIO[:, column], codes_SO, zero_SO)
        codes_SIO[:, column] = codes_SO
        return decode(codes_SO, scale_SO, zero_SO, dtype)

    # A grid that is taken on the way needs its whole group up to date.
    feed_errors_back(weight_SIO, inverse.factor, _SEGMENT if static else size, compress)
    if order_SI is not None:
        codes_SIO = codes_SIO.gather(1, order_SI.argsort(-1)[:, :, None].expand_as(codes_SIO))
    quantized = Quantized(codes_SIO.mT.contiguous(), scale_SGO.mT.contiguous(), zero_SGO.mT.contiguous())
    return quantized, inverse


def _grouped(weight_SIO: Tensor, size: int) -> Tensor:
    """View transposed weights as ``[S, O, G, X]``."""
    return weight_SIO.mT.unflatten(-1, (-1, size))
