"""Down projection of few tokens with dense weights, times the routing weight, in parts that `combine` adds up.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, D splits, O rows of a tile, T tokens of a tile, X channels
of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.routing import DecodeRouting


@triton.jit(do_not_specialize=["num_tokens"])
def dense_down_kernel(
    inner_ptr,
    weight_ptr,
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
    TILES: tl.constexpr = (INNER + BLOCK_IN - 1) // BLOCK_IN
    TILES_OF_A_SPLIT: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    split = tl.program_id(1)
    token_T = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    chosen_T = tl.zeros((BLOCK_TOKENS,), tl.int1)
    for place in tl.static_range(TOP_K):
        chosen_T |= tl.load(slot_ptr + token_T * TOP_K + place, mask=token_T < num_tokens, other=-1) == slot

    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_X = tl.arange(0, BLOCK_IN)
    row_O = slot * HIDDEN + tl.minimum(out_O, HIDDEN - 1)
    weight_OX = weight_ptr + row_O[:, None] * INNER + in_X[None, :]
    input_XT = inner_ptr + (slot * num_tokens + token_T)[None, :] * INNER + in_X[:, None]
    total_OT = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    last = tl.minimum((split + 1) * TILES_OF_A_SPLIT, TILES)
    for tile in tl.range(split * TILES_OF_A_SPLIT, last, num_stages=STAGES):
        first = tile * BLOCK_IN
        if INNER % BLOCK_IN == 0:
            part_XT = tl.load(input_XT + first, mask=chosen_T[None, :], other=0.0).to(COMPUTE)
            part_OX = tl.load(weight_OX + first).to(COMPUTE)
        else:
            inside_X = first + in_X < INNER
            both_XT = inside_X[:, None] & chosen_T[None, :]
            part_XT = tl.load(input_XT + first, mask=both_XT, other=0.0).to(COMPUTE)
            part_OX = tl.load(weight_OX + first, mask=inside_X[None, :], other=0.0).to(COMPUTE)
        total_OT = tl.dot(part_OX, part_XT, total_OT, input_precision="ieee")

    # A true loop: the registers of all stores at once would be too many.
    for place in tl.range(0, TOP_K, num_stages=1):
        pair_T = token_T * TOP_K + place
        mine_T = tl.load(slot_ptr + pair_T, mask=token_T < num_tokens, other=-1) == slot
        share_T = tl.load(share_ptr + pair_T, mask=mine_T, other=0.0)
        target_OT = parts_ptr + (split * num_tokens * TOP_K + pair_T)[None, :] * HIDDEN + out_O[:, None]
        tl.store(target_OT, total_OT * share_T[None, :], mask=(out_O < HIDDEN)[:, None] & mine_T[None, :])


def dense_down(
    inner_SNI: Tensor,
    down_SHI: Tensor,
    routing: DecodeRouting,
    splits: int = 4,
    block_out: int = 64,
    block_in: int = 64,
    block_tokens: int = 16,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Tensor:
    """Compute the weighted outputs of the experts that tokens chose, in parts.

    Args:
        inner_SNI: Inner activations, ``[S, N, I]``; read only where the token chose the slot.
        down_SHI: ``[S, H, I]``, contiguous, in the type of the activations.
        routing: Who chose which slot, and how much of it.
        splits: D, programs among which the channels are split.
        block_out: Outputs of a tile.
        block_in: Channels of a tile.
        block_tokens: Tokens of a tile, at least N.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.

    Returns:
        fp32 ``[D, N, K, H]``, to be added up over D and K; written only for choices of real experts.
    """
    (slots, num_tokens, inner_size), hidden_size = inner_SNI.shape, down_SHI.shape[1]
    top_k = routing.slot_NK.shape[1]
    parts_DNKH = torch.empty(splits, num_tokens, top_k, hidden_size, dtype=torch.float32, device=inner_SNI.device)
    if slots and num_tokens:
        dense_down_kernel[(triton.cdiv(hidden_size, block_out), splits, slots)](
            inner_SNI,
            down_SHI,
            routing.slot_NK,
            routing.weight_NK,
            routing.reached_S,
            parts_DNKH,
            num_tokens,
            HIDDEN=hidden_size,
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


def dense_down_twin(inner_SNI: Tensor, down_SHI: Tensor) -> Tensor:
    """Say the same in plain torch, for every slot and token and before the routing weight, in fp32 or wider."""
    wide = torch.promote_types(inner_SNI.dtype, torch.float32)
    return inner_SNI.to(wide) @ down_SHI.to(wide).transpose(1, 2)
