"""Products with int8 weights, a code a byte: ``w = (code - zero) * scale``.

On a CPU a compiled product reads the codes as they lie, where there is one; otherwise, and in the backward pass,
weights are dequantised tile by tile.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, X inputs of a group, T outputs of a tile, P
rows sorted by slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import plain_tensors
from moe_kernels.cpu_kernels.int8 import compiled_int8_linear, takes_int8
from moe_kernels.int4 import TiledMatrices, row_groups
from moe_kernels.machine import int8_route, this_machine

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

    def grouped_product(self, rows_PI: Tensor, offsets_S: Tensor, ends: list[int], out_PO: Tensor) -> None:
        """See `Int4Matrices.grouped_product`: all slots in one call, where the product is compiled."""
        weights = self.codes_SOI, self.scale_SOG, self.zero_SOG
        most = max((group.stop - group.start for _, group in row_groups(ends)), default=0)
        if (
            most == 0
            or not plain_tensors(rows_PI, *weights)
            or not takes_int8(*weights)
            or int8_route(most, self.inputs, rows_PI.dtype, this_machine()) != "kernel"
            or library("int8") is None
        ):
            super().grouped_product(rows_PI, offsets_S, ends, out_PO)
            return
        ends_S = offsets_S.to("cpu", torch.int32).contiguous()
        compiled_int8_linear(rows_PI.contiguous(), ends_S, *weights, out_PO)
