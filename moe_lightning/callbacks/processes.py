"""What the processes of a run tell each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer


def of_all_processes(trainer: Trainer, item: Any) -> list[Any]:
    """Return what each process has, in their order; called by all of them.

    Args:
        trainer: The trainer.
        item: What this process has; plain values and tensors on the CPU.
    """
    if trainer.world_size == 1:
        return [item]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, item)
    return gathered
