"""Giving a model the layers and experts of a shape, by slicing the tensors that are there.

Shapes only: the values of surviving parameters are kept, new ones (novices, biases) are zeros until a method fills
them. A merged expert starts as its owner, and of channels the first are kept, until a method says better.

Legend: S real experts, I intermediate (channels), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer
from moe_lightning.experts import Channels, CompressedExperts, Dense
from moe_lightning.plan import ExpertLayout, ModelShape


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
    """

    name: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    rows: Tensor | None
    axis: int | None = None
    picks: Tensor | None = None

    def carried(self, value: Tensor) -> Tensor:
        """Return of a tensor shaped like ``old`` what belongs to ``new``; zeros for rows that are new."""
        assert self.rows is not None
        rows = self.rows.to(value.device)
        result = value.index_select(0, rows.clamp(min=0))
        result[rows < 0] = 0
        return result if self.picks is None or self.axis is None else _pick(result, self.picks, self.axis)

    @property
    def numbers_gone_and_new(self) -> int:
        """Numbers that went and numbers that came."""
        kept = 0
        if self.rows is not None and self.new is not None and len(self.new):
            kept = int((self.rows >= 0).sum()) * self.new[0].numel()
        return sum(parameter.numel() - kept for parameter in (self.old, self.new) if parameter is not None)


