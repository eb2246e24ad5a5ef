"""Small compressed models, and what the tests of the stages watch."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import FullFineTuning, LoRARecovery, NoviceTuning, RouterDistillation
from tests.callbacks.small_fit import batches, tiny_module
from tests.models import random_batches

INT4: dict[str, Any] = {"group_size": 16}
BOTH = "experts+attention"

KINDS: dict[str, list[Any]] = {
    "whole": [],
    "trimmed": [ml.ExpertDrop(keep=4), ml.ChannelDrop(ratio=1 / 3), ml.BlockDrop(count=1)],
    "constant novices": [ml.Novices(keep=4)],
    "low-rank novices": [ml.Novices(keep=4, novice="low_rank", rank=2)],
    "2:4": [ml.Magnitude(pattern="2:4", targets=BOTH)],
    "masked": [ml.Magnitude(sparsity=0.4, targets=BOTH)],
    "int4": [ml.RTN(**INT4, targets=BOTH)],
    "mixture": [
        ml.LayerDrop(count=1),
        ml.Novices(keep=4, novice="low_rank", rank=2),
        ml.Magnitude(sparsity=0.4, targets=BOTH),
        ml.RTN(**INT4),
    ],
}
"""Every kind of compressed model that a stage may find."""

NO_TEACHER: dict[str, Any] = {"teacher": None, "alpha": 0.0}


def stage(name: str, at_step: int = 0, **options: Any) -> Any:
    """Return a stage with a high learning rate and without a teacher."""
    kinds = {item.__name__: item for item in (RouterDistillation, NoviceTuning, LoRARecovery, FullFineTuning)}
    given = {"learning_rate": 0.02, **NO_TEACHER, **options}
    if name == "LoRARecovery":
        given = {"rank": 2, **given}
    return kinds[name](at_step, **given)


def trains(name: str, parameter: str) -> bool:
    """Say, by name alone, whether a stage trains an entry of the state dict."""
    last = parameter.rpartition(".")[2]
    return {
        "RouterDistillation": parameter.endswith(".mlp.gate.weight"),
        "NoviceTuning": last in ("novices", "novice_in", "novice_out"),
        "LoRARecovery": last in ("lora_A", "lora_B"),
        # What describes packed weights: integers, their scales, masks.
        "FullFineTuning": last not in ("words", "codes", "scale", "zero", "bits", "metadata"),
    }[name]


@functools.cache
def _compressed(kind: str) -> Any:
    module = tiny_module()
    module.configure_model()
    if KINDS[kind]:
        calibration = random_batches(2, batch=2, sequence=16, seed=5)
        ml.compress(module.model, calibration, copy.deepcopy(KINDS[kind]), progress=False, max_fallback=1.0)
        module.model.train()
    return module


def compressed_module(kind: str) -> Any:
    """Return a module whose model is of a kind; made once in each process."""
    return copy.deepcopy(_compressed(kind))


class Before(Callback):
    """Stands before the stages: the state at the end of each step, before a stage leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.states.append(state_of(pl_module))


class Behind(Callback):
    """Stands behind the stages: what there is before each batch, once stages and compressions have acted."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, dict[str, torch.Tensor]]] = []
        self.rates: list[set[float]] = []
        self.steps: list[int] = []
        self.training: list[set[str]] = []
        self.objectives: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        named = dict(pl_module.named_parameters())
        state = trainer.optimizers[0].state
        self.states.append(state_of(pl_module))
        self.moments.append(
            {
                name: {key: value.clone() for key, value in state[item].items()}
                for name, item in named.items()
                if item in state
            }
        )
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})
        self.steps.append(trainer.global_step)
        self.training.append({name for name, item in named.items() if item.requires_grad})
        self.objectives.append(pl_module.objective)


def state_of(module: Any) -> dict[str, torch.Tensor]:
    """Return a copy of everything that a checkpoint of the module would hold."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Return the entries that differ in a single bit."""
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def train_batches(count: int, seed: int = 0) -> list[Any]:
    """Return training batches, with padding."""
    return batches(count, seed=seed, padded=True)


def load_checkpoint(path: Path) -> Any:
    """Read a checkpoint as a resumed run does: nothing but tensors and plain types is let through."""
    return torch.load(path, weights_only=True)
