"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from moe_lightning.plan import CompressionPlan, ModelShape


def plan_table(plan: CompressionPlan, shape: ModelShape) -> str:
    """Return who stands where after a plan, one layer a row, by original expert numbers.

    Args:
        plan: The plan.
        shape: The shape that it leads to.
    """

    def numbers(experts: Iterable[int]) -> str:
        return " ".join(map(str, experts)) or "-"

    lines = [f"{len(plan.edits)} edits", "", "| layer | real experts | novices | dropped |", "|--:|---|---|---|"]
    for layout in shape.layouts:
        dropped = (expert for expert in range(shape.num_experts) if expert not in layout.router)
        lines.append(f"| {layout.layer} | {numbers(layout.real)} | {numbers(layout.novices)} | {numbers(dropped)} |")
    return "\n".join(lines) + "\n"
