"""Putting low-rank terms beside the matrices of a model, and taking them away again; values are not touched.

New terms are zeros: they change nothing until a method fills them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer
from moe_lightning.experts import CompressedExperts, LoraLinear, LoraStack, PackedLinear
from moe_lightning.experts.storage import Storage
from moe_lightning.plan import ExpertLayout, LoraRank, ModelShape
from moe_lightning.surgery.replaced import LayoutChange, ReplacedParameter

EXPERT_TERMS = {"gate_up_proj": "gate_up_lora", "down_proj": "down_lora"}
"""Where a storage holds the terms beside its matrices."""


def change_lora(
    model: Any, architecture: Architecture, before: ModelShape, after: ModelShape, change: LayoutChange
) -> None:
    """Give the layers of a model the low-rank terms of a shape, everything else being in place already.

    Args:
        model: The live model; blocks that go are still there.
        architecture: Its architecture.
        before: The shape that it had.
        after: The shape that it gets.
        change: Gets what is done.
    """
    for layer in architecture.moe_layers(model):
        if layer.index not in after.moe_layers:
            continue
        new = after.layout(layer.index)
        if before.layout(layer.index).lora != new.lora:
            _change_experts(architecture, layer, new, after, change)
    terms = dict(before.attention_lora), dict(after.attention_lora)
    for place, (block, decoder_layer) in enumerate(zip(before.blocks, architecture.decoder_layers(model), strict=True)):
        if block in after.blocks and terms[0].get(block) != terms[1].get(block):
            prefix = f"{architecture.layers_prefix}.{place}.{architecture.attention_name}"
            _change_attention(architecture, decoder_layer, prefix, terms[1].get(block), after, change)


def _replaced(change: LayoutChange, prefix: str, old: LoraStack | None, new: LoraStack | None) -> None:
    for stack, gone in ((old, True), (new, False)):
        for name, parameter in () if stack is None else stack.named_parameters():
            before, after = (parameter, None) if gone else (None, parameter)
            change.replaced.append(ReplacedParameter(f"{prefix}.{name}", before, after, None))


def _terms(slots: int, size: tuple[int, int], lora: LoraRank | None, like: Tensor) -> LoraStack | None:
    return None if lora is None else LoraStack.empty(slots, *size, lora.rank, lora.alpha, like)


def _change_experts(
    architecture: Architecture, layer: MoELayer, new: ExpertLayout, after: ModelShape, change: LayoutChange
) -> None:
    experts = layer.block.experts
    if not isinstance(experts, CompressedExperts):
        opened = architecture.open_experts(layer)
        held = CompressedExperts(opened.storage, new.slot_map, None, opened.activation)
        held.train(experts.training)
        change.set(layer.block, "experts", held)
        experts = held
    storage: Storage = experts.storage
    for name, place in EXPERT_TERMS.items():
        old = getattr(storage, place)
        terms = _terms(len(new.real), after.expert_sizes(new)[name], new.lora, layer.router.weight)
        _replaced(change, f"{layer.name}.experts.storage.{place}", old, terms)
        change.set(storage, place, terms)
    if new == ExpertLayout(new.layer, tuple(range(after.num_experts))):
        # Nothing of ours is left: a model built from the plan has the family's own module here.
        change.set(layer.block, "experts", architecture.plain_experts(layer))


def _change_attention(
    architecture: Architecture,
    decoder_layer: Any,
    prefix: str,
    lora: LoraRank | None,
    after: ModelShape,
    change: LayoutChange,
) -> None:
    attention = architecture.attention_of(decoder_layer)
    for name, linear in architecture.attention_linears(decoder_layer).items():
        packed = isinstance(linear, PackedLinear)
        if not packed and getattr(linear, "bias", None) is not None:
            raise ValueError(f"{prefix}.{name} has a bias: target the experts only")
        reference = next(iter(decoder_layer.parameters()))
        terms = _terms(1, after.attention_sizes[name], lora, reference)
        _replaced(change, f"{prefix}.{name}.lora", getattr(linear, "lora", None), terms)
        if packed:
            change.set(linear, "lora", terms)
            continue
        module: nn.Module
        if terms is None:
            module = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            module.weight = linear.weight
        else:
            module = LoraLinear(linear.weight, terms)
        module.train(linear.training)
        change.set(attention, name, module)
