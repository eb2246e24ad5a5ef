"""Gradients of matrices: sums over a slot's pairs of outer products, ``out[s] = sum_p left_p right_p^T``.

Every matrix of the step gets its gradient here: the stacks of dense experts and all four of the low-rank terms. A slot
that no token reached gets zeros. One program adds up all pairs of its tile, in their order.

Legend: N tokens, K top-k, S slots, P places of pairs sorted by slot, B places of a block, L rows of the result, X its
columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.grouped_gate_up import tile_of
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.training.choose import OuterTiles
from moe_kernels.triton_kernels.training.tiles import groups_of, wide_type


@triton.jit
def slot_outer_kernel(
    left_ptr,
    right_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    LEFT_GATHERED: tl.constexpr,
    RIGHT_GATHERED: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of one slot's matrix."""
    TILES_LEFT: tl.constexpr = (LEFT + BLOCK_LEFT - 1) // BLOCK_LEFT
    TILES_RIGHT: tl.constexpr = (RIGHT + BLOCK_RIGHT - 1) // BLOCK_RIGHT
    row, column = tile_of(tl.program_id(0), TILES_LEFT, TILES_RIGHT, TILES_TOGETHER)
    slot = tl.program_id(1)
    left_L = row * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    right_X = column * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    inside_L, inside_X = left_L < LEFT, right_X < RIGHT
    start = tl.load(ends_ptr + slot - 1, mask=slot > 0, other=0)
    end = tl.load(ends_ptr + slot)
    total_LX = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for first in tl.range(start, end, BLOCK_PAIRS, num_stages=STAGES):
        place_B = first + tl.arange(0, BLOCK_PAIRS)
        known_B = place_B < end
        place_B = place_B.to(tl.int64)
        if LEFT_GATHERED or RIGHT_GATHERED:
            token_B = tl.load(order_ptr + place_B, mask=known_B, other=0).to(tl.int64) // TOP_K
        from_B = token_B if LEFT_GATHERED else place_B
        left_BL = left_ptr + from_B[:, None] * LEFT + left_L[None, :]
        part_BL = tl.load(left_BL, mask=known_B[:, None] & inside_L[None, :], other=0.0).to(COMPUTE)
        from_B = token_B if RIGHT_GATHERED else place_B
        right_BX = right_ptr + from_B[:, None] * RIGHT + right_X[None, :]
        part_BX = tl.load(right_BX, mask=known_B[:, None] & inside_X[None, :], other=0.0).to(COMPUTE)
        total_LX = tl.dot(part_BL.T, part_BX, total_LX, input_precision="ieee")
    target_LX = out_ptr + (slot.to(tl.int64) * LEFT + left_L)[:, None] * RIGHT + right_X[None, :]
    tl.store(target_LX, total_LX.to(out_ptr.dtype.element_ty), mask=inside_L[:, None] & inside_X[None, :])


def slot_outer(
    left: Tensor,
    right: Tensor,
    schedule: Schedule,
    slots: int,
    tiles: OuterTiles,
    dtype: torch.dtype,
    left_gathered: bool = False,
    right_gathered: bool = False,
    tiles_together: int = 16,
) -> Tensor:
    """Add up outer products of rows for each slot.

    Args:
        left: Rows of places ``[P, L]``, or of tokens ``[N, L]``, contiguous.
        right: Rows of places ``[P, X]``, or of tokens ``[N, X]``, contiguous, in the same type.
        schedule: The pairs sorted by slot.
        slots: S.
        tiles: Sizes of tiles.
        dtype: Of the result; sums are fp32 and cast once.
        left_gathered: Left rows are those of tokens.
        right_gathered: Right rows are those of tokens.
        tiles_together: Rows of tiles that go through the columns together.

    Returns:
        ``[S, L, X]``; zeros for slots without pairs.
    """
    rows, columns = left.shape[1], right.shape[1]
    if not schedule.order_P.shape[0]:
        return torch.zeros(slots, rows, columns, dtype=dtype, device=left.device)
    out_SLX = torch.empty(slots, rows, columns, dtype=dtype, device=left.device)
    if out_SLX.numel():
        block_left, block_right = tiles.of(rows, columns)
        slot_outer_kernel[(triton.cdiv(rows, block_left) * triton.cdiv(columns, block_right), slots)](
            left,
            right,
            schedule.order_P,
            schedule.ends_S,
            out_SLX,
            LEFT=rows,
            RIGHT=columns,
            TOP_K=schedule.slot_NK.shape[1],
            BLOCK_LEFT=block_left,
            BLOCK_RIGHT=block_right,
            BLOCK_PAIRS=tiles.block_pairs,
            TILES_TOGETHER=tiles_together,
            LEFT_GATHERED=left_gathered,
            RIGHT_GATHERED=right_gathered,
            STAGES=tiles.num_stages,
            COMPUTE=compute_type(left.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out_SLX


def slot_outer_twin(
    left: Tensor,
    right: Tensor,
    schedule: Schedule,
    slots: int,
    left_gathered: bool = False,
    right_gathered: bool = False,
) -> Tensor:
    """Say the same in plain torch, in fp32 or wider."""
    wide, top_k = wide_type(left), schedule.slot_NK.shape[1]
    out_SLX = torch.zeros(slots, left.shape[1], right.shape[1], dtype=wide, device=left.device)
    for slot, places, pairs in groups_of(schedule, slots):
        rows = left[pairs // top_k if left_gathered else places].to(wide)
        out_SLX[slot] = rows.T @ right[pairs // top_k if right_gathered else places].to(wide)
    return out_SLX
