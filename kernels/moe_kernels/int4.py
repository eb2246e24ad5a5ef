"""Products with int4 weights that are stored eight codes an int32: ``w = (code - zero) * scale``.

The plain-torch twin of every faster form. Weights exist in floating point only a tile at a time.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, W words of a row, P rows sorted by slot, T
outputs of a tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.machine import this_machine
from moe_kernels.packing import unpack_int4

TILE_WEIGHTS = 2**18
"""Weights dequantised at a time: 1 MiB in fp32, which stays in a core's cache."""

SYMMETRIC_ZERO = 8


def dequantize_int4(
    words_SOW: Tensor, scale_SOG: Tensor, zero_SOB: Tensor | None, inputs: int, dtype: torch.dtype
) -> Tensor:
    """Return int4 weights in floating point.

    Args:
        words_SOW: Eight codes an int32, the first in the lowest bits, ``[..., O, ceil(I / 8)]``.
        scale_SOG: ``[..., O, G]``; G divides I.
        zero_SOB: Two zeros a byte, uint8 ``[..., O, ceil(G / 2)]``; None for a symmetric grid, whose zero is 8.
        inputs: I.
        dtype: Of the result.

    Returns:
        ``(code - zero) * scale``, ``[..., O, I]``, computed in fp32 (fp64 where ``dtype`` is) and rounded once.

    Raises:
        ValueError: The groups do not divide the inputs.
    """
    groups = scale_SOG.shape[-1]
    if groups == 0 or inputs % groups:
        raise ValueError(f"{groups} groups do not divide {inputs} inputs")
    wide = torch.promote_types(dtype, torch.float32)
    # Bytes, not words: a quarter of the traffic. The codes of a word lie in the order of its bytes.
    bytes_SOB = words_SOW.view(torch.uint8)[..., : -(-inputs // 2)]
    codes_SOGX = unpack_int4(bytes_SOB, inputs).unflatten(-1, (groups, inputs // groups)).to(wide)
    if zero_SOB is None:
        codes_SOGX -= SYMMETRIC_ZERO
    else:
        codes_SOGX -= unpack_int4(zero_SOB, groups)[..., None].to(wide)
    return codes_SOGX.mul_(scale_SOG[..., None].to(wide)).flatten(-2).to(dtype)


class Int4Matrices(ABC):
    """A stack of int4 matrices in some layout, multiplied one by one and tile by tile.

    Attributes:
        inputs: I.
    """

    inputs: int

    @property
    @abstractmethod
    def outputs(self) -> int:
        """O."""

    @abstractmethod
    def product(self, slot: int, rows_PI: Tensor, out_PO: Tensor) -> None:
        """Write ``rows @ weight[slot].T`` to ``out_PO``."""

    def grouped_product(self, rows_PI: Tensor, offsets_S: Tensor, ends: list[int], out_PO: Tensor) -> None:
        """Write the product of each group of rows with its own matrix to ``out_PO``.

        Args:
            rows_PI: Rows sorted by slot, ``[P, I]``.
            offsets_S: End of each group, int32 ``[S]``.
            ends: The same as numbers.
            out_PO: ``[P, O]``, contiguous, in the type of the rows.
        """
        for slot, group in row_groups(ends):
            self.product(slot, rows_PI[group], out_PO[group])

    @abstractmethod
    def transposed_product(self, slot: int, grad_PO: Tensor, out_PI: Tensor) -> None:
        """Write ``grad @ weight[slot]`` to ``out_PI``."""


class TiledMatrices(Int4Matrices):
    """Matrices that are spelled out a few outputs at a time."""

    @abstractmethod
    def _tile(self, slot: int, part: slice, dtype: torch.dtype) -> Tensor:
        """Return some outputs of a matrix in floating point, ``[T, I]``."""

    def _tiles(self, slot: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        # Layouts keep sixteen outputs together.
        step = max(1, TILE_WEIGHTS // (16 * max(self.inputs, 1))) * 16
        for first in range(0, self.outputs, step):
            part = slice(first, first + step)
            yield part, self._tile(slot, part, dtype)

    def product(self, slot: int, rows_PI: Tensor, out_PO: Tensor) -> None:
        """See `Int4Matrices.product`."""
        rows_PI = rows_PI.to(tile_type(rows_PI))
        for part, weight_TI in self._tiles(slot, rows_PI.dtype):
            out_PO[:, part] = F.linear(rows_PI, weight_TI)

    def transposed_product(self, slot: int, grad_PO: Tensor, out_PI: Tensor) -> None:
        """See `Int4Matrices.transposed_product`."""
        total_PI = torch.zeros_like(out_PI, dtype=torch.promote_types(grad_PO.dtype, torch.float32))
        grad_PO = grad_PO.to(tile_type(grad_PO))
        for part, weight_TI in self._tiles(slot, grad_PO.dtype):
            total_PI += grad_PO[:, part] @ weight_TI
        out_PI.copy_(total_PI)


@dataclass(frozen=True)
class WordMatrices(TiledMatrices):
    """Int4 matrices as they are stored; see :func:`dequantize_int4`."""

    words_SOW: Tensor
    scale_SOG: Tensor
    zero_SOB: Tensor | None
    inputs: int

    @property
    def outputs(self) -> int:
        """O."""
        return self.words_SOW.shape[1]

    def _tile(self, slot: int, part: slice, dtype: torch.dtype) -> Tensor:
        zero_TB = None if self.zero_SOB is None else self.zero_SOB[slot, part]
        return dequantize_int4(self.words_SOW[slot, part], self.scale_SOG[slot, part], zero_TB, self.inputs, dtype)


def tile_type(rows: Tensor) -> torch.dtype:
    """Return the type in which tiles are multiplied with rows: fp32 for bf16 rows where the CPU only emulates bf16."""
    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16:
        return rows.dtype
    return torch.float32 if this_machine().bf16_emulated else torch.bfloat16


class _GroupedProduct(torch.autograd.Function):
    """``rows[group s] @ weight[s].T``, differentiable in the rows; keeps nothing but the packed weights."""

    @staticmethod
    def forward(ctx: Any, rows_PI: Tensor, offsets_S: Tensor, matrices: Int4Matrices) -> Tensor:
        ctx.matrices, ctx.ends = matrices, offsets_S.tolist()
        out_PO = rows_PI.new_empty(rows_PI.shape[0], matrices.outputs)
        with torch.autocast(rows_PI.device.type, enabled=False):
            matrices.grouped_product(rows_PI, offsets_S, ctx.ends, out_PO)
        return out_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor, None, None]:
        matrices = ctx.matrices
        out_PI = grad_PO.new_empty(grad_PO.shape[0], matrices.inputs)
        with torch.autocast(grad_PO.device.type, enabled=False):
            for slot, group in row_groups(ctx.ends):
                matrices.transposed_product(slot, grad_PO[group], out_PI[group])
        return out_PI, None, None


def row_groups(ends: list[int]) -> Iterator[tuple[int, slice]]:
    """Return the slots that rows reached, with their rows.

    Args:
        ends: End of each slot's rows.
    """
    start = 0
    for slot, end in enumerate(ends):
        if end > start:
            yield slot, slice(start, end)
        start = end


# What is decided by the number of rows of each expert is no business of a compiler.
@torch.compiler.disable
def grouped_product(rows_PI: Tensor, offsets_S: Tensor, matrices: Int4Matrices) -> Tensor:
    """Multiply each group of rows with its own int4 matrix.

    Args:
        rows_PI: Rows sorted by slot, ``[P, I]``, in the type to compute in.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.
        matrices: The weights.

    Returns:
        ``[P, O]``, differentiable in the rows.
    """
    return _GroupedProduct.apply(rows_PI, offsets_S, matrices)


def int4_grouped_linear(
    rows_PI: Tensor, offsets_S: Tensor, words_SOW: Tensor, scale_SOG: Tensor, zero_SOB: Tensor | None, inputs: int
) -> Tensor:
    """Multiply each group of rows with its own int4 matrix: ``rows[group s] @ weight[s].T``.

    Args:
        rows_PI: Rows sorted by group, ``[P, I]``, in the type to compute in.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.
        words_SOW: int32 ``[S, O, ceil(I / 8)]``; see :func:`dequantize_int4` for these three.
        scale_SOG: ``[S, O, G]``.
        zero_SOB: uint8 ``[S, O, ceil(G / 2)]``, or None.
        inputs: I.

    Returns:
        ``[P, O]``, differentiable in the rows. Weights are dequantised tile by tile, in the backward pass again.
    """
    return grouped_product(rows_PI, offsets_S, WordMatrices(words_SOW, scale_SOG, zero_SOB, inputs))
