"""Down projection of many tokens, times the routing weight; each pair's output goes to its own place of a table.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, P places of pairs sorted by slot, M places of a tile, O
outputs of a tile, X channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.grouped_gate_up import (
    has_descriptors,
    processors,
    tile_of,
    weight_tile,
    weights_of,
)
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule


@triton.jit
def grouped_down_kernel(
    inner_ptr,
    weights,
    order_ptr,
    share_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    parts_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """All tiles whose numbers leave the same rest."""
    TILES_OUT: tl.constexpr = (HIDDEN + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_m = tl.load(num_tiles_ptr)
    in_X = tl.arange(0, BLOCK_IN)
    for number in tl.range(tl.program_id(0), tiles_m * TILES_OUT, tl.num_programs(0)):
        tile, column = tile_of(number, tiles_m, TILES_OUT, TILES_TOGETHER)
        slot = tl.load(tile_slot_ptr + tile)
        place_M = tl.load(tile_first_ptr + tile).to(tl.int64) + tl.arange(0, BLOCK_ROWS)
        known_M = place_M < tl.load(ends_ptr + slot)
        input_MX = inner_ptr + place_M[:, None] * INNER + in_X[None, :]
        total_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first in tl.range(0, INNER, BLOCK_IN, num_stages=STAGES):
            if INNER % BLOCK_IN == 0:
                part_MX = tl.load(input_MX + first, mask=known_M[:, None], other=0.0).to(COMPUTE)
            else:
                inside_MX = known_M[:, None] & (first + in_X < INNER)[None, :]
                part_MX = tl.load(input_MX + first, mask=inside_MX, other=0.0).to(COMPUTE)
            part_OX = weight_tile(weights, slot, column, first, HIDDEN, INNER, BLOCK_OUT, BLOCK_IN, DESCRIPTORS).to(
                COMPUTE
            )
            total_MO = tl.dot(part_MX, part_OX.T, total_MO, input_precision="ieee")
        pair_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64)
        share_M = tl.load(share_ptr + pair_M, mask=known_M, other=0.0)
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        target_MO = parts_ptr + pair_M[:, None] * HIDDEN + out_O[None, :]
        tl.store(target_MO, total_MO * share_M[:, None], mask=known_M[:, None] & (out_O < HIDDEN)[None, :])


def grouped_down(
    inner_PI: Tensor,
    down_SHI: Tensor,
    weight_NK: Tensor,
    schedule: Schedule,
    block_out: int = 256,
    block_in: int = 64,
    tiles_together: int = 16,
    num_warps: int = 8,
    num_stages: int = 3,
    programs: int | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Compute the weighted outputs of all pairs that reach a real expert.

    Args:
        inner_PI: Inner activations in the order of the schedule.
        down_SHI: ``[S, H, I]``, contiguous.
        weight_NK: Routing weights, fp32, contiguous.
        schedule: The pairs sorted by slot.
        block_out: Outputs of a tile.
        block_in: Channels of a tile.
        tiles_together: Rows of tiles that go through the weights together.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.
        programs: Programs that stay; one for each of the GPU's processors where None.
        descriptors: Load weights by descriptors; where None, decided by `has_descriptors`.

    Returns:
        fp32 ``[1, N, K, H]``, for `combine`; written only for choices of real experts.
    """
    slots, hidden_size, inner_size = down_SHI.shape
    descriptors = has_descriptors(down_SHI) if descriptors is None else descriptors
    num_tokens, top_k = weight_NK.shape
    parts_1NKH = torch.empty(1, num_tokens, top_k, hidden_size, dtype=torch.float32, device=inner_PI.device)
    if inner_PI.numel() and slots:
        grouped_down_kernel[(programs or processors(inner_PI.device),)](
            inner_PI,
            weights_of(down_SHI, block_out, block_in) if descriptors else down_SHI,
            schedule.order_P,
            weight_NK,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            parts_1NKH,
            HIDDEN=hidden_size,
            INNER=inner_size,
            BLOCK_ROWS=schedule.tile_rows,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            TILES_TOGETHER=tiles_together,
            STAGES=num_stages,
            DESCRIPTORS=descriptors,
            COMPUTE=compute_type(inner_PI.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return parts_1NKH


def grouped_down_twin(inner_PI: Tensor, down_SHI: Tensor, weight_NK: Tensor, schedule: Schedule) -> Tensor:
    """Say the same in plain torch, in fp32 or wider; zeros where a choice is no real expert."""
    wide = torch.promote_types(inner_PI.dtype, torch.float32)
    parts = torch.zeros(weight_NK.numel(), down_SHI.shape[1], dtype=wide, device=inner_PI.device)
    start = 0
    for down_HI, end in zip(down_SHI, schedule.ends_S.tolist(), strict=True):
        pairs = schedule.order_P[start:end].long()
        share_P1 = weight_NK.reshape(-1)[pairs, None].to(wide)
        parts[pairs] = share_P1 * (inner_PI[start:end].to(wide) @ down_HI.to(wide).T)
        start = end
    return parts.view(1, *weight_NK.shape, down_SHI.shape[1])
