"""Gate and up projections of few tokens with 2:4 weights, and SwiGLU: ``inner = silu(gate x) * up x``.

As with dense weights, of which half is read: zeros are put in between in registers. A tile holds all tokens, and those
that did not choose the expert are masked; experts that nobody chose return at once.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, O rows of a tile, T tokens of a tile, B bytes of metadata
of a row of it, X = 2 B inputs of a plane of it.
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
def sparse24_gate_up_kernel(
    hidden_ptr,
    words_ptr,
    metadata_ptr,
    slot_ptr,
    reached_ptr,
    inner_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of channels of one slot: gate rows and up rows side by side."""
    slot = tl.program_id(1).to(tl.int64)
    if tl.load(reached_ptr + slot) == 0:
        return
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    BYTES: tl.constexpr = BLOCK_IN // 8
    ROW_BYTES: tl.constexpr = HIDDEN // 8
    TAIL: tl.constexpr = ROW_BYTES % BYTES != 0
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    for place in tl.static_range(TOP_K):
        chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    byte_B = tl.arange(0, BYTES)
    column_X = tl.arange(0, 2 * BYTES)
    # Two neighbours of every eight inputs.
    in_X = column_X // 2 * 8 + column_X % 2
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask.
    row_O = slot * 2 * INNER + tl.minimum(out_O, INNER - 1)
    gate_OB = row_O[:, None] * ROW_BYTES + byte_B[None, :]
    up_OB = gate_OB + INNER * ROW_BYTES
    input_XT = hidden_ptr + token_T[None, :] * HIDDEN + in_X[:, None]
    gate_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    up_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for first in tl.range(0, ROW_BYTES, BYTES, num_stages=STAGES):
        inside_OB = (first + byte_B < ROW_BYTES)[None, :]
        read_XT = chosen_T[None, :]
        if TAIL:
            read_XT = (first * 8 + in_X < HIDDEN)[:, None] & chosen_T[None, :]
        gate_one_OB, gate_two_OB = load_groups(words_ptr, gate_OB + first, inside_OB, dtype, TAIL)
        up_one_OB, up_two_OB = load_groups(words_ptr, up_OB + first, inside_OB, dtype, TAIL)
        gate_places_OB = load_places(metadata_ptr, gate_OB + first, inside_OB, TAIL)
        up_places_OB = load_places(metadata_ptr, up_OB + first, inside_OB, TAIL)
        for plane in tl.static_range(4):
            part_XT = tl.load(input_XT + first * 8 + 2 * plane, mask=read_XT, other=0.0).to(COMPUTE)
            gate_OX = plane_operand(gate_one_OB, gate_two_OB, gate_places_OB, plane, dtype, COMPUTE)
            gate_OT = tl.dot(gate_OX, part_XT, gate_OT, input_precision="ieee")
            up_OX = plane_operand(up_one_OB, up_two_OB, up_places_OB, plane, dtype, COMPUTE)
            up_OT = tl.dot(up_OX, part_XT, up_OT, input_precision="ieee")

    inner_OT = gate_OT / (1 + tl.exp(-gate_OT)) * up_OT
    target_OT = inner_ptr + (slot * num_tokens + token_T)[None, :] * INNER + out_O[:, None]
    here_OT = (out_O < INNER)[:, None] & chosen_T[None, :]
    tl.store(target_OT, inner_OT.to(inner_ptr.dtype.element_ty), mask=here_OT)


def sparse24_gate_up(
    hidden_NH: Tensor,
    gate_up: Sparse24Tiles,
    routing: DecodeRouting,
    block_out: int = 64,
    block_in: int = 128,
    block_tokens: int = 16,
    num_warps: int = 2,
    num_stages: int = 4,
) -> Tensor:
    """Compute the inner activations of the experts that tokens chose.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``, contiguous.
        gate_up: Gate rows, then up rows, ``[S, 2I, H]``, with values in the type of the input; H divisible by 8.
        routing: Who chose which slot.
        block_out: Channels of a tile.
        block_in: Inputs of a tile, zeros included; at least 64.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.

    Returns:
        ``[S, N, I]``; written only where the token chose the slot.
    """
    num_tokens, hidden_size = hidden_NH.shape
    inner_size = gate_up.outputs // 2
    inner_SNI = hidden_NH.new_empty(gate_up.slots, num_tokens, inner_size)
    if inner_SNI.numel():
        sparse24_gate_up_kernel[(triton.cdiv(inner_size, block_out), gate_up.slots)](
            hidden_NH,
            gate_up.words,
            gate_up.metadata_SOB,
            routing.slot_NK,
            routing.reached_S,
            inner_SNI,
            num_tokens,
            HIDDEN=hidden_size,
            INNER=inner_size,
            TOP_K=routing.slot_NK.shape[1],
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            BLOCK_TOKENS=block_tokens,
            STAGES=num_stages,
            COMPUTE=compute_type(hidden_NH.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return inner_SNI


def sparse24_gate_up_twin(hidden_NH: Tensor, gate_up: Sparse24Tiles) -> Tensor:
    """Say the same in plain torch, for every slot and token, in fp32 or wider: ``[S, N, I]``."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gate_SNI, up_SNI = (hidden_NH.to(wide) @ expand_tiles(gate_up, wide).transpose(1, 2)).chunk(2, -1)
    return torch.nn.functional.silu(gate_SNI) * up_SNI
