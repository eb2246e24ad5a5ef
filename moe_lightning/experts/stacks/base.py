"""What every stack of packed matrices can do.

Legend: S matrices (slots), O outputs, I inputs, P rows sorted by slot.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from moe_kernels import grouped_linear
from torch import Tensor, nn

from moe_lightning.plan import WeightFormat
from moe_lightning.plan.formats import Kind


class WeightStack(nn.Module):
    """A stack of matrices ``[slots, outputs, inputs]`` in a packed form.

    Attributes:
        format: How the weights are stored.
        slots: Matrices, S.
        outputs: Rows of each, O.
        inputs: Columns of each, I.
        dtype: Type that the weights are computed in; it follows the module (``.to(torch.bfloat16)``), unlike scales.
    """

    kind: ClassVar[Kind]
    _kinds: ClassVar[dict[str, type[WeightStack]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        WeightStack._kinds[cls.kind] = cls

    def __init__(self, format: WeightFormat, slots: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        """Note the sizes; children register the tensors.

        Raises:
            ValueError: Matrices of this size cannot be stored so.
        """
        super().__init__()
        format.check(outputs, inputs)
        self.format = format
        self.slots, self.outputs, self.inputs = slots, outputs, inputs
        self.dtype = dtype

    @staticmethod
    def empty(
        format: WeightFormat,
        slots: int,
        outputs: int,
        inputs: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> WeightStack:
        """Make a stack of a given size without values, as weights files are loaded into.

        Args:
            format: How the weights are stored.
            slots: S.
            outputs: O.
            inputs: I.
            dtype: Type to compute in; torch's default where None.
            device: Where the tensors lie.

        Raises:
            ValueError: Matrices of this size cannot be stored so.
        """
        format.check(outputs, inputs)
        return WeightStack._kinds[format.kind]._empty(
            format, (slots, outputs, inputs), dtype or torch.get_default_dtype(), device
        )

    @classmethod
    @abstractmethod
    def _empty(cls, format: WeightFormat, size: tuple[int, int, int], dtype: torch.dtype, device: Any) -> WeightStack:
        """Make a stack without values."""

    @property
    def num_weights(self) -> int:
        """Weights that the stack stands for, zeros included: each is one parameter of the model."""
        return self.slots * self.outputs * self.inputs

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(tensor.device for tensor in (*self.parameters(), *self.buffers()))

    @property
    def is_pruned(self) -> bool:
        """Whether weights were pruned, so that some are zero for good."""
        return self.format.sparsity is not None or self.format.pattern is not None

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights in floating point, ``[S, O, I]``.

        Args:
            dtype: Of the result; that of the stack where None.
        """

    @abstractmethod
    def select(self, slots: Sequence[int]) -> WeightStack:
        """Return a stack of some of the matrices, in the order given; it shares nothing with this one."""

    def linear(self, rows_PI: Tensor, offsets_S: Tensor) -> Tensor:
        """Multiply each group of rows with its own matrix, ``[P, O]``; see `moe_kernels.grouped_linear`.

        Args:
            rows_PI: Rows sorted by slot.
            offsets_S: End of each slot's rows, int32.
        """
        return grouped_linear(rows_PI, self.dense(rows_PI.dtype), offsets_S)

    def zeros_kept(self) -> Tensor | None:
        """Return which weights may be other than zero, bool ``[S, O, I]``; None where nothing was pruned."""
        return self.dense() != 0 if self.is_pruned else None

    def slot(self, number: int) -> WeightStack:
        """Return one of the matrices as a stack of one, to read from: it may share its tensors with this stack.

        Args:
            number: Slot.
        """
        return self.select([number])

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return what is written to disk, by name."""
        return dict(self.state_dict(keep_vars=True))

    def _apply(self, fn: Any, recurse: bool = True) -> WeightStack:
        # Scales and codes are what was decided when the weights were rounded: they move, but no cast reaches them.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != old.dtype:
                self._buffers[name] = old.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Say how many matrices of what size are held, and how."""
        return f"{self.format}, slots={self.slots}, outputs={self.outputs}, inputs={self.inputs}"


def slot_index(slots: Sequence[int], device: torch.device) -> Tensor:
    """Return slots as an index tensor."""
    return torch.tensor(list(slots), dtype=torch.int64, device=device)


def packed_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that hold packed weights, anywhere in a module, in whatever form they may be."""
    return [
        f"{path}.{name}" if path else name
        for path, inner in module.named_modules()
        if isinstance(inner, WeightStack)
        for name in sorted(_buffer_names(inner))
    ]


def _buffer_names(stack: WeightStack) -> set[str]:
    # The stored form is what a state dict has; working forms, which come and go, are in none.
    return (set(stack.state_dict()) | stack._non_persistent_buffers_set) - dict(stack.named_parameters()).keys()
