"""Int4 matrices to floating point, once, for so many tokens that the product and not the weights take the time.

Legend: S slots, O rows of a tile, I inputs, W words of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.int4_layout import Int4Tiles
from moe_kernels.triton_kernels.int4_numbers import exact_weights, unpack_plane


@triton.jit
def int4_dequantize_kernel(
    words_ptr,
    pairs_ptr,
    dense_ptr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One group of some rows of one slot."""
    WORDS: tl.constexpr = GROUP // 8
    group = tl.program_id(1)
    slot = tl.program_id(2).to(tl.int64)
    out_O = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_O = (slot * (INPUTS // GROUP) + group) * OUTPUTS + out_O
    words_OW = tl.load(words_ptr + row_O[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    pairs_O = tl.load(pairs_ptr + row_O)
    target_O = dense_ptr + (slot * OUTPUTS + out_O) * INPUTS + group * GROUP
    for plane in tl.static_range(4):
        codes = unpack_plane(words_OW, 0, plane, tl.float32)
        weights = exact_weights(codes, pairs_O)
        place = plane * 2 * WORDS + tl.arange(0, 2 * WORDS)
        tl.store(target_O[:, None] + place[None, :], weights.to(dense_ptr.dtype.element_ty))


def int4_dequantize(tiles: Int4Tiles, dtype: torch.dtype, block_out: int = 64, num_warps: int = 4) -> Tensor:
    """Return the weights ``(code - zero) * scale``, computed in fp32 and rounded once.

    Args:
        tiles: The matrices.
        dtype: Of the result: bfloat16, float16 or float32.
        block_out: Rows of a tile; halved until it divides O.
        num_warps: Warps of a block.

    Returns:
        ``[S, O, I]``; `int4_layout.dequantize_tiles` is its twin.
    """
    dense_SOI = torch.empty(tiles.slots, tiles.outputs, tiles.inputs, dtype=dtype, device=tiles.words_SGOW.device)
    while tiles.outputs % block_out:
        block_out //= 2
    if dense_SOI.numel():
        int4_dequantize_kernel[(tiles.outputs // block_out, tiles.inputs // tiles.group, tiles.slots)](
            tiles.words_SGOW,
            tiles.pairs_SGO,
            dense_SOI,
            OUTPUTS=tiles.outputs,
            INPUTS=tiles.inputs,
            GROUP=tiles.group,
            BLOCK_OUT=block_out,
            num_warps=num_warps,
        )
    return dense_SOI
