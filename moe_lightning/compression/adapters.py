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
        What was done. Merged matrices are there twice until its surgeries are dropped: as they were and as they are.

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
    before = places_of(model, edit.layer, edit.target)
    surgery = apply_plan(model, plan)
    adapted.surgeries.append(surgery)
    for name, place in places_of(model, edit.layer, edit.target).items():
        lost_S = _write(surgery, before[name], place.weight)
        rounded = _rounds(before[name].weight, place.weight)
        for key, lost in zip(before[name].keys, lost_S, strict=True):
            said = "merged a term that is zero" if lost is None else "merged"
            adapted.losses.setdefault(edit.layer, {})[key] = lost or 0.0
            adapted.statuses.setdefault(edit.layer, {})[key] = f"{said}, {rounded}" if rounded else said


def _write(surgery: Surgery, before: Place, after: nn.Parameter | WeightStack) -> list[float | None]:
    """Fold terms into matrices, one after another; all are finite before any takes the place of what is there.

    What was there is neither copied nor written over: a parameter gets another storage, and has the old one again when
    the surgery is undone. What the surgery made itself is written to as it is.

    Args:
        surgery: Took the terms away, and perhaps put other matrices there.
        before: The matrices and the terms beside them, as they were.
        after: The matrices that stand there now.

    Returns:
        Of each matrix the share of the squared term that storing it took; None where the term is zero.
    """
    made = after is not before.weight
    held = _held(after, made)
    new = {name: tensor.detach() if made else torch.empty_like(tensor.detach()) for name, tensor in held.items()}
    lost_S: list[float | None] = []
    for slot in range(len(before.keys)):
        merged_OX = _term(before, slot)
        size = merged_OX.square().sum()
        merged_OX += _weight(before, slot)
        one = _stored(after, slot, merged_OX, made)
        for name, tensor in new.items():
            value = getattr(one, name)[0] if isinstance(one, WeightStack) else one
            _check_finite(value, name)
            (tensor if isinstance(after, WeightStack) or tensor.ndim == 3 else tensor[None])[slot] = value
        if merged_OX.device.type == "meta":
            lost_S.append(0.0)
            continue
        stored_OX = one.dense(merged_OX.dtype)[0] if isinstance(one, WeightStack) else one.to(merged_OX.dtype)
        lost = float((stored_OX - merged_OX).square().sum() / size.clamp(min=1e-30))
        lost_S.append(lost if size > 0 else None)
    take_from_first_rank(new.values())
    if not made:
        for name, tensor in held.items():
            surgery.change.undo_steps.append(partial(_hold, after, name, tensor.detach()))
            _hold(after, name, new[name])
    return lost_S


def _term(place: Place, slot: int) -> Tensor:
    """Return what a term adds to its matrix, ``[O, X]`` in fp32 or wider; nothing to weights that are pruned."""
    assert place.lora is not None
    lora, wide = place.lora, _wide(place.weight)
    term_OX = lora.scale * (lora.lora_B[slot].to(wide) @ lora.lora_A[slot].to(wide))
    kept_SOX = place.weight.slot(slot).zeros_kept() if isinstance(place.weight, WeightStack) else None
    return term_OX if kept_SOX is None else term_OX.masked_fill_(~kept_SOX[0], 0)


def _weight(place: Place, slot: int) -> Tensor:
    """Return a matrix without its term, ``[O, X]`` in fp32 or wider."""
    if isinstance(place.weight, WeightStack):
        return place.weight.slot(slot).dense(_wide(place.weight))[0]
    weight = place.weight.detach()
    return (weight if weight.ndim == 2 else weight[slot]).to(_wide(place.weight))


def _wide(weight: nn.Parameter | WeightStack) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _held(weight: nn.Parameter | WeightStack, made: bool) -> dict[str, Tensor]:
    """Return the tensors that merging writes, by name: of pruned matrices that are there already not the places."""
    if not isinstance(weight, WeightStack):
        return {"weight": weight}
    if isinstance(weight, Int4):
        weight.take_stored_form()
    if isinstance(weight, Int4 | Int8):
        return dict(weight.named_buffers())
    assert not isinstance(weight, Masked) or weight.weight is not None
    return dict(weight.named_parameters()) | (dict(weight.named_buffers()) if made else {})


def _stored(weight: nn.Parameter | WeightStack, slot: int, merged_OX: Tensor, made: bool) -> WeightStack | Tensor:
    """Return a merged matrix as it is stored: a stack of one, or ``[O, X]``."""
    if not isinstance(weight, WeightStack):
        return merged_OX.to(weight.dtype)
    format, merged_SOX = weight.format, merged_OX[None]
    if isinstance(weight, Int4 | Int8):
        scheme = Scheme(format.bits, format.group_size, format.symmetric, SCALE_TYPE)  # type: ignore[arg-type]
        return type(weight).pack(format, *round_to_nearest(merged_SOX, scheme), weight.dtype)
    assert isinstance(weight, Sparse24 | Masked)
    if made:
        # Spelled out, but for the zeros. Integers do not tell weights that were pruned from those that were rounded to
        # zero: the largest stay, on every process the same.
        take_from_first_rank([merged_OX])
        keep = keep_mask(merged_SOX.abs(), Selection(format.sparsity, format.pattern, format.scope))  # type: ignore[arg-type]
        return type(weight).pack(format, merged_SOX.to(weight.dtype), keep)
    if isinstance(weight, Sparse24):
        one = weight.slot(slot)
        assert isinstance(one, Sparse24)
        values = torch.take_along_dim(merged_SOX, one.places, -1).to(weight.dtype)
        return Sparse24(format, nn.Parameter(values, requires_grad=False), one.metadata)
    size = (1, weight.outputs, weight.inputs)
    value = nn.Parameter(merged_SOX.to(weight.dtype), requires_grad=False)
    return Masked(format, size, weight.bits[slot : slot + 1], weight=value)


def _check_finite(value: Tensor, name: str) -> None:
    if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
        raise RuntimeError(f"weights with their low-rank terms folded in are not finite in {value.dtype} ({name})")


def _hold(weight: nn.Parameter | WeightStack, name: str, tensor: Tensor) -> None:
    """Let a parameter or a packed tensor hold other values, without a copy where they are of its type and device."""
    with torch.inference_mode(False), torch.no_grad():
        # A stack is asked anew: integers may have gone through another form since, as they do when they work.
        now = getattr(weight, name) if isinstance(weight, WeightStack) else weight
        if isinstance(now, nn.Parameter):
            now.data = tensor.to(now)
        else:
            assert isinstance(weight, WeightStack)
            weight._buffers[name] = tensor.to(now)


def _rounds(before: nn.Parameter | WeightStack, after: nn.Parameter | WeightStack) -> str:
    old, new = (weight.format if isinstance(weight, WeightStack) else None for weight in (before, after))
    if _quantized(new):
        return "rounded again (rtn)"
    return "integers spelled out" if _quantized(old) else ""


def _quantized(format: WeightFormat | None) -> bool:
    return format is not None and format.quantized
