"""Products with matrices of the pattern 2:4 on a CPU: by a compiled product that reads them as stored, if there is one.

Elsewhere, and for gradients, zeros are spelled out for a tile of a matrix at a time.

Places are 2 bits each; two values of a group of four have places ``first < second``, so one of six pairs. A tile is
spelled out by operations on whole numbers, without an index for each value, in four planes: all first inputs of the
groups, all second ones, and so on. The inputs of the rows take the same order: that changes the order of a sum only.

Legend: S matrices (slots), O outputs, I inputs, X inputs in the order of the planes, G groups of four inputs, K kept
values of a row (2 G), B bytes of places, P rows sorted by slot, T outputs of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.cpu_kernels.calls import plain_tensors
from moe_kernels.cpu_kernels.sparse24 import compiled_sparse24_linear, has_sparse24_product
from moe_kernels.experts import grouped_linear
from moe_kernels.int4 import row_groups, tile_type
from moe_kernels.machine import sparse24_route, this_machine
from moe_kernels.packing import Packed24, unpack_24
from moe_kernels.sparse24_row import one_row_pays, one_row_product

TILE_BYTES = 2**21
"""Of the weights that are spelled out at a time. Smaller tiles stay nearer to the core, but are over sooner than the
twenty calls that each takes. One row and tiles of 2^19 to 2^22 bytes: 1.0, 0.76, 0.68, 0.78 ns a weight in bf16; 1.4,
1.2, 1.1, 1.3 in fp32."""

_LANES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PAIRS = {2: torch.int32, 4: torch.int64}
# What the four bits of a group say of its two places, and where the bits stand in a lane: each is more than a lane has
# bits, so that a number shifted by it is gone.
_FIRST_IS_1, _FIRST_IS_2, _SECOND_IS_NOT_2, _SECOND_IS_NOT_1 = 1 << 6, 1 << 7, 1 << 8, 1 << 9
# Two lanes of 16 bits of a byte: its lower four bits, and its upper four, both from bit 6 on.
_SPREAD = (1 << 6) + (1 << 18)


def sparse24_grouped_linear(rows_PI: Tensor, offsets_S: Tensor, values_SOK: Tensor, metadata_SOB: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix of the pattern 2:4: ``rows[group s] @ weight[s].T``.

    On a CPU rows in bfloat16 or float32 are multiplied with the values as they are stored, where
    `moe_kernels.cpu_kernels` can be compiled. Otherwise, and always in the backward pass, matrices that rows reached
    are spelled out tile by tile; for a single row not even those, see `moe_kernels.sparse24_row`. Elsewhere, and while
    a compiler traces, it is :func:`sparse24_twin`.

    Args:
        rows_PI: Rows sorted by slot, ``[P, I]``, in the type to compute in.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.
        values_SOK: The kept two of every four, ``[S, O, I / 2]``; see `moe_kernels.packing.Packed24` for these two.
        metadata_SOB: Their places, uint8 ``[S, O, ceil(I / 8)]``.

    Returns:
        ``[P, O]``, differentiable in the rows and the values; values that no row reached have a gradient of zero.
    """
    if rows_PI.device.type != "cpu" or torch.compiler.is_compiling():
        return sparse24_twin(rows_PI, offsets_S, values_SOK, metadata_SOB)
    return _GroupedProduct.apply(rows_PI, offsets_S, values_SOK, metadata_SOB)


def sparse24_twin(rows_PI: Tensor, offsets_S: Tensor, values_SOK: Tensor, metadata_SOB: Tensor) -> Tensor:
    """Do what :func:`sparse24_grouped_linear` does with all weights spelled out at once."""
    weight_SOI = unpack_24(Packed24(values_SOK, metadata_SOB)).to(rows_PI.dtype)
    return grouped_linear(rows_PI, weight_SOI, offsets_S)


