"""What the kernels for few tokens need to know before they start: who chose which slot, and sums of the input.

Legend: N tokens, H hidden, E experts, K top-k, S slots, G groups along the hidden size, P pairs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.int4_layout import group_sums

_SLOTS_OF_A_TILE = 16


@dataclass(frozen=True)
class DecodeRouting:
    """Who chose which slot.

    Attributes:
        slot_NK: Entry of the slot map for each choice, int32 ``[N, K]``: a slot, a novice (negative) or ``ABSENT``.
        weight_NK: Routing weights, fp32 ``[N, K]``.
        reached_S: 1 for slots that some token chose, else 0; int32 ``[S]``.
        sums_NG: Sums of the input over groups, fp32 ``[N, G]``; None where nobody needs them.
    """

    slot_NK: Tensor
    weight_NK: Tensor
    reached_S: Tensor
    sums_NG: Tensor | None = None


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_experts"])
def routing_kernel(
    hidden_ptr,
    index_ptr,
    slot_map_ptr,
    slot_ptr,
    reached_ptr,
    sums_ptr,
    num_tokens,
    num_slots,
    num_experts,
    TOP_K: tl.constexpr,
    ABSENT_SLOT: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The first programs take some slots each (the very first one writes the table), the others a token each."""
    program = tl.program_id(0)
    slot_programs = tl.cdiv(num_slots, BLOCK_SLOTS)
    # Without real experts there still is a table to write.
    slot_programs = tl.maximum(slot_programs, 1)
    if program < slot_programs:
        pair_P = tl.arange(0, BLOCK_PAIRS)
        here_P = pair_P < num_tokens * TOP_K
        expert_P = tl.load(index_ptr + pair_P, mask=here_P, other=-1)
        known_P = (expert_P >= 0) & (expert_P < num_experts)
        chosen_P = tl.load(slot_map_ptr + expert_P, mask=known_P, other=ABSENT_SLOT).to(tl.int32)
        if program == 0:
            tl.store(slot_ptr + pair_P, chosen_P, mask=here_P)
        slot_S = program * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        reached_S = tl.max((chosen_P[:, None] == slot_S[None, :]).to(tl.int32), 0)
        tl.store(reached_ptr + slot_S, reached_S, mask=slot_S < num_slots)
    elif GROUP > 0:  # looked at while compiling: hidden sizes need no group that is a power of two
        NUM_GROUPS: tl.constexpr = HIDDEN // GROUP
        token = (program - slot_programs).to(tl.int64)
        for first in tl.range(0, NUM_GROUPS, BLOCK_GROUPS):
            group_G = first + tl.arange(0, BLOCK_GROUPS)
            place_GX = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside_G = group_G < NUM_GROUPS
            numbers_GX = tl.load(hidden_ptr + token * HIDDEN + place_GX, mask=inside_G[:, None], other=0.0)
            tl.store(sums_ptr + token * NUM_GROUPS + group_G, tl.sum(numbers_GX.to(tl.float32), 1), mask=inside_G)


def decode_routing(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    num_slots: int,
    group: int | None = None,
) -> DecodeRouting:
    """Look up the slots that tokens chose, mark those that anybody chose, and add up the input over groups.

    Args:
        hidden_NH: Input of the block, ``[N, H]``, contiguous.
        index_NK: Experts chosen by the router, int64 ``[N, K]``, contiguous; numbers outside ``[0, E)`` mean nobody.
        weight_NK: Their routing weights.
        slot_map_E: Slot or novice of each expert, int64 ``[E]``.
        num_slots: S.
        group: Inputs of one sum; None for no sums.

    Returns:
        The table, without a word from the GPU to the CPU.
    """
    (num_tokens, top_k), hidden_size = index_NK.shape, hidden_NH.shape[1]
    device = hidden_NH.device
    slot_NK = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    reached_S = torch.empty(num_slots, dtype=torch.int32, device=device)
    sums_NG = torch.empty(num_tokens, hidden_size // group, dtype=torch.float32, device=device) if group else None
    if num_tokens:
        grid = max(1, triton.cdiv(num_slots, _SLOTS_OF_A_TILE)) + (num_tokens if group else 0)
        routing_kernel[(grid,)](
            hidden_NH,
            index_NK,
            slot_map_E,
            slot_NK,
            reached_S,
            sums_NG if sums_NG is not None else hidden_NH,
            num_tokens,
            num_slots,
            slot_map_E.shape[0],
            TOP_K=top_k,
            ABSENT_SLOT=ABSENT,
            HIDDEN=hidden_size,
            GROUP=group or 0,
            # Of 64 tokens at most: one shape of tile for all.
            BLOCK_PAIRS=triton.next_power_of_2(max(num_tokens, 64) * top_k),
            BLOCK_SLOTS=_SLOTS_OF_A_TILE,
            BLOCK_GROUPS=16,
        )
    return DecodeRouting(slot_NK, weight_NK.float().contiguous(), reached_S, sums_NG)


def decode_routing_twin(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    num_slots: int,
    group: int | None = None,
) -> DecodeRouting:
    """Say the same as :func:`decode_routing` in plain torch."""
    known_NK = (index_NK >= 0) & (index_NK < slot_map_E.shape[0])
    slot_NK = torch.where(known_NK, slot_map_E[index_NK.clamp(0, slot_map_E.shape[0] - 1)], ABSENT).int()
    numbers_S = torch.arange(num_slots, device=index_NK.device)
    reached_S = (slot_NK.reshape(-1, 1) == numbers_S).any(0).int()
    return DecodeRouting(
        slot_NK, weight_NK.float(), reached_S, group_sums(hidden_NH, group) if group is not None else None
    )
