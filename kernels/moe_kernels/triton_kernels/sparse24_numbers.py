"""Parts of the 2:4 kernels: from two values of four and their places to operands of a product.

A byte of metadata holds the places of the values of eight inputs, ``p0 | p1 << 2`` for each group of four, ``p0 < p1``.
Its eight inputs make four planes of two neighbours each: column ``2 b + half`` of plane ``q`` is input ``8 b + 2 q +
half``. A plane is an operand of a product over a quarter of the tile's inputs.

Values of 16 bits never leave their 32-bit registers: the first values of both groups lie side by side in one, the
second ones in another, and so do their bits of metadata, of which a multiplication makes masks for the halves. The four
bits of a group, called 0 to 3, say it all: ``p0`` is 1 where bit 0 is set, 2 where bit 1 is, else 0; ``p1`` is 1 where
bit 3 is not set, else 2 where bit 2 is not, else 3. The whole loop of the gate and up projections takes 4.13
instructions a weight with this (16 tokens, sm_90), and 9.28, with registers spilled, where places are compared.

Legend: O rows of a tile, B bytes of metadata of a row of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_groups(words_ptr, place_OB, inside_OB, dtype: tl.constexpr, MASKED: tl.constexpr):
    """Load the values of two groups of four for each byte of metadata: int32 pairs, or int64 pairs of fp32 numbers."""
    if dtype == tl.float32:
        if MASKED:
            first_OB = tl.load(words_ptr + 2 * place_OB, mask=inside_OB, other=0)
            second_OB = tl.load(words_ptr + 2 * place_OB + 1, mask=inside_OB, other=0)
        else:
            first_OB = tl.load(words_ptr + 2 * place_OB)
            second_OB = tl.load(words_ptr + 2 * place_OB + 1)
    else:
        if MASKED:
            words_OB = tl.load(words_ptr + place_OB, mask=inside_OB, other=0)
        else:
            words_OB = tl.load(words_ptr + place_OB)
        first_OB = words_OB.to(tl.int32)
        second_OB = (words_OB >> 32).to(tl.int32)
    return first_OB, second_OB


@triton.jit
def load_places(metadata_ptr, place_OB, inside_OB, MASKED: tl.constexpr):
    """Load bytes of metadata as int32."""
    if MASKED:
        places_OB = tl.load(metadata_ptr + place_OB, mask=inside_OB, other=0)
    else:
        places_OB = tl.load(metadata_ptr + place_OB)
    return places_OB.to(tl.int32)


@triton.jit
def halves_mask(both, bit: tl.constexpr):
    """Make a mask of 16 bits in each half, of one bit of each half."""
    return ((both >> bit) & 0x10001) * 0xFFFF


@triton.jit
def expand_bits(first_OB, second_OB, places_OB, plane: tl.constexpr):
    """Give one plane of a tile of 16-bit values: the two neighbours of an input pair in one int32."""
    ones = (first_OB & 0xFFFF) | (second_OB << 16)
    others = ((first_OB >> 16) & 0xFFFF) | (second_OB & -65536)
    # Bits 4 to 7 once more, in the upper half.
    both = places_OB * 0x1001
    if plane % 2 == 0:
        low = ones & ~(halves_mask(both, 0) | halves_mask(both, 1))
        high = (ones & halves_mask(both, 0)) | (others & ~halves_mask(both, 3))
    else:
        low = (ones & halves_mask(both, 1)) | (others & ~halves_mask(both, 2))
        high = others & halves_mask(both, 2) & halves_mask(both, 3)
    if plane < 2:
        return (low & 0xFFFF) | (high << 16)
    else:
        return ((low >> 16) & 0xFFFF) | (high & -65536)


@triton.jit
def expand_numbers(first_OB, second_OB, places_OB, plane: tl.constexpr):
    """Give one plane of a tile of fp32 values: the lower and the upper neighbour of an input pair."""
    if plane < 2:
        pair_OB = first_OB
        places_OB = places_OB & 15
    else:
        pair_OB = second_OB
        places_OB = places_OB >> 4
    one = pair_OB.to(tl.int32).to(tl.float32, bitcast=True)
    other = (pair_OB >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    nothing = tl.zeros_like(one)
    if plane % 2 == 0:
        low = tl.where((places_OB & 3) == 0, one, nothing)
        high = tl.where((places_OB & 3) == 1, one, tl.where((places_OB >> 2) == 1, other, nothing))
    else:
        low = tl.where((places_OB & 3) == 2, one, tl.where((places_OB >> 2) == 2, other, nothing))
        high = tl.where((places_OB >> 2) == 3, other, nothing)
    return low, high


@triton.jit
def plane_halves(first_OB, second_OB, places_OB, plane: tl.constexpr, dtype: tl.constexpr, COMPUTE: tl.constexpr):
    """Turn one plane of a tile into numbers to compute with: inputs ``8 b + 2 plane``, and those after them."""
    if dtype == tl.float32:
        low, high = expand_numbers(first_OB, second_OB, places_OB, plane)
    else:
        bits = expand_bits(first_OB, second_OB, places_OB, plane)
        low = bits.to(tl.int16).to(dtype, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low.to(COMPUTE), high.to(COMPUTE)


@triton.jit
def plane_operand(first_OB, second_OB, places_OB, plane: tl.constexpr, dtype: tl.constexpr, COMPUTE: tl.constexpr):
    """Turn one plane of a tile into an operand ``[O, 2B]``."""
    low, high = plane_halves(first_OB, second_OB, places_OB, plane, dtype, COMPUTE)
    return tl.reshape(tl.join(low, high), (places_OB.shape[0], 2 * places_OB.shape[1]))
