"""What each process of ``test_lm_eval.py``'s run on two processes executes; started by Lightning itself."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning.pytorch import Trainer

import moe_lightning as ml
from tests.models import SIZES


def main(folder: Path, tasks: str) -> None:
    """Train, compress, measure and test on two processes.

    Args:
        folder: Where texts and tasks lie.
        tasks: Names of tasks.
    """
    data = ml.TextDataModule(
        sources=f"{folder}/texts/*.txt",
        vocab_size=300,
        block_size=16,
        batch_size=2,
        validation=0,
        test=4,
        calibration=8,
        cache_dir=str(folder / "cache"),
    )
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        default_root_dir=folder / "ddp",
        callbacks=[
            ml.callbacks.Compress([ml.Novices(ratio=0.5)], at_step=2, calibration_batches=3),
            ml.callbacks.LMEval(tasks, include_path=str(folder / "tasks"), limit=4),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = ml.MixtralModule(model={**SIZES, "vocab_size": 300, "max_position_embeddings": 512})
    trainer.fit(module, data)
    trainer.test(module, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
