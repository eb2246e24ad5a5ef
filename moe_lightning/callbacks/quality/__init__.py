"""Quality, size and speed of a model around its compressions, measured on the same object."""

from __future__ import annotations

from moe_lightning.callbacks.quality.quality_evaluation import QualityEvaluation

__all__ = ["QualityEvaluation"]
