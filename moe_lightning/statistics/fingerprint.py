"""Which weights statistics were measured on, in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from moe_lightning.architectures import architecture_of
from moe_lightning.experts.lora import whole_weights


@torch.no_grad()
def fingerprint(model: nn.Module, terms: bool = True) -> list[float]:
    """Return two numbers for each MoE layer that nearly every change of its weights changes.

    Args:
        model: The model.
        terms: Count low-rank terms as a part of the matrices that they stand beside.

    Returns:
        For each layer the sum of squares of the router, and of the first row of every expert's down matrix, with the
        low-rank term beside it or without.
    """
    architecture = architecture_of(model)
    numbers = []
    for layer in architecture.moe_layers(model):
        experts = architecture.open_experts(layer)
        down_SHI = experts.down_proj if terms else whole_weights(experts.storage.down_proj, None)
        for part in (layer.router.weight, down_SHI[:, :1]):
            numbers.append(float(part.double().square().sum()))
    return numbers


def same_weights(one: Sequence[float], other: Sequence[float], tolerance: float = 1e-9) -> bool:
    """Say whether two fingerprints are of the same weights.

    Args:
        one: A fingerprint.
        other: Another one.
        tolerance: Relative difference that still counts as the same: devices add up in orders of their own.
    """
    if len(one) != len(other):
        return False
    return all(math.isclose(*pair, rel_tol=tolerance, abs_tol=1e-12) for pair in zip(one, other, strict=True))
