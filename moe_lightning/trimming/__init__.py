"""Which experts go, and what takes their place."""

from moe_lightning.trimming.expert_drop import ExpertDrop
from moe_lightning.trimming.novices import NoviceKind, Novices, novice_values
from moe_lightning.trimming.replay import Replay

__all__ = ["ExpertDrop", "NoviceKind", "Novices", "Replay", "novice_values"]
