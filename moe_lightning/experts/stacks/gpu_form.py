"""int4 weights in the form that the Triton kernels work on, instead of the form that is stored.

As with `CpuForm`, only one form is in memory, and the stored one comes back, bit for bit, when anybody asks for it.

Legend: P rows sorted by slot, I inputs, O outputs, S matrices (slots), G groups along the input, W words of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from moe_kernels import Int4Matrices
from moe_kernels.int4 import TILE_WEIGHTS
from moe_kernels.triton_kernels.int4_layout import (
    GROUPS,
    ROW_MULTIPLE,
    Int4Tiles,
    dequantize_tiles,
    from_tiles,
    kernel_group,
    to_tiles,
)
from torch import Tensor
from torch.nn.functional import linear

from moe_lightning.experts.stacks.cpu_form import WORKING, CpuForm
from moe_lightning.plan import WeightFormat

_STORED = ("words", "scale", "zero")
_TILES = ("tile_words", "tile_pairs")
_EVERY_FORM = (*_STORED, *_TILES, *WORKING)
# On a GPU a product wants more at a time than what stays in a core's cache.
_GPU_TILE_WEIGHTS = 2**24


class GpuForm(CpuForm):
    """The part of `Int4` that changes between the stored form, that of a CPU and that of the Triton kernels.

    Attributes:
        tile_words: Codes as the kernels want them, int32 ``[S, G, O, W]``; in no state dict. There only while
            ``words``, ``scale`` and ``zero`` are not.
        tile_pairs: Scales and zeros, int32 ``[S, G, O]``.
    """

    kind = "int4"

    def __init__(self, format: WeightFormat, slots: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        """Note the sizes; children register the tensors of the stored form.

        Raises:
            ValueError: Matrices of this size cannot be stored so.
        """
        super().__init__(format, slots, outputs, inputs, dtype)
        self._non_persistent_buffers_set.update(_TILES)

    @property
    def in_kernel_form(self) -> bool:
        """Whether the weights are held as the kernels want them."""
        return "tile_words" in self._buffers

    def why_no_tiles(self) -> str | None:
        """Say why the kernels cannot work with matrices of this size; None where they can."""
        group = self.inputs // self._num_groups
        if kernel_group(self.inputs, self._num_groups) is None:
            return f"groups of {group}: the kernels want multiples of {' or '.join(map(str, GROUPS))}"
        if self.outputs % ROW_MULTIPLE:
            return f"{self.outputs} outputs: the kernels want a multiple of {ROW_MULTIPLE}"
        return None

    def tiles(self) -> Int4Tiles:
        """Hold the weights as the kernels want them, if they are not, and return them.

        Raises:
            ValueError: They cannot be held so: see `why_no_tiles`.
        """
        held = self._buffers
        # Without the lock where nothing is to do: a compiler can trace that. Both tensors come from one dict.
        words_SGOW, pairs_SGO = held.get("tile_words"), held.get("tile_pairs")
        if words_SGOW is None or pairs_SGO is None:
            return self._take_kernel_form()
        return Int4Tiles(words_SGOW, pairs_SGO)

    @torch.compiler.disable
    def _take_kernel_form(self) -> Int4Tiles:
        with self._lock:
            if not self.in_kernel_form:
                self.take_stored_form()
                words, scale, zero = (self._buffers[name] for name in _STORED)
                assert words is not None and scale is not None
                # Not as inference tensors: training may read them later.
                with torch.inference_mode(False), torch.no_grad():
                    tiles = to_tiles(words, scale, zero, self.inputs)
                self._hold(tile_words=tiles.words_SGOW, tile_pairs=tiles.pairs_SGO)
            return self._held_tiles()

    def _held_tiles(self) -> Int4Tiles:
        words_SGOW, pairs_SGO = (self._buffers[name] for name in _TILES)
        assert words_SGOW is not None and pairs_SGO is not None
        return Int4Tiles(words_SGOW, pairs_SGO)

    def take_stored_form(self) -> None:
        """Hold the weights as they are stored, if they are not."""
        with self._lock:
            if self.in_kernel_form:
                with torch.inference_mode(False), torch.no_grad():
                    stored = from_tiles(self._held_tiles(), self._num_groups, self.format.symmetric)
                self._hold(**dict(zip(_STORED, stored, strict=True)))
            else:
                super().take_stored_form()

    def _matrices(self, rows_PI: Tensor) -> Int4Matrices:
        # Training after, or between, passes through the kernels goes on with the form that is there.
        with self._lock:
            return TileMatrices(self._held_tiles()) if self.in_kernel_form else super()._matrices(rows_PI)

    def _hold(self, **tensors: Tensor | None) -> None:
        # Another dict, for whoever goes through the buffers meanwhile: it shows one form or the other.
        others = {name: held for name, held in self._buffers.items() if name not in _EVERY_FORM}
        self._buffers = others | tensors


@dataclass(frozen=True)
class TileMatrices(Int4Matrices):
    """Int4 matrices in the kernels' form, for products in plain torch."""

    form: Int4Tiles

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """I."""
        return self.form.inputs

    @property
    def outputs(self) -> int:
        """O."""
        return self.form.outputs

    def _parts(self, slot: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        words_SGOW, pairs_SGO = self.form.words_SGOW, self.form.pairs_SGO
        weights = _GPU_TILE_WEIGHTS if words_SGOW.is_cuda else TILE_WEIGHTS
        step = max(ROW_MULTIPLE, weights // max(self.inputs, 1))
        for first in range(0, self.outputs, step):
            part, one = slice(first, first + step), slice(slot, slot + 1)
            yield part, dequantize_tiles(Int4Tiles(words_SGOW[one, :, part], pairs_SGO[one, :, part]), dtype)[0]

    def product(self, slot: int, rows_PI: Tensor, out_PO: Tensor) -> None:
        """See `Int4Matrices.product`."""
        for part, weight_TI in self._parts(slot, rows_PI.dtype):
            out_PO[:, part] = linear(rows_PI, weight_TI)

    def transposed_product(self, slot: int, grad_PO: Tensor, out_PI: Tensor) -> None:
        """See `Int4Matrices.transposed_product`."""
        total_PI = torch.zeros_like(out_PI, dtype=torch.promote_types(grad_PO.dtype, torch.float32))
        for part, weight_TI in self._parts(slot, grad_PO.dtype):
            total_PI += grad_PO[:, part] @ weight_TI
        out_PI.copy_(total_PI)
