"""A run that leaves everything that TensorBoard can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

import moe_lightning as ml
from moe_lightning.callbacks import (
    Compress,
    ExpertStatistics,
    LastCheckpoint,
    NoviceTuning,
    QualityEvaluation,
    RecoveredShare,
    TimeSpent,
)
from moe_lightning.callbacks.run_log import log_run
from moe_lightning.data import TextDataModule
from moe_lightning.reporting.report import read_run
from tests.small_runs import MODEL, write_texts


class LogAtTheEnd(Callback):
    """Only what TensorBoard gets of a report."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log what the others left."""
        log_run(trainer, read_run(trainer.default_root_dir))


def run(folder: Path, steps: int = 4, ckpt_path: Path | None = None, learning_rate: float = 0.01) -> Trainer:
    """Train, compress at step 2, tune the novices, and measure it all; texts lie beside the folder.

    Args:
        folder: Run directory.
        steps: Optimizer steps.
        ckpt_path: To go on from.
        learning_rate: Of the module.
    """
    texts = folder.parent / "texts"
    if not texts.is_dir():
        write_texts(texts)
    torch.manual_seed(3)
    data = TextDataModule(
        f"{texts}/*.txt",
        vocab_size=300,
        block_size=16,
        batch_size=2,
        validation=4,
        test=6,
        calibration=8,
        cache_dir=str(folder.parent / "cache"),
    )
    module = ml.MixtralModule(model={**MODEL, "attention_dropout": 0.0}, learning_rate=learning_rate, warmup_steps=1)
    callbacks: list[Any] = [
        TimeSpent(),
        ExpertStatistics(every_n_steps=2, figures_every_n_steps=4),
        QualityEvaluation(new_tokens=2, layer_tokens=32, prompts=["abc"]),
        RecoveredShare(1),
        Compress([ml.Novices(ratio=0.5, criterion="mone")], at_step=2),
        NoviceTuning(at_step=2),
        LastCheckpoint(2),
        LogAtTheEnd(),
    ]
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        logger=TensorBoardLogger(str(folder), name="logs", version="", default_hp_metric=False),
        val_check_interval=4,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return trainer
