"""Checkpoints at one fixed place, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from moe_lightning.callbacks.spending import spending

CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_NAME = "last.ckpt"


def last_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """Return where a run directory keeps its last checkpoint, whether it exists or not."""
    return Path(run_dir) / CHECKPOINT_FOLDER / CHECKPOINT_NAME


def steps_behind(trainer: Trainer) -> int:
    """Return the optimizer steps behind the model; in a test those of its checkpoint, 0 of a folder.

    Args:
        trainer: The trainer.
    """
    path = getattr(trainer, "ckpt_path", None)
    if trainer.state.fn == "fit" or path is None or not Path(path).is_file():
        return trainer.global_step
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("global_step", 0))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, force it to disk, then rename it.

    Lightning's own goes through a temporary folder that may lie on another disk, where the final move is a copy: a
    process killed in the middle of it leaves half a file under the good name, and the checkpoint before it is gone.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the local file ``path``; whoever reads ``path`` sees the old file or the new one.

        Args:
            checkpoint: What to save.
            path: Local file.
            storage_options: Not supported.

        Raises:
            TypeError: ``storage_options`` were given.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        # The rename itself must survive a power cut too.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class LastCheckpoint(Checkpoint):
    """Save to ``RUN/checkpoints/last.ckpt`` every so many steps, after each compression and at the end of the run.

    One fixed path, so that ``--ckpt_path last`` cannot miss it. Saves happen after a whole optimizer step only: after a
    compression it is the first one of what is left, so that a calibration is not lost with the process.

    Args:
        every_n_train_steps: Optimizer steps between two saves.
        run_dir: Run directory; the trainer's ``default_root_dir`` when None.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive.
    """

    def __init__(self, every_n_train_steps: int = 100, run_dir: str | None = None) -> None:
        super().__init__()
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: use a number of steps >= 1")
        self.every_n_train_steps = every_n_train_steps
        self.run_dir = run_dir
        self._saved_step = -1
        self._compressed_step: int | None = None  # of a compression that no checkpoint holds yet

    def path(self, trainer: Trainer) -> Path:
        """Return where the checkpoint goes."""
        return last_checkpoint(self.run_dir or trainer.default_root_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trainer write atomically, unless it was given another way of writing."""
        self._compressed_step = None
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which step was saved last, so that it is not saved again."""
        self._saved_step = state_dict["saved_step"]

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last save."""
        return {"saved_step": self._saved_step}

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self._compressed_step = None
        self._saved_step = trainer.global_step
        with spending(trainer, "checkpoints"):
            trainer.save_checkpoint(self.path(trainer), weights_only=False)

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Take note that there is something that took long to make."""
        self._compressed_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every so many steps, and after a compression; not between the batches of one step."""
        step = trainer.global_step
        due = step > 0 and step % self.every_n_train_steps == 0 and step != self._saved_step
        if due or (self._compressed_step is not None and step > self._compressed_step):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, whatever was saved at its last step: other callbacks may have acted since."""
        self._save(trainer)
