"""The way back through the down projection, the routing weight and SwiGLU, in one kernel.

With ``g`` the gradient of a token's result, ``w`` its routing weight and ``a = silu(gate) * up``: ``u = down^T g``
(and what the low-rank term adds), ``dw = <a, u>``, ``da = w u``, ``dgate = da * up * silu'(gate)``, ``dup = da *
silu(gate)``. Of ``dw`` each tile of channels gives a part of its own: nothing is added up in an order of chance.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, P places of pairs sorted by slot, M places of a tile, O
channels of a tile, X outputs of the projection in a tile, C tiles of channels, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.dispatch import Tiles
from moe_kernels.triton_kernels.grouped_gate_up import has_descriptors, processors, tile_of, weights_of
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.training.tiles import (
    RANK_TILE,
    add_low_rank,
    groups_of,
    quarters_of,
    row_tile,
    transposed_tile,
    wide_type,
)


@triton.jit
def swiglu_backward(
    total_MO,
    share_M,
    known_M,
    pre_ptr,
    grad_pre_ptr,
    inner_ptr,
    first_place,
    first_out,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_INNER: tl.constexpr,
):
    """Go back through SwiGLU for some channels; returns their part of the routing weights' gradient."""
    out_O = first_out + tl.arange(0, COLUMNS)
    here_MO = known_M[:, None] & (out_O < INNER)[None, :]
    # Places of a tile are neighbours: offsets inside it fit into 32 bits, and half as many registers.
    row_M1 = tl.arange(0, ROWS)[:, None]
    offset_MO = row_M1 * (2 * INNER) + out_O[None, :]
    pre_MO = pre_ptr + first_place * (2 * INNER) + offset_MO
    gate_MO = tl.load(pre_MO, mask=here_MO, other=0.0).to(tl.float32)
    up_MO = tl.load(pre_MO + INNER, mask=here_MO, other=0.0).to(tl.float32)
    sigmoid_MO = 1 / (1 + tl.exp(-gate_MO))
    silu_MO = gate_MO * sigmoid_MO
    inner_MO = silu_MO * up_MO
    if WANT_INNER:
        weighted_MO = (inner_MO * share_M[:, None]).to(inner_ptr.dtype.element_ty)
        tl.store(inner_ptr + first_place * INNER + (row_M1 * INNER + out_O[None, :]), weighted_MO, mask=here_MO)
    if WANT_PRE:
        grad_inner_MO = total_MO * share_M[:, None]
        grad_pre_MO = grad_pre_ptr + first_place * (2 * INNER) + offset_MO
        grad_up_MO = grad_inner_MO * silu_MO
        tl.store(grad_pre_MO + INNER, grad_up_MO.to(grad_pre_ptr.dtype.element_ty), mask=here_MO)
        grad_gate_MO = grad_inner_MO * up_MO * (sigmoid_MO + silu_MO * (1 - sigmoid_MO))
        tl.store(grad_pre_MO, grad_gate_MO.to(grad_pre_ptr.dtype.element_ty), mask=here_MO)
    return tl.sum(inner_MO * total_MO, 1)