class Expansion:
    """Memory in which tiles of matrices of one size are spelled out, one after another."""

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        """Take memory for tiles.

        Args:
            outputs: O.
            inputs: I, divisible by 4.
            dtype: Of the tiles.
        """
        self.dtype, self._outputs = dtype, outputs
        self._step = max(1, min(outputs, TILE_BYTES // max(dtype.itemsize * inputs, 1)))
        groups, lanes = inputs // 4, _LANES[dtype.itemsize]
        self._planes_TX = torch.empty(self._step, 4 * groups, dtype=lanes, device="cpu")
        self._bits = torch.empty(self._step, -(-groups // 2), dtype=torch.int32, device="cpu")
        self._first, self._second, self._shift = (
            torch.empty(self._step, groups, dtype=lanes, device="cpu") for _ in range(3)
        )
        self._pairs = (
            torch.empty(self._step, groups, dtype=_PAIRS[dtype.itemsize], device="cpu")
            if dtype.itemsize in _PAIRS
            else None
        )

    def parts(self) -> Iterator[slice]:
        """Return the outputs of one tile after another."""
        return (slice(first, min(first + self._step, self._outputs)) for first in range(0, self._outputs, self._step))

    def tile(self, values_TK: Tensor, metadata_TB: Tensor) -> Tensor:
        """Return the weights of a tile, ``[T, 4 G]`` in planes, in memory that the next tile overwrites.

        Args:
            values_TK: Values of as many outputs as `parts` says.
            metadata_TB: Their places.
        """
        planes_TX, bits_TG, first_TG, second_TG, shift_TG = self._memory(metadata_TB)
        plane_0, plane_1, plane_2, plane_3 = planes_TX.unflatten(1, (4, -1)).unbind(1)
        self._split(values_TK, first_TG, second_TG)

        def keep(number_TG: Tensor, unless: int, out_TG: Tensor) -> None:
            """Write the numbers of the groups of which none of these bits is set, and zeros."""
            torch.bitwise_and(bits_TG, unless, out=shift_TG)
            torch.bitwise_left_shift(number_TG, shift_TG, out=out_TG)

        keep(first_TG, _FIRST_IS_1 | _FIRST_IS_2, plane_0)
        first_TG ^= plane_0  # those at 1 and 2
        keep(first_TG, _FIRST_IS_2, plane_1)
        first_TG ^= plane_1  # those at 2
        keep(second_TG, _SECOND_IS_NOT_2, plane_2)
        second_TG ^= plane_2  # those at 1 and 3
        plane_2 ^= first_TG
        keep(second_TG, _SECOND_IS_NOT_1, first_TG)
        plane_1 ^= first_TG
        torch.bitwise_xor(second_TG, first_TG, out=plane_3)
        return planes_TX.view(self.dtype)

    def kept(self, planes_TX: Tensor, metadata_TB: Tensor) -> tuple[Tensor, Tensor]:
        """Return what stands at the places of the first and of the second values, ``[T, G]`` each.

        Args:
            planes_TX: A number for each weight of a tile in planes, in the type of the tiles, ``[T, 4 G]``.
            metadata_TB: The places.
        """
        _, bits_TG, first_TG, second_TG, shift_TG = self._memory(metadata_TB)
        lanes_TX = planes_TX.contiguous().view(_LANES[self.dtype.itemsize])
        plane_0, plane_1, plane_2, plane_3 = lanes_TX.unflatten(1, (4, -1)).unbind(1)

        def choose(number_TG: Tensor, unless: int, other_TG: Tensor, out_TG: Tensor) -> None:
            """Write the other number where this bit is set."""
            torch.bitwise_and(bits_TG, unless, out=shift_TG)
            torch.bitwise_xor(number_TG, other_TG, out=out_TG)
            out_TG <<= shift_TG
            out_TG ^= other_TG

        choose(plane_0, _FIRST_IS_1, plane_1, first_TG)
        choose(first_TG, _FIRST_IS_2, plane_2, first_TG)
        choose(plane_2, _SECOND_IS_NOT_2, plane_3, second_TG)
        # The other one is what is written to: a copy of it, in a plane that is not read any more.
        plane_3.copy_(second_TG)
        choose(plane_1, _SECOND_IS_NOT_1, plane_3, second_TG)
        return first_TG.view(self.dtype), second_TG.view(self.dtype)

    def _memory(self, metadata_TB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return memory for as many outputs, with the bits of the groups in the second."""
        size, groups = metadata_TB.shape[0], self._first.shape[1]
        bits_TB = self._bits[:size].copy_(metadata_TB).mul_(_SPREAD)
        bits_TG = bits_TB.view(torch.int16)[:, :groups].to(self._first.dtype)
        return self._planes_TX[:size], bits_TG, self._first[:size], self._second[:size], self._shift[:size]

    def _split(self, values_TK: Tensor, first_TG: Tensor, second_TG: Tensor) -> None:
        values_TK = values_TK.detach().to(self.dtype)
        if self._pairs is None:
            pairs_TG2 = values_TK.view(first_TG.dtype).unflatten(1, (-1, 2))
            first_TG.copy_(pairs_TG2[..., 0])
            second_TG.copy_(pairs_TG2[..., 1])
            return
        # As halves of longer numbers they are split five times as fast as with strides; parameters may be parts of
        # others that begin between two such numbers.
        if values_TK.storage_offset() % 2 or not values_TK.is_contiguous():
            values_TK = values_TK.clone(memory_format=torch.contiguous_format)
        pairs_TG = values_TK.view(self._pairs.dtype)
        first_TG.copy_(pairs_TG)
        second_TG.copy_(torch.bitwise_right_shift(pairs_TG, 8 * self.dtype.itemsize, out=self._pairs[: len(pairs_TG)]))


def to_planes(rows_PI: Tensor) -> Tensor:
    """Return rows with their inputs in the order of the tiles: every fourth from the first on, then from the second."""
    return rows_PI.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)


def from_planes(rows_PI: Tensor) -> Tensor:
    """Return rows with their inputs in the order that they had before :func:`to_planes`."""
    return rows_PI.unflatten(1, (4, -1)).transpose(1, 2).flatten(1)


class _GroupedProduct(torch.autograd.Function):
    """``rows[group s] @ weight[s].T``, differentiable in the rows and the values; keeps nothing spelled out."""

    @staticmethod
    def forward(ctx: Any, rows_PI: Tensor, offsets_S: Tensor, values_SOK: Tensor, metadata_SOB: Tensor) -> Tensor:
        ctx.ends = offsets_S.tolist()
        # The rows only where the values are trained.
        ctx.save_for_backward(rows_PI if ctx.needs_input_grad[2] else None, values_SOK, metadata_SOB)
        out_PO = rows_PI.new_empty(rows_PI.shape[0], values_SOK.shape[1])
        left = _compiled(rows_PI, offsets_S, ctx.ends, values_SOK, metadata_SOB, out_PO)
        if not left:
            return out_PO
        with torch.autocast("cpu", enabled=False):
            expansion = _expansion(rows_PI, values_SOK)
            planes_PX = to_planes(rows_PI.to(expansion.dtype))
            for slot, group in left:
                if one_row_pays(group.stop - group.start, values_SOK.shape[1], rows_PI.dtype):
                    values_OK = values_SOK[slot].to(rows_PI.dtype)
                    one_row_product(rows_PI[group.start], values_OK, metadata_SOB[slot], out_PO[group.start])
                    continue
                for part in expansion.parts():
                    weight_TX = expansion.tile(values_SOK[slot, part], metadata_SOB[slot, part])
                    out_PO[group, part] = F.linear(planes_PX[group], weight_TX)
        return out_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        rows_PI, values_SOK, metadata_SOB = ctx.saved_tensors
        wide = torch.promote_types(grad_PO.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            expansion = _expansion(grad_PO, values_SOK)
            narrow_PO = grad_PO.to(expansion.dtype)
            total_PX = grad_values = rows_PX = None
            if ctx.needs_input_grad[0]:
                total_PX = torch.zeros(grad_PO.shape[0], 2 * values_SOK.shape[2], dtype=wide, device="cpu")
            if ctx.needs_input_grad[2]:
                grad_values = torch.zeros_like(values_SOK, memory_format=torch.contiguous_format)
                rows_PX = to_planes(rows_PI.to(expansion.dtype))
            for slot, group in row_groups(ctx.ends):
                for part in expansion.parts():
                    part_PT, metadata_TB = narrow_PO[group, part], metadata_SOB[slot, part]
                    if total_PX is not None:
                        total_PX[group] += part_PT @ expansion.tile(values_SOK[slot, part], metadata_TB)
                    if grad_values is not None and rows_PX is not None:
                        kept = expansion.kept(part_PT.T @ rows_PX[group], metadata_TB)
                        for place, number_TG in enumerate(kept):
                            grad_values[slot, part, place::2] = number_TG
            grad_rows = None if total_PX is None else from_planes(total_PX).to(grad_PO.dtype)
        return grad_rows, None, grad_values, None


def _compiled(
    rows_PI: Tensor, offsets_S: Tensor, ends: list[int], values_SOK: Tensor, metadata_SOB: Tensor, out_PO: Tensor
) -> list[tuple[int, slice]]:
    """Do the products for which the compiled one is the way; return slots and rows of the others."""
    groups = list(row_groups(ends))
    as_they_lie = values_SOK.is_contiguous() and metadata_SOB.is_contiguous()
    if not groups or not as_they_lie or rows_PI.dtype != values_SOK.dtype:
        return groups
    if not plain_tensors(rows_PI, values_SOK, metadata_SOB):
        return groups
    machine = this_machine()
    left = [
        (slot, group)
        for slot, group in groups
        if sparse24_route(group.stop - group.start, rows_PI.shape[1], rows_PI.dtype, machine) != "kernel"
    ]
    if len(left) == len(groups) or not has_sparse24_product():
        return groups
    rows_PI = rows_PI.contiguous()
    if not left:
        ends_S = offsets_S.to("cpu", torch.int32).contiguous()
        compiled_sparse24_linear(rows_PI, values_SOK, metadata_SOB, ends_S, out_PO)
        return left
    for slot, group in groups:
        if (slot, group) not in left:
            one, end = slice(slot, slot + 1), torch.tensor([group.stop - group.start], dtype=torch.int32, device="cpu")
            compiled_sparse24_linear(rows_PI[group], values_SOK[one], metadata_SOB[one], end, out_PO[group])
    return left


def _expansion(rows: Tensor, values_SOK: Tensor) -> Expansion:
    return Expansion(values_SOK.shape[1], 2 * values_SOK.shape[2], tile_type(rows))
