"""Products with dense weights on a CPU where torch's are not the fastest; without gradients.

Legend: S matrices, O outputs, X inputs, P rows sorted by matrix, T outputs of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.cpu_kernels.calls import plain_tensors
from moe_kernels.cpu_kernels.dense import compiled_grouped_linear, has_dense_product
from moe_kernels.int4 import row_groups
from moe_kernels.machine import DenseRoute, Machine, dense_route, this_machine

# A tile has 4 MiB in fp32, which a cache holds, but no fewer rows than products in fp32 need to run at full speed.
_TILE_WEIGHTS = 2**20
_TILE_ROWS = 256


def cpu_product_pays(rows_PX: Tensor, weight_SOX: Tensor) -> bool:
    """Say whether :func:`cpu_grouped_linear` is the way for a product: on a CPU, without gradients."""
    if rows_PX.dtype != weight_SOX.dtype or rows_PX.dtype not in (torch.bfloat16, torch.float32):
        return False
    if not plain_tensors(rows_PX, weight_SOX):
        return False
    if torch.is_grad_enabled() and (rows_PX.requires_grad or weight_SOX.requires_grad):
        return False
    # How many rows a group has, is seen when they are there.
    machine = this_machine()
    rows, inputs = rows_PX.shape
    return machine.compiled or dense_route(rows, inputs, rows_PX.dtype, machine) != "product"


def cpu_grouped_linear(
    rows_PX: Tensor, weight_SOX: Tensor, offsets_S: Tensor, machine: Machine | None = None
) -> Tensor:
    """Multiply each group of rows with its own matrix, each in the way that is fastest; not differentiable.

    Args:
        rows_PX: Rows sorted by group, bfloat16 or float32 on a CPU, ``[P, X]``.
        weight_SOX: One matrix for each group, ``[S, O, X]``.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.
        machine: Decides what is fastest; this one where None.

    Returns:
        ``[P, O]`` in the type of the rows; each number is rounded once.

    Raises:
        ValueError: There are not as many groups as matrices.
    """
    # As F.grouped_mm, which knows nothing of autocast either.
    with torch.autocast("cpu", enabled=False):
        return _grouped_linear(rows_PX, weight_SOX, offsets_S, machine or this_machine())


def _grouped_linear(rows_PX: Tensor, weight_SOX: Tensor, offsets_S: Tensor, machine: Machine) -> Tensor:
    out_PO = rows_PX.new_empty(rows_PX.shape[0], weight_SOX.shape[1])
    if len(offsets_S) != len(weight_SOX):
        raise ValueError(f"{len(offsets_S)} groups of rows do not fit {len(weight_SOX)} matrices")
    groups = list(row_groups(offsets_S.tolist()))
    routes = [dense_route(part.stop - part.start, rows_PX.shape[1], rows_PX.dtype, machine) for _, part in groups]
    compiled = has_dense_product(rows_PX.dtype)
    if set(routes) == {"kernel"} and compiled and weight_SOX.is_contiguous():
        compiled_grouped_linear(rows_PX.contiguous(), weight_SOX, offsets_S, out_PO)
        return out_PO
    for (slot, part), route in zip(groups, routes, strict=True):
        taken: DenseRoute = "product" if route == "kernel" and not compiled else route
        _one_group(rows_PX[part], weight_SOX[slot], out_PO[part], taken)
    return out_PO


def _one_group(rows_PX: Tensor, weight_OX: Tensor, out_PO: Tensor, route: DenseRoute) -> None:
    if route == "kernel" and weight_OX.is_contiguous():
        end = torch.tensor([rows_PX.shape[0]], dtype=torch.int32, device="cpu")
        compiled_grouped_linear(rows_PX.contiguous(), weight_OX[None], end, out_PO)
    elif route == "fp32 tiles":
        step = max(_TILE_ROWS, _TILE_WEIGHTS // max(weight_OX.shape[1], 1))
        tile = torch.empty(min(step, weight_OX.shape[0]), weight_OX.shape[1], dtype=torch.float32, device="cpu")
        wide_PX = rows_PX.float()
        for part in (slice(first, first + step) for first in range(0, weight_OX.shape[0], step)):
            weight_TX = weight_OX[part]
            out_PO[:, part] = F.linear(wide_PX, tile[: weight_TX.shape[0]].copy_(weight_TX))
    else:
        out_PO.copy_(F.linear(rows_PX, weight_OX))
