"""Fewer bits: a grid for every group of neighbours along the input, and the nearest point of it.

Legend: S matrices, O outputs, I inputs, G groups along the input, X inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_lightning.plan.formats import WeightFormat
from moe_lightning.slimming.hessian import check_stack, work_type

GroupSize = int | Literal["channel", "auto"]


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded.

    Attributes:
        bits: 4 or 8.
        group_size: Inputs that share a scale: a number that divides the input size, ``channel`` for a whole row, or
            ``auto`` for the first of 128, 64 and 32 that divides.
        symmetric: The grid's zero is its middle; else it is where the group's weights want it.
        scale_dtype: Type in which scales are kept, rounded to before the codes are computed; None for that of the
            computation.
    """

    bits: Literal[4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if isinstance(self.group_size, str):
            known = self.group_size in ("channel", "auto")
        else:
            known = self.group_size > 0
        if not known:
            raise ValueError(f"group_size must be a positive number, 'channel' or 'auto', got {self.group_size!r}")

    @property
    def max_code(self) -> int:
        """Largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    def group_of(self, columns: int) -> int:
        """Return X for an input size.

        Raises:
            ValueError: The group size does not divide it.
        """
        return WeightFormat(self.bits, self.group_size, self.symmetric).group_of(columns)


class Quantized(NamedTuple):
    """A stack of rounded matrices: ``w = (code - zero) * scale``, symmetric or not.

    Attributes:
        codes: uint8 ``[S, O, I]``.
        scale: ``[S, O, G]``, positive.
        zero: uint8 ``[S, O, G]``; the middle code everywhere in a symmetric grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def make_grid(weight_SOGX: Tensor, scheme: Scheme, clip_SOG: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of every group.

    Asymmetric: ``scale = (max - min) / (2^bits - 1)`` over the group and 0, ``zero = round(-min / scale)``. Symmetric:
    ``scale = 2 max|w| / (2^bits - 1)``, and the zero is ``2^(bits - 1)``: an error is at most half a step either
    way, and the largest weight of a group always has it.

    Args:
        weight_SOGX: Weights in groups, ``[..., G, X]``, in fp32 or float64.
        scheme: How to round.
        clip_SOG: Share of the range to cover, in ``(0, 1]``.

    Returns:
        ``scale`` in the scheme's type for scales, and ``zero`` uint8; both ``[..., G]``. A group of zeros gets scale 1.
    """
    if scheme.symmetric:
        step = 2 * weight_SOGX.abs().amax(-1) * clip_SOG / scheme.max_code
    else:
        low = weight_SOGX.amin(-1).clamp(max=0) * clip_SOG
        step = (weight_SOGX.amax(-1).clamp(min=0) * clip_SOG - low) / scheme.max_code
    scale = step.to(scheme.scale_dtype or weight_SOGX.dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    if scheme.symmetric:
        return scale, torch.full_like(scale, 1 << (scheme.bits - 1), dtype=torch.uint8)
    return scale, (-low / scale.to(low.dtype)).round().clamp(0, scheme.max_code).to(torch.uint8)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Return the codes uint8 of the nearest grid points; of two equally near ones that of the even step."""
    steps = (weight / scale.to(weight.dtype)).round() + zero.to(weight.dtype)
    return steps.clamp(0, max_code).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(code - zero) * scale``: exact in fp32 for scales of 16 bits, since the first factor has 9 at most."""
    return (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)


def round_to_nearest(weight_SOI: Tensor, scheme: Scheme, clip_SOG: Tensor | float = 1.0) -> Quantized:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight_SOI: Weights.
        scheme: How to round.
        clip_SOG: Share of each group's range to cover, in ``(0, 1]``; weights beyond are cut off.

    Raises:
        ValueError: The group size does not divide the input size, or weights are not finite.
    """
    check_stack(weight_SOI)
    weight_SOGX = weight_SOI.to(work_type(weight_SOI)).unflatten(-1, (-1, scheme.group_of(weight_SOI.shape[-1])))
    scale, zero = make_grid(weight_SOGX, scheme, clip_SOG)
    codes_SOGX = encode(weight_SOGX, scale[..., None], zero[..., None], scheme.max_code)
    return Quantized(codes_SOGX.flatten(-2), scale, zero)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weights that the codes stand for.

    Args:
        quantized: Codes, scales and zeros.
        dtype: Of the result; by default fp32, or float64 where the scales are.

    Returns:
        ``[S, O, I]``, computed in fp32 or wider and rounded once.
    """
    wide = work_type(quantized.scale)
    codes_SOGX = quantized.codes.unflatten(-1, (quantized.scale.shape[-1], -1))
    weight = decode(codes_SOGX, quantized.scale[..., None], quantized.zero[..., None], wide).flatten(-2)
    return weight if dtype is None else weight.to(dtype)