@triton.jit(do_not_specialize=["num_pairs"])
def down_backward_kernel(
    grad_ptr,
    weights,
    reads_ptr,
    gives_ptr,
    pre_ptr,
    order_ptr,
    share_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    grad_pre_ptr,
    inner_ptr,
    grad_share_ptr,
    num_pairs,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_INNER: tl.constexpr,
    WANT_SHARE: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """All tiles whose numbers leave the same rest."""
    TILES_OUT: tl.constexpr = (INNER + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_m = tl.load(num_tiles_ptr)
    in_X = tl.arange(0, BLOCK_IN)
    for number in tl.range(tl.program_id(0), tiles_m * TILES_OUT, tl.num_programs(0)):
        tile, column = tile_of(number, tiles_m, TILES_OUT, TILES_TOGETHER)
        slot = tl.load(tile_slot_ptr + tile)
        first_place = tl.load(tile_first_ptr + tile).to(tl.int64)
        place_M = first_place + tl.arange(0, BLOCK_ROWS)
        known_M = place_M < tl.load(ends_ptr + slot)
        pair_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64)
        grad_MX = grad_ptr + (pair_M // TOP_K)[:, None] * HIDDEN + in_X[None, :]
        total_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first in tl.range(0, HIDDEN, BLOCK_IN, num_stages=STAGES):
            part_MX = row_tile(grad_MX, first, known_M, in_X, HIDDEN, BLOCK_IN).to(COMPUTE)
            part_XO = transposed_tile(weights, slot, column, first, HIDDEN, INNER, BLOCK_OUT, BLOCK_IN, DESCRIPTORS).to(
                COMPUTE
            )
            total_MO = tl.dot(part_MX, part_XO, total_MO, input_precision="ieee")
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside_O = out_O < INNER
        if RANK > 0:
            total_MO = add_low_rank(
                total_MO,
                reads_ptr,
                gives_ptr,
                place_M,
                known_M,
                slot,
                out_O,
                inside_O,
                INNER,
                RANK,
                BLOCK_RANK,
                True,
                COMPUTE,
            )
        share_M = tl.load(share_ptr + pair_M, mask=known_M, other=0.0)
        # Quarter after quarter: all numbers of a tile at once would not fit into the registers.
        quarters = quarters_of(total_MO)
        grad_share_M = tl.zeros((BLOCK_ROWS,), tl.float32)
        for quarter in tl.static_range(4):
            grad_share_M += swiglu_backward(
                quarters[quarter],
                share_M,
                known_M,
                pre_ptr,
                grad_pre_ptr,
                inner_ptr,
                first_place,
                column * BLOCK_OUT + quarter * (BLOCK_OUT // 4),
                INNER,
                BLOCK_ROWS,
                BLOCK_OUT // 4,
                WANT_PRE,
                WANT_INNER,
            )
        if WANT_SHARE:
            tl.store(grad_share_ptr + column.to(tl.int64) * num_pairs + pair_M, grad_share_M, mask=known_M)


def down_backward(
    grad_NH: Tensor,
    down_SHI: Tensor,
    pre_P2I: Tensor,
    weight_NK: Tensor,
    schedule: Schedule,
    tiles: Tiles,
    reads_PR: Tensor | None = None,
    gives_SRI: Tensor | None = None,
    want_pre: bool = True,
    want_inner: bool = True,
    want_share: bool = True,
    tiles_together: int = 16,
    programs: int | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of the pre-activation and of the routing weights, and the weighted inner activations.

    Args:
        grad_NH: Gradient of the sum over experts, in the type of the weights, contiguous.
        down_SHI: ``[S, H, I]``, contiguous.
        pre_P2I: From the forward pass.
        weight_NK: Routing weights, fp32, contiguous.
        schedule: The pairs sorted by slot; its tiles' rows are those of the tiles here.
        tiles: Sizes of tiles.
        reads_PR: What the gradient reads of the low-rank term's matrix that gives, scaled, or None.
        gives_SRI: The term's matrix that reads, ``[S, R, I]``; of any floating type.
        want_pre: Compute the first result; else it is empty.
        want_inner: Compute the second; else it is empty.
        want_share: Compute the third; else it is empty.
        tiles_together: Rows of tiles that go through the weights together.
        programs: Programs that stay; one for each of the GPU's processors where None.
        descriptors: Load weights by descriptors; where None, decided by `has_descriptors` and the sizes.

    Returns:
        Gradient of the pre-activation ``[P, 2I]`` and ``weight * inner`` ``[P, I]`` in the type of the gradient (places
        behind the last are not written), and parts of the routing weights' gradient, fp32 ``[C, N, K]``, to be added
        up (written only for choices of real experts).
    """
    slots, hidden_size, inner_size = down_SHI.shape
    places, columns = schedule.order_P.shape[0], triton.cdiv(inner_size, tiles.block_out)
    if descriptors is None:
        descriptors = has_descriptors(down_SHI)
    descriptors = descriptors and hidden_size % tiles.block_in == 0
    grad_pre_P2I = grad_NH.new_empty((places, 2 * inner_size) if want_pre else 0)
    inner_PI = grad_NH.new_empty((places, inner_size) if want_inner else 0)
    shape = (columns, *schedule.slot_NK.shape) if want_share else (0,)
    grad_share_CNK = torch.empty(shape, dtype=torch.float32, device=grad_NH.device)
    if places and columns and slots:
        rank = 0 if reads_PR is None else reads_PR.shape[1]
        down_backward_kernel[(programs or processors(grad_NH.device),)](
            grad_NH,
            weights_of(down_SHI, tiles.block_in, tiles.block_out) if descriptors else down_SHI,
            grad_NH if reads_PR is None else reads_PR,
            grad_NH if gives_SRI is None else gives_SRI,
            pre_P2I,
            schedule.order_P,
            weight_NK,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            grad_pre_P2I,
            inner_PI,
            grad_share_CNK,
            places,
            HIDDEN=hidden_size,
            INNER=inner_size,
            RANK=rank,
            TOP_K=schedule.slot_NK.shape[1],
            BLOCK_ROWS=schedule.tile_rows,
            BLOCK_OUT=tiles.block_out,
            BLOCK_IN=tiles.block_in,
            BLOCK_RANK=RANK_TILE,
            TILES_TOGETHER=tiles_together,
            WANT_PRE=want_pre,
            WANT_INNER=want_inner,
            WANT_SHARE=want_share,
            STAGES=tiles.num_stages,
            DESCRIPTORS=descriptors,
            COMPUTE=compute_type(grad_NH.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return grad_pre_P2I, inner_PI, grad_share_CNK


def down_backward_twin(
    grad_NH: Tensor,
    down_SHI: Tensor,
    pre_P2I: Tensor,
    weight_NK: Tensor,
    schedule: Schedule,
    reads_PR: Tensor | None = None,
    gives_SRI: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Say the same in plain torch, in fp32 or wider, with the derivative of SwiGLU from autograd; one part, C = 1."""
    wide, top_k = wide_type(grad_NH), schedule.slot_NK.shape[1]
    share_P = weight_NK.reshape(-1).to(wide)
    grad_share = torch.zeros_like(share_P)
    grads, inners = [grad_NH.new_empty(0, pre_P2I.shape[1], dtype=wide)], [grad_NH.new_empty(0, down_SHI.shape[2])]
    for slot, places, pairs in groups_of(schedule, down_SHI.shape[0]):
        total = grad_NH[pairs // top_k].to(wide) @ down_SHI[slot].to(wide)
        if reads_PR is not None and gives_SRI is not None:
            total = total + reads_PR[places].to(wide) @ gives_SRI[slot].to(wide)
        with torch.enable_grad():
            pre = pre_P2I[places].detach().to(wide).requires_grad_()
            gate, up = pre.chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
        grads.append(torch.autograd.grad(inner, pre, total * share_P[pairs, None])[0])
        inners.append(inner.detach() * share_P[pairs, None])
        grad_share[pairs] = (inner.detach() * total).sum(1)
    return torch.cat(grads), torch.cat(inners), grad_share.view(1, *weight_NK.shape)
