"""2:4 matrices with their zeros, once, for so many tokens that the product and not the weights take the time.

Legend: S slots, O rows of a tile, I inputs, B bytes of metadata of a tile's row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles
from moe_kernels.triton_kernels.sparse24_numbers import load_groups, load_places, plane_halves


@triton.jit
def sparse24_expand_kernel(
    words_ptr,
    metadata_ptr,
    dense_ptr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One tile of some rows of all matrices."""
    dtype: tl.constexpr = dense_ptr.dtype.element_ty
    BYTES: tl.constexpr = BLOCK_IN // 8
    ROW_BYTES: tl.constexpr = INPUTS // 8
    row_O = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    byte_B = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside_OB = (row_O < ROWS)[:, None] & (byte_B < ROW_BYTES)[None, :]
    place_OB = row_O[:, None] * ROW_BYTES + byte_B[None, :]
    one_OB, two_OB = load_groups(words_ptr, place_OB, inside_OB, dtype, True)
    places_OB = load_places(metadata_ptr, place_OB, inside_OB, True)
    low_0, high_0 = plane_halves(one_OB, two_OB, places_OB, 0, dtype, dtype)
    low_1, high_1 = plane_halves(one_OB, two_OB, places_OB, 1, dtype, dtype)
    low_2, high_2 = plane_halves(one_OB, two_OB, places_OB, 2, dtype, dtype)
    low_3, high_3 = plane_halves(one_OB, two_OB, places_OB, 3, dtype, dtype)
    # Each join is a dimension behind the others: group of four, pair, neighbour.
    low = tl.join(tl.join(low_0, low_2), tl.join(low_1, low_3))
    high = tl.join(tl.join(high_0, high_2), tl.join(high_1, high_3))
    dense_OI = tl.reshape(tl.join(low, high), (BLOCK_OUT, BLOCK_IN))
    in_I = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    here_OI = (row_O < ROWS)[:, None] & (in_I < INPUTS)[None, :]
    tl.store(dense_ptr + row_O[:, None] * INPUTS + in_I[None, :], dense_OI, mask=here_OI)


def sparse24_expand(tiles: Sparse24Tiles, block_out: int = 32, block_in: int = 256, num_warps: int = 4) -> Tensor:
    """Return the weights with their zeros, bit for bit.

    Args:
        tiles: The matrices; I divisible by 8.
        block_out: Rows of a tile.
        block_in: Inputs of a tile.
        num_warps: Warps of a block.

    Returns:
        ``[S, O, I]`` in the type of the values; `sparse24_layout.expand_tiles` is its twin.
    """
    dense_SOI = tiles.values_SOV.new_empty(tiles.slots, tiles.outputs, tiles.inputs)
    rows = tiles.slots * tiles.outputs
    if dense_SOI.numel():
        sparse24_expand_kernel[(triton.cdiv(rows, block_out), triton.cdiv(tiles.inputs, block_in))](
            tiles.words,
            tiles.metadata_SOB,
            dense_SOI,
            ROWS=rows,
            INPUTS=tiles.inputs,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            num_warps=num_warps,
        )
    return dense_SOI
