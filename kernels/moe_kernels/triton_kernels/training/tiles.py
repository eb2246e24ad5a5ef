"""What the training kernels share: rows of a tile, tiles of matrices read the other way round, low-rank terms.

Legend: S slots, P places of pairs sorted by slot, M places of a tile, O outputs of a tile, X inputs of a tile, R ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.schedule import Schedule

# What a product wants at least; more would take registers that the sums of large tiles need.
RANK_TILE = 16


@triton.jit
def transposed_tile(
    weights,
    matrix,
    column,
    first,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load ``[X, O]`` of one of several stacked matrices whose rows are the inputs of the product, ``[S, X, O]``.

    A descriptor knows the end of all matrices, not of each: it is taken only where tiles divide the inputs.
    """
    if DESCRIPTORS:
        return weights.load([matrix * INPUTS + first, column * BLOCK_OUT])
    else:
        in_X = first + tl.arange(0, BLOCK_IN)
        out_O = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        tile_XO = weights + (matrix.to(tl.int64) * INPUTS + in_X)[:, None] * OUTPUTS + out_O[None, :]
        if INPUTS % BLOCK_IN == 0 and OUTPUTS % BLOCK_OUT == 0:
            return tl.load(tile_XO)
        else:
            return tl.load(tile_XO, mask=(in_X < INPUTS)[:, None] & (out_O < OUTPUTS)[None, :], other=0.0)


@triton.jit
def row_tile(rows_MX, first, known_M, in_X, INPUTS: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Load a tile of rows from pointers to their first inputs; zeros for rows that are not there."""
    if INPUTS % BLOCK_IN == 0:
        return tl.load(rows_MX + first, mask=known_M[:, None], other=0.0)
    else:
        return tl.load(rows_MX + first, mask=known_M[:, None] & (first + in_X < INPUTS)[None, :], other=0.0)


@triton.jit
def add_low_rank(
    total_MO,
    reads_ptr,
    gives_ptr,
    place_M,
    known_M,
    slot,
    out_O,
    inside_O,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Add what a low-rank term gives for what it read: its matrix is ``[S, O, R]``, transposed ``[S, R, O]``."""
    for first in tl.range(0, RANK, BLOCK_RANK, num_stages=1):
        rank_R = first + tl.arange(0, BLOCK_RANK)
        used_R = rank_R < RANK
        reads_MR = tl.load(
            reads_ptr + place_M[:, None] * RANK + rank_R[None, :], mask=known_M[:, None] & used_R[None, :], other=0.0
        ).to(COMPUTE)
        if TRANSPOSED:
            gives_RO = gives_ptr + (slot.to(tl.int64) * RANK + rank_R)[:, None] * OUTPUTS + out_O[None, :]
        else:
            gives_RO = gives_ptr + (slot.to(tl.int64) * OUTPUTS + out_O)[None, :] * RANK + rank_R[:, None]
        part_RO = tl.load(gives_RO, mask=used_R[:, None] & inside_O[None, :], other=0.0).to(COMPUTE)
        total_MO = tl.dot(reads_MR, part_RO, total_MO, input_precision="ieee")
    return total_MO


@triton.jit
def _halves(tile_MO):
    rows: tl.constexpr = tile_MO.shape[0]
    columns: tl.constexpr = tile_MO.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile_MO, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def quarters_of(tile_MO):
    """Cut a tile into four, from left to right: what follows a product then takes a quarter of the registers."""
    left, right = _halves(tile_MO)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


def groups_of(schedule: Schedule, slots: int) -> list[tuple[int, slice, Tensor]]:
    """List slots with their places and pairs, for the twins (waits for the GPU)."""
    groups, start = [], 0
    for slot, end in enumerate(schedule.ends_S.tolist()[:slots]):
        groups.append((slot, slice(start, end), schedule.order_P[start:end].long()))
        start = end
    return groups


def wide_type(tensor: Tensor) -> torch.dtype:
    """Return the type in which twins compute: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
