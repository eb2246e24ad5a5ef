"""Down projection of few tokens with int4 weights, times the routing weight.

The outputs alone would fill half of a large GPU, so the inner channels are split among programs too; each writes its
own part of the result, which `combine` adds up in a fixed order.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, D splits, O rows of a tile, T tokens of a tile, W words of
a group, B sums of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.int4_layout import Int4Tiles, dequantize_tiles
from moe_kernels.triton_kernels.int4_numbers import (
    group_product,
    nibble_mask,
    scales_of,
    subtract_zeros,
    unpack_plane,
    zeros_apart,
)
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.routing import DecodeRouting


@triton.jit(do_not_specialize=["num_tokens"])
def int4_down_kernel(
    inner_ptr,
    inner_sums_ptr,
    words_ptr,
    pairs_ptr,
    slot_ptr,
    weight_ptr,
    reached_ptr,
    parts_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SUM_OVER: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of outputs of one slot, over some of its groups of channels."""
    slot = tl.program_id(2).to(tl.int64)
    reached = tl.load(reached_ptr + slot + tl.zeros((1, 1), tl.int32))
    if tl.sum(reached) == 0:
        return
    WORDS: tl.constexpr = GROUP // 8
    NUM_GROUPS: tl.constexpr = INNER // GROUP
    GROUPS_OF_A_SPLIT: tl.constexpr = (NUM_GROUPS + SPLITS - 1) // SPLITS
    SUMS: tl.constexpr = GROUP // SUM_OVER
    ZEROS_APART: tl.constexpr = zeros_apart(BLOCK_TOKENS, COMPUTE)
    ZEROS_AT_ONCE: tl.constexpr = 16
    mask = nibble_mask(reached, COMPUTE)
    split = tl.program_id(1)
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    for place in tl.static_range(TOP_K):
        chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_O = slot * NUM_GROUPS * HIDDEN + out_O
    row_T = slot * num_tokens + token_T
    words_OW = words_ptr + row_O[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    input_XT = inner_ptr + row_T[None, :] * INNER + tl.arange(0, 2 * WORDS)[:, None]
    total_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    last = tl.minimum((split + 1) * GROUPS_OF_A_SPLIT, NUM_GROUPS)
    for group in tl.range(split * GROUPS_OF_A_SPLIT, last, num_stages=STAGES):
        tile_words_OW = tl.load(words_OW + group * HIDDEN * WORDS)
        tile_pairs_O = tl.load(pairs_ptr + row_O + group * HIDDEN)
        if not ZEROS_APART:
            sums_T = tl.zeros((BLOCK_TOKENS,), tl.float32)
            for part in tl.static_range(SUMS):
                sums_T += tl.load(
                    inner_sums_ptr + row_T * (INNER // SUM_OVER) + group * SUMS + part, mask=chosen_T, other=0.0
                )
        part_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
        for plane in tl.static_range(4):
            offset = group * GROUP + plane * 2 * WORDS
            part_XT = tl.load(input_XT + offset, mask=chosen_T[None, :], other=0.0).to(COMPUTE)
            numbers = unpack_plane(tile_words_OW, mask, plane, COMPUTE)
            part_OT = tl.dot(numbers, part_XT, part_OT, input_precision="ieee")
        if ZEROS_APART:
            total_OT += part_OT * scales_of(tile_pairs_O)[:, None]
        else:
            total_OT += group_product(part_OT, tile_pairs_O, sums_T, COMPUTE)
    if ZEROS_APART:
        for first in tl.range(split * GROUPS_OF_A_SPLIT * SUMS, last * SUMS, ZEROS_AT_ONCE, num_stages=1):
            sum_B = first + tl.arange(0, ZEROS_AT_ONCE)
            known_B = sum_B < last * SUMS
            sums_BT = tl.load(
                inner_sums_ptr + row_T[None, :] * (INNER // SUM_OVER) + sum_B[:, None],
                mask=known_B[:, None] & chosen_T[None, :],
                other=0.0,
            )
            pairs_OB = pairs_ptr + row_O[:, None] + (sum_B // SUMS)[None, :] * HIDDEN
            total_OT = subtract_zeros(total_OT, tl.load(pairs_OB, mask=known_B[None, :], other=0), sums_BT, COMPUTE)

    # A true loop: the registers of all stores at once would be too many.
    for place in tl.range(0, TOP_K, num_stages=1):
        pair_T = token_T * TOP_K + place
        mine_T = tl.load(slot_ptr + pair_T, mask=token_T < num_tokens, other=-1) == slot
        weight_T = tl.load(weight_ptr + pair_T, mask=mine_T, other=0.0)
        target_OT = parts_ptr + (split * num_tokens * TOP_K + pair_T)[None, :] * HIDDEN + out_O[:, None]
        tl.store(target_OT, total_OT * weight_T[None, :], mask=mine_T[None, :])


def int4_down(
    inner_SNI: Tensor,
    sums_SNB: Tensor,
    down: Int4Tiles,
    routing: DecodeRouting,
    splits: int = 4,
    block_out: int = 64,
    block_tokens: int = 16,
    num_warps: int = 2,
    num_stages: int = 4,
) -> Tensor:
    """Compute the weighted outputs of the experts that tokens chose, in parts.

    Args:
        inner_SNI: Inner activations, ``[S, N, I]``; read only where the token chose the slot.
        sums_SNB: Their sums, fp32 ``[S, N, B]``; so many channels each as divide the group of the weights.
        down: ``[S, H, I]``.
        routing: Who chose which slot, and how much of it.
        splits: D, programs among which the groups of channels are split.
        block_out: Outputs of a tile; divides H.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Groups on their way at a time.

    Returns:
        fp32 ``[D, N, K, H]``, to be added up over D and K; written only for choices of real experts.
    """
    _, num_tokens, inner_size = inner_SNI.shape
    top_k = routing.slot_NK.shape[1]
    parts_DNKH = torch.empty(splits, num_tokens, top_k, down.outputs, dtype=torch.float32, device=inner_SNI.device)
    if inner_SNI.numel():
        int4_down_kernel[(down.outputs // block_out, splits, down.slots)](
            inner_SNI,
            sums_SNB,
            down.words_SGOW,
            down.pairs_SGO,
            routing.slot_NK,
            routing.weight_NK,
            routing.reached_S,
            parts_DNKH,
            num_tokens,
            HIDDEN=down.outputs,
            INNER=inner_size,
            TOP_K=top_k,
            GROUP=down.group,
            SPLITS=splits,
            BLOCK_OUT=block_out,
            BLOCK_TOKENS=block_tokens,
            SUM_OVER=inner_size // sums_SNB.shape[2],
            STAGES=num_stages,
            COMPUTE=compute_type(inner_SNI.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return parts_DNKH


def int4_down_twin(inner_SNI: Tensor, down: Int4Tiles) -> Tensor:
    """Say the same in plain torch, for every slot and token and before the routing weight, in fp32 or wider."""
    wide = torch.promote_types(inner_SNI.dtype, torch.float32)
    return inner_SNI.to(wide) @ dequantize_tiles(down, wide).transpose(1, 2)
