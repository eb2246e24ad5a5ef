"""Rows of places times the matrix of their slot, in either direction; each pair's result has its own place in a table.

The down projection of the forward pass (times the routing weight) and the way back through the gate and up projections.

Legend: N tokens, K top-k, S slots, P places of pairs sorted by slot, M places of a tile, O outputs, X inputs, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.dispatch import Tiles
from moe_kernels.triton_kernels.grouped_gate_up import has_descriptors, processors, tile_of, weight_tile, weights_of
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.training.tiles import (
    RANK_TILE,
    add_low_rank,
    groups_of,
    quarters_of,
    row_tile,
    transposed_tile,
    wide_type,
)


@triton.jit
def pairs_product_kernel(
    rows_ptr,
    weights,
    reads_ptr,
    gives_ptr,
    order_ptr,
    share_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    parts_ptr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """All tiles whose numbers leave the same rest."""
    TILES_OUT: tl.constexpr = (OUTPUTS + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_m = tl.load(num_tiles_ptr)
    in_X = tl.arange(0, BLOCK_IN)
    for number in tl.range(tl.program_id(0), tiles_m * TILES_OUT, tl.num_programs(0)):
        tile, column = tile_of(number, tiles_m, TILES_OUT, TILES_TOGETHER)
        slot = tl.load(tile_slot_ptr + tile)
        place_M = tl.load(tile_first_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
        known_M = place_M < tl.load(ends_ptr + slot)
        input_MX = rows_ptr + place_M[:, None] * INPUTS + in_X[None, :]
        total_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first in tl.range(0, INPUTS, BLOCK_IN, num_stages=STAGES):
            part_MX = row_tile(input_MX, first, known_M, in_X, INPUTS, BLOCK_IN).to(COMPUTE)
            if TRANSPOSED:
                part_XO = transposed_tile(
                    weights, slot, column, first, INPUTS, OUTPUTS, BLOCK_OUT, BLOCK_IN, DESCRIPTORS
                ).to(COMPUTE)
            else:
                part_OX = weight_tile(weights, slot, column, first, OUTPUTS, INPUTS, BLOCK_OUT, BLOCK_IN, DESCRIPTORS)
                part_XO = part_OX.to(COMPUTE).T
            total_MO = tl.dot(part_MX, part_XO, total_MO, input_precision="ieee")
        pair_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64)
        if SHARED:
            # Low-rank reads carry the weight already.
            total_MO *= tl.load(share_ptr + pair_M, mask=known_M, other=0.0)[:, None]
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside_O = out_O < OUTPUTS
        if RANK > 0:
            total_MO = add_low_rank(
                total_MO,
                reads_ptr,
                gives_ptr,
                place_M,
                known_M,
                slot,
                out_O,
                inside_O,
                OUTPUTS,
                RANK,
                BLOCK_RANK,
                TRANSPOSED,
                COMPUTE,
            )
        # Quarter after quarter: all addresses of a tile at once would not fit into the registers.
        quarters = quarters_of(total_MO)
        for quarter in tl.static_range(4):
            out_O = column * BLOCK_OUT + quarter * (BLOCK_OUT // 4) + tl.arange(0, BLOCK_OUT // 4)
            target_MO = parts_ptr + pair_M[:, None] * OUTPUTS + out_O[None, :]
            tl.store(target_MO, quarters[quarter], mask=known_M[:, None] & (out_O < OUTPUTS)[None, :])


def pairs_product(
    rows_PX: Tensor,
    matrix: Tensor,
    schedule: Schedule,
    tiles: Tiles,
    transposed: bool,
    weight_NK: Tensor | None = None,
    reads_PR: Tensor | None = None,
    gives: Tensor | None = None,
    tiles_together: int = 16,
    programs: int | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Multiply rows of places with the matrix of their slot.

    Args:
        rows_PX: Rows in the order of the schedule, contiguous; places behind the last are not read.
        matrix: ``[S, O, X]``, or ``[S, X, O]`` where ``transposed``, contiguous, in the type of the rows.
        schedule: The pairs sorted by slot; its tiles' rows are those of the tiles here.
        tiles: Sizes of tiles.
        transposed: The matrix, and that of a low-rank term, lie the other way round.
        weight_NK: Routing weights in fp32 to multiply the product with, or None.
        reads_PR: What a low-rank term read, scaled and weighted as it is to be added, or None.
        gives: What it gives, ``[S, O, R]``, or ``[S, R, O]`` where ``transposed``; of any floating type.
        tiles_together: Rows of tiles that go through the weights together.
        programs: Programs that stay; one for each of the GPU's processors where None.
        descriptors: Load weights by descriptors; where None, decided by `has_descriptors` and the sizes.

    Returns:
        fp32 ``[1, N, K, O]``, for `combine`; written only for choices of real experts.
    """
    slots, (places, inputs) = matrix.shape[0], rows_PX.shape
    outputs = matrix.shape[2 if transposed else 1]
    if descriptors is None:
        descriptors = has_descriptors(matrix)
    descriptors = descriptors and not (transposed and inputs % tiles.block_in)
    parts_1NKO = torch.empty(1, *schedule.slot_NK.shape, outputs, dtype=torch.float32, device=rows_PX.device)
    if places and outputs and slots:
        block = (tiles.block_in, tiles.block_out) if transposed else (tiles.block_out, tiles.block_in)
        rank = 0 if reads_PR is None else reads_PR.shape[1]
        pairs_product_kernel[(programs or processors(rows_PX.device),)](
            rows_PX,
            weights_of(matrix, *block) if descriptors else matrix,
            rows_PX if reads_PR is None else reads_PR,
            rows_PX if gives is None else gives,
            schedule.order_P,
            rows_PX if weight_NK is None else weight_NK,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            parts_1NKO,
            INPUTS=inputs,
            OUTPUTS=outputs,
            RANK=rank,
            BLOCK_ROWS=schedule.tile_rows,
            BLOCK_OUT=tiles.block_out,
            BLOCK_IN=tiles.block_in,
            BLOCK_RANK=RANK_TILE,
            TILES_TOGETHER=tiles_together,
            TRANSPOSED=transposed,
            SHARED=weight_NK is not None,
            STAGES=tiles.num_stages,
            DESCRIPTORS=descriptors,
            COMPUTE=compute_type(rows_PX.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return parts_1NKO


def pairs_product_twin(
    rows_PX: Tensor,
    matrix: Tensor,
    schedule: Schedule,
    transposed: bool,
    weight_NK: Tensor | None = None,
    reads_PR: Tensor | None = None,
    gives: Tensor | None = None,
) -> Tensor:
    """Say the same in plain torch, in fp32 or wider; zeros where a choice is no real expert."""
    wide, outputs = wide_type(rows_PX), matrix.shape[2 if transposed else 1]
    parts = torch.zeros(schedule.slot_NK.numel(), outputs, dtype=wide, device=rows_PX.device)
    for slot, places, pairs in groups_of(schedule, matrix.shape[0]):
        part = rows_PX[places].to(wide) @ (matrix[slot] if transposed else matrix[slot].T).to(wide)
        if weight_NK is not None:
            part = part * weight_NK.reshape(-1)[pairs, None].to(wide)
        if reads_PR is not None and gives is not None:
            part = part + reads_PR[places].to(wide) @ (gives[slot] if transposed else gives[slot].T).to(wide)
        parts[pairs] = part
    return parts.view(1, *schedule.slot_NK.shape, outputs)
