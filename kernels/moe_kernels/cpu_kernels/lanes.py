"""Int4 matrices as the compiled product works on them, and back, exactly.

The stored words, transposed: sixteen outputs are the lanes of a vector.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, W words of a row, B blocks of L = 16
outputs, Z bytes of two groups' zeros, P rows sorted by slot, T outputs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import FLOATS, checked_ends, plain_tensors, scratch_memory, threads_for
from moe_kernels.int4 import TiledMatrices, dequantize_int4, row_groups
from moe_kernels.machine import int4_route, this_machine

LANES = 16
WORD_CODES = 8


@dataclass(frozen=True)
class LaneMatrices(TiledMatrices):
    """Int4 matrices whose outputs are lanes.

    Attributes:
        words_SBWL: Eight codes of an output, the first in the lowest bits, int32 ``[S, O / 16, I / 8, 16]``.
        scale_SBGL: bfloat16 or float32 ``[S, O / 16, G, 16]``.
        zero_SBZL: Zeros of two groups a byte, uint8 ``[S, O / 16, ceil(G / 2), 16]``; None for a symmetric grid, whose
            zero is 8.
    """

    words_SBWL: Tensor
    scale_SBGL: Tensor
    zero_SBZL: Tensor | None

    @property
    def outputs(self) -> int:
        """O."""
        return LANES * self.words_SBWL.shape[1]

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """I."""
        return WORD_CODES * self.words_SBWL.shape[2]

    def _tile(self, slot: int, part: slice, dtype: torch.dtype) -> Tensor:
        # Tiles begin and end between blocks: their step is a multiple of sixteen.
        one, blocks = slice(slot, slot + 1), slice(part.start // LANES, -(-part.stop // LANES))
        zero_SBZL = None if self.zero_SBZL is None else self.zero_SBZL[one, blocks]
        words, scale, zero = from_lanes(
            LaneMatrices(self.words_SBWL[one, blocks], self.scale_SBGL[one, blocks], zero_SBZL)
        )
        return dequantize_int4(words[0], scale[0], None if zero is None else zero[0], self.inputs, dtype)

    def grouped_product(self, rows_PI: Tensor, offsets_S: Tensor, ends: list[int], out_PO: Tensor) -> None:
        """See `Int4Matrices.grouped_product`: all slots in one call.

        Raises:
            ValueError: Sizes do not fit one another.
        """
        most = max((group.stop - group.start for _, group in row_groups(ends)), default=0)
        found = library("int4")
        if (
            found is None
            or rows_PI.dtype not in FLOATS
            or not plain_tensors(rows_PI, self.words_SBWL, self.scale_SBGL, self.zero_SBZL)
            or int4_route(most, rows_PI.dtype, this_machine()) != "kernel"
        ):
            super().grouped_product(rows_PI, offsets_S, ends, out_PO)
            return
        (total, inputs), groups = rows_PI.shape, self.scale_SBGL.shape[2]
        if inputs != self.inputs or out_PO.shape != (total, self.outputs) or not out_PO.is_contiguous():
            raise ValueError(
                f"rows {list(rows_PI.shape)} and results {list(out_PO.shape)} do not fit matrices of {self.outputs} "
                f"outputs and {self.inputs} inputs"
            )
        rows_PI, ends_S = rows_PI.contiguous(), checked_ends(offsets_S, len(self.words_SBWL), total)
        if not most:
            return
        wide = rows_PI.dtype == torch.float32
        scratch, start = scratch_memory(found.moe_int4_scratch(total, inputs, groups, wide))
        found.moe_int4_product(
            rows_PI.data_ptr(),
            ends_S.data_ptr(),
            self.words_SBWL.data_ptr(),
            self.scale_SBGL.data_ptr(),
            None if self.zero_SBZL is None else self.zero_SBZL.data_ptr(),
            out_PO.data_ptr(),
            start,
            len(ends),
            self.outputs,
            inputs,
            groups,
            wide,
            self.scale_SBGL.dtype == torch.float32,
            threads_for(total * self.outputs * inputs),
        )
        del scratch  # held until here


def to_lanes(words_SOW: Tensor, scale_SOG: Tensor, zero_SOB: Tensor | None, inputs: int) -> LaneMatrices | None:
    """Turn stored int4 matrices into those of the compiled product.

    Args:
        words_SOW: int32 ``[S, O, ceil(I / 8)]``; see `moe_kernels.int4.dequantize_int4` for these four.
        scale_SOG: ``[S, O, G]``.
        zero_SOB: uint8 ``[S, O, ceil(G / 2)]``, or None.
        inputs: I.

    Returns:
        The matrices, or None where they must stay as they are: outputs that are no multiple of 16, groups that are no
        multiple of 8, scales of another type than bfloat16 and float32, another device than the CPU.
    """
    _, outputs, groups = scale_SOG.shape
    tensors = (words_SOW, scale_SOG) if zero_SOB is None else (words_SOW, scale_SOG, zero_SOB)
    if (
        outputs == 0
        or outputs % LANES
        or groups == 0
        or inputs == 0
        or inputs % (groups * WORD_CODES)
        or scale_SOG.dtype not in FLOATS
        or any(tensor.device.type != "cpu" for tensor in tensors)
    ):
        return None
    with torch.inference_mode(False), torch.no_grad():
        return LaneMatrices(_lanes(words_SOW), _lanes(scale_SOG), None if zero_SOB is None else _lanes(zero_SOB))


def _lanes(table_SOX: Tensor) -> Tensor:
    return table_SOX.unflatten(1, (-1, LANES)).transpose(2, 3).contiguous()


def _rows(table_SBXL: Tensor) -> Tensor:
    return table_SBXL.transpose(2, 3).flatten(1, 2).contiguous()


def from_lanes(matrices: LaneMatrices) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what :func:`to_lanes` was given, bit for bit.

    Returns:
        ``words [S, O, W]``, ``scale [S, O, G]`` and packed ``zero [S, O, ceil(G / 2)]`` or None.
    """
    with torch.inference_mode(False), torch.no_grad():
        zero_SBZL = matrices.zero_SBZL
        zero_SOB = None if zero_SBZL is None else _rows(zero_SBZL)
        return _rows(matrices.words_SBWL), _rows(matrices.scale_SBGL), zero_SOB
