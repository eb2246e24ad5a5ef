"""Which blocks of text a run will see, before it does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

from moe_lightning.data import TextDataModule
from moe_lightning.recovery.logit_cache import CacheHeader

BLOCKS_AT_A_TIME = 256


def blocks_to_come(trainer: Trainer, first_step: int, end: float) -> Iterator[Tensor]:
    """Yield the tokens of every block that this process trains on in some steps, each block once.

    Args:
        trainer: The trainer. Of other data than a :class:`TextDataModule` nothing is known: nothing is yielded.
        first_step: First optimizer step.
        end: Step before which to stop; infinity for the end of the run.

    Yields:
        ``input_ids`` ``[B, S]``.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, TextDataModule) or getattr(trainer, "fast_dev_run", False):
        return
    # A stream of its own: the trainer's keeps its place.
    stream = datamodule.train_dataloader()
    numbers = [stream.block_numbers(index) for index in batches_of(trainer, len(stream), first_step, end)]
    seen = np.unique(np.concatenate([np.zeros(0, np.int64), *numbers]))
    for start in range(0, len(seen), BLOCKS_AT_A_TIME):
        yield stream.blocks.batch(seen[start : start + BLOCKS_AT_A_TIME])["input_ids"]


def batches_of(trainer: Trainer, epoch_batches: int, first_step: int, end: float) -> Iterator[int]:
    """Yield the numbers of the batches of some optimizer steps in the training stream.

    Args:
        trainer: The trainer.
        epoch_batches: Batches of an epoch of the stream.
        first_step: First optimizer step.
        end: Step before which to stop.
    """
    accumulate = trainer.accumulate_grad_batches
    end = _end_in_run(trainer, epoch_batches, end)
    if math.isinf(end):
        return
    if _is_one_stretch(trainer):
        yield from range(first_step * accumulate, int(end) * accumulate)
        return
    used = _used(trainer, epoch_batches)
    steps = math.ceil(used / accumulate)
    for step in range(first_step, int(end)):
        epoch, position = divmod(step, steps)
        for batch in range(position * accumulate, min((position + 1) * accumulate, used)):
            yield epoch * epoch_batches + batch


def _is_one_stretch(trainer: Trainer) -> bool:
    """Say whether the whole run is one stretch of the stream."""
    return trainer.max_steps > 0 and trainer.max_epochs in (None, -1)


def _used(trainer: Trainer, epoch_batches: int) -> int:
    """Return the batches of an epoch that are trained on."""
    limit = trainer.limit_train_batches
    return int(epoch_batches * limit) if isinstance(limit, float) else min(epoch_batches, int(limit))


def _end_in_run(trainer: Trainer, epoch_batches: int, end: float) -> float:
    """Return the step before which to stop, the run's end included; infinity where it has none."""
    if trainer.max_steps > 0:
        end = min(end, trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        # What is left over of an epoch is a step of its own.
        end = min(end, trainer.max_epochs * math.ceil(_used(trainer, epoch_batches) / trainer.accumulate_grad_batches))
    return end


def command_for(trainer: Trainer, folder: str, header: CacheHeader, first_step: int, end: float) -> str:
    """Return the command that writes the predictions of some steps' blocks.

    Args:
        trainer: The trainer, with a :class:`TextDataModule`.
        folder: The cache.
        header: What it holds.
        first_step: First optimizer step.
        end: Step before which to stop; infinity for the end of the run.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    end = _end_in_run(trainer, len(data.train_dataloader()), end)
    options: dict[str, Any] = {
        "model": header.teacher.get("folder", "TEACHER"),
        "output": folder,
        "run": "CONFIG",
        "from_step": first_step,
        "steps": int(end - first_step),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        "temperature": f"{header.temperature:g}",
        "top_k": header.top_k,
        "storage": header.storage,
        "data.batch_size": data.batch_size,
        "data.order_seed": data.order_seed,
    }
    return "moe-lightning cache-logits " + shlex.join(
        part for name, value in options.items() for part in (f"--{name}", str(value))
    )
