"""How much the model suffers when one layer alone is trimmed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.compression.filling import apply_edits, settled_edits, undo
from moe_lightning.divergence import kl_divergence
from moe_lightning.method import Method
from moe_lightning.statistics import Statistics
from moe_lightning.statistics.batches import checked_counts, inputs_and_mask, over_all_ranks

SENSITIVITY_TOKENS = 8192
"""Calibration tokens, about, on which the divergence is measured: the first batches that hold so many."""


def _first_batches(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chosen: list[Mapping[str, Any]] = []
    tokens = 0
    for batch in batches:
        chosen.append(batch)
        tokens += batch["input_ids"].numel()
        if tokens >= SENSITIVITY_TOKENS:
            break
    return chosen


def _logits(model: PreTrainedModel, batch: Mapping[str, Any], number: int) -> Tensor:
    """Return the logits of the tokens that are not padding, ``[tokens, vocabulary]``."""
    inputs, mask = inputs_and_mask(batch, number, next(model.parameters()).device)
    logits = model(input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
    return logits.flatten(0, 1) if mask is None else logits[mask]


def layer_divergence(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    method: Method,
    statistics: Statistics,
    progress: bool = True,
) -> Tensor:
    """Trim each MoE layer alone, as a method would with its budget in every layer, and measure the divergence.

    The model is as before afterwards.

    Args:
        model: The model that the statistics were measured on.
        batches: Calibration batches; the first ones, of about ``SENSITIVITY_TOKENS`` tokens, are used.
        method: A method with :meth:`Method.trial`.
        statistics: What the method needs; gets the low-rank fits that the trials make.
        progress: Show a progress bar.

    Returns:
        Mean over tokens of ``KL(intact || trimmed)`` in nats, float64 ``[layers]``.

    Raises:
        ValueError: There are no batches, or no tokens outside the padding.

    Cost: one forward pass over those tokens for each MoE layer, and one for the intact model's logits, which are kept.
    """
    chosen = _first_batches(batches)
    shape = architecture_of(model).shape(model)
    device = next(model.parameters()).device
    sums = torch.zeros(len(shape.layouts) + 1, dtype=torch.float64)
    with evaluation_mode(model):
        intact = [_logits(model, batch, number) for number, batch in enumerate(chosen)]
    sums[-1] = num_tokens = sum(len(logits) for logits in intact)
    # Together with the other processes: one of them may have no batches of its own.
    checked_counts(len(chosen), num_tokens, device)
    bar = tqdm(shape.moe_layers, desc="sensitivity", unit="layer", disable=None if progress else True, leave=False)
    for row, layer in enumerate(bar):
        edits = settled_edits(model, batches, method, method.trial(shape, statistics, layer), statistics, progress)
        surgeries = apply_edits(model, method, edits, statistics)
        try:
            with evaluation_mode(model):
                for number, (batch, expected) in enumerate(zip(chosen, intact, strict=True)):
                    sums[row] += float(kl_divergence(expected, _logits(model, batch, number)).sum())
        finally:
            undo(surgeries)
    sums = over_all_ranks(sums.to(device)).cpu()
    return sums[:-1] / sums[-1]
