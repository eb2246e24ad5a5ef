"""What happened to every module, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moe_lightning.compression.layerwise import SlimmingReport
from moe_lightning.compression.result import ModuleStatus
from moe_lightning.plan import CompressionPlan, ExpertLayout, LoraRank, ModelShape, NoviceExperts


def _experts_status(
    before: ExpertLayout, after: ExpertLayout, whole: int, kinds: Mapping[int, str], fits: Mapping[int, str]
) -> str:
    parts = [f"{len(after.real)} of {len(before.real)} experts real"]
    if after.novices:
        named = sorted({kinds[expert] for expert in after.novices})
        ranks = f", {after.stored_rank} rows of maps" if after.stored_rank else ""
        parts.append(f"{len(after.novices)} novices ({', '.join(named)}{ranks})")
    dropped = len(before.router) - len(after.router)
    if dropped:
        parts.append(f"{dropped} dropped with their router rows")
    if len(after.absent) > len(before.absent):
        parts.append(f"{len(after.absent) - len(before.absent)} dropped, their router rows kept")
    if after.merged != before.merged:
        parts.append(f"{len(after.merged)} merged into others")
    if after.width != before.width:
        parts.append(f"{after.width} of {before.width or whole} channels in each, and a bias")
    if after.format != before.format:
        parts.append("in floating point" if after.format is None else str(after.format))
    if after.lora != before.lora:
        parts.append(_terms(after.lora))
    fallen = [f"{expert}: {fits[expert]}" for expert in after.novices if "constant" in fits.get(expert, "")]
    if fallen:
        parts.append(f"no map for {'; '.join(fallen)}")
    return ", ".join(parts)


def _terms(lora: LoraRank | None) -> str:
    return "low-rank terms merged" if lora is None else f"low-rank terms of rank {lora.rank}"


def _slimmed(
    status: str, tokens: dict[int, int], layer: int, keys: Iterable[str], report: SlimmingReport
) -> ModuleStatus:
    """Return a status with that of the matrices that are left, of which experts may have gone later."""
    keys = list(keys)
    matrices = {key: said for key, said in report.matrices.get(layer, {}).items() if key in keys}
    errors = {key: error for key, error in report.errors.get(layer, {}).items() if key in matrices}
    fallen = [key for key in report.fallbacks.get(layer, ()) if key in matrices]
    if fallen:
        status = f"{status}, {len(fallen)} of {len(matrices)} matrices without measurement"
    losses = {key: lost for key, lost in report.losses.get(layer, {}).items() if key in matrices}
    return ModuleStatus(status, tokens, matrices, errors, losses)


def module_statuses(
    plan: CompressionPlan,
    before: ModelShape,
    after: ModelShape,
    tokens: Mapping[int, dict[int, int]],
    fits: Mapping[tuple[int, int], str],
    report: SlimmingReport,
) -> dict[str, ModuleStatus]:
    """Say what happened to every module that changed, by its name in the model before.

    Args:
        plan: The whole plan.
        before: Shape before.
        after: Shape after.
        tokens: Calibration tokens that reached each expert, by layer and original number.
        fits: How the low-rank fit of an expert went, by (layer, expert).
        report: How matrices were made smaller.
    """
    kinds: dict[int, dict[int, str]] = {}
    for edit in plan.edits:
        if isinstance(edit, NoviceExperts):
            kinds.setdefault(edit.layer, {}).update(dict.fromkeys(edit.experts, edit.novice))
    found = {}
    for place, number in enumerate(before.blocks):
        name = f"model.layers.{place}"
        if number not in after.blocks:
            found[name] = ModuleStatus("dropped, the whole layer")
            continue
        attention = after.attention_format(number)
        terms = after.lora(number, "attention")
        said = []
        if attention != before.attention_format(number):
            said.append("in floating point" if attention is None else str(attention))
        if terms != before.lora(number, "attention"):
            said.append(_terms(terms))
        if said:
            found[f"{name}.self_attn"] = _slimmed(", ".join(said), {}, number, before.attention_sizes, report)
        if number in before.moe_layers and number not in after.moe_layers:
            found[f"{name}.mlp"] = ModuleStatus("dropped with its norm")
        elif number in before.moe_layers and before.layout(number) != after.layout(number):
            of_layer = {expert: status for (layer, expert), status in fits.items() if layer == number}
            status = _experts_status(
                before.layout(number),
                after.layout(number),
                before.intermediate_size,
                kinds.get(number, {}),
                of_layer,
            )
            layout = after.layout(number)
            keys = [f"{expert}.{matrix}" for expert in layout.real for matrix in after.expert_sizes(layout)]
            counted = tokens.get(number) or report.tokens.get(number, {})
            found[f"{name}.mlp.experts"] = _slimmed(status, counted, number, keys, report)
    return found
