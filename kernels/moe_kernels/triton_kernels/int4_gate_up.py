"""Gate and up projections of few tokens with int4 weights, and SwiGLU: ``inner = silu(gate x) * up x``.

No sorting and no gathering: a tile holds all tokens, and those that did not choose the expert are masked. Experts that
nobody chose return at once.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, G groups along the hidden size, O rows of a tile, T tokens
of a tile, W words of a group, B sums of channels.
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
def int4_gate_up_kernel(
    hidden_ptr,
    sums_ptr,
    words_ptr,
    pairs_ptr,
    slot_ptr,
    reached_ptr,
    inner_ptr,
    inner_sums_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SUM_OVER: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of channels of one slot: gate rows and up rows side by side."""
    slot = tl.program_id(1).to(tl.int64)
    reached = tl.load(reached_ptr + slot + tl.zeros((1, 1), tl.int32))
    if tl.sum(reached) == 0:
        return
    WORDS: tl.constexpr = GROUP // 8
    NUM_GROUPS: tl.constexpr = HIDDEN // GROUP
    ZEROS_APART: tl.constexpr = zeros_apart(BLOCK_TOKENS, COMPUTE)
    ZEROS_AT_ONCE: tl.constexpr = 16
    mask = nibble_mask(reached, COMPUTE)
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    if BLOCK_TOKENS < 64:
        for place in tl.static_range(TOP_K):
            chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot
    else:
        # A true loop: the registers of all choices at once would be too many.
        for place in tl.range(0, TOP_K, num_stages=1):
            chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_O = slot * NUM_GROUPS * 2 * INNER + out_O
    words_OW = words_ptr + row_O[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    input_XT = hidden_ptr + token_T[None, :] * HIDDEN + tl.arange(0, 2 * WORDS)[:, None]
    gate_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    up_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for group in tl.range(0, NUM_GROUPS, num_stages=STAGES):
        first = group * 2 * INNER
        gate_words_OW = tl.load(words_OW + first * WORDS)
        up_words_OW = tl.load(words_OW + (first + INNER) * WORDS)
        gate_pairs_O = tl.load(pairs_ptr + row_O + first)
        up_pairs_O = tl.load(pairs_ptr + row_O + first + INNER)
        if not ZEROS_APART:
            sums_T = tl.load(sums_ptr + token_T * NUM_GROUPS + group, mask=chosen_T, other=0.0)
        gate_part_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
        up_part_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
        for plane in tl.static_range(4):
            offset = group * GROUP + plane * 2 * WORDS
            part_XT = tl.load(input_XT + offset, mask=chosen_T[None, :], other=0.0).to(COMPUTE)
            gate_numbers = unpack_plane(gate_words_OW, mask, plane, COMPUTE)
            gate_part_OT = tl.dot(gate_numbers, part_XT, gate_part_OT, input_precision="ieee")
            up_numbers = unpack_plane(up_words_OW, mask, plane, COMPUTE)
            up_part_OT = tl.dot(up_numbers, part_XT, up_part_OT, input_precision="ieee")
        if ZEROS_APART:
            gate_OT += gate_part_OT * scales_of(gate_pairs_O)[:, None]
            up_OT += up_part_OT * scales_of(up_pairs_O)[:, None]
        else:
            gate_OT += group_product(gate_part_OT, gate_pairs_O, sums_T, COMPUTE)
            up_OT += group_product(up_part_OT, up_pairs_O, sums_T, COMPUTE)
    if ZEROS_APART:
        # A true loop, by a bound that the compiler does not know: unrolled, it takes too many registers.
        for first in tl.range(0, NUM_GROUPS * tl.sum(reached), ZEROS_AT_ONCE, num_stages=1):
            group_G = first + tl.arange(0, ZEROS_AT_ONCE)
            known_G = group_G < NUM_GROUPS
            sums_GT = tl.load(
                sums_ptr + token_T[None, :] * NUM_GROUPS + group_G[:, None],
                mask=known_G[:, None] & chosen_T[None, :],
                other=0.0,
            )
            pairs_OG = pairs_ptr + row_O[:, None] + group_G[None, :] * (2 * INNER)
            gate_OT = subtract_zeros(gate_OT, tl.load(pairs_OG, mask=known_G[None, :], other=0), sums_GT, COMPUTE)
            up_pairs_OG = tl.load(pairs_OG + INNER, mask=known_G[None, :], other=0)
            up_OT = subtract_zeros(up_OT, up_pairs_OG, sums_GT, COMPUTE)

    inner_OT = (gate_OT / (1 + tl.exp(-gate_OT)) * up_OT).to(inner_ptr.dtype.element_ty)
    row_T = slot * num_tokens + token_T
    tl.store(inner_ptr + row_T[None, :] * INNER + out_O[:, None], inner_OT, mask=chosen_T[None, :])
    # Of the numbers as they are stored: what the next product multiplies.
    SUMS: tl.constexpr = BLOCK_OUT // SUM_OVER
    sums_BT = tl.sum(tl.reshape(inner_OT.to(tl.float32), (SUMS, SUM_OVER, BLOCK_TOKENS)), 1)
    sum_B = tl.program_id(0) * SUMS + tl.arange(0, SUMS)
    tl.store(inner_sums_ptr + row_T[None, :] * (INNER // SUM_OVER) + sum_B[:, None], sums_BT, mask=chosen_T[None, :])


def int4_gate_up(
    hidden_NH: Tensor,
    sums_NG: Tensor,
    gate_up: Int4Tiles,
    routing: DecodeRouting,
    sum_over: int,
    block_out: int = 64,
    block_tokens: int = 16,
    num_warps: int = 2,
    num_stages: int = 4,
) -> tuple[Tensor, Tensor]:
    """Compute the inner activations of the experts that tokens chose.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``, contiguous.
        sums_NG: Its sums over the groups of the weights, fp32 ``[N, G]``.
        gate_up: Gate rows, then up rows, ``[S, 2I, H]``.
        routing: Who chose which slot.
        sum_over: Channels that one sum of the inner activations covers; divides the group of the down projection.
        block_out: Channels of a tile; divides I.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Groups on their way at a time.

    Returns:
        Inner activations ``[S, N, I]`` and their sums, fp32 ``[S, N, I / sum_over]``; written only where the token
        chose the slot.
    """
    num_tokens, hidden_size = hidden_NH.shape
    inner_size = gate_up.outputs // 2
    inner_SNI = hidden_NH.new_empty(gate_up.slots, num_tokens, inner_size)
    sums_SNB = torch.empty(
        gate_up.slots, num_tokens, inner_size // sum_over, dtype=torch.float32, device=hidden_NH.device
    )
    if inner_SNI.numel():
        int4_gate_up_kernel[(inner_size // block_out, gate_up.slots)](
            hidden_NH,
            sums_NG,
            gate_up.words_SGOW,
            gate_up.pairs_SGO,
            routing.slot_NK,
            routing.reached_S,
            inner_SNI,
            sums_SNB,
            num_tokens,
            HIDDEN=hidden_size,
            INNER=inner_size,
            TOP_K=routing.slot_NK.shape[1],
            GROUP=gate_up.group,
            BLOCK_OUT=block_out,
            BLOCK_TOKENS=block_tokens,
            SUM_OVER=sum_over,
            STAGES=num_stages,
            COMPUTE=compute_type(hidden_NH.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return inner_SNI, sums_SNB


def int4_gate_up_twin(hidden_NH: Tensor, gate_up: Int4Tiles) -> Tensor:
    """Say the same in plain torch, for every slot and token, in fp32 or wider: ``[S, N, I]``."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gate_SNI, up_SNI = (hidden_NH.to(wide) @ dequantize_tiles(gate_up, wide).transpose(1, 2)).chunk(2, -1)
    return torch.nn.functional.silu(gate_SNI) * up_SNI
