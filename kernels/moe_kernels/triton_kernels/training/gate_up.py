"""Gate and up projections of many tokens for training: low-rank terms come in, the pre-activation is kept.

``pre = W x + gives r``, ``inner = silu(gate) * up`` where ``r`` is what `rank_reads` found. Without the two it is
`grouped_gate_up`, whose recorded instructions stay as they are.

Legend: N tokens, H hidden, I intermediate, S slots, K top-k, P places of pairs sorted by slot, M places of a tile, O
channels of a tile, X inputs of a tile, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.dispatch import Tiles
from moe_kernels.triton_kernels.grouped_gate_up import has_descriptors, processors, tile_of, weight_tile, weights_of
from moe_kernels.triton_kernels.interpreting import compute_type
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.training.tiles import (
    RANK_TILE,
    add_low_rank,
    groups_of,
    quarters_of,
    row_tile,
    wide_type,
)


@triton.jit
def training_gate_up_kernel(
    hidden_ptr,
    weights,
    reads_ptr,
    gives_ptr,
    order_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    pre_ptr,
    inner_ptr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
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
        token_M = tl.load(order_ptr + place_M, mask=known_M, other=0).to(tl.int64) // TOP_K
        input_MX = hidden_ptr + token_M[:, None] * HIDDEN + in_X[None, :]
        gate_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        up_MO = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for first in tl.range(0, HIDDEN, BLOCK_IN, num_stages=STAGES):
            part_MX = row_tile(input_MX, first, known_M, in_X, HIDDEN, BLOCK_IN).to(COMPUTE)
            gate_OX = weight_tile(weights, 2 * slot, column, first, INNER, HIDDEN, BLOCK_OUT, BLOCK_IN, DESCRIPTORS).to(
                COMPUTE
            )
            up_OX = weight_tile(
                weights, 2 * slot + 1, column, first, INNER, HIDDEN, BLOCK_OUT, BLOCK_IN, DESCRIPTORS
            ).to(COMPUTE)
            gate_MO = tl.dot(part_MX, gate_OX.T, gate_MO, input_precision="ieee")
            up_MO = tl.dot(part_MX, up_OX.T, up_MO, input_precision="ieee")
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside_O = out_O < INNER
        if RANK > 0:
            gate_MO = add_low_rank(
                gate_MO,
                reads_ptr,
                gives_ptr,
                place_M,
                known_M,
                slot,
                out_O,
                inside_O,
                2 * INNER,
                RANK,
                BLOCK_RANK,
                False,
                COMPUTE,
            )
            up_MO = add_low_rank(
                up_MO,
                reads_ptr,
                gives_ptr,
                place_M,
                known_M,
                slot,
                INNER + out_O,
                inside_O,
                2 * INNER,
                RANK,
                BLOCK_RANK,
                False,
                COMPUTE,
            )
        # Quarter after quarter: all numbers of a tile at once would not fit into the registers.
        gate_quarters, up_quarters = quarters_of(gate_MO), quarters_of(up_MO)
        row_M1 = tl.arange(0, BLOCK_ROWS)[:, None]
        for quarter in tl.static_range(4):
            first_out = column * BLOCK_OUT + quarter * (BLOCK_OUT // 4)
            out_O = first_out + tl.arange(0, BLOCK_OUT // 4)
            gate_MO, up_MO = gate_quarters[quarter], up_quarters[quarter]
            here_MO = known_M[:, None] & (out_O < INNER)[None, :]
            # Places of a tile are neighbours: offsets inside it fit into 32 bits, and half as many registers.
            pre_MO = pre_ptr + first_place * (2 * INNER) + (row_M1 * (2 * INNER) + out_O[None, :])
            tl.store(pre_MO, gate_MO.to(pre_ptr.dtype.element_ty), mask=here_MO)
            tl.store(pre_MO + INNER, up_MO.to(pre_ptr.dtype.element_ty), mask=here_MO)
            inner_MO = (gate_MO / (1 + tl.exp(-gate_MO)) * up_MO).to(inner_ptr.dtype.element_ty)
            tl.store(inner_ptr + first_place * INNER + (row_M1 * INNER + out_O[None, :]), inner_MO, mask=here_MO)


def training_gate_up(
    hidden_NH: Tensor,
    gate_up_S2IH: Tensor,
    schedule: Schedule,
    tiles: Tiles,
    reads_PR: Tensor | None = None,
    gives_S2IR: Tensor | None = None,
    tiles_together: int = 16,
    programs: int | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute pre-activations and inner activations of all pairs that reach a real expert.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``, contiguous.
        gate_up_S2IH: Gate rows, then up rows, ``[S, 2I, H]``, contiguous.
        schedule: The pairs sorted by slot; its tiles' rows are those of the tiles here.
        tiles: Sizes of tiles.
        reads_PR: What the low-rank terms read, scaled, or None.
        gives_S2IR: What they give, ``[S, 2I, R]``, contiguous; of any floating type.
        tiles_together: Rows of tiles that go through the weights together.
        programs: Programs that stay; one for each of the GPU's processors where None.
        descriptors: Load weights by descriptors; where None, decided by `has_descriptors`.

    Returns:
        ``[P, 2I]`` and ``[P, I]`` in the type of the input; places behind the last are not written.
    """
    slots, rows, hidden_size = gate_up_S2IH.shape
    places, inner_size = schedule.order_P.shape[0], rows // 2
    descriptors = has_descriptors(gate_up_S2IH) if descriptors is None else descriptors
    pre_P2I, inner_PI = hidden_NH.new_empty(places, rows), hidden_NH.new_empty(places, inner_size)
    if inner_PI.numel() and slots:
        rank = 0 if reads_PR is None else reads_PR.shape[1]
        training_gate_up_kernel[(programs or processors(hidden_NH.device),)](
            hidden_NH,
            weights_of(gate_up_S2IH, tiles.block_out, tiles.block_in) if descriptors else gate_up_S2IH,
            hidden_NH if reads_PR is None else reads_PR,
            hidden_NH if gives_S2IR is None else gives_S2IR,
            schedule.order_P,
            schedule.ends_S,
            schedule.tile_slot_M,
            schedule.tile_first_M,
            schedule.num_tiles,
            pre_P2I,
            inner_PI,
            HIDDEN=hidden_size,
            INNER=inner_size,
            RANK=rank,
            TOP_K=schedule.slot_NK.shape[1],
            BLOCK_ROWS=schedule.tile_rows,
            BLOCK_OUT=tiles.block_out,
            BLOCK_IN=tiles.block_in,
            BLOCK_RANK=RANK_TILE,
            TILES_TOGETHER=tiles_together,
            STAGES=tiles.num_stages,
            DESCRIPTORS=descriptors,
            COMPUTE=compute_type(hidden_NH.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return pre_P2I, inner_PI


def training_gate_up_twin(
    hidden_NH: Tensor,
    gate_up_S2IH: Tensor,
    schedule: Schedule,
    reads_PR: Tensor | None = None,
    gives_S2IR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Say the same in plain torch, in fp32 or wider: with the last place as their end."""
    wide, top_k = wide_type(hidden_NH), schedule.slot_NK.shape[1]
    parts = [hidden_NH.new_empty(0, gate_up_S2IH.shape[1], dtype=wide)]
    for slot, places, pairs in groups_of(schedule, gate_up_S2IH.shape[0]):
        part = hidden_NH[pairs // top_k].to(wide) @ gate_up_S2IH[slot].to(wide).T
        if reads_PR is not None and gives_S2IR is not None:
            part = part + reads_PR[places].to(wide) @ gives_S2IR[slot].to(wide).T
        parts.append(part)
    pre_P2I = torch.cat(parts)
    gate_PI, up_PI = pre_P2I.chunk(2, -1)
    return pre_P2I, torch.nn.functional.silu(gate_PI) * up_PI
