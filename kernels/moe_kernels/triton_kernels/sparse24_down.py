"""Down projection of few tokens with 2:4 weights, times the routing weight, in parts that `combine` adds up.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, D splits, O rows of a tile, T tokens of a tile, B bytes of
metadata of a row of it, X = 2 B channels of a plane of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.routing import DecodeRouting
from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles, expand_tiles
from moe_kernels.triton_kernels.sparse24_numbers import load_groups, load_places, plane_operand


@triton.jit(do_not_specialize=["num_tokens"])
def sparse24_down_kernel(
    inner_ptr,
    words_ptr,
    metadata_ptr,
    slot_ptr,
    share_ptr,
    reached_ptr,
    parts_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of outputs of one slot, over some of its channels."""
    slot = tl.program_id(2).to(tl.int64)
    if tl.load(reached_ptr + slot) == 0:
        return
    dtype: tl.constexpr = inner_ptr.dtype.element_ty
    BYTES: tl.constexpr = BLOCK_IN // 8
    ROW_BYTES: tl.constexpr = INNER // 8
    TAIL: tl.constexpr = ROW_BYTES % BYTES != 0
    TILES: tl.constexpr = (ROW_BYTES + BYTES - 1) // BYTES
    TILES_OF_A_SPLIT: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    for place in tl.static_range(TOP_K):
        chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    byte_B = tl.arange(0, BYTES)
    column_X = tl.arange(0, 2 * BYTES)
    # Two neighbours of every eight channels.
    in_X = column_X // 2 * 8 + column_X % 2
    row_O = slot * HIDDEN + tl.minimum(out_O, HIDDEN - 1)
    place_OB = row_O[:, None] * ROW_BYTES + byte_B[None, :]
    input_XT = inner_ptr + (slot * num_tokens + token_T)[None, :] * INNER + in_X[:, None]
    total_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    last = tl.minimum((split + 1) * TILES_OF_A_SPLIT, TILES)
    for tile in tl.range(split * TILES_OF_A_SPLIT, last, num_stages=STAGES):
        first = tile * BYTES
        inside_OB = (first + byte_B < ROW_BYTES)[None, :]
        read_XT = chosen_T[None, :]
        if TAIL:
            read_XT = (first * 8 + in_X < INNER)[:, None] & chosen_T[None, :]
        one_OB, two_OB = load_groups(words_ptr, place_OB + first, inside_OB, dtype, TAIL)
        places_OB = load_places(metadata_ptr, place_OB + first, inside_OB, TAIL)
        for plane in tl.static_range(4):
            part_XT = tl.load(input_XT + first * 8 + 2 * plane, mask=read_XT, other=0.0).to(COMPUTE)
            part_OX = plane_operand(one_OB, two_OB, places_OB, plane, dtype, COMPUTE)
            total_OT = tl.dot(part_OX, part_XT, total_OT, input_precision="ieee")

    # A true loop: the registers of all stores at once would be too many.
    for place in tl.range(0, TOP_K, num_stages=1):
        pair_T = token_T * TOP_K + place
        mine_T = tl.load(slot_ptr + pair_T, mask=token_T < num_tokens, other=-1) == slot
        share_T = tl.load(share_ptr + pair_T, mask=mine_T, other=0.0)
        target_OT = parts_ptr + (split * num_tokens * TOP_K + pair_T)[None, :] * HIDDEN + out_O[:, None]
        tl.store(target_OT, total_OT * share_T[None, :], mask=(out_O < HIDDEN)[:, None] & mine_T[None, :])


def sparse24_down(
    inner_SNI: Tensor,
    down: Sparse24Tiles,
    routing: DecodeRouting,
    splits: int = 4,
    block_out: int = 64,
    block_in: int = 128,
    block_tokens: int = 16,
    num_warps: int = 2,
    num_stages: int = 4,
) -> Tensor:
    """Compute the weighted outputs of the experts that tokens chose, in parts.

    Args:
        inner_SNI: Inner activations, ``[S, N, I]``; read only where the token chose the slot.
        down: ``[S, H, I]``, with values in the type of the activations; I divisible by 8.
        routing: Who chose which slot, and how much of it.
        splits: D, programs among which the channels are split.
        block_out: Outputs of a tile.
        block_in: Channels of a tile, zeros included; at least 64.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.

    Returns:
        fp32 ``[D, N, K, H]``, to be added up over D and K; written only for choices of real experts.
    """
    slots, num_tokens, inner_size = inner_SNI.shape
    top_k = routing.slot_NK.shape[1]
    parts_DNKH = torch.empty(splits, num_tokens, top_k, down.outputs, dtype=torch.float32, device=inner_SNI.device)
    if slots and num_tokens:
        sparse24_down_kernel[(triton.cdiv(down.outputs, block_out), splits, slots)](
            inner_SNI,
            down.words,
            down.metadata_SOB,
            routing.slot_NK,
            routing.weight_NK,
            routing.reached_S,
            parts_DNKH,
            num_tokens,
            HIDDEN=down.outputs,
            INNER=inner_size,
            TOP_K=top_k,
            SPLITS=splits,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            BLOCK_TOKENS=block_tokens,
            STAGES=num_stages,
            COMPUTE=compute_type(inner_SNI.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return parts_DNKH


def sparse24_down_twin(inner_SNI: Tensor, down: Sparse24Tiles) -> Tensor:
    """Say the same in plain torch, for every slot and token and before the routing weight, in fp32 or wider."""
    wide = torch.promote_types(inner_SNI.dtype, torch.float32)
    return inner_SNI.to(wide) @ expand_tiles(down, wide).transpose(1, 2)
