"""The Lightning face: when things happen. No formula lives here.

All callbacks are imported here, so that a YAML file can name them without their module: ``class_path: LastCheckpoint``.
"""

from __future__ import annotations

from moe_lightning.callbacks.checkpointing import AtomicCheckpointIO, LastCheckpoint, last_checkpoint
from moe_lightning.callbacks.compress import Compress
from moe_lightning.callbacks.compression_report import CompressionReport
from moe_lightning.callbacks.expert_statistics import ExpertStatistics
from moe_lightning.callbacks.export import Export
from moe_lightning.callbacks.lm_eval import LMEval
from moe_lightning.callbacks.predictions import PredictionWriter
from moe_lightning.callbacks.progress import CompactProgress
from moe_lightning.callbacks.quality import QualityEvaluation
from moe_lightning.callbacks.random_state import RandomState
from moe_lightning.callbacks.recovery import (
    FullFineTuning,
    LoRARecovery,
    NoviceTuning,
    RecoveredShare,
    RecoveryStage,
    RouterDistillation,
)
from moe_lightning.callbacks.time_spent import TimeSpent

__all__ = [
    "AtomicCheckpointIO",
    "CompactProgress",
    "Compress",
    "CompressionReport",
    "ExpertStatistics",
    "Export",
    "FullFineTuning",
    "LMEval",
    "LastCheckpoint",
    "LoRARecovery",
    "NoviceTuning",
    "PredictionWriter",
    "QualityEvaluation",
    "RandomState",
    "RecoveredShare",
    "RecoveryStage",
    "RouterDistillation",
    "TimeSpent",
    "last_checkpoint",
]
