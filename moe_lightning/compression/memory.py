"""What a list of methods leads to and how much memory it takes, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_lightning.compression.layerwise import measures
from moe_lightning.compression.sensitivity import SENSITIVITY_TOKENS
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ExpertLayout, ModelShape, WeightFormat
from moe_lightning.slimming.policy import SlimmingPolicy
from moe_lightning.statistics import Statistics, statistics_bytes
from moe_lightning.statistics.moment_memory import MomentKind, layer_input_bytes, moment_bytes, solving_bytes
from moe_lightning.statistics.second_moments import MAX_BYTES, second_moment_bytes

_MERGING_COPIES = 8
"""Matrices in fp32 that are there at most while one is merged: of itself, its term, and what rounding works with."""


def trial_edits(shape: ModelShape, methods: Sequence[Method]) -> tuple[list[Edit], ModelShape]:
    """Try a list of methods out on a shape, before anything is measured.

    Args:
        shape: Shape of the model as it is.
        methods: The methods, in order.

    Returns:
        Edits of the right number and size (which experts they name is not known yet), and the shape that they lead to.

    Raises:
        ValueError: A method does not fit what the ones before it leave.
    """
    edits: list[Edit] = []
    for method in methods:
        proposed = method.propose(shape, Statistics.synthetic(shape))
        shape = CompressionPlan(proposed).check(shape)
        edits += proposed
    return edits, shape


def made_bytes(shape: ModelShape, methods: Sequence[Method]) -> int:
    """Say how much memory the weights take that methods make, beside those that the model had before.

    ``ml.compress`` keeps every layer that it changes until all methods are done, so that it can put the model back: the
    peak is the model as it was and everything that was made of it, what a later method replaced again included. Weights
    that low-rank terms are folded into are there twice as well, as they were and as they are.

    Args:
        shape: Shape of the model as it is.
        methods: The methods, in order.

    Returns:
        Bytes of the experts, attentions and low-rank terms that the methods change, as they are held in memory, and of
        what merging works with: a few copies of the largest matrix in fp32.
    """
    made = working = 0
    for method in methods:
        after = trial_edits(shape, [method])[1]
        changed: list[int] = []
        for layout in after.layouts:
            old = shape.layout(layout.layer)
            if layout == old:
                continue
            if replace(layout, lora=old.lora) == old and layout.lora is not None:
                # Terms come, and nothing else.
                made += layout.lora_parameters(shape.hidden_size, shape.intermediate_size) * shape.weight_bytes
                continue
            made += _layout_bytes(after, layout)
            if old.lora is not None and layout.lora is None:
                changed += [outputs * inputs for outputs, inputs in after.expert_sizes(layout).values()]
        terms = dict(shape.attention_lora), dict(after.attention_lora)
        for block in after.blocks:
            format = after.attention_format(block)
            merged = block in terms[0] and block not in terms[1]
            if merged or format != shape.attention_format(block):
                made += sum(
                    _held_bytes(format, 1, *size, after.weight_bytes) for size in after.attention_sizes.values()
                )
            if merged:
                changed += [outputs * inputs for outputs, inputs in after.attention_sizes.values()]
            if terms[0].get(block) != terms[1].get(block):
                made += after.attention_lora_parameters(block) * after.weight_bytes
        working = max(working, _MERGING_COPIES * 4 * max(changed, default=0))
        shape = after
    return made + working


def _layout_bytes(shape: ModelShape, layout: ExpertLayout) -> int:
    """Return the bytes of a layer's router, experts and what stands beside them."""
    held = layout.parameters(shape.hidden_size, shape.intermediate_size) * shape.weight_bytes
    if layout.format is not None:
        slots = len(layout.real)
        for outputs, inputs in shape.expert_sizes(layout).values():
            held -= slots * outputs * inputs * shape.weight_bytes
            held += _held_bytes(layout.format, slots, outputs, inputs, shape.weight_bytes)
    return held


def _held_bytes(format: WeightFormat | None, slots: int, outputs: int, inputs: int, weight_bytes: int) -> int:
    if format is None:
        return slots * outputs * inputs * weight_bytes
    if format.kind != "sparse":
        return format.stored_bytes(slots, outputs, inputs, weight_bytes)
    # All weights, and a bit for each.
    return slots * outputs * (inputs * weight_bytes + -(-inputs // 8))


def calibration_bytes(
    shape: ModelShape,
    methods: Sequence[Method],
    tokens_per_batch: int = 0,
    tokens: int | None = None,
    max_moment_bytes: int = SlimmingPolicy.max_moment_bytes,
) -> int:
    """Say how much memory the measurements take at most, beside the model, what is made of it and its forward pass.

    Args:
        shape: Shape of the model as it is.
        methods: The methods, in order.
        tokens_per_batch: Tokens of the largest calibration batch.
        tokens: Calibration tokens of this process, padding included; None where all are in one batch. Methods that make
            matrices smaller keep what enters a layer for all of them.
        max_moment_bytes: Memory for the moments of inputs that are measured at a time.

    Returns:
        Bytes of the method that needs most.
    """
    most = 0
    for method in methods:
        edits, after = trial_edits(shape, [method])
        needed = statistics_bytes(shape, method.needs, tokens_per_batch) if method.needs else 0
        fitted = sum(len(pairs) for pairs in method.low_rank_wants(edits).values())
        needed += min(MAX_BYTES, second_moment_bytes(shape.hidden_size, fitted))
        if method.measures_sensitivity:
            needed += max(SENSITIVITY_TOKENS, tokens_per_batch) * shape.vocab_size * 4
        if measures(method):
            all_tokens = tokens_per_batch if tokens is None else tokens
            needed += _slimming_bytes(shape, method, edits, all_tokens, max_moment_bytes)
        most, shape = max(most, needed), after
    return most


def _slimming_bytes(shape: ModelShape, method: Any, edits: Sequence[Edit], tokens: int, max_moment_bytes: int) -> int:
    """Return the memory of what enters a layer, and of the moments of the largest stack with what solving takes."""
    kind: MomentKind = method.moment_kind
    moments = [0]
    for edit in edits:
        experts = getattr(edit, "target", "experts") == "experts"
        sizes = shape.expert_sizes(shape.layout(edit.layer)) if experts else shape.attention_sizes
        slots = len(shape.layout(edit.layer).real) if experts else 1
        for _, inputs in sizes.values():
            one = moment_bytes(inputs, kind, shape.weight_bytes)
            beside = solving_bytes(inputs, kind, shape.weight_bytes)
            moments.append(max(one + beside, min(slots * one + beside, max_moment_bytes)))
    kept = layer_input_bytes(
        tokens,
        shape.hidden_size,
        shape.top_k,
        shape.weight_bytes,
        ahead=method.propagate == "original",
    )
    return kept + max(moments)
