"""int4 weights in the form that a product on a CPU works on, instead of the form that is stored.

There are two such products, with a form each: that of `moe_kernels.cpu_kernels`, where it can be compiled, and torch's.
Only one form is in memory. The stored form comes back, bit for bit, when anybody asks for it: a state dict, a
move to another device, a copy, a dense stack. Threads may share a stack: the forms change under a lock, all buffers at
once, and a product keeps the tensors that it began with.

Legend: P rows sorted by slot, I inputs, O outputs, S matrices (slots).
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from moe_kernels import (
    CpuMatrices,
    Int4Matrices,
    LaneMatrices,
    WordMatrices,
    from_cpu_layout,
    from_lanes,
    grouped_product,
    to_cpu_layout,
    to_lanes,
)
from moe_kernels.machine import Int4Product, this_machine
from torch import Tensor

from moe_lightning.experts.stacks.base import WeightStack
from moe_lightning.plan import WeightFormat

_STORED = ("words", "scale", "zero")
_OP = ("cpu_codes", "cpu_scales")
_LANES = ("lane_words", "lane_scale", "lane_zero")
WORKING = (*_OP, *_LANES)
"""Names of the tensors of both forms."""

# Types of rows that each product takes.
_TYPES: dict[Int4Product, tuple[torch.dtype, ...]] = {
    "kernel": (torch.bfloat16, torch.float32),
    "op": (torch.bfloat16,),
    "tiles": (),
}


class CpuForm(WeightStack):
    """The part of `Int4` that changes between the stored form and those of products on a CPU.

    Attributes:
        lane_words: Codes as the compiled product wants them, int32 ``[S, O / 16, I / 8, 16]``; in no state dict. There
            only while ``words``, ``scale`` and ``zero`` are not.
        lane_scale: ``[S, O / 16, G, 16]``, likewise.
        lane_zero: uint8 ``[S, O / 16, ceil(G / 2), 16]`` or None, likewise.
        cpu_codes: Codes as torch's product on this machine wants them, uint8 ``[S, O, I / 2]``, likewise.
        cpu_scales: Scales and zeros for it, likewise.
    """

    kind = "int4"
    lane_words: Tensor
    lane_scale: Tensor
    lane_zero: Tensor | None
    cpu_codes: Tensor
    cpu_scales: Tensor
    # The stored form cannot be turned into the other and back: found out once, until other weights are loaded.
    _stays_stored = False

    def __init__(self, format: WeightFormat, slots: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        """Note the sizes; children register the tensors of the stored form.

        Raises:
            ValueError: Matrices of this size cannot be stored so.
        """
        super().__init__(format, slots, outputs, inputs, dtype)
        self._non_persistent_buffers_set.update(WORKING)
        self._begin()

    def _begin(self) -> None:
        # Taken again by who holds it: a state dict asks for the stored form.
        self._lock = threading.RLock()

    @property
    def in_cpu_form(self) -> bool:
        """Whether the weights are held as a product on a CPU wants them."""
        return "cpu_codes" in self._buffers or "lane_words" in self._buffers

    @torch.compiler.disable
    def linear(self, rows_PI: Tensor, offsets_S: Tensor) -> Tensor:
        """Multiply each group of rows with its own matrix, ``[P, O]``; differentiable in the rows.

        Weights are dequantised tile by tile, or not at all: the first rows on a CPU turn the stack into the form of the
        compiled product (bf16 and fp32), or of torch's (bf16, where no gradient is wanted).

        Args:
            rows_PI: Rows sorted by slot, in the type to compute in.
            offsets_S: End of each slot's rows, int32.
        """
        return grouped_product(rows_PI, offsets_S, self._matrices(rows_PI))

    def _matrices(self, rows_PI: Tensor) -> Int4Matrices:
        with self._lock:
            if not self.in_cpu_form and self._gains_from(rows_PI):
                self._take_cpu_form()
            if self.in_cpu_form:
                return self._working()
            return WordMatrices(self.words, self.scale, self.zero, self.inputs)

    def _working(self) -> CpuMatrices | LaneMatrices:
        if "cpu_codes" in self._buffers:
            return CpuMatrices(self.cpu_codes, self.cpu_scales)
        return LaneMatrices(self.lane_words, self.lane_scale, self.lane_zero)

    def _gains_from(self, rows_PI: Tensor) -> bool:
        if self._stays_stored or rows_PI.device.type != "cpu" or not rows_PI.shape[0]:
            return False
        product = this_machine().int4
        # torch's product has no gradient. The compiled one is taken for training as well: whether something else was
        # computed with the stack before, an evaluation say, must not show in what training computes.
        no_gradient = product == "op" and torch.is_grad_enabled() and rows_PI.requires_grad
        return not no_gradient and rows_PI.dtype in _TYPES[product]

    def _take_cpu_form(self) -> None:
        form: dict[str, Tensor | None] | None = None
        if self.scale.shape[-1] == self._num_groups and (self.zero is None) == self.format.symmetric:
            stored = self.words, self.scale, self.zero, self.inputs
            if this_machine().compiled:
                lanes = to_lanes(*stored)
                if lanes is not None:
                    form = dict(zip(_LANES, (lanes.words_SBWL, lanes.scale_SBGL, lanes.zero_SBZL), strict=True))
            else:
                op = to_cpu_layout(*stored)
                if op is not None:
                    form = dict(zip(_OP, (op.packed_SOB, op.scales_SGO2), strict=True))
        if form is None:
            self._stays_stored = True
        else:
            self._hold(**form)

    @property
    def _num_groups(self) -> int:
        return self.inputs // self.format.group_of(self.inputs)

    def _hold(self, **tensors: Tensor | None) -> None:
        # Another dict, for whoever goes through the buffers meanwhile: it shows one form or the other.
        others = {name: held for name, held in self._buffers.items() if name not in (*_STORED, *WORKING)}
        self._buffers = others | tensors

    def take_stored_form(self) -> None:
        """Hold the weights as they are stored, if they are not."""
        with self._lock:
            if self.in_cpu_form:
                matrices = self._working()
                if isinstance(matrices, LaneMatrices):
                    stored = from_lanes(matrices)
                else:
                    stored = from_cpu_layout(matrices, self._num_groups, self.format.symmetric)
                self._hold(**dict(zip(_STORED, stored, strict=True)))

    def __getattr__(self, name: str) -> Any:
        # Called for what is no plain attribute: buffers, and what is not there.
        if name in _STORED and "_lock" in self.__dict__:
            with self._lock:
                self.take_stored_form()
                return super().__getattr__(name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # Copies, shallow ones too, and pickles that another machine may read.
        with self._lock:
            self.take_stored_form()
            state = self.__dict__ | {"_buffers": self._buffers.copy()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def _apply(self, fn: Any, recurse: bool = True) -> CpuForm:
        with self._lock:
            self.take_stored_form()
            self._stays_stored = False
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._lock:
            self.take_stored_form()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._lock:
            self.take_stored_form()
            self._stays_stored = False
            super()._load_from_state_dict(*args)
