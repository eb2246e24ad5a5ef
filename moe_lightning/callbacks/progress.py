"""A compact progress display, for terminals and for logs."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from moe_lightning.callbacks.at_step import total_steps
from moe_lightning.sizes import count_parameters, count_trainable


def duration(seconds: float) -> str:
    """Return a time as ``1:02:03`` or ``2:03``."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: float) -> str:
    """Return a number with three or four digits: ``0.0012``, ``3.21``, ``12.3k``."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value / 1000:.1f}k"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


class CompactProgress(ProgressBar):
    """One line: step, loss, validation perplexity, tokens per second, learning rate, time left.

    On a terminal the line is rewritten in place. Elsewhere (a log file, CI) a plain line is printed now and then, so
    that the log can be read. Results of validations, and what other callbacks print, stand on lines of their own.

    Args:
        seconds: Least time between two lines where the output is no terminal; on a terminal it is a tenth of a second.

    Raises:
        ValueError: ``seconds`` is negative.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        if seconds < 0:
            raise ValueError(f"CompactProgress: seconds must not be negative, got {seconds}")
        self.seconds = seconds
        self._enabled = True
        self._shown_at = -math.inf
        self._line = ""
        self._started_at = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Show nothing (ranks other than the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    @property
    def is_terminal(self) -> bool:
        """Whether the line can be rewritten."""
        return sys.stdout.isatty()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line of its own; the running line stays below it."""
        if not self._enabled:
            return
        self._clear()
        print(*args, **kwargs, flush=True)
        if self._line and self.is_terminal:
            print(self._line, end="", flush=True)

    def _clear(self) -> None:
        if self._line and self.is_terminal:
            print("\r\x1b[2K", end="")

    def _is_due(self) -> bool:
        # Asked before a line is made: reading metrics makes a GPU wait.
        return self._enabled and time.monotonic() - self._shown_at >= (0.1 if self.is_terminal else self.seconds)

    def _show(self, line: str, force: bool = False) -> None:
        if not self._enabled or not (force or self._is_due()):
            return
        self._shown_at = time.monotonic()
        if not self.is_terminal:
            print(line, flush=True)
            return
        width = shutil.get_terminal_size().columns
        self._clear()
        self._line = line if len(line) < width else line[: width - 2] + "~"
        print(self._line, end="", flush=True)

    def _finish(self) -> None:
        if self._line and self.is_terminal and self._enabled:
            print(flush=True)
        self._line = ""

    # ------------------------------------------------------------ training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained, and take the time."""
        count, trained = count_parameters(pl_module), count_trainable(pl_module)
        share = "" if trained == count else f", {trained:,} of them train"
        total = total_steps(trainer)
        self.print(
            f"training {type(pl_module).__name__}: {count:,} parameters{share}, {total:.0f} steps on {pl_module.device}"
        )
        self._started_at = time.monotonic()
        self._first_step = trainer.global_step

    def _training_line(self, trainer: Trainer) -> str:
        total = total_steps(trainer)
        step, metrics = trainer.global_step, trainer.callback_metrics
        parts = [f"step {step}/{total:.0f}"]
        for name, words in (
            ("train/loss", "loss {}"),
            ("val/perplexity", "val perplexity {}"),
            ("train/tokens_per_second", "{} tokens/s"),
            # Where only novices train, theirs is the one that counts.
            (
                "train/novice_learning_rate" if "train/novice_learning_rate" in metrics else "train/learning_rate",
                "lr {}",
            ),
        ):
            if name in metrics:
                parts.append(words.format(short(float(metrics[name]))))
        done = step - self._first_step
        if done:
            left = (time.monotonic() - self._started_at) / done * (total - step)
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show where the training is."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due():
            self._show(self._training_line(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last line."""
        self._show(self._training_line(trainer), force=True)
        self._finish()
        self.print(f"trained to step {trainer.global_step} in {duration(time.monotonic() - self._started_at)}")

    # ------------------------------------------------------------ the other stages

    def _stage_line(self, stage: str, batch_idx: int, total: int | float) -> str:
        of_total = f"/{total:.0f}" if math.isfinite(total) else ""
        return f"{stage} batch {batch_idx + 1}{of_total}"

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show where the validation is."""
        if not trainer.sanity_checking:
            self.has_dataloader_changed(dataloader_idx)  # the base class needs to hear of it
            self._show(self._stage_line("validation", batch_idx, self.total_val_batches_current_dataloader))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the result of a validation within training; Lightning prints the others."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish()
            return
        metrics = trainer.callback_metrics
        found = [
            f"{words} {short(float(metrics[name]))}"
            for name, words in (("val/perplexity", "perplexity"), ("val/bits_per_byte", "bits per byte"))
            if name in metrics
        ]
        if found:
            self.print(f"step {trainer.global_step}: validation {', '.join(found)}")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show where the test is."""
        self.has_dataloader_changed(dataloader_idx)  # the base class needs to hear of it
        self._show(self._stage_line("test", batch_idx, self.total_test_batches_current_dataloader))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the line."""
        self._finish()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show where the prediction is."""
        self.has_dataloader_changed(dataloader_idx)  # the base class needs to hear of it
        self._show(self._stage_line("predict", batch_idx, self.total_predict_batches_current_dataloader))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the line."""
        self._finish()
