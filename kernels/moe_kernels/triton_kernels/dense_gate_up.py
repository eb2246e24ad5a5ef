"""Gate and up projections of few tokens with dense weights, and SwiGLU: ``inner = silu(gate x) * up x``.

As with int4 weights: a tile holds all tokens, and those that did not choose the expert are masked; experts that nobody
chose return at once.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, O rows of a tile, T tokens of a tile, X inputs of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.routing import DecodeRouting


@triton.jit(do_not_specialize=["num_tokens"])
def dense_gate_up_kernel(
    hidden_ptr,
    weight_ptr,
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
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    for place in tl.static_range(TOP_K):
        chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_X = tl.arange(0, BLOCK_IN)
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask.
    row_O = slot * 2 * INNER + tl.minimum(out_O, INNER - 1)
    gate_OX = weight_ptr + row_O[:, None] * HIDDEN + in_X[None, :]
    up_OX = gate_OX + INNER * HIDDEN
    input_XT = hidden_ptr + token_T[None, :] * HIDDEN + in_X[:, None]
    gate_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    up_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for first in tl.range(0, HIDDEN, BLOCK_IN, num_stages=STAGES):
        if HIDDEN % BLOCK_IN == 0:
            part_XT = tl.load(input_XT + first, mask=chosen_T[None, :], other=0.0).to(COMPUTE)
            gate_part_OX = tl.load(gate_OX + first).to(COMPUTE)
            up_part_OX = tl.load(up_OX + first).to(COMPUTE)
        else:
            inside_X = first + in_X < HIDDEN
            both_XT = inside_X[:, None] & chosen_T[None, :]
            part_XT = tl.load(input_XT + first, mask=both_XT, other=0.0).to(COMPUTE)
            gate_part_OX = tl.load(gate_OX + first, mask=inside_X[None, :], other=0.0).to(COMPUTE)
            up_part_OX = tl.load(up_OX + first, mask=inside_X[None, :], other=0.0).to(COMPUTE)
        gate_OT = tl.dot(gate_part_OX, part_XT, gate_OT, input_precision="ieee")
        up_OT = tl.dot(up_part_OX, part_XT, up_OT, input_precision="ieee")

    inner_OT = gate_OT / (1 + tl.exp(-gate_OT)) * up_OT
    target_OT = inner_ptr + (slot * num_tokens + token_T)[None, :] * INNER + out_O[:, None]
    here_OT = (out_O < INNER)[:, None] & chosen_T[None, :]
    tl.store(target_OT, inner_OT.to(inner_ptr.dtype.element_ty), mask=here_OT)


def dense_gate_up(
    hidden_NH: Tensor,
    gate_up_S2IH: Tensor,
    routing: DecodeRouting,
    block_out: int = 64,
    block_in: int = 64,
    block_tokens: int = 16,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Tensor:
    """Compute the inner activations of the experts that tokens chose.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``, contiguous.
        gate_up_S2IH: Gate rows, then up rows, ``[S, 2I, H]``, contiguous, in the type of the input.
        routing: Who chose which slot.
        block_out: Channels of a tile.
        block_in: Inputs of a tile.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.

    Returns:
        ``[S, N, I]``; written only where the token chose the slot.
    """
    (num_tokens, hidden_size), (slots, rows, _) = hidden_NH.shape, gate_up_S2IH.shape
    inner_SNI = hidden_NH.new_empty(slots, num_tokens, rows // 2)
    if inner_SNI.numel():
        dense_gate_up_kernel[(triton.cdiv(rows // 2, block_out), slots)](
            hidden_NH,
            gate_up_S2IH,
            routing.slot_NK,
            routing.reached_S,
            inner_SNI,
            num_tokens,
            HIDDEN=hidden_size,
            INNER=rows // 2,
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


def dense_gate_up_twin(hidden_NH: Tensor, gate_up_S2IH: Tensor) -> Tensor:
    """Say the same in plain torch, for every slot and token, in fp32 or wider: ``[S, N, I]``."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gate_SNI, up_SNI = (hidden_NH.to(wide) @ gate_up_S2IH.to(wide).transpose(1, 2)).chunk(2, -1)
    return torch.nn.functional.silu(gate_SNI) * up_SNI
