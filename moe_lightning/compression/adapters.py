"""Low-rank terms: put beside the matrices of a live model, and folded into them.

Legend: S matrices (slots), O outputs, X inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lightning.architectures import Architecture, architecture_of
from moe_lightning.compression.filling import undo
from moe_lightning.compression.precision import full_float32
from moe_lightning.compression.ranks import take_from_first_rank
from moe_lightning.experts import Int4, Int8, LoraStack, Masked, PackedLinear, Sparse24, WeightStack
from moe_lightning.experts.lora import kept_delta
from moe_lightning.experts.stacks.integers import SCALE_TYPE
from moe_lightning.plan import AddLora, CompressionPlan, Edit, MergeLora, WeightFormat
from moe_lightning.recovery.lora import AdapterMethod, LoRA
from moe_lightning.slimming.masks import Selection, keep_mask
from moe_lightning.slimming.rounding import Scheme, round_to_nearest
from moe_lightning.surgery import Surgery, apply_plan, plan_of
from moe_lightning.surgery.lora import EXPERT_TERMS


@dataclass
class Adapted:
    """What a method of low-rank terms did.

    Attributes:
        surgeries: In order.
        statuses: By layer, and by the key of the matrix: ``3.gate_up_proj`` of an expert by its original number, or
            ``q_proj``.
        losses: Share of the squared term that rounding took when it was folded in, by the same keys.
    """

    surgeries: list[Surgery] = field(default_factory=list)
    statuses: dict[int, dict[str, str]] = field(default_factory=dict)
    losses: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A matrix, or a stack of them, and the term beside it.

    Attributes:
        keys: Key of each slot.
        weight: ``[S, O, X]``, the weight ``[O, X]`` of a linear layer, or packed.
        lora: The terms, or None.
    """

    keys: tuple[str, ...]
    weight: nn.Parameter | WeightStack
    lora: LoraStack | None


def places_of(model: PreTrainedModel, layer: int, target: str) -> dict[str, Place]:
    """Return the matrices of a layer that terms stand beside, or may, by name.

    Args:
        model: The live model.
        layer: Original number of the layer.
        target: ``experts`` or ``attention``.
    """
    architecture: Architecture = architecture_of(model)
    shape = architecture.shape(model)
    if target == "attention":
        decoder_layer = architecture.decoder_layers(model)[shape.blocks.index(layer)]
        found = {}
        for name, linear in architecture.attention_linears(decoder_layer).items():
            weight = linear.stack if isinstance(linear, PackedLinear) else linear.weight
            found[name] = Place((name,), weight, getattr(linear, "lora", None))
        return found
    moe = next(moe for moe in architecture.moe_layers(model) if moe.index == layer)
    storage = architecture.open_experts(moe).storage
    owners = shape.layout(layer).real
    return {
        name: Place(
            tuple(f"{owner}.{name}" for owner in owners), getattr(storage, name), getattr(storage, EXPERT_TERMS[name])
        )
        for name in EXPERT_TERMS
    }


def apply_adapters(
    model: PreTrainedModel, method: AdapterMethod, edits: Sequence[Edit], origin: Mapping[str, Any] | None = None
) -> Adapted:
    """Extend a model's plan by edits of low-rank terms, with values, or leave the model as it was.

    Args:
        model: The live model.
        method: Proposed the edits.
        edits: Edits of low-rank terms.
        origin: Entry of the plan's history.

    Returns:
        What was done.

    Raises:
        RuntimeError: Merged weights are not finite in the type of the model.
    """
    target = plan_of(model).extended(edits, None if origin is None else dict(origin))
    start = len(target.edits) - len(edits)
    adapted = Adapted()
    try:
        with torch.inference_mode(False), torch.no_grad(), full_float32():
            for done, edit in enumerate(edits, start + 1):
                plan = CompressionPlan(target.edits[:done], target.origin)
                if isinstance(edit, MergeLora):
                    _merge(model, edit, plan, adapted)
                else:
                    assert isinstance(edit, AddLora) and isinstance(method, LoRA)
                    adapted.surgeries.append(apply_plan(model, plan))
                    for name, place in places_of(model, edit.layer, edit.target).items():
                        assert place.lora is not None
                        method.begin(place.lora, edit.layer, name)
                        take_from_first_rank(place.lora.parameters())
    except BaseException:
        undo(adapted.surgeries)
        raise
    return adapted


