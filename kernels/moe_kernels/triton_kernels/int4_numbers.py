"""Parts of the int4 kernels: from words to numbers in the type of the activations.

Legend: O rows of a tile, W words of a group, T tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nibble_mask(reached, dtype: tl.constexpr):
    """Make the mask of a plane out of a flag that is 1.

    As a constant it would be an immediate, of which an instruction holds only one: the other (the exponent) is enough.
    The compiler would move the mask into a register again for every use: half an instruction a weight.
    """
    if dtype == tl.float16:
        return 0x03C003BF + reached
    else:
        return 0x000F000E + reached


@triton.jit
def unpack_plane(words_OW, mask, plane: tl.constexpr, dtype: tl.constexpr):
    """Turn one plane of a tile of words into numbers ``[O, 2W]``: the code plus `code_offset`, exactly."""
    if dtype == tl.bfloat16:
        bits = ((words_OW >> (4 * plane)) & mask) | 0x43004300
        low = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        # Ten bits of mantissa: in the upper four of them a code counts as one of sixteen steps from 16 to 32.
        if plane < 2:
            shifted = words_OW << (6 - 4 * plane)
        else:
            shifted = words_OW >> (4 * plane - 6)
        bits = (shifted & mask) | 0x4C004C00
        low = bits.to(tl.int16).to(tl.float16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        low = ((words_OW >> (4 * plane)) & 15).to(dtype)
        high = ((words_OW >> (4 * plane + 16)) & 15).to(dtype)
    return tl.reshape(tl.join(low, high), (words_OW.shape[0], 2 * words_OW.shape[1]))


@triton.jit
def scales_of(pairs):
    """Return the scales in the upper halves of pairs, fp32."""
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def zeros_of(pairs, dtype: tl.constexpr):
    """Return zeros with the same offset as the codes of `unpack_plane`, fp32: stored is ``128 + zero``."""
    zeros = (pairs << 16).to(tl.float32, bitcast=True)
    if dtype == tl.bfloat16:
        return zeros
    elif dtype == tl.float16:
        return zeros - 112
    else:
        return zeros - 128


@triton.jit
def group_product(product_OT, pairs_O, sums_T, dtype: tl.constexpr):
    """Turn the product of one group with bare codes into that with weights: scale and zero come after it."""
    return (product_OT - zeros_of(pairs_O, dtype)[:, None] * sums_T[None, :]) * scales_of(pairs_O)[:, None]


@triton.constexpr_function  # triton 3.6 makes a number of the GPU out of what a function under jit returns
def zeros_apart(BLOCK_TOKENS, dtype):
    """Say whether zeros are taken off once, behind the loop: with many tokens they cost as much as the scales in it.

    Not in fp32: without an offset of the codes there is little to take off, and no tensor core that would do it.
    """
    return BLOCK_TOKENS >= 32 and dtype != tl.float32


@triton.jit
def subtract_zeros(total_OT, pairs_OG, sums_GT, dtype: tl.constexpr):
    """Take zeros off a sum over groups of bare products times scales.

    Three products of tf32 numbers are one of fp32 (the zero times the scale has sixteen bits: two of them hold it).
    """
    zeros_OG = zeros_of(pairs_OG, dtype) * scales_of(pairs_OG)
    return tl.dot(-zeros_OG, sums_GT, total_OT, input_precision="tf32x3")


@triton.jit
def exact_weights(codes_OX, pairs_O):
    """Turn codes without an offset, in fp32, into weights."""
    return (codes_OX - zeros_of(pairs_O, tl.float32)[:, None]) * scales_of(pairs_O)[:, None]
