"""What the tests of slimming in mid-run have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress
from moe_lightning.experts import WeightStack
from tests.models import random_batches

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = random_batches(4, batch=2, sequence=16, seed=5)
INT4: dict[str, Any] = {"group_size": 16, "symmetric": False}


def compress(at_step: Any, *methods: Any, **options: Any) -> Compress:
    # Six experts share few tokens here: none of them may make a run fail.
    given = {"batches": CALIBRATION, "min_tokens": 1, "max_fallback": 1.0, **options}
    return Compress(list(methods), at_step=at_step, **given)


def gradual(
    end: float = 0.5, start: float = 0.0, steps: int = 4, every: int = 2, **options: Any
) -> ml.SparsitySchedule:
    return ml.SparsitySchedule(start, end, steps, every, **options)


class Watch(Callback):
    """Note stacks, parameters and moments before each batch, behind the callbacks that stand before this one."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[dict[str, torch.Tensor]] = []
        self.dense: list[dict[str, torch.Tensor]] = []
        self.parameters: list[dict[str, torch.Tensor]] = []
        self.buffers: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, dict[str, torch.Tensor]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        stacks = {name: item for name, item in pl_module.named_modules() if isinstance(item, WeightStack)}
        kept = {name: stack.zeros_kept() for name, stack in stacks.items()}
        self.masks.append({name: mask.clone() for name, mask in kept.items() if mask is not None})
        self.dense.append({name: stack.dense().detach().clone() for name, stack in stacks.items()})
        self.parameters.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.buffers.append(
            {
                f"{name}.{key}": value.clone()
                for name, stack in stacks.items()
                for key, value in stack.state_dict().items()
                if key in ("words", "codes", "scale", "zero", "bits", "metadata")
            }
        )
        state = trainer.optimizers[0].state
        self.moments.append(
            {
                name: {key: value.clone() for key, value in state[parameter].items()}
                for name, parameter in pl_module.named_parameters()
                if parameter in state
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}
