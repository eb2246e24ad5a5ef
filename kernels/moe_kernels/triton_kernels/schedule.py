"""Routed pairs sorted by slot, and the tiles that multiply them; nothing of it waits for the CPU.

Three small kernels sort by counting: blocks of pairs count their slots, one program turns counts into places and lists
the tiles, and the blocks put their pairs there. Novices' pairs, and those of nobody, get no place. The order is that of
the tokens inside a slot, always the same.

Legend: N tokens, K top-k, E experts, P pairs, S slots, B blocks of pairs, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.experts import ABSENT, sort_pairs

_BLOCK_PAIRS = 256


@dataclass(frozen=True)
class Schedule:
    """Routed pairs sorted by slot, cut into tiles.

    Attributes:
        slot_NK: Entry of the slot map for each choice, int32 ``[N, K]``.
        order_P: Pair ``n * K + k`` at each place, int32; places behind the last are not written.
        ends_S: Where the places of each slot end, int32 ``[S]``.
        tile_slot_M: Slot of each tile, int32.
        tile_first_M: Its first place, int32.
        num_tiles: Tiles, int32 ``[1]``; of the others nothing is written.
        tile_rows: Places of a tile.
    """

    slot_NK: Tensor
    order_P: Tensor
    ends_S: Tensor
    tile_slot_M: Tensor
    tile_first_M: Tensor
    num_tiles: Tensor
    tile_rows: int


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def count_kernel(
    index_ptr,
    slot_map_ptr,
    slot_ptr,
    counts_ptr,
    num_pairs,
    num_experts,
    ABSENT_SLOT: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Look up the slots of a block of pairs and count them."""
    block = tl.program_id(0)
    pair_P = block.to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    here_P = pair_P < num_pairs
    expert_P = tl.load(index_ptr + pair_P, mask=here_P, other=-1)
    known_P = (expert_P >= 0) & (expert_P < num_experts)
    slot_P = tl.load(slot_map_ptr + expert_P, mask=known_P, other=ABSENT_SLOT).to(tl.int32)
    tl.store(slot_ptr + pair_P, slot_P, mask=here_P)
    slot_S = tl.arange(0, BLOCK_SLOTS)
    counts_S = tl.sum((slot_P[:, None] == slot_S[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * BLOCK_SLOTS + slot_S, counts_S)


@triton.jit(do_not_specialize=["num_blocks", "num_slots", "most_tiles"])
def plan_kernel(
    counts_ptr,
    ends_ptr,
    tile_slot_ptr,
    tile_first_ptr,
    num_tiles_ptr,
    num_blocks,
    num_slots,
    most_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Turn counts of blocks into first places (where they stood), and list the tiles: one program."""
    slot_S = tl.arange(0, BLOCK_SLOTS)
    total_S = tl.zeros((BLOCK_SLOTS,), tl.int32)
    for block in tl.range(0, num_blocks):
        total_S += tl.load(counts_ptr + block * BLOCK_SLOTS + slot_S)
    end_S = tl.cumsum(total_S, 0)
    tl.store(ends_ptr + slot_S, end_S, mask=slot_S < num_slots)
    place_S = end_S - total_S
    for block in tl.range(0, num_blocks):
        counts_S = tl.load(counts_ptr + block * BLOCK_SLOTS + slot_S)
        tl.store(counts_ptr + block * BLOCK_SLOTS + slot_S, place_S)
        place_S += counts_S
    tiles_S = (total_S + TILE_ROWS - 1) // TILE_ROWS
    tile_end_S = tl.cumsum(tiles_S, 0)
    num_tiles = tl.sum(tiles_S, 0)
    tl.store(num_tiles_ptr, num_tiles)
    for first in tl.range(0, most_tiles, BLOCK_TILES):
        tile_M = first + tl.arange(0, BLOCK_TILES)
        slot_M = tl.sum((tile_end_S[None, :] <= tile_M[:, None]).to(tl.int32), 1)
        mine_MS = slot_S[None, :] == slot_M[:, None]
        start_M = tl.sum(tl.where(mine_MS, (end_S - total_S)[None, :], 0), 1)
        before_M = tl.sum(tl.where(mine_MS, (tile_end_S - tiles_S)[None, :], 0), 1)
        used_M = tile_M < num_tiles
        tl.store(tile_slot_ptr + tile_M, slot_M, mask=used_M)
        tl.store(tile_first_ptr + tile_M, start_M + (tile_M - before_M) * TILE_ROWS, mask=used_M)


@triton.jit(do_not_specialize=["num_pairs", "num_slots"])
def place_kernel(
    slot_ptr, places_ptr, order_ptr, num_pairs, num_slots, BLOCK_PAIRS: tl.constexpr, BLOCK_SLOTS: tl.constexpr
):
    """Put a block of pairs where they belong."""
    block = tl.program_id(0)
    pair_P = block.to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    slot_P = tl.load(slot_ptr + pair_P, mask=pair_P < num_pairs, other=-1)
    slot_S = tl.arange(0, BLOCK_SLOTS)
    mine_PS = (slot_P[:, None] == slot_S[None, :]).to(tl.int32)
    before_PS = tl.cumsum(mine_PS, 0) - 1 + tl.load(places_ptr + block * BLOCK_SLOTS + slot_S)[None, :]
    place_P = tl.sum(before_PS * mine_PS, 1)
    tl.store(order_ptr + place_P, pair_P.to(tl.int32), mask=(slot_P >= 0) & (slot_P < num_slots))


def make_schedule(index_NK: Tensor, slot_map_E: Tensor, num_slots: int, tile_rows: int) -> Schedule:
    """Sort the pairs that reach a real expert by slot, and cut those of each slot into tiles.

    Args:
        index_NK: Experts chosen by the router, int64 ``[N, K]``, contiguous; numbers outside ``[0, E)`` mean nobody.
        slot_map_E: Slot or novice of each expert, int64 ``[E]``.
        num_slots: S, at least 1.
        tile_rows: Pairs of a tile; the last one of a slot may hold fewer.

    Returns:
        The schedule, without a word from the GPU to the CPU.
    """
    device, num_pairs = index_NK.device, index_NK.numel()
    blocks = triton.cdiv(num_pairs, _BLOCK_PAIRS)
    block_slots = triton.next_power_of_2(max(num_slots, 2))
    most_tiles = most_tiles_of(num_pairs, num_slots, tile_rows)

    def new(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.int32, device=device)

    slot_NK, counts_BS, order_P, ends_S = new(*index_NK.shape), new(blocks, block_slots), new(num_pairs), new(num_slots)
    tile_slot_M, tile_first_M, num_tiles = new(most_tiles), new(most_tiles), new(1)
    if num_pairs:
        count_kernel[(blocks,)](
            index_NK,
            slot_map_E,
            slot_NK,
            counts_BS,
            num_pairs,
            slot_map_E.shape[0],
            ABSENT_SLOT=ABSENT,
            BLOCK_PAIRS=_BLOCK_PAIRS,
            BLOCK_SLOTS=block_slots,
        )
    plan_kernel[(1,)](
        counts_BS,
        ends_S,
        tile_slot_M,
        tile_first_M,
        num_tiles,
        blocks,
        num_slots,
        most_tiles,
        TILE_ROWS=tile_rows,
        BLOCK_SLOTS=block_slots,
        BLOCK_TILES=64,
    )
    if num_pairs:
        place_kernel[(blocks,)](
            slot_NK, counts_BS, order_P, num_pairs, num_slots, BLOCK_PAIRS=_BLOCK_PAIRS, BLOCK_SLOTS=block_slots
        )
    return Schedule(slot_NK, order_P, ends_S, tile_slot_M, tile_first_M, num_tiles, tile_rows)


def most_tiles_of(num_pairs: int, num_slots: int, tile_rows: int) -> int:
    """Return how many tiles there can be: every slot may end with one that is not full."""
    return num_pairs // tile_rows + min(num_slots, num_pairs)


def make_schedule_twin(index_NK: Tensor, slot_map_E: Tensor, num_slots: int, tile_rows: int) -> Schedule:
    """Say the same in plain torch (which waits for the GPU)."""
    known_NK = (index_NK >= 0) & (index_NK < slot_map_E.shape[0])
    slot_NK = torch.where(known_NK, slot_map_E[index_NK.clamp(0, slot_map_E.shape[0] - 1)], ABSENT).int()
    pairs = sort_pairs(index_NK, slot_map_E, num_slots)
    tiles = []
    start = 0
    for slot, end in enumerate(pairs.offsets.tolist()):
        tiles += [(slot, first) for first in range(start, end, tile_rows)]
        start = end
    table = torch.tensor(tiles, dtype=torch.int32, device=index_NK.device).view(-1, 2)
    count = torch.tensor([len(tiles)], dtype=torch.int32, device=index_NK.device)
    return Schedule(slot_NK, pairs.order.int(), pairs.offsets, table[:, 0], table[:, 1], count, tile_rows)
