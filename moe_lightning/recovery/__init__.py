"""Getting accuracy back after a compression: what may train, what it is taught, and what stands beside the weights."""

from moe_lightning.recovery.lora import LoRA, MergeLoRA
from moe_lightning.recovery.losses import hidden_error, kl_to_teacher, kl_to_top_words, next_token_loss
from moe_lightning.recovery.objective import Objective, Student, Targets, Teacher, TopWords, hidden_by_layer

__all__ = [
    "LoRA",
    "MergeLoRA",
    "Objective",
    "Student",
    "Targets",
    "Teacher",
    "TopWords",
    "hidden_by_layer",
    "hidden_error",
    "kl_to_teacher",
    "kl_to_top_words",
    "next_token_loss",
]
