"""Stages of recovery: what trains when, after which teacher, and how much of the lost loss comes back."""

from __future__ import annotations

from moe_lightning.callbacks.recovery.lora_recovery import LoRARecovery
from moe_lightning.callbacks.recovery.recovered_share import RecoveredShare
from moe_lightning.callbacks.recovery.stage import RecoveryStage, stages_of
from moe_lightning.callbacks.recovery.stages import FullFineTuning, NoviceTuning, RouterDistillation

__all__ = [
    "FullFineTuning",
    "LoRARecovery",
    "NoviceTuning",
    "RecoveredShare",
    "RecoveryStage",
    "RouterDistillation",
    "stages_of",
]
