"""Models with low-rank terms that are not zero, and what they stand for, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.compression.adapters import places_of
from moe_lightning.experts import LoraStack, WeightStack
from moe_lightning.experts.lora import lora_stacks
from moe_lightning.plan import Edit
from tests.models import tiny_mixtral
from tests.packed import EDITS, apply_filled
from tests.stand_ins import unpacked

BASES: dict[str, tuple[Edit, ...]] = {"dense": (), **EDITS}
"""Edits that give a model of every kind, for terms to stand beside."""


def fill_terms(module: torch.nn.Module, seed: int = 0, spread: float = 0.3) -> dict[str, LoraStack]:
    """Give every low-rank term of a module random values; return the terms by name."""
    generator = torch.Generator().manual_seed(seed)
    stacks = dict(lora_stacks(module))
    with torch.no_grad():
        for stack in stacks.values():
            for parameter in (stack.lora_A, stack.lora_B):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * spread * parameter.shape[-1] ** -0.5)
    return stacks


def adapted_mixtral(
    base: str | Sequence[Edit] = "dense",
    rank: int = 3,
    alpha: float = 5.0,
    targets: Any = "experts+attention",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Return a tiny Mixtral with edits applied and terms that are not zero beside its matrices."""
    model = tiny_mixtral(**options)
    apply_filled(model, BASES[base] if isinstance(base, str) else base)
    ml.compress(model, None, ml.LoRA(rank=rank, alpha=alpha, targets=targets), progress=False)
    fill_terms(model, seed)
    return model


def whole_matrices(model: Any) -> dict[tuple[int, str], Tensor]:
    """Return ``W + alpha / R B A`` of every matrix in float64, ``[S, O, X]``, by layer and name, matrix by matrix."""
    found = {}
    shape = architecture_of(model).shape(model)
    places = [*((layer, "experts") for layer in shape.moe_layers), *((block, "attention") for block in shape.blocks)]
    for layer, target in places:
        for name, place in places_of(model, layer, target).items():
            found[layer, name] = whole_matrix(place.weight, place.lora)
    return found


def whole_matrix(weight: Any, lora: LoraStack | None) -> Tensor:
    """Return ``W + alpha / R B A`` in float64, decoded by hand; zeros of pruned weights stay."""
    plain = unpacked(weight).double()
    plain = plain if plain.ndim == 3 else plain[None]
    if lora is None:
        return plain
    kept = kept_weights(weight, plain)
    return torch.stack([_whole(plain[slot], kept[slot], lora, slot) for slot in range(len(plain))])


def kept_weights(weight: Any, plain: Tensor) -> Tensor:
    """Return which weights may be other than zero, bool ``[S, O, X]``."""
    pruned = isinstance(weight, WeightStack) and (weight.format.pattern or weight.format.sparsity) is not None
    return plain != 0 if pruned else torch.ones_like(plain, dtype=torch.bool)


def _whole(plain: Tensor, kept: Tensor, lora: LoraStack, slot: int) -> Tensor:
    first, second = lora.lora_A[slot].detach().double(), lora.lora_B[slot].detach().double()
    return plain + kept * (lora.alpha / lora.lora_A.shape[1] * (second @ first))
