"""Giving a model the layers and experts of a shape, by slicing the tensors that are there.

Shapes only: the values of surviving parameters are kept, new ones (novices, biases) are zeros until a method fills
them. A merged expert starts as its owner, and of channels the first are kept, until a method says better.

Legend: S real experts, I intermediate (channels), H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer
from moe_lightning.experts import Channels, CompressedExperts, Dense, Packed, WeightStack
from moe_lightning.plan import ExpertLayout, ModelShape
from moe_lightning.surgery.lora import change_lora
from moe_lightning.surgery.packed import (
    Stacks,
    change_attention,
    check_stacks,
    expert_stacks,
    in_floating_point,
    replace_weights,
    spelled_out,
)
from moe_lightning.surgery.replaced import LayoutChange, ReplacedParameter, pick


def _slice(name: str, old: nn.Parameter, rows: list[int], axis: int | None = None, picks: Tensor | None = None) -> Any:
    # On the CPU, also where the model is on the meta device: what was touched is counted from it.
    index = torch.tensor(rows, dtype=torch.int64, device="cpu")
    with torch.inference_mode(False), torch.no_grad():
        values = old.index_select(0, index.to(old.device))
        if picks is not None and axis is not None:
            values = pick(values, picks, axis)
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
    slots: list[int],
    after: ExpertLayout,
    channels: Tensor | None,
) -> Dense:
    """Slice the stacks of the real experts; a slot that several experts will share starts as its owner's."""
    if isinstance(source, Packed):
        return _in_floating_point(change, prefix, source, slots)
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
    old_bias = source.bias
    rows = slots if old_bias is not None else [-1] * len(slots)
    bias = _vectors(gate_up, old_bias, rows)
    index = None if old_bias is None else torch.tensor(rows, dtype=torch.int64, device="cpu")
    change.replaced += [*items, ReplacedParameter(f"{prefix}.bias", old_bias, bias, index)]
    return Channels(items[0].new, items[1].new, bias)


def _in_floating_point(change: LayoutChange, prefix: str, source: Packed, slots: list[int]) -> Dense:
    """Spell out packed matrices: parameters that train from here on."""
    if slots != list(range(source.num_slots)):
        raise ValueError(f"{prefix}: experts leave their format as they are, and not fewer or in another order")
    parameters = {}
    for name, stack in (("gate_up_proj", source.gate_up_proj), ("down_proj", source.down_proj)):
        with torch.inference_mode(False), torch.no_grad():
            parameters[name] = nn.Parameter(in_floating_point(stack))
        spelled_out(change, f"{prefix}.{name}", stack, parameters[name])
    if source.bias is None:
        return Dense(parameters["gate_up_proj"], parameters["down_proj"])
    return Channels(parameters["gate_up_proj"], parameters["down_proj"], source.bias)


def _new_packed_storage(
    change: LayoutChange,
    prefix: str,
    source: Any,
    slots: list[int],
    after: ExpertLayout,
    stacks: Mapping[str, WeightStack | None],
    like: Tensor,
) -> Packed:
    """Put packed matrices in place of the real experts', or pick some of those that are packed already."""
    new = {}
    for name, stack in stacks.items():
        new[name] = replace_weights(change, f"{prefix}.{name}", getattr(source, name), slots, stack)
    old_bias = source.bias
    bias = None
    if after.width is not None:
        bias = _vectors(like, old_bias, slots if old_bias is not None else [-1] * len(slots))
        index = None if old_bias is None else torch.tensor(slots, dtype=torch.int64, device="cpu")
        change.replaced.append(ReplacedParameter(f"{prefix}.bias", old_bias, bias, index))
    return Packed(new["gate_up_proj"], new["down_proj"], bias)


def _change_layer(
    change: LayoutChange,
    architecture: Architecture,
    layer: MoELayer,
    before: ExpertLayout,
    after: ExpertLayout,
    channels: Tensor | None,
    packed: Mapping[str, WeightStack | None],
) -> None:
    experts = layer.experts
    opened = architecture.open_experts(layer)
    prefix = f"{layer.name}.experts"
    owners = dict(zip(before.router, before.slot_map, strict=True))
    slots = [owners[expert] for expert in after.real]
    storage: Dense | Packed
    if after.format is None:
        storage = _new_storage(change, f"{prefix}.storage", opened.storage, slots, after, channels)
    else:
        storage = _new_packed_storage(
            change, f"{prefix}.storage", opened.storage, slots, after, packed, layer.router.weight
        )
    # Of experts that have low-rank terms none goes, so that these only move along.
    storage.gate_up_lora, storage.down_lora = opened.storage.gate_up_lora, opened.storage.down_lora
    rows = [before.novices.index(expert) if expert in before.novices else -1 for expert in after.novices]
    maps = _map_rows(before, after)
    stacks: dict[str, nn.Parameter | None] = {}
    for name, wanted in (("novices", rows), ("novice_in", maps), ("novice_out", maps)):
        item = _regrown(f"{prefix}.{name}", layer.router.weight, getattr(experts, name, None), wanted)
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
    stacks: Stacks | None = None,
    opened: bool = False,
) -> LayoutChange:
    """Give a model the layers, and every layer the experts, of another shape.

    Args:
        model: The live model, in the structure of ``before``.
        architecture: Its architecture.
        before: The shape it has.
        after: The shape it gets.
        channels: For layers whose experts lose channels the ones that each keeps, int64 ``[S, width]``, ascending.
        stacks: Packed matrices that are filled already; others come without values.
        opened: Whether masked matrices are to be open, as they work, or closed, as weights files are loaded into.

    Returns:
        What was replaced, with an undo.
    """
    change = LayoutChange()
    channels, stacks = channels or {}, stacks or {}
    check_stacks(before, after, stacks)
    try:
        for layer in architecture.moe_layers(model):
            if layer.index not in after.blocks:
                continue  # goes as a whole
            old = before.layout(layer.index)
            if layer.index not in after.moe_layers:
                architecture.drop_moe(layer, change)
                continue
            new = after.layout(layer.index)
            if dataclasses.replace(old, lora=None) != dataclasses.replace(new, lora=None):
                packed = expert_stacks(after, old, new, stacks, layer.router.weight, opened)
                _change_layer(change, architecture, layer, old, new, channels.get(layer.index), packed)
            picks = min(after.top_k, len(new.router))
            if layer.router.top_k != picks:
                change.set(layer.router, "top_k", picks)
        for place, (block, decoder_layer) in enumerate(
            zip(before.blocks, architecture.decoder_layers(model), strict=True)
        ):
            if block in after.blocks and before.attention_format(block) != after.attention_format(block):
                prefix = f"{architecture.layers_prefix}.{place}"
                change_attention(change, architecture, decoder_layer, prefix, after, block, stacks, opened)
        change_lora(model, architecture, before, after, change)
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
                name = new_name + item.name.removeprefix(old_name)
                change.replaced[index] = dataclasses.replace(item, name=name)
                break
    change.drop(prefix, *((str(place), layer) for place, layer in enumerate(layers) if place not in places))
    architecture.keep_blocks(model, [layers[place] for place in places], change)
