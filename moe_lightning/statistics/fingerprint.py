"""Which weights statistics were measured on, in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from moe_lightning.architectures import architecture_of


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[float]:
    """Return two numbers for each MoE layer that nearly every change of its weights changes.

    Args:
        model: The model.

    Returns:
        For each layer the sum of squares of the router, and of the first row of every expert's down matrix with the
        low-rank term beside it.
    """
    architecture = architecture_of(model)
    numbers = []
    for layer in architecture.moe_layers(model):
        down_SHI = architecture.open_experts(layer).down_proj
        for part in (layer.router.weight, down_SHI[:, :1]):
            numbers.append(float(part.double().square().sum()))
    return numbers


def same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Say whether two fingerprints are of the same weights; devices add up in orders of their own."""
    return len(one) == len(other) and all(map(_close, one, other))


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
