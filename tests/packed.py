"""Packed matrices made in numpy, apart from the library's own methods: references for what holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from moe_lightning.architectures import architecture_of
from moe_lightning.experts import Int4, Int8, Masked, Sparse24, WeightStack
from moe_lightning.plan import CompressionPlan, Edit, ModelShape, Quantize, Sparsify, WeightFormat
from moe_lightning.surgery import Surgery, apply_plan
from tests.models import tiny_mixtral

Array = Any


def zeros_by_magnitude(weight: Array, format: WeightFormat) -> Array:
    """Mark the weights ``[S, O, I]`` that stay where the smallest become zero, as many as a format says."""
    slots, outputs, inputs = weight.shape
    if format.pattern is not None:
        zeros, size = map(int, format.pattern.split(":"))
        groups = numpy.abs(weight).reshape(weight.size // size, size)
    elif format.scope == "row":
        groups = numpy.abs(weight).reshape(slots * outputs, inputs)
        zeros = inputs - format.kept(1, inputs)
    else:
        groups = numpy.abs(weight).reshape(slots, outputs * inputs)
        zeros = outputs * inputs - format.kept(outputs, inputs)
    keep = numpy.ones_like(groups, dtype=bool)
    numpy.put_along_axis(keep, numpy.argsort(groups, -1, kind="stable")[:, :zeros], False, -1)
    return keep.reshape(weight.shape)


def packed(
    weight: Tensor, format: WeightFormat, dtype: torch.dtype | None = None, keep: Array | None = None
) -> tuple[WeightStack, Array]:
    """Pack weights ``[S, O, I]`` by plain rounding and magnitudes.

    Args:
        weight: The weights.
        format: How.
        dtype: Of the stack.
        keep: Which weights stay; by magnitude where None and something goes.

    Returns:
        The stack, and its weights as float64, made without it.
    """
    dtype = dtype or weight.dtype
    dense = weight.detach().double().numpy().copy()
    if not format.quantized:
        keep = zeros_by_magnitude(dense, format)
        dense[~keep] = 0.0
        kind: type[Sparse24] | type[Masked] = Sparse24 if format.kind == "sparse24" else Masked
        return kind.pack(format, weight.to(dtype), torch.from_numpy(keep)), dense
    assert format.bits is not None
    top, (slots, outputs, inputs) = 2**format.bits - 1, dense.shape
    group = format.group_of(inputs)
    grouped = dense.reshape(slots, outputs, inputs // group, group)
    if format.symmetric:
        scale = numpy.abs(grouped).max(-1) * 2 / top
        zero = numpy.full(scale.shape, 2 ** (format.bits - 1))
    else:
        low, high = grouped.min(-1).clip(max=0), grouped.max(-1).clip(min=0)
        scale = (high - low) / top
        zero = numpy.rint(-low / numpy.maximum(scale, 1e-30)).clip(0, top)
    scale = torch.from_numpy(numpy.maximum(scale, 1e-8)).bfloat16()
    steps = scale.double().numpy()[..., None]
    codes = (numpy.rint(grouped / steps) + zero[..., None]).clip(0, top)
    exact = ((codes - zero[..., None]) * steps).reshape(dense.shape)
    build = Int4 if format.bits == 4 else Int8
    tensors = [torch.from_numpy(array.astype(numpy.uint8)) for array in (codes.reshape(dense.shape), zero)]
    return build.pack(format, tensors[0], scale, tensors[1], dtype), exact


def random_weight(slots: int, outputs: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random weights ``[S, O, I]``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slots, outputs, inputs, generator=generator).to(dtype)


def live_matrices(model: Any) -> dict[tuple[int, str], Tensor]:
    """Return the weights of a model's experts and attention in floating point, ``[S, O, I]``, by layer and name."""
    architecture = architecture_of(model)
    found = {}
    for layer in architecture.moe_layers(model):
        opened = architecture.open_experts(layer)
        found[layer.index, "gate_up_proj"] = opened.gate_up_proj.detach()
        found[layer.index, "down_proj"] = opened.down_proj.detach()
    for block, decoder_layer in zip(architecture.shape(model).blocks, architecture.decoder_layers(model), strict=True):
        for name, linear in architecture.attention_linears(decoder_layer).items():
            dense = linear.stack.dense() if hasattr(linear, "stack") else linear.weight[None]
            found[block, name] = dense.detach()
    return found


