"""Applying a method's edits to a live model and writing the values that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ExpertLayout, KeepChannels, MergeExperts, ModelShape
from moe_lightning.statistics import Statistics, collect_low_rank
from moe_lightning.surgery import Surgery, apply_plan, plan_of

Batches = Any  # an iterable of batches


def settled_edits(
    model: PreTrainedModel,
    batches: Batches,
    method: Method,
    edits: tuple[Edit, ...],
    statistics: Statistics,
    progress: bool,
) -> tuple[Edit, ...]:
    """Fit the low-rank maps that edits ask for, and return the edits as they are then.

    Args:
        model: The model as the statistics saw it.
        batches: Calibration batches.
        method: The method that proposed the edits.
        edits: Its edits.
        statistics: What was measured; gets the fits, and keeps those that it has.
        progress: Show progress bars.
    """
    wants = {
        layer: tuple((expert, rank) for expert, rank in pairs if not _is_fitted(statistics, layer, expert, rank))
        for layer, pairs in method.low_rank_wants(edits).items()
    }
    wants = {layer: pairs for layer, pairs in wants.items() if pairs}
    if wants:
        statistics.fits.update(collect_low_rank(model, batches, wants, progress=progress))
    return method.settle(edits, statistics)


def _is_fitted(statistics: Statistics, layer: int, expert: int, rank: int) -> bool:
    fit = statistics.fits.get((layer, expert))
    return fit is not None and len(fit.held_out_error) == rank + 1


def apply_edits(
    model: PreTrainedModel,
    method: Method,
    edits: Sequence[Edit],
    statistics: Statistics,
    origin: Mapping[str, Any] | None = None,
) -> list[Surgery]:
    """Extend a model's plan by a method's edits and fill in what they make, or leave the model as it was.

    Args:
        model: The live model.
        method: Says the values.
        edits: The edits.
        statistics: What was measured on the model as it is.
        origin: Entry of the plan's history.

    Returns:
        What was done, in order.

    Raises:
        RuntimeError: A value is not finite.
    """
    target = plan_of(model).extended(edits, None if origin is None else dict(origin))
    done = len(target.edits) - len(edits)
    surgeries: list[Surgery] = []
    try:
        # A layer that several edits change is filled after each: the next one starts from those weights.
        for edits_of_round in CompressionPlan(tuple(edits)).rounds() or ((),):
            values = _values(model, method, edits_of_round, statistics)
            channels = {layer: found.pop("channels") for layer, found in values.items() if "channels" in found}
            done += len(edits_of_round)
            plan = CompressionPlan(target.edits[:done], target.origin)
            surgeries.append(apply_plan(model, plan, channels))
            _write(model, edits_of_round, values)
    except BaseException:
        undo(surgeries)
        raise
    return surgeries


def undo(surgeries: Sequence[Surgery]) -> None:
    """Put a model back as it was before some surgeries."""
    for surgery in reversed(surgeries):
        surgery.undo()


@torch.no_grad()
def _values(
    model: PreTrainedModel, method: Method, edits: Sequence[Edit], statistics: Statistics
) -> dict[int, dict[str, Tensor]]:
    architecture = architecture_of(model)
    layers = {layer.index: layer for layer in architecture.moe_layers(model)}
    found = {}
    for edit in edits:
        weights = architecture.open_experts(layers[edit.layer]) if edit.layer in layers else None
        found[edit.layer] = dict(method.fill(edit, statistics, weights))
    return found


@torch.no_grad()
def _write(model: PreTrainedModel, edits: Sequence[Edit], values: Mapping[int, dict[str, Tensor]]) -> None:
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    layers = {layer.index: layer for layer in architecture.moe_layers(model)}
    for edit in edits:
        for name, tensor in values[edit.layer].items():
            experts = layers[edit.layer].experts
            owner = experts if name.startswith("novice") else experts.storage
            parameter = getattr(owner, name)
            rows = _rows(name, edit, shape.layout(edit.layer), shape)
            tensor = tensor.to(parameter.device, parameter.dtype)  # what is finite in float64 may overflow here
            if tuple(tensor.shape) != (len(rows), *parameter.shape[1:]):
                raise RuntimeError(f"layer {edit.layer}: {name} of the shape {tuple(tensor.shape)} does not fit {edit}")
            if tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
                raise RuntimeError(f"layer {edit.layer}: {name} made by {edit} is not finite in {parameter.dtype}")
            with torch.inference_mode(False):
                parameter.data[torch.tensor(rows, dtype=torch.int64, device=parameter.device)] = tensor


def _rows(name: str, edit: Edit, layout: ExpertLayout, shape: ModelShape) -> list[int]:
    """Return which rows of a parameter the values of an edit are."""
    if isinstance(edit, MergeExperts | KeepChannels):
        return list(range(len(layout.real)))
    numbers = [layout.novices.index(expert) for expert in edit.experts]  # type: ignore[attr-defined]
    if name == "novices":
        return numbers
    return [row for number in numbers for row, owner in enumerate(layout.novice_map) if owner == number]
