"""What surgery did to a model's parameters, so that an optimizer's state can follow, and so that it can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.experts import Masked, Sparse24, WeightStack


@dataclass(frozen=True)
class ReplacedParameter:
    """A parameter that another one stands for now.

    Attributes:
        name: Name of the new parameter in the model (of the old one where none came).
        old: The parameter that went; None where there was none.
        new: The parameter that came; None where none did.
        rows: For each row (first axis) of ``new`` the row of ``old`` that it holds, int64 on the CPU, -1 for a row that
            is new; None where one of the two is not there.
        axis: Further axis along which entries were picked, or None.
        picks: For each row of ``new`` the entries of ``old`` along ``axis`` that it holds, int64 ``[rows, entries]``.
        stack: The pruned matrices that hold ``new``, where ``old`` has an entry for each of their weights: they say
            which of those are in ``new``. They are asked only where a state follows, for their answer is large.
        counts: Whether its numbers are counted here; those of packed matrices are counted with their stack.
    """

    name: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    rows: Tensor | None
    axis: int | None = None
    picks: Tensor | None = None
    stack: WeightStack | None = None
    counts: bool = True

    def carried(self, value: Tensor) -> Tensor:
        """Return of a tensor shaped like ``old`` what belongs to ``new``; zeros for rows that are new."""
        assert self.rows is not None
        if self.stack is not None and value.ndim == 2:
            value = value[None]  # of a single matrix, which is a stack of one now
        rows = self.rows.to(value.device)
        result = value.index_select(0, rows.clamp(min=0))
        result[rows < 0] = 0
        if self.picks is not None and self.axis is not None:
            result = pick(result, self.picks, self.axis)
        return result if self.stack is None else _of_pruned(result, self.stack)

    @property
    def numbers_gone_and_new(self) -> int:
        """Numbers that went and numbers that came."""
        if not self.counts:
            return 0
        kept = 0
        if self.rows is not None and self.new is not None and len(self.new):
            kept = int((self.rows >= 0).sum()) * self.new[0].numel()
        return sum(parameter.numel() - kept for parameter in (self.old, self.new) if parameter is not None)


def _of_pruned(value: Tensor, stack: WeightStack) -> Tensor:
    """Return of a state of whole matrices ``[S, O, I]`` what belongs to the weights that pruning left.

    Of a factored state, ``[S, O, 1]`` or ``[S, 1, I]``, the rows stay, and columns become means over what stands there.
    """
    factored = value.shape[-1] == 1 < stack.inputs
    if factored or stack.device.type == "meta":
        return value
    shared = value.shape[-2] == 1 < stack.outputs
    if isinstance(stack, Sparse24):
        whole = value.expand(-1, stack.outputs, -1)
        result = torch.take_along_dim(whole, stack.places.to(value.device), -1)
        return result.mean(-2, keepdim=True) if shared else result
    if isinstance(stack, Masked) and not shared:
        return value.masked_fill(~stack.zeros_kept().to(value.device), 0)
    return value


def pick(tensor: Tensor, picks: Tensor, axis: int) -> Tensor:
    """Take from each row other entries along an axis."""
    rows, entries = picks.shape
    index = picks.to(tensor.device).reshape([rows, *(entries if at == axis else 1 for at in range(1, tensor.ndim))])
    sizes = [entries if at == axis else size for at, size in enumerate(tensor.shape)]
    return torch.take_along_dim(tensor, index.expand(sizes), axis)


@dataclass
class LayoutChange:
    """What was done to a model's layers, and how to undo it.

    Attributes:
        replaced: Every parameter that went, came, or was sliced.
        packed_weights: Weights of packed matrices that went, came, or were stored in another form.
        undo_steps: What puts everything back, the first step first.
    """

    replaced: list[ReplacedParameter] = field(default_factory=list)
    packed_weights: int = 0
    undo_steps: list[Callable[[], object]] = field(default_factory=list)

    def set(self, module: Any, name: str, value: object) -> None:
        """Set an attribute and remember the old one."""
        self.undo_steps.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    def drop(self, prefix: str, *modules: tuple[str, nn.Module]) -> None:
        """Remember that the parameters of modules, given with their names under a prefix, are gone."""
        for name, module in modules:
            stacks = [inner for inner in module.modules() if isinstance(inner, WeightStack)]
            packed = {id(parameter) for stack in stacks for parameter in stack.parameters()}
            self.packed_weights += sum(stack.num_weights for stack in stacks)
            for inner, parameter in module.named_parameters():
                counts = id(parameter) not in packed
                item = ReplacedParameter(f"{prefix}.{name}.{inner}", parameter, None, None, counts=counts)
                self.replaced.append(item)

    def rescale(self, parameter: nn.Parameter, factor: Tensor) -> None:
        """Multiply a parameter in place; the optimizer's state stays as it is.

        Args:
            parameter: The parameter.
            factor: What to multiply with, of a shape that fits it.
        """
        old = parameter.detach().clone()

        def restore() -> None:
            with torch.inference_mode(False), torch.no_grad():
                parameter.copy_(old)

        with torch.inference_mode(False), torch.no_grad():
            parameter.copy_(old.to(factor.dtype) * factor.to(old.device))
        self.undo_steps.append(restore)

    def undo(self) -> None:
        """Put everything back, last step first."""
        while self.undo_steps:
            self.undo_steps.pop()()
