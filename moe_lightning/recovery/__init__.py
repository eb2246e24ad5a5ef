"""Getting accuracy back after a compression: what may train, what it is taught, and what stands beside the weights."""

from moe_lightning.recovery.lora import LoRA, MergeLoRA

__all__ = ["LoRA", "MergeLoRA"]
