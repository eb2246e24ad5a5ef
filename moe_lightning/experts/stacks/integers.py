"""Integers of 4 or 8 bits with a scale for each group of neighbours along the input.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, P rows sorted by slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moe_kernels import grouped_product
from moe_kernels.int8 import SYMMETRIC_ZERO, ByteMatrices, dequantize_codes
from moe_kernels.packing import pack_int4, unpack_int4
from torch import Tensor

from moe_lightning.experts.stacks.base import WeightStack, slot_index
from moe_lightning.experts.stacks.gpu_form import GpuForm
from moe_lightning.plan import WeightFormat

SCALE_TYPE = torch.bfloat16
"""Scales of integers: the range of fp32, and what torch's int4 product on a CPU takes as it is."""


class Int8(WeightStack):
    """Codes of 8 bits with a scale, and mostly a zero point, for every group: ``w = (code - zero) * scale``.

    Attributes:
        codes: uint8 ``[S, O, I]``.
        scale: bfloat16 ``[S, O, G]``.
        zero: uint8 ``[S, O, G]``; None in a symmetric grid, whose zero is 128.
    """

    kind = "int8"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, format: WeightFormat, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Hold codes, scales and zeros.

        Args:
            format: Of the stack.
            codes: uint8 ``[S, O, I]``.
            scale: ``[S, O, G]``.
            zero: uint8 ``[S, O, G]``, or None.
            dtype: Type to compute in.
        """
        super().__init__(format, codes.shape[0], codes.shape[1], codes.shape[2], dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(SCALE_TYPE))
        self.register_buffer("zero", zero)

    @classmethod
    def _empty(cls, format: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> Int8:
        groups = size[2] // format.group_of(size[2])
        codes = torch.zeros(size, dtype=torch.uint8, device=device)
        scale = torch.ones(*size[:2], groups, dtype=SCALE_TYPE, device=device)
        zero = None if format.symmetric else torch.zeros(*size[:2], groups, dtype=torch.uint8, device=device)
        return cls(format, codes, scale, zero, dtype)

    @classmethod
    def pack(cls, format: WeightFormat, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Int8:
        """Make a stack of codes ``[S, O, I]``, scales and zeros ``[S, O, G]``."""
        return cls(format, codes, scale, None if format.symmetric else zero, dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights in floating point, ``[S, O, I]``, computed in fp32 and rounded once."""
        zero = SYMMETRIC_ZERO if self.zero is None else self.zero
        return dequantize_codes(self.codes, self.scale, zero, dtype or self.dtype)

    def linear(self, rows_PI: Tensor, offsets_S: Tensor) -> Tensor:
        """Multiply each group of rows with its own matrix, ``[P, O]``; differentiable in the rows.

        On a CPU a compiled product reads the codes as they lie. Where there is none, and for gradients, only matrices
        that rows reached are dequantised, tile by tile; not so while a compiler traces.

        Args:
            rows_PI: Rows sorted by slot, in the type to compute in.
            offsets_S: End of each slot's rows, int32.
        """
        if rows_PI.device.type != "cpu" or torch.compiler.is_compiling():
            return super().linear(rows_PI, offsets_S)
        return grouped_product(rows_PI, offsets_S, ByteMatrices(self.codes, self.scale, self.zero))

    def select(self, slots: Sequence[int]) -> Int8:
        """Return a stack of some of the matrices."""
        index = slot_index(slots, self.codes.device)
        zero = None if self.zero is None else self.zero[index]
        return Int8(self.format, self.codes[index], self.scale[index], zero, self.dtype)


class Int4(GpuForm):
    """Codes of 4 bits with a scale, and mostly a zero point, for every group: ``w = (code - zero) * scale``.

    On a CPU, and in the Triton kernels, the weights take another form while they work; see
    `CpuForm` and `GpuForm`.

    Attributes:
        words: Eight codes an int32, the first in the lowest bits, ``[S, O, ceil(I / 8)]``.
        scale: bfloat16 ``[S, O, G]``.
        zero: Two zeros a byte, uint8 ``[S, O, ceil(G / 2)]``; None in a symmetric grid, whose zero is 8.
    """

    kind = "int4"
    words: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, format: WeightFormat, words: Tensor, scale: Tensor, zero: Tensor | None, inputs: int, dtype: torch.dtype
    ) -> None:
        """Hold packed codes, scales and packed zeros.

        Args:
            format: Of the stack.
            words: int32 ``[S, O, ceil(I / 8)]``.
            scale: ``[S, O, G]``.
            zero: uint8 ``[S, O, ceil(G / 2)]``, or None.
            inputs: I.
            dtype: Type to compute in.
        """
        super().__init__(format, words.shape[0], words.shape[1], inputs, dtype)
        self.register_buffer("words", words)
        self.register_buffer("scale", scale.to(SCALE_TYPE))
        self.register_buffer("zero", zero)

    @classmethod
    def _empty(cls, format: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> Int4:
        groups = size[2] // format.group_of(size[2])
        words = torch.zeros(*size[:2], -(-size[2] // 8), dtype=torch.int32, device=device)
        scale = torch.ones(*size[:2], groups, dtype=SCALE_TYPE, device=device)
        zero = None if format.symmetric else torch.zeros(*size[:2], -(-groups // 2), dtype=torch.uint8, device=device)
        return cls(format, words, scale, zero, size[2], dtype)

    @classmethod
    def pack(cls, format: WeightFormat, codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Int4:
        """Make a stack of codes uint8 ``[S, O, I]``, scales and zeros ``[S, O, G]``."""
        packed = None if format.symmetric else pack_int4(zero, torch.uint8)
        return cls(format, pack_int4(codes), scale, packed, codes.shape[-1], dtype)

    @property
    def codes(self) -> Tensor:
        """Codes, uint8 ``[S, O, I]``."""
        return unpack_int4(self.words, self.inputs)

    @property
    def zeros(self) -> Tensor | None:
        """Zeros, uint8 ``[S, O, G]``, or None."""
        return None if self.zero is None else unpack_int4(self.zero, self.scale.shape[-1])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights in floating point, ``[S, O, I]``, computed in fp32 and rounded once."""
        zeros = self.zeros
        return dequantize_codes(self.codes, self.scale, zeros if zeros is not None else 8, dtype or self.dtype)

    def select(self, slots: Sequence[int]) -> Int4:
        """Return a stack of some of the matrices."""
        index = slot_index(slots, self.words.device)
        zero = None if self.zero is None else self.zero[index]
        return Int4(self.format, self.words[index], self.scale[index], zero, self.inputs, self.dtype)
