"""One file per model family: where its MoE layers, routers, experts and norms are. Nothing else knows a family."""

from __future__ import annotations

from torch import nn

from moe_lightning.architectures.base import Architecture, MoELayer, OpenExperts
from moe_lightning.architectures.mixtral import MixtralArchitecture

ARCHITECTURES: tuple[Architecture, ...] = (MixtralArchitecture(),)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "MixtralArchitecture",
    "MoELayer",
    "OpenExperts",
    "architecture_named",
    "architecture_of",
]


def architecture_named(model_type: str) -> Architecture:
    """Return the architecture that a ``model_type`` (transformers' or ours) belongs to.

    Raises:
        ValueError: No architecture here knows it.
    """
    for architecture in ARCHITECTURES:
        if model_type in (architecture.model_type, architecture.compressed_model_type):
            return architecture
    known = ", ".join(architecture.model_type for architecture in ARCHITECTURES)
    raise ValueError(f"model type {model_type!r} is not supported: moe-lightning compresses {known}")


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a transformers model.

    Raises:
        ValueError: Not a transformers language model of a supported family.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(f"{type(model).__name__} is not a transformers model: it has no config with a model_type")
    architecture = architecture_named(model_type)
    architecture.check_model(model)
    return architecture
