"""Who stands where, as a table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from moe_lightning.plan.formats import WeightFormat
from moe_lightning.plan.plan import CompressionPlan
from moe_lightning.plan.shape import ModelShape


def formats_of(shape: ModelShape) -> list[str]:
    """Say how weights are stored that are no longer plain floating-point numbers: a line for each format.

    Args:
        shape: Shape of the model.

    Returns:
        E.g. ``int4, group 128, asymmetric: experts of layers 0 1 2 3``; nothing where all are plain.
    """
    found: dict[WeightFormat, dict[str, list[int]]] = {}
    for layout in shape.layouts:
        if layout.format is not None and layout.real:
            found.setdefault(layout.format, {}).setdefault("experts", []).append(layout.layer)
    for block, packed in shape.attention:
        found.setdefault(packed, {}).setdefault("attention", []).append(block)
    lines = []
    for packed, places in found.items():
        where = (f"{name} of layers {' '.join(map(str, layers))}" for name, layers in places.items())
        lines.append(f"{packed}: {', '.join(where)}")
    return lines


def plan_table(plan: CompressionPlan, shape: ModelShape) -> str:
    """Return who stands where after a plan, one layer a row, by original expert numbers.

    Args:
        plan: The plan.
        shape: The shape that it leads to.
    """

    def numbers(experts: Iterable[object]) -> str:
        return " ".join(map(str, experts)) or "-"

    lines = [f"{len(plan.edits)} edits", ""]
    gone = [block for block in range(shape.num_layers) if block not in shape.blocks]
    if gone:
        lines += [f"Layers dropped as a whole: {numbers(gone)}", ""]
    for packed in dict.fromkeys(packed for _, packed in shape.attention):
        lines += [f"Attention of layers {numbers(n for n, other in shape.attention if other == packed)}: {packed}", ""]
    for term in dict.fromkeys(term for _, term in shape.attention_lora):
        blocks = numbers(n for n, other in shape.attention_lora if other == term)
        lines += [f"Attention of layers {blocks}: low-rank terms of rank {term.rank}", ""]
    lines += ["| layer | real experts | novices | dropped |", "|--:|---|---|---|"]
    for layer in shape.original_moe_layers:
        if layer in gone:
            continue
        if layer not in shape.moe_layers:
            lines.append(f"| {layer} | - | - | the whole MoE |")
            continue
        layout = shape.layout(layer)
        real = numbers(layout.real)
        if layout.merged:
            shared = numbers(f"{expert}={owner}" for expert, owner in layout.merged)
            real += f" (shared: {shared})"
        if layout.width is not None:
            real += f", {layout.width} channels each"
        if layout.format is not None and layout.real:
            real += f" ({layout.format})"
        if layout.lora is not None:
            real += f" + rank {layout.lora.rank}"
        ranks = dict(zip(layout.novices, layout.novice_ranks, strict=True))
        novices = numbers(f"{expert} (rank {rank})" if rank else expert for expert, rank in ranks.items())
        dropped = (
            expert for expert in range(shape.num_experts) if expert not in layout.router or expert in layout.absent
        )
        lines.append(f"| {layer} | {real} | {novices} | {numbers(dropped)} |")
    return "\n".join(lines) + "\n"
