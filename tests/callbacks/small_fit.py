"""A small training run without the command line."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import moe_lightning as ml
from tests.models import SIZES, random_batches


def tiny_module(**options: Any) -> ml.MixtralModule:
    """Return a module whose weights are always the same."""
    torch.manual_seed(0)
    return ml.MixtralModule(model=dict(SIZES), warmup_steps=1, learning_rate=1e-2, **options)


def batches(count: int, seed: int = 0, padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return training batches; padded: the last four tokens of each first row are padding."""
    found = random_batches(count, batch=2, sequence=16, seed=seed)
    for batch in found:
        batch["labels"] = batch["input_ids"].clone()
        if padded:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][0, -4:] = 0
            batch["labels"][0, -4:] = -100
    return found


def loader(items: list[Any]) -> DataLoader[Any]:
    """Return a loader that yields the batches as they are."""
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: Any,
    folder: Path,
    callbacks: list[Callback],
    steps: int = 8,
    train: list[Any] | None = None,
    validation: list[Any] | None = None,
    **options: Any,
) -> Trainer:
    """Train; TensorBoard events go to ``folder/logs``."""
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        logger=TensorBoardLogger(str(folder), name="logs", version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"enable_progress_bar": False, **options},
    )
    trainer.fit(module, loader(train or batches(steps)), loader(validation) if validation else None)
    return trainer
