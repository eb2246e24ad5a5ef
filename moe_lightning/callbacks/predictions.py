"""What becomes of the continuations of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_lightning.files import write_atomically

PREDICTIONS_NAME = "predictions.jsonl"


class PredictionWriter(Callback):
    """Print each prompt with its continuation, and write them all to ``RUN/predictions.jsonl``.

    Args:
        run_dir: Run directory; the trainer's ``default_root_dir`` when None.
    """

    def __init__(self, run_dir: str | None = None) -> None:
        super().__init__()
        self.run_dir = run_dir
        self._predictions: list[dict[str, str]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew."""
        self._predictions = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[dict[str, str]] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a batch."""
        for prediction in outputs or ():
            self._predictions.append(prediction)
            print(f"--- prompt\n{prediction['prompt']}\n--- continuation\n{prediction['continuation']}\n", flush=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, whole or not at all."""
        # One file for each process beyond the first, which hold different prompts.
        name = PREDICTIONS_NAME if trainer.global_rank == 0 else f"predictions-{trainer.global_rank}.jsonl"
        path = Path(self.run_dir or trainer.default_root_dir) / name
        lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in self._predictions)
        write_atomically(path, "".join(lines))
