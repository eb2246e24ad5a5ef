"""Int4 matrices in the layout of the kernels, and back, exactly; and the twins of the kernels' arithmetic.

A word holds eight codes of one group. Code ``k = plane * X / 4 + 2 * word + half`` stands at bit ``4 * plane +
16 * half``: a shift, a mask and an or turn a word into two neighbouring 16-bit numbers ``128 + code``, exact, which go
into the product as they are. Zero and scale come after it: ``sum_k w_k a_k = s * (sum_k (128 + code_k) a_k - (128 +
zero) * sum_k a_k)``, so that rounding never touches a weight and zeros cost nothing.

Words of all rows at one group lie together: a tile of rows is one stretch of memory, whatever its height.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, X inputs of a group, W = X / 8 words of a
group, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.int4 import SYMMETRIC_ZERO
from moe_kernels.packing import pack_int4, unpack_int4

ZERO_OFFSET = 128
"""Zeros are stored as bfloat16 numbers ``128 + zero``, which are exact."""

GROUPS = (128, 64)
"""Group sizes that the kernels know; larger ones are cut into several with the same scale."""

ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Int4Tiles:
    """Int4 matrices in the layout of the kernels.

    Attributes:
        words_SGOW: Codes, int32 ``[S, G, O, W]``.
        pairs_SGO: Scale in the upper, ``128 + zero`` in the lower half, both bfloat16; int32 ``[S, G, O]``.
    """

    words_SGOW: Tensor
    pairs_SGO: Tensor

    @property
    def slots(self) -> int:
        """S."""
        return self.words_SGOW.shape[0]

    @property
    def outputs(self) -> int:
        """O."""
        return self.words_SGOW.shape[2]

    @property
    def group(self) -> int:
        """X."""
        return 8 * self.words_SGOW.shape[3]

    @property
    def inputs(self) -> int:
        """I."""
        return self.words_SGOW.shape[1] * self.group


def kernel_group(inputs: int, groups: int) -> int | None:
    """Return the group size that the kernels use for groups of another size; None where there is none."""
    if groups <= 0 or inputs % groups:
        return None
    return next((size for size in GROUPS if inputs // groups % size == 0), None)


def to_tiles(words_SOW: Tensor, scale_SOG: Tensor, zero_SOB: Tensor | None, inputs: int) -> Int4Tiles:
    """Turn stored int4 matrices into the layout of the kernels, one after another.

    Args:
        words_SOW: Eight codes an int32, the first in the lowest bits, ``[S, O, ceil(I / 8)]``.
        scale_SOG: bfloat16 ``[S, O, G]``.
        zero_SOB: Two zeros a byte, uint8 ``[S, O, ceil(G / 2)]``; None for a symmetric grid, whose zero is 8.
        inputs: I.

    Returns:
        The same matrices; 4.25 bits a weight in groups of 128.

    Raises:
        ValueError: Sizes or scales that the kernels do not know.
    """
    slots, outputs, groups = scale_SOG.shape
    group = kernel_group(inputs, groups)
    if group is None:
        raise ValueError(
            f"{groups} groups of {inputs} inputs: the kernels want groups of {' or '.join(map(str, GROUPS))} inputs, "
            "or a multiple of them"
        )
    if outputs % ROW_MULTIPLE:
        raise ValueError(f"{outputs} outputs: the kernels want a multiple of {ROW_MULTIPLE}")
    if scale_SOG.dtype != torch.bfloat16:
        raise ValueError(f"scales are {scale_SOG.dtype}: the kernels want bfloat16")
    cuts = inputs // groups // group
    device = words_SOW.device
    words_SGOW = torch.empty(slots, groups * cuts, outputs, group // 8, dtype=torch.int32, device=device)
    pairs_SGO = torch.empty(slots, groups * cuts, outputs, dtype=torch.int32, device=device)
    for slot in range(slots):
        codes_OI = unpack_int4(words_SOW[slot].view(torch.uint8)[:, : inputs // 2], inputs)
        places = codes_OI.view(outputs, groups * cuts, 4, group // 8, 2)
        words_GOW = torch.zeros_like(words_SGOW[slot])
        for plane in range(4):
            for half in range(2):
                words_GOW |= places[:, :, plane, :, half].transpose(0, 1).int() << (4 * plane + 16 * half)
        words_SGOW[slot] = words_GOW
        zero_OG = torch.full((outputs, groups), SYMMETRIC_ZERO, dtype=torch.uint8, device=device)
        if zero_SOB is not None:
            zero_OG = unpack_int4(zero_SOB[slot], groups)
        offset_OG = _bits(zero_OG.float() + ZERO_OFFSET)
        pairs_OG = (_bits(scale_SOG[slot]) << 16) | offset_OG
        pairs_SGO[slot] = pairs_OG.repeat_interleave(cuts, 1).t()
    return Int4Tiles(words_SGOW, pairs_SGO)


def from_tiles(tiles: Int4Tiles, groups: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what :func:`to_tiles` was given, bit for bit.

    Args:
        tiles: The matrices.
        groups: G of the stored form.
        symmetric: There were no zeros.

    Returns:
        ``words [S, O, I / 8]``, ``scale [S, O, G]`` and packed ``zero [S, O, ceil(G / 2)]`` or None.
    """
    words_SOW = torch.stack([pack_int4(_codes(words_GOW)) for words_GOW in tiles.words_SGOW])
    once_SOG = tiles.pairs_SGO[:, :: tiles.pairs_SGO.shape[1] // groups].transpose(1, 2)
    zero_SOB = None if symmetric else pack_int4(_zeros(once_SOG).to(torch.uint8), torch.uint8)
    return words_SOW, _scales(once_SOG), zero_SOB


def dequantize_tiles(tiles: Int4Tiles, dtype: torch.dtype) -> Tensor:
    """Return the weights ``(code - zero) * scale``, ``[S, O, I]``, computed in fp32 (fp64 where ``dtype`` is)."""
    wide = torch.promote_types(dtype, torch.float32)
    dense = []
    for words_GOW, pairs_GO in zip(tiles.words_SGOW, tiles.pairs_SGO, strict=True):
        codes_OGX = _codes(words_GOW).unflatten(1, (-1, tiles.group)).to(wide)
        pairs_OG1 = pairs_GO.t()[..., None]
        dense.append(((codes_OGX - _zeros(pairs_OG1).to(wide)) * _scales(pairs_OG1).to(wide)).flatten(1).to(dtype))
    return torch.stack(dense)


def group_sums(rows_NI: Tensor, group: int) -> Tensor:
    """Add up the inputs of each group, fp32 ``[N, G]``: what zeros are multiplied with."""
    return rows_NI.float().unflatten(-1, (-1, group)).sum(-1)


def _codes(words_GOW: Tensor) -> Tensor:
    """Return the codes of a matrix, uint8 ``[O, I]``."""
    groups, outputs, words = words_GOW.shape
    places = [(words_GOW >> (4 * plane + 16 * half)) & 15 for plane in range(4) for half in range(2)]
    codes = torch.stack(places, -1).view(groups, outputs, words, 4, 2).permute(1, 0, 3, 2, 4)
    return codes.reshape(outputs, groups * words * 8).to(torch.uint8)


def _bits(numbers: Tensor) -> Tensor:
    """Return the 16 bits of numbers as bfloat16 in the lower half of int32."""
    return numbers.bfloat16().contiguous().view(torch.int16).int() & 0xFFFF


def _scales(pairs: Tensor) -> Tensor:
    return (pairs >> 16).to(torch.int16).view(torch.bfloat16)


def _zeros(pairs: Tensor) -> Tensor:
    """Return the zeros as floating-point numbers."""
    lower = pairs & 0xFFFF
    return torch.where(lower > 0x7FFF, lower - 0x10000, lower).to(torch.int16).view(torch.bfloat16) - ZERO_OFFSET
