"""Giving the MoE layers of a model the experts of a layout, by slicing the tensors that are there.

Shapes only: the values of surviving parameters are kept, new ones (novices) are zeros until a method fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer
from moe_lightning.experts import CompressedExperts, Dense
from moe_lightning.plan import ExpertLayout, ModelShape


@dataclass(frozen=True)
class ReplacedParameter:
    """A parameter that another one stands for now.

    Attributes:
        name: Name of the new parameter in the model.
        old: The parameter that went; None where there was none.
        new: The parameter that came; None where none did (the last novices of a layer were deleted).
        rows: For each row (first axis) of ``new`` the row of ``old`` that it holds, int64 on the CPU, -1 for a row that
            is new; None where one of the two is not there.
    """

    name: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    rows: Tensor | None


@dataclass
class LayoutChange:
    """What was done to a model's layers, and how to undo it."""

    replaced: list[ReplacedParameter] = field(default_factory=list)
    undo_steps: list[Callable[[], object]] = field(default_factory=list)

    def set(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute and remember the old one."""
        self.undo_steps.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    def undo(self) -> None:
        """Put everything back, last step first."""
        while self.undo_steps:
            self.undo_steps.pop()()


def _slice(old: nn.Parameter, rows: list[int]) -> tuple[nn.Parameter, Tensor]:
    # On the CPU, also where the model is on the meta device: what was touched is counted from it.
    index = torch.tensor(rows, dtype=torch.int64, device="cpu")
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(old.index_select(0, index.to(old.device)), requires_grad=old.requires_grad), index


def _new_novices(
    architecture: Architecture, layer: MoELayer, before: ExpertLayout, after: ExpertLayout
) -> nn.Parameter | None:
    if not after.novices:
        return None
    opened = architecture.open_experts(layer)
    with torch.inference_mode(False), torch.no_grad():
        values = opened.gate_up_proj.new_zeros(len(after.novices), opened.gate_up_proj.shape[-1])
        for row, expert in enumerate(after.novices):
            if expert in before.novices and opened.novices is not None:
                values[row] = opened.novices[before.novices.index(expert)]
    old = opened.novices
    return nn.Parameter(values, requires_grad=old.requires_grad if old is not None else True)


def _change_layer(
    change: LayoutChange, architecture: Architecture, layer: MoELayer, before: ExpertLayout, after: ExpertLayout
) -> None:
    experts = layer.experts
    opened = architecture.open_experts(layer)
    slots = [before.real.index(expert) for expert in after.real]
    prefix = f"{layer.name}.experts"
    source = experts.storage if isinstance(experts, CompressedExperts) else experts
    gate_up, gate_up_rows = _slice(source.gate_up_proj, slots)
    down, down_rows = _slice(source.down_proj, slots)
    novices = _new_novices(architecture, layer, before, after)
    change.replaced += [
        ReplacedParameter(f"{prefix}.storage.gate_up_proj", source.gate_up_proj, gate_up, gate_up_rows),
        ReplacedParameter(f"{prefix}.storage.down_proj", source.down_proj, down, down_rows),
    ]
    if novices is not None or before.novices:
        change.replaced.append(_replaced_novices(f"{prefix}.novices", experts, novices, before, after))
    module = CompressedExperts(Dense(gate_up, down), after.slot_map, novices, opened.activation)
    module.train(experts.training)
    change.set(layer.block, "experts", module)
    if after.router != before.router:
        weight, rows = _slice(layer.router.weight, [before.router.index(expert) for expert in after.router])
        change.replaced.append(ReplacedParameter(f"{layer.name}.gate.weight", layer.router.weight, weight, rows))
        change.set(layer.router, "weight", weight)
        change.set(layer.router, "num_experts", len(after.router))


def _replaced_novices(
    name: str, experts: nn.Module, novices: nn.Parameter | None, before: ExpertLayout, after: ExpertLayout
) -> ReplacedParameter:
    old = getattr(experts, "novices", None)
    if old is None or novices is None:
        return ReplacedParameter(name, old, novices, None)
    places = [before.novices.index(expert) if expert in before.novices else -1 for expert in after.novices]
    return ReplacedParameter(name, old, novices, torch.tensor(places, dtype=torch.int64, device="cpu"))


def change_layouts(model: nn.Module, architecture: Architecture, before: ModelShape, after: ModelShape) -> LayoutChange:
    """Give every layer whose layout differs the experts of its new layout.

    Args:
        model: The live model, in the structure of ``before``.
        architecture: Its architecture.
        before: The shape it has.
        after: The shape it gets.

    Returns:
        What was replaced, with an undo.
    """
    change = LayoutChange()
    try:
        for layer in architecture.moe_layers(model):
            old, new = before.layout(layer.index), after.layout(layer.index)
            if old != new:
                _change_layer(change, architecture, layer, old, new)
    except BaseException:
        change.undo()
        raise
    return change
