"""What low-rank terms read: rows times the small matrix of their slot, times a factor.

Each of the four products of a step with few outputs is this one: what the terms of both projections read of their
inputs, and, on the way back, what the gradients read of the matrices that give.

Legend: N tokens, K top-k, P places of pairs sorted by slot, M places of a tile, X inputs, S slots, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.training.tiles import groups_of, row_tile, wide_type

# Few outputs make few programs: tiles of rows are cut smaller.
_ROWS = 32
_MOST_RANKS_OF_A_TILE = 64


@triton.jit(do_not_specialize=["scale"])
def rank_reads_kernel(
    rows_ptr,
    matrix_ptr,
    order_ptr,
    share_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    reads_ptr,
    scale,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GATHERED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Some rows of one tile; programs behind the last tile have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(num_tiles_ptr):
        slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
        first_place = tl.load(tile_first_ptr + tile).to(tl.int64) + tl.program_id(1) * BLOCK_ROWS
        place_M = first_place + tl.arange(0, BLOCK_ROWS)
        known_M = place_M < tl.load(ends_ptr + slot)
        pair_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64)
        row_M = pair_M // TOP_K if GATHERED else place_M
        in_X = tl.arange(0, BLOCK_IN)
        rank_R = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        used_R = rank_R < RANK
        rows_MX = rows_ptr + row_M[:, None] * INPUTS + in_X[None, :]
        total_MR = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
        for first in tl.range(0, INPUTS, BLOCK_IN, num_stages=STAGES):
            part_MX = row_tile(rows_MX, first, known_M, in_X, INPUTS, BLOCK_IN).to(COMPUTE)
            if TRANSPOSED:
                matrix_XR = matrix_ptr + (slot * INPUTS + first + in_X)[:, None] * RANK + rank_R[None, :]
            else:
                matrix_XR = matrix_ptr + (slot * RANK + rank_R)[None, :] * INPUTS + (first + in_X)[:, None]
            inside_XR = (first + in_X < INPUTS)[:, None] & used_R[None, :]
            part_XR = tl.load(matrix_XR, mask=inside_XR, other=0.0).to(COMPUTE)
            total_MR = tl.dot(part_MX, part_XR, total_MR, input_precision="ieee")
        total_MR *= scale
        if SHARED:
            total_MR *= tl.load(share_ptr + pair_M, mask=known_M, other=0.0)[:, None]
        target_MR = reads_ptr + place_M[:, None] * RANK + rank_R[None, :]
        tl.store(target_MR, total_MR.to(reads_ptr.dtype.element_ty), mask=known_M[:, None] & used_R[None, :])


def rank_reads(
    rows_XX: Tensor,
    matrix: Tensor,
    schedule: Schedule,
    scale: float,
    gathered: bool,
    transposed: bool = False,
    weight_NK: Tensor | None = None,
    block_in: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """Multiply rows with the small matrix of their slot.

    Args:
        rows_XX: Rows of tokens ``[N, X]`` or of places ``[P, X]``, contiguous.
        matrix: ``[S, R, X]``, or ``[S, X, R]`` where ``transposed``, contiguous; of any floating type.
        schedule: The pairs sorted by slot.
        scale: Factor.
        gathered: Rows are those of tokens.
        transposed: The matrix lies the other way round.
        weight_NK: Routing weights in fp32 to multiply with, too, or None.
        block_in: Inputs of a tile.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.

    Returns:
        ``[P, R]`` in the type of the rows; places behind the last are not written.
    """
    slots, inputs = matrix.shape[0], rows_XX.shape[1]
    rank = matrix.shape[2 if transposed else 1]
    reads_PR = torch.empty(schedule.order_P.shape[0], rank, dtype=rows_XX.dtype, device=rows_XX.device)
    if reads_PR.numel() and slots:
        rows, block_rank = min(_ROWS, schedule.tile_rows), rank_tile(rank)
        grid = (schedule.tile_slot_M.shape[0], schedule.tile_rows // rows, triton.cdiv(rank, block_rank))
        rank_reads_kernel[grid](
            rows_XX,
            matrix,
            schedule.order_P,
            rows_XX if weight_NK is None else weight_NK,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            reads_PR,
            scale,
            INPUTS=inputs,
            RANK=rank,
            TOP_K=schedule.slot_NK.shape[1],
            BLOCK_ROWS=rows,
            BLOCK_IN=block_in,
            BLOCK_RANK=block_rank,
            GATHERED=gathered,
            TRANSPOSED=transposed,
            SHARED=weight_NK is not None,
            STAGES=num_stages,
            COMPUTE=compute_type(rows_XX.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return reads_PR


def rank_tile(rank: int) -> int:
    """Return how many ranks a program takes: what a product wants at least, or up to 64."""
    return min(max(triton.next_power_of_2(rank), 16), _MOST_RANKS_OF_A_TILE)


def rank_reads_twin(
    rows_XX: Tensor,
    matrix: Tensor,
    schedule: Schedule,
    scale: float,
    gathered: bool,
    transposed: bool = False,
    weight_NK: Tensor | None = None,
) -> Tensor:
    """Say the same in plain torch, in fp32 or wider: ``[P', R]`` with the last place as its end."""
    wide, top_k = wide_type(rows_XX), schedule.slot_NK.shape[1]
    parts = [rows_XX.new_empty(0, matrix.shape[2 if transposed else 1], dtype=wide)]
    for slot, places, pairs in groups_of(schedule, matrix.shape[0]):
        rows = (rows_XX[pairs // top_k] if gathered else rows_XX[places]).to(wide)
        part = scale * rows @ (matrix[slot] if transposed else matrix[slot].T).to(wide)
        parts.append(part if weight_NK is None else part * weight_NK.reshape(-1)[pairs, None].to(wide))
    return torch.cat(parts)
