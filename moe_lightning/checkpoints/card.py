"""The model card: what the folder holds and where it comes from."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel

from moe_lightning.plan import CompressionPlan, ModelShape, formats_of, plan_table
from moe_lightning.sizes import measure


def _history(origin: dict[str, Any]) -> list[Any]:
    """Return every step that led to a model, those before it was written as a plain one first."""
    earlier = (origin.get("lineage") or {}).get("origin") or {}
    return [*(_history(earlier) if earlier else []), *origin.get("history", [])]


def model_card(model: PreTrainedModel, plan: CompressionPlan, shape: ModelShape, format: str) -> str:
    """Return the text of ``README.md``.

    Args:
        model: The model as the folder holds it.
        plan: What was done to it, which a plain one does not know.
        shape: Its shape.
        format: ``native`` or ``transformers``.
    """
    size = measure(model)
    whole = shape.uncompressed().parameters
    base = plan.origin.get("base_model") or getattr(model, "name_or_path", "") or "trained from scratch"
    load = "from transformers import AutoModelForCausalLM\n"
    if plan and format == "native":
        load = "import moe_lightning\n" + load
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [mixtral, mixture-of-experts{', moe-lightning, compressed' if plan else ', moe-lightning'}]",
        "---",
        "",
        f"# {'Compressed ' if plan else ''}Mixtral",
        "",
        f"* base model: {base}",
        f"* parameters: {size.parameters:,} ({size.parameters / whole:.1%} of {whole:,})",
        f"* bytes: {size.bytes:,} in memory, {shape.bytes:,} on disk",
        *(f"* weights: {words}" for words in formats_of(shape)),
        "",
        "```python",
        load + 'model = AutoModelForCausalLM.from_pretrained("this folder")',
        "```",
        "",
    ]
    if plan:
        lines += ["## Experts", "", plan_table(plan, shape)]
    steps = _history(plan.origin)
    if steps:
        lines += ["## Lineage", ""]
        for step in steps:
            lines += ["```json", json.dumps(step, indent=2), "```", ""]
    lines.append("Made with moe-lightning.")
    return "\n".join(lines) + "\n"
