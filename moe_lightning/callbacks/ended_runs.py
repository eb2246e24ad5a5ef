"""Runs that were killed after their last step, before what happens at the end was done.

Lightning does not enter its loop when a checkpoint holds all steps of a run, so ``on_train_end`` would never come, and
what acts at the end would be lost. Here the loop is entered where something waits: it makes no step, and ends as ever,
with all hooks.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def outstanding(trainer: Trainer) -> list[Any]:
    """Return the callbacks that have something left to do at the end: those whose ``outstanding(trainer)`` is true.

    Args:
        trainer: The trainer, with the states of a checkpoint loaded.
    """
    found: list[Any] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        question = getattr(callback, "outstanding", None)
        if question is not None and question(trainer):
            found.append(callback)
    return found


class _EndsWhatHasEnded:
    """Mixed into the class of a trainer's fit loop."""

    steps_at_start: int | None = None
    """Optimizer steps that were done when the loop was entered."""

    trainer: Trainer

    @property
    def skip(self) -> bool:
        """Whether the loop is not entered at all."""
        there_is_data = self.trainer.limit_train_batches != 0 and self.max_batches != 0  # type: ignore[attr-defined]
        if self.trainer.global_step > 0 and there_is_data and outstanding(self.trainer):
            return False  # with nothing to train it ends at once
        return bool(super().skip)  # type: ignore[misc]

    def on_run_start(self) -> None:
        """Note where it begins."""
        self.steps_at_start = self.trainer.global_step
        super().on_run_start()  # type: ignore[misc]


def finish_ended_runs(trainer: Trainer) -> None:
    """Let ``fit`` of a checkpoint that holds all steps do what is left to do at the end, and nothing else.

    Args:
        trainer: The trainer, before its loop runs.
    """
    loop: Any = getattr(trainer, "fit_loop", None)
    if loop is not None and not isinstance(loop, _EndsWhatHasEnded):
        kind = type(loop)
        loop.__class__ = type(kind.__name__, (_EndsWhatHasEnded, kind), {})


def trained_nothing(trainer: Trainer) -> bool:
    """Say whether the run had ended before this ``fit``, at whose end it is asked."""
    return getattr(getattr(trainer, "fit_loop", None), "steps_at_start", None) == trainer.global_step