def _merge(model: PreTrainedModel, edit: MergeLora, plan: CompressionPlan, adapted: Adapted) -> None:
    places = places_of(model, edit.layer, edit.target)
    wanted, sizes = {}, {}
    for name, place in places.items():
        term_SOX = _term(place)
        sizes[name] = term_SOX.square().flatten(1).sum(1)
        wanted[name] = term_SOX.add_(_weights(place))
    after = plan.check(architecture_of(model).shape(model).uncompressed())
    experts = edit.target == "experts"
    format = after.layout(edit.layer).format if experts else after.attention_format(edit.layer)
    stacks = {}
    for name, place in places.items():
        if isinstance(place.weight, WeightStack) and place.weight.format != format and format is not None:
            # Spelled out, but for the zeros.
            # Integers do not tell weights that were pruned from those that were rounded to zero: the largest stay, on
            # every process the same.
            take_from_first_rank([wanted[name]])
            selection = Selection(format.sparsity, format.pattern, format.scope)  # type: ignore[arg-type]
            keep = keep_mask(wanted[name].abs(), selection)
            kind: type[Sparse24] | type[Masked] = Sparse24 if format.kind == "sparse24" else Masked
            stacks[edit.layer, name] = kind.pack(format, wanted[name].to(place.weight.dtype), keep)
    surgery = apply_plan(model, plan, stacks=stacks)
    adapted.surgeries.append(surgery)
    for name, place in places_of(model, edit.layer, edit.target).items():
        stored = _write(surgery, place.weight, wanted[name])
        take_from_first_rank(stored)
        _report(adapted, edit.layer, places[name], place.weight, wanted[name], sizes[name])


def _wide(weight: nn.Parameter | WeightStack) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _term(place: Place) -> Tensor:
    """Return what the terms add to the matrices, ``[S, O, X]`` in fp32 or wider; nothing to weights that are pruned."""
    assert place.lora is not None
    wide = _wide(place.weight)
    delta_SOX = kept_delta(place.weight, place.lora, wide) if isinstance(place.weight, WeightStack) else None
    return place.lora.delta(wide) if delta_SOX is None else delta_SOX


def _weights(place: Place) -> Tensor:
    """Return the matrices without their terms, ``[S, O, X]`` in fp32 or wider."""
    if isinstance(place.weight, WeightStack):
        return place.weight.dense(_wide(place.weight))
    weight_SOX = place.weight.detach().to(_wide(place.weight))
    return weight_SOX if weight_SOX.ndim == 3 else weight_SOX[None]


def _write(surgery: Surgery, weight: nn.Parameter | WeightStack, merged_SOX: Tensor) -> list[Tensor]:
    """Put merged weights in the place of those that are there; undone with the surgery."""
    new: dict[str, Tensor]
    if not isinstance(weight, WeightStack):
        held: dict[str, Tensor] = {"weight": weight}
        new = {"weight": merged_SOX.view(weight.shape)}
    elif isinstance(weight, Int4 | Int8):
        scheme = Scheme(weight.format.bits, weight.format.group_size, weight.format.symmetric, SCALE_TYPE)  # type: ignore[arg-type]
        if isinstance(weight, Int4):
            weight.take_stored_form()
        packed = type(weight).pack(weight.format, *round_to_nearest(merged_SOX, scheme), weight.dtype)
        held = dict(weight.named_buffers())
        new = dict(packed.named_buffers())
    elif isinstance(weight, Sparse24):
        held, new = {"values": weight.values}, {"values": torch.take_along_dim(merged_SOX, weight.places, -1)}
    else:
        assert isinstance(weight, Masked) and weight.weight is not None
        held, new = {"weight": weight.weight}, {"weight": merged_SOX}
    for name, tensor in held.items():
        value = new[name].to(tensor.dtype)
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise RuntimeError(f"weights with their low-rank terms folded in are not finite in {tensor.dtype} ({name})")
        surgery.change.undo_steps.append(partial(_put_back, weight, name, tensor.detach().clone()))
        tensor.copy_(value)
    return list(held.values())


def _put_back(weight: nn.Parameter | WeightStack, name: str, old: Tensor) -> None:
    # A stack is asked anew: integers may have gone through another form since, as they do when they work.
    with torch.inference_mode(False), torch.no_grad():
        (getattr(weight, name) if isinstance(weight, WeightStack) else weight).copy_(old)


def _report(
    adapted: Adapted,
    layer: int,
    before: Place,
    after: nn.Parameter | WeightStack,
    merged_SOX: Tensor,
    size_S: Tensor,
) -> None:
    if merged_SOX.device.type == "meta":
        return
    wide = _wide(after)
    stored_SOX = after.dense(wide) if isinstance(after, WeightStack) else after.detach().to(wide).view(merged_SOX.shape)
    lost_S = (stored_SOX - merged_SOX).square().flatten(1).sum(1) / size_S.clamp(min=1e-30)
    for key, lost, size in zip(before.keys, lost_S.tolist(), size_S.tolist(), strict=True):
        adapted.losses.setdefault(layer, {})[key] = lost if size > 0 else 0.0
        rounded = _rounds(before.weight, after)
        said = "merged" if size > 0 else "merged a term that is zero"
        adapted.statuses.setdefault(layer, {})[key] = f"{said}, {rounded}" if rounded else said


def _rounds(before: nn.Parameter | WeightStack, after: nn.Parameter | WeightStack) -> str:
    old, new = (weight.format if isinstance(weight, WeightStack) else None for weight in (before, after))
    if _quantized(new):
        return "rounded again (rtn)"
    return "integers spelled out" if _quantized(old) else ""


def _quantized(format: WeightFormat | None) -> bool:
    return format is not None and format.quantized
