"""Sum over the chosen experts of every token: parts of real experts, novices, bias and residual.

``y = residual + sum_k (sum_d parts_dk + w_k bias) + sum_{k novice} w_k (vector + map(x))``, always in the same order
and without atomics, in fp32; cast once at the end.

Legend: N tokens, H hidden, K top-k, D splits, S slots, V novices, R ranks of all novices' maps together, T tokens of a
tile, O outputs of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.experts import NoviceMaps
from moe_kernels.triton_kernels.interpreting import compute_type


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    parts_ptr,
    slot_ptr,
    weight_ptr,
    bias_ptr,
    vectors_ptr,
    reads_ptr,
    novice_ptr,
    gives_ptr,
    residual_ptr,
    mixed_ptr,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    NOVICES: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of tokens and outputs."""
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out_O = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known_T = token_T < num_tokens
    inside_O = out_O < HIDDEN
    total_TO = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    for place in tl.static_range(TOP_K):
        pair_T = token_T * TOP_K + place
        slot_T = tl.load(slot_ptr + pair_T, mask=known_T, other=-NOVICES - 1).to(tl.int64)
        weight_T = tl.load(weight_ptr + pair_T, mask=known_T, other=0.0)
        real_TO = (slot_T >= 0)[:, None] & inside_O[None, :]
        for split in tl.static_range(SPLITS):
            row_T = pair_T + tl.cast(split, tl.int64) * num_tokens * TOP_K
            total_TO += tl.load(parts_ptr + row_T[:, None] * HIDDEN + out_O[None, :], mask=real_TO, other=0.0)
        if HAS_BIAS:
            bias_TO = tl.load(bias_ptr + slot_T[:, None] * HIDDEN + out_O[None, :], mask=real_TO, other=0.0)
            total_TO += weight_T[:, None] * bias_TO.to(tl.float32)
        if NOVICES > 0:
            novice_TO = ((slot_T < 0) & (slot_T >= -NOVICES))[:, None] & inside_O[None, :]
            row_T = -1 - slot_T
            vector_TO = tl.load(vectors_ptr + row_T[:, None] * HIDDEN + out_O[None, :], mask=novice_TO, other=0.0)
            total_TO += weight_T[:, None] * vector_TO.to(tl.float32)
    for first in tl.range(0, RANKS, BLOCK_RANKS):
        rank_R = first + tl.arange(0, BLOCK_RANKS)
        used_R = rank_R < RANKS
        novice_R = -1 - tl.load(novice_ptr + rank_R, mask=used_R, other=0)
        weight_TR = tl.zeros((BLOCK_TOKENS, BLOCK_RANKS), tl.float32)
        for place in tl.static_range(TOP_K):
            pair_T = token_T * TOP_K + place
            slot_T = tl.load(slot_ptr + pair_T, mask=known_T, other=0).to(tl.int64)
            weight_T = tl.load(weight_ptr + pair_T, mask=known_T, other=0.0)
            weight_TR += tl.where(slot_T[:, None] == novice_R[None, :], weight_T[:, None], 0.0)
        both_TR = known_T[:, None] & used_R[None, :]
        reads_TR = tl.load(reads_ptr + token_T[:, None] * RANKS + rank_R[None, :], mask=both_TR, other=0.0)
        gives_RO = tl.load(
            gives_ptr + rank_R.to(tl.int64)[:, None] * HIDDEN + out_O[None, :],
            mask=used_R[:, None] & inside_O[None, :],
            other=0.0,
        ).to(COMPUTE)
        weighted_TR = (reads_TR.to(tl.float32) * weight_TR).to(COMPUTE)
        total_TO = tl.dot(weighted_TR, gives_RO, total_TO, input_precision="ieee")
    target_TO = token_T[:, None] * HIDDEN + out_O[None, :]
    here_TO = known_T[:, None] & inside_O[None, :]
    if HAS_RESIDUAL:
        total_TO += tl.load(residual_ptr + target_TO, mask=here_TO, other=0.0).to(tl.float32)
    tl.store(mixed_ptr + target_TO, total_TO.to(mixed_ptr.dtype.element_ty), mask=here_TO)


