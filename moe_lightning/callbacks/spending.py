"""Saying what the time of a run is spent on, to whoever keeps count of it, and measuring in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Trainer

from moe_lightning.callbacks.random_state import same_random_states
from moe_lightning.compression.stopwatch import Stopwatch

PARTS = ("training", "validation", "compression", "evaluation", "exporting", "checkpoints", "other")
"""What the time of a run is spent on."""


@contextmanager
def spending(trainer: Trainer, part: str) -> Iterator[None]:
    """Count what happens inside a ``with`` block as a part of the run's time; of nested ones the innermost counts.

    Nothing happens where no callback keeps count: none has an attribute ``stopwatch``.

    Args:
        trainer: The trainer.
        part: One of :data:`PARTS`.

    Raises:
        ValueError: Another word.
    """
    if part not in PARTS:
        raise ValueError(f"the time of a run is spent on {', '.join(PARTS)}, not on {part!r}")
    with ExitStack() as stack:
        for callback in getattr(trainer, "callbacks", ()):
            watch = getattr(callback, "stopwatch", None)
            if isinstance(watch, Stopwatch):
                stack.enter_context(watch.spending(part))
        yield


@contextmanager
def undisturbed(trainer: Trainer) -> Iterator[None]:
    """Measure something inside a ``with`` block, while the run goes on behind it as if nothing had been measured.

    The time counts as evaluation, and random numbers are drawn beside the training's sequence.

    Args:
        trainer: The trainer.
    """
    # A test or validation runs in inference mode, and what is kept (packed weights, say) must not be of that kind.
    with same_random_states(), spending(trainer, "evaluation"), torch.inference_mode(False):
        yield
