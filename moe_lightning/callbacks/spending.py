"""Saying what the time of a run is spent on, to whoever keeps count of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch import Trainer

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
