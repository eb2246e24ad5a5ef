"""Choice of experts: softmax in fp32, the largest probabilities, made to add up to one where the model does so.

Legend: N tokens, E experts, K top-k, T tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    logits_ptr,
    index_ptr,
    weight_ptr,
    num_tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All experts of some tokens."""
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert_E = tl.arange(0, BLOCK_EXPERTS)
    known_T = token_T < num_tokens
    inside_TE = known_T[:, None] & (expert_E < EXPERTS)[None, :]
    logits_TE = tl.load(logits_ptr + token_T[:, None] * EXPERTS + expert_E[None, :], mask=inside_TE, other=0.0)
    logits_TE = tl.where((expert_E < EXPERTS)[None, :], logits_TE.to(tl.float32), -float("inf"))
    shifted_TE = tl.exp(logits_TE - tl.max(logits_TE, 1)[:, None])
    left_TE = shifted_TE / tl.sum(shifted_TE, 1)[:, None]
    # Probabilities are never negative: what is taken, or no expert, falls behind all of them.
    left_TE = tl.where((expert_E < EXPERTS)[None, :], left_TE, -1.0)
    place_K = tl.arange(0, BLOCK_K)
    index_TK = tl.zeros((BLOCK_TOKENS, BLOCK_K), tl.int64)
    weight_TK = tl.zeros((BLOCK_TOKENS, BLOCK_K), tl.float32)
    for place in tl.static_range(TOP_K):
        best_T = tl.argmax(left_TE, 1, tie_break_left=True)
        here_TK = (place_K == place)[None, :]
        index_TK = tl.where(here_TK, best_T[:, None].to(tl.int64), index_TK)
        weight_TK = tl.where(here_TK, tl.max(left_TE, 1)[:, None], weight_TK)
        left_TE = tl.where(expert_E[None, :] == best_T[:, None], -1.0, left_TE)
    if RENORMALIZE:
        weight_TK = weight_TK / tl.sum(weight_TK, 1)[:, None]
    target_TK = token_T[:, None] * TOP_K + place_K[None, :]
    mask_TK = known_T[:, None] & (place_K < TOP_K)[None, :]
    tl.store(index_ptr + target_TK, index_TK, mask=mask_TK)
    tl.store(weight_ptr + target_TK, weight_TK, mask=mask_TK)


def choose_experts(logits_NE: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Choose experts and their weights.

    Args:
        logits_NE: From the router's product, ``[N, E]``, contiguous.
        top_k: K, at most E.
        renormalize: Make the weights of a token add up to one.

    Returns:
        Experts, int64 ``[N, K]``, from the largest probability down, of equal ones the lower number first; and their
        weights, fp32 ``[N, K]``.

    Raises:
        ValueError: More experts to choose than there are.
    """
    num_tokens, experts = logits_NE.shape
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k = {top_k} of {experts} experts: it must lie between 1 and their number")
    index_NK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_NE.device)
    weight_NK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_NE.device)
    if num_tokens:
        block_tokens = 16
        router_kernel[(triton.cdiv(num_tokens, block_tokens),)](
            logits_NE,
            index_NK,
            weight_NK,
            num_tokens,
            EXPERTS=experts,
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            BLOCK_TOKENS=block_tokens,
            BLOCK_EXPERTS=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k),
        )
    return index_NK, weight_NK


def choose_experts_twin(logits_NE: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Say the same as :func:`choose_experts` in plain torch; equal probabilities in the order of the experts."""
    probability_NE = logits_NE.float().softmax(-1)
    # A stable sort keeps equal numbers in order, which torch.topk does not promise.
    weight_NE, index_NE = torch.sort(probability_NE, stable=True, dim=-1, descending=True)
    index_NK, weight_NK = index_NE[:, :top_k].contiguous(), weight_NE[:, :top_k].contiguous()
    return index_NK, weight_NK / weight_NK.sum(-1, keepdim=True) if renormalize else weight_NK