def filled_stacks(model: Any, edit: Edit, after: ModelShape) -> dict[tuple[int, str], WeightStack]:
    """Return the stacks that an edit asks for, filled with a model's weights."""
    if not isinstance(edit, Quantize | Sparsify):
        return {}
    if edit.target == "attention":
        names, format = tuple(after.attention_sizes), after.attention_format(edit.layer)
    else:
        names, format = ("gate_up_proj", "down_proj"), after.layout(edit.layer).format
    assert format is not None
    with torch.inference_mode(False), torch.no_grad():  # as the library's driver does
        weights = {name: live_matrices(model)[edit.layer, name] for name in names}
        return {(edit.layer, name): packed(weight, format)[0] for name, weight in weights.items()}


def apply_filled(model: Any, edits: Sequence[Edit]) -> list[Surgery]:
    """Extend a model's plan edit by edit; packed matrices get the weights that were there."""
    surgeries = []
    for edit in edits:
        plan = architecture_of(model).plan_of_config(model.config).extended([edit])
        after = plan.check(architecture_of(model).shape(model).uncompressed())
        surgeries.append(apply_plan(model, plan, stacks=filled_stacks(model, edit, after)))
    return surgeries


def packed_mixtral(edits: Sequence[Edit], **options: Any) -> Any:
    """Return a tiny Mixtral with edits applied and its packed matrices filled."""
    model = tiny_mixtral(**options)
    apply_filled(model, edits)
    return model


def everywhere(edit: Edit, layers: int = 3) -> tuple[Edit, ...]:
    """Return an edit for each layer."""
    return tuple(dataclasses.replace(edit, layer=layer) for layer in range(layers))  # type: ignore[type-var]


def plan_of_edits(*edits: Edit) -> CompressionPlan:
    """Return a plan."""
    return CompressionPlan(tuple(edits))


FORMATS = {
    "int4": WeightFormat(bits=4, group_size=16),
    "int4 symmetric": WeightFormat(bits=4, group_size=16, symmetric=True),
    "int4 rows": WeightFormat(bits=4, group_size="channel"),
    "int8": WeightFormat(bits=8, group_size=16),
    "int8 symmetric rows": WeightFormat(bits=8, group_size="channel", symmetric=True),
    "2:4": WeightFormat(pattern="2:4"),
    "4:8": WeightFormat(pattern="4:8"),
    "1:4": WeightFormat(pattern="1:4"),
    "half": WeightFormat(sparsity=0.5),
    "a third of each matrix": WeightFormat(sparsity=0.33, scope="matrix"),
    "int4 of 2:4": WeightFormat(bits=4, group_size=16, pattern="2:4"),
}
"""Every way of storing weights."""

EDITS: dict[str, tuple[Edit, ...]] = {
    "int4": everywhere(Quantize(0, group_size=16)),
    "int4 symmetric": everywhere(Quantize(0, group_size=16, symmetric=True)),
    "int8": everywhere(Quantize(0, bits=8, group_size="channel")),
    "2:4": everywhere(Sparsify(0, pattern="2:4")),
    "1:4": everywhere(Sparsify(0, pattern="1:4")),
    "unstructured": everywhere(Sparsify(0, sparsity=0.4)),
    "attention int4": everywhere(Quantize(0, "attention", group_size=16)),
    "attention 2:4 and unstructured": (
        Sparsify(0, "attention", pattern="2:4"),
        Sparsify(1, "attention", sparsity=0.3, scope="matrix"),
    ),
    "everything": (
        *everywhere(Quantize(0, group_size=16)),
        *everywhere(Quantize(0, "attention", bits=8, group_size=16)),
    ),
    "int4 of 2:4": (*everywhere(Sparsify(0, pattern="2:4")), *everywhere(Quantize(0, group_size=16))),
}
"""Edits of the tiny Mixtral that give a model of every kind."""
