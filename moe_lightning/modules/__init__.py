"""LightningModules."""

from __future__ import annotations

from moe_lightning.modules.mixtral import MixtralModule

__all__ = ["MixtralModule"]
