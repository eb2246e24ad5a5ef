"""Matrices with two of every four weights, as the kernels read them: what is stored, without another form.

The values are parameters that may train: a second copy would be out of date after a step of the optimizer, and none is
needed. The two values of a group of four are neighbours, and a byte of the metadata holds the places of two groups. So
one number of 64 bits holds the four values (of 16 bits) of eight neighbouring inputs, and one byte says where they
stand: both have the same place in their tensors, and everything the kernels do with them is element by element.

Legend: S matrices (slots), O outputs, I inputs, V = I / 2 values of a row, B = I / 8 bytes of its metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.packing import Packed24, unpack_24

INPUTS_OF_A_BYTE = 8

WORD_BYTES = 8


@dataclass(frozen=True)
class Sparse24Tiles:
    """Matrices with the pattern 2:4, as `packing.pack_24` packs them.

    Attributes:
        values_SOV: The kept two of every four, bfloat16, float16 or float32 ``[S, O, I / 2]``, contiguous.
        metadata_SOB: Their places, 2 bits each, uint8 ``[S, O, I / 8]``, contiguous.
    """

    values_SOV: Tensor
    metadata_SOB: Tensor

    @property
    def slots(self) -> int:
        """S."""
        return self.values_SOV.shape[0]

    @property
    def outputs(self) -> int:
        """O."""
        return self.values_SOV.shape[1]

    @property
    def inputs(self) -> int:
        """I."""
        return 2 * self.values_SOV.shape[2]

    @property
    def words(self) -> Tensor:
        """The values as numbers of 64 bits: two groups of 16-bit values in each, or one of 32-bit values.

        The same memory, unless they begin in the middle of 64 bits (as a part of a flat tensor may): then a copy.
        """
        values_SOV = self.values_SOV
        if values_SOV.storage_offset() * values_SOV.element_size() % WORD_BYTES:
            values_SOV = values_SOV.clone()
        return values_SOV.view(torch.int64)


def why_no_tiles(values_SOV: Tensor, metadata_SOB: Tensor) -> str | None:
    """Say why the kernels cannot work with matrices as they are stored; None where they can.

    Args:
        values_SOV: Kept values, ``[S, O, I / 2]``.
        metadata_SOB: Their places, uint8.
    """
    slots, outputs, columns = values_SOV.shape
    inputs = 2 * columns
    if inputs % INPUTS_OF_A_BYTE:
        return f"{inputs} inputs: the kernels for 2:4 want a multiple of {INPUTS_OF_A_BYTE}"
    if metadata_SOB.dtype != torch.uint8 or metadata_SOB.shape != (slots, outputs, inputs // INPUTS_OF_A_BYTE):
        return (
            f"metadata of 2:4 are {metadata_SOB.dtype} {list(metadata_SOB.shape)}, values of {list(values_SOV.shape)} "
            f"take uint8 {[slots, outputs, inputs // INPUTS_OF_A_BYTE]}"
        )
    return None


def expand_tiles(tiles: Sparse24Tiles, dtype: torch.dtype) -> Tensor:
    """Return the weights with their zeros, ``[S, O, I]``: the twin of what the kernels do with a tile."""
    return unpack_24(Packed24(tiles.values_SOV, tiles.metadata_SOB)).to(dtype)
