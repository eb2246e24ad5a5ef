"""Products with bf16 weights on a CPU that only emulates bf16: in fp32, a tile of the weights at a time.

Legend: S matrices, O outputs, X inputs, P rows sorted by matrix, T outputs of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.machine import Machine, dense_route, this_machine

# A tile has 4 MiB in fp32, which a cache holds, but no fewer rows than products in fp32 need to run at full speed.
_TILE_WEIGHTS = 2**20
_TILE_ROWS = 256


def upcast_pays(rows_PX: Tensor, weight_SOX: Tensor) -> bool:
    """Say whether :func:`upcast_grouped_linear` is the way for a product: bf16, without gradients, on such a CPU."""
    return (
        rows_PX.device.type == "cpu"
        and rows_PX.dtype == weight_SOX.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (rows_PX.requires_grad or weight_SOX.requires_grad))
        # With rows enough for one group; which groups have them, is seen when they are.
        and dense_route(rows_PX.shape[0], rows_PX.dtype, this_machine()) == "fp32 tiles"
    )


def upcast_grouped_linear(
    rows_PX: Tensor, weight_SOX: Tensor, offsets_S: Tensor, machine: Machine | None = None
) -> Tensor:
    """Multiply each group of rows with its own matrix, those with enough rows in fp32; not differentiable.

    Args:
        rows_PX: Rows sorted by group, ``[P, X]``.
        weight_SOX: One matrix for each group, ``[S, O, X]``.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.
        machine: Decides what are enough rows; this one where None.

    Returns:
        ``[P, O]`` in the type of the rows; each number is rounded once.
    """
    machine = machine or this_machine()
    out_PO = rows_PX.new_empty(rows_PX.shape[0], weight_SOX.shape[1])
    step = max(_TILE_ROWS, _TILE_WEIGHTS // max(weight_SOX.shape[2], 1))
    tile = torch.empty(min(step, weight_SOX.shape[1]), weight_SOX.shape[2], dtype=torch.float32, device=rows_PX.device)
    start = 0
    for end, weight_OX in zip(offsets_S.tolist(), weight_SOX, strict=True):
        group = slice(start, end)
        start = end
        if group.start == end:
            continue
        if dense_route(end - group.start, rows_PX.dtype, machine) == "product":
            out_PO[group] = F.linear(rows_PX[group], weight_OX)
            continue
        wide_PX = rows_PX[group].float()
        for part in (slice(first, first + step) for first in range(0, weight_OX.shape[0], step)):
            weight_TX = weight_OX[part]
            out_PO[group, part] = F.linear(wide_PX, tile[: weight_TX.shape[0]].copy_(weight_TX))
    return out_PO