@dataclass
class LayoutChange:
    """What was done to a model's layers, and how to undo it."""

    replaced: list[ReplacedParameter] = field(default_factory=list)
    undo_steps: list[Callable[[], object]] = field(default_factory=list)

    def set(self, module: Any, name: str, value: object) -> None:
        """Set an attribute and remember the old one."""
        self.undo_steps.append(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    def drop(self, prefix: str, *modules: tuple[str, nn.Module]) -> None:
        """Remember that the parameters of modules, given with their names under a prefix, are gone."""
        for name, module in modules:
            for inner, parameter in module.named_parameters():
                self.replaced.append(ReplacedParameter(f"{prefix}.{name}.{inner}", parameter, None, None))

    def undo(self) -> None:
        """Put everything back, last step first."""
        while self.undo_steps:
            self.undo_steps.pop()()


def _pick(tensor: Tensor, picks: Tensor, axis: int) -> Tensor:
    """Take from each row other entries along an axis."""
    rows, entries = picks.shape
    index = picks.to(tensor.device).reshape([rows, *(entries if at == axis else 1 for at in range(1, tensor.ndim))])
    sizes = [entries if at == axis else size for at, size in enumerate(tensor.shape)]
    return torch.take_along_dim(tensor, index.expand(sizes), axis)


def _slice(name: str, old: nn.Parameter, rows: list[int], axis: int | None = None, picks: Tensor | None = None) -> Any:
    # On the CPU, also where the model is on the meta device: what was touched is counted from it.
    index = torch.tensor(rows, dtype=torch.int64, device="cpu")
    with torch.inference_mode(False), torch.no_grad():
        values = old.index_select(0, index.to(old.device))
        if picks is not None and axis is not None:
            values = _pick(values, picks, axis)
        return ReplacedParameter(name, old, nn.Parameter(values, requires_grad=old.requires_grad), index, axis, picks)


def _vectors(like: Tensor, old: nn.Parameter | None, rows: list[int]) -> nn.Parameter:
    """Make a stack of vectors of rows of an old one (-1: zeros)."""
    with torch.inference_mode(False), torch.no_grad():
        values = like.new_zeros(len(rows), like.shape[-1])
        for place, row in enumerate(rows):
            if row >= 0 and old is not None:
                values[place] = old[row]
    return nn.Parameter(values, requires_grad=old.requires_grad if old is not None else True)


def _regrown(name: str, like: Tensor, old: nn.Parameter | None, rows: list[int]) -> ReplacedParameter | None:
    """Make a stack of vectors of rows of an old one; None where there was none and is none."""
    if not rows:
        return None if old is None else ReplacedParameter(name, old, None, None)
    index = None if old is None else torch.tensor(rows, dtype=torch.int64, device="cpu")
    return ReplacedParameter(name, old, _vectors(like, old, rows), index)


def _map_rows(before: ExpertLayout, after: ExpertLayout) -> list[int]:
    """Return for each row of the stacks of low-rank maps the row that it was, or -1."""
    starts, start = {}, 0
    for expert, rank in zip(before.novices, before.novice_ranks, strict=True):
        starts[expert] = start
        start += rank
    rows: list[int] = []
    for expert, rank in zip(after.novices, after.novice_ranks, strict=True):
        rows += range(starts[expert], starts[expert] + rank) if expert in starts else [-1] * rank
    return rows


def _new_storage(
    change: LayoutChange,
    prefix: str,
    source: Any,
    before: ExpertLayout,
    after: ExpertLayout,
    channels: Tensor | None,
) -> Dense:
    """Slice the stacks of the real experts; a slot that several experts will share starts as its owner's."""
    owners = dict(zip(before.router, before.slot_map, strict=True))
    slots = [owners[expert] for expert in after.real]
    gate_up, down = source.gate_up_proj, source.down_proj
    width_now = down.shape[-1]
    picks = None
    if after.width is not None and (after.width != width_now or channels is not None):
        picks = torch.arange(after.width, device="cpu").expand(len(slots), -1) if channels is None else channels.cpu()
    both = None if picks is None else torch.cat([picks, picks + width_now], dim=1)
    items = [
        _slice(f"{prefix}.gate_up_proj", gate_up, slots, None if both is None else 1, both),
        _slice(f"{prefix}.down_proj", down, slots, None if picks is None else 2, picks),
    ]
    if after.width is None:
        change.replaced += items
        return Dense(items[0].new, items[1].new)
    old_bias = getattr(source, "bias", None)
    rows = slots if old_bias is not None else [-1] * len(slots)
    bias = _vectors(gate_up, old_bias, rows)
    index = None if old_bias is None else torch.tensor(rows, dtype=torch.int64, device="cpu")
    change.replaced += [*items, ReplacedParameter(f"{prefix}.bias", old_bias, bias, index)]
    return Channels(items[0].new, items[1].new, bias)


def _change_layer(
    change: LayoutChange,
    architecture: Architecture,
    layer: MoELayer,
    before: ExpertLayout,
    after: ExpertLayout,
    channels: Tensor | None,
) -> None:
    experts = layer.experts
    opened = architecture.open_experts(layer)
    prefix = f"{layer.name}.experts"
    source = experts.storage if isinstance(experts, CompressedExperts) else experts
    storage = _new_storage(change, f"{prefix}.storage", source, before, after, channels)
    rows = [before.novices.index(expert) if expert in before.novices else -1 for expert in after.novices]
    maps = _map_rows(before, after)
    stacks: dict[str, nn.Parameter | None] = {}
    for name, wanted in (("novices", rows), ("novice_in", maps), ("novice_out", maps)):
        item = _regrown(f"{prefix}.{name}", opened.gate_up_proj, getattr(experts, name, None), wanted)
        if item is not None:
            change.replaced.append(item)
        stacks[name] = None if item is None else item.new
    module = CompressedExperts(
        storage,
        after.slot_map,
        stacks["novices"],
        opened.activation,
        stacks["novice_in"],
        stacks["novice_out"],
        after.novice_map,
    )
    module.train(experts.training)
    change.set(layer.block, "experts", module)
    if after.router != before.router:
        kept = [before.router.index(expert) for expert in after.router]
        item = _slice(f"{layer.name}.gate.weight", layer.router.weight, kept)
        change.replaced.append(item)
        change.set(layer.router, "weight", item.new)
        change.set(layer.router, "num_experts", len(after.router))


def change_layouts(
    model: Any,
    architecture: Architecture,
    before: ModelShape,
    after: ModelShape,
    channels: Mapping[int, Tensor] | None = None,
) -> LayoutChange:
    """Give a model the layers, and every layer the experts, of another shape.

    Args:
        model: The live model, in the structure of ``before``.
        architecture: Its architecture.
        before: The shape it has.
        after: The shape it gets.
        channels: For layers whose experts lose channels the ones that each keeps, int64 ``[S, width]``, ascending.

    Returns:
        What was replaced, with an undo.
    """
    change = LayoutChange()
    channels = channels or {}
    try:
        for layer in architecture.moe_layers(model):
            if layer.index not in after.blocks:
                continue  # goes as a whole
            old = before.layout(layer.index)
            if layer.index not in after.moe_layers:
                architecture.drop_moe(layer, change)
                continue
            new = after.layout(layer.index)
            if old != new:
                _change_layer(change, architecture, layer, old, new, channels.get(layer.index))
            picks = min(after.top_k, len(new.router))
            if layer.router.top_k != picks:
                change.set(layer.router, "top_k", picks)
        if before.blocks != after.blocks:
            _keep_blocks(model, architecture, change, [before.blocks.index(block) for block in after.blocks])
    except BaseException:
        change.undo()
        raise
    return change


def _keep_blocks(model: Any, architecture: Architecture, change: LayoutChange, places: Sequence[int]) -> None:
    """Keep some decoder layers; the names of what was replaced in them follow their new places."""
    layers = architecture.decoder_layers(model)
    prefix = architecture.layers_prefix
    names = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(places)}
    for index, item in enumerate(change.replaced):
        for old_name, new_name in names.items():
            if item.name.startswith(old_name):
                new_item = ReplacedParameter(
                    new_name + item.name.removeprefix(old_name), item.old, item.new, item.rows, item.axis, item.picks
                )
                change.replaced[index] = new_item
                break
    change.drop(prefix, *((str(place), layer) for place, layer in enumerate(layers) if place not in places))
    architecture.keep_blocks(model, [layers[place] for place in places], change)