def combine(
    parts_DNKH: Tensor,
    slot_NK: Tensor,
    weight_NK: Tensor,
    hidden_NH: Tensor,
    novices_VH: Tensor | None = None,
    maps: NoviceMaps | None = None,
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
    block_tokens: int = 16,
    block_out: int = 128,
) -> Tensor:
    """Add up what the chosen experts give.

    Args:
        parts_DNKH: Weighted outputs of real experts in parts, fp32; read only where a token chose a real expert.
        slot_NK: Slot (``>= 0``), novice (``-1 - number``) or nothing (anything below) of each choice, int32.
        weight_NK: Routing weights, fp32.
        hidden_NH: Input of the block after its norm: read by the novices' maps, and its type is that of the result.
        novices_VH: Novice vectors, or None.
        maps: Low-rank maps of the novices, or None.
        bias_SH: Bias of each slot, or None.
        residual_NH: Added to everything, or None.
        block_tokens: Tokens of a tile.
        block_out: Outputs of a tile.

    Returns:
        ``[N, H]`` in the type of ``hidden_NH``.
    """
    splits, num_tokens, top_k, hidden_size = parts_DNKH.shape
    mixed_NH = torch.empty(num_tokens, hidden_size, dtype=hidden_NH.dtype, device=hidden_NH.device)
    if not num_tokens:
        return mixed_NH
    novices = 0 if novices_VH is None else novices_VH.shape[0]
    ranks = maps.in_RH.shape[0] if maps is not None and novices else 0
    reads_NR = hidden_NH.to(maps.in_RH.dtype) @ maps.in_RH.T if maps is not None and ranks else None
    has_bias = bias_SH is not None and bias_SH.shape[0] > 0
    # Whatever is not there is not read: any pointer will do.
    combine_kernel[(triton.cdiv(num_tokens, block_tokens), triton.cdiv(hidden_size, block_out))](
        parts_DNKH,
        slot_NK,
        weight_NK,
        bias_SH if has_bias else hidden_NH,
        novices_VH if novices else hidden_NH,
        hidden_NH if reads_NR is None else reads_NR,
        maps.novice_R if maps is not None and ranks else slot_NK,
        maps.out_RH if maps is not None and ranks else hidden_NH,
        hidden_NH if residual_NH is None else residual_NH,
        mixed_NH,
        num_tokens,
        HIDDEN=hidden_size,
        TOP_K=top_k,
        SPLITS=splits,
        NOVICES=novices,
        RANKS=ranks,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=residual_NH is not None,
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=block_out,
        BLOCK_RANKS=16,
        COMPUTE=compute_type(maps.out_RH.dtype if maps is not None and ranks else torch.float32),
    )
    return mixed_NH


def combine_twin(
    parts_DNKH: Tensor,
    slot_NK: Tensor,
    weight_NK: Tensor,
    hidden_NH: Tensor,
    novices_VH: Tensor | None = None,
    maps: NoviceMaps | None = None,
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
) -> Tensor:
    """Say the same as :func:`combine` in plain torch, choice by choice; in the wider of fp32 and the parts' type."""
    wide = torch.promote_types(parts_DNKH.dtype, torch.float32)
    real_NK = slot_NK >= 0
    outputs_NKH = torch.where(real_NK[..., None], parts_DNKH.to(wide).sum(0), 0)
    weight_NK1 = weight_NK.to(wide)[..., None]
    if bias_SH is not None and bias_SH.shape[0]:
        bias_NKH = bias_SH.to(wide)[slot_NK.clamp(min=0).long()]
        outputs_NKH = outputs_NKH + torch.where(real_NK[..., None], weight_NK1 * bias_NKH, 0)
    if novices_VH is not None and novices_VH.shape[0]:
        novice_NK = (-1 - slot_NK.long()).clamp(0, novices_VH.shape[0] - 1)
        chosen_NK1 = ((slot_NK < 0) & (slot_NK >= -novices_VH.shape[0]))[..., None]
        given_NKH = novices_VH.to(wide)[novice_NK]
        if maps is not None and maps.in_RH.shape[0]:
            mine_NKR = maps.novice_R == novice_NK[..., None]
            reads_NR = hidden_NH.to(wide) @ maps.in_RH.to(wide).T
            given_NKH = given_NKH + (mine_NKR * reads_NR[:, None]) @ maps.out_RH.to(wide)
        outputs_NKH = outputs_NKH + torch.where(chosen_NK1, weight_NK1 * given_NKH, 0)
    mixed_NH = outputs_NKH.sum(1)
    return mixed_NH if residual_NH is None else mixed_NH + residual_NH.to(wide)
