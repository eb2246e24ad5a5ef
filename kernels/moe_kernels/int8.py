"""Products with int8 weights, a code a byte: ``w = (code - zero) * scale``. They are dequantised tile by tile.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, X inputs of a group, T outputs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.int4 import TiledMatrices

SYMMETRIC_ZERO = 128


def dequantize_codes(codes: Tensor, scale: Tensor, zero: Tensor | int, dtype: torch.dtype) -> Tensor:
    """Return weights of codes in floating point.

    Args:
        codes: A byte each, uint8 ``[..., O, I]``.
        scale: ``[..., O, G]``; G divides I.
        zero: uint8 ``[..., O, G]``, or one for all.
        dtype: Of the result.

    Returns:
        ``(code - zero) * scale``, ``[..., O, I]``, computed in fp32 (fp64 where ``dtype`` is) and rounded once.
    """
    wide = torch.promote_types(dtype, torch.float32)
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(wide)
    groups -= zero[..., None].to(wide) if isinstance(zero, Tensor) else zero
    return groups.mul_(scale[..., None].to(wide)).flatten(-2).to(dtype)


@dataclass(frozen=True)
class ByteMatrices(TiledMatrices):
    """Int8 matrices as they are stored, for `moe_kernels.grouped_product`; see :func:`dequantize_codes`."""

    codes_SOI: Tensor
    scale_SOG: Tensor
    zero_SOG: Tensor | None

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """I."""
        return self.codes_SOI.shape[2]

    @property
    def outputs(self) -> int:
        """O."""
        return self.codes_SOI.shape[1]

    def _tile(self, slot: int, part: slice, dtype: torch.dtype) -> Tensor:
        zero = SYMMETRIC_ZERO if self.zero_SOG is None else self.zero_SOG[slot, part]
        return dequantize_codes(self.codes_SOI[slot, part], self.scale_SOG[slot, part], zero, dtype)
