"""Where the time of a run goes, how far it got, and which stage of it trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_lightning.callbacks.at_step import time_was_up, total_steps
from moe_lightning.callbacks.recovery.stage import stages_of
from moe_lightning.callbacks.spending import PARTS
from moe_lightning.callbacks.tensorboard_pages import tensorboards
from moe_lightning.compression.stopwatch import Stopwatch
from moe_lightning.files import write_atomically


class TimeSpent(Callback):
    """Keep count of where the time of a run goes, in ``RUN/results/time.json``.

    Every moment counts once, as one of: ``training`` (with the loading of its data), ``validation``, ``compression``,
    ``evaluation`` (what is measured around compressions and at the end: quality, recovered share, tasks),
    ``exporting``, ``checkpoints``, ``other`` (setting up). It adds up over the parts of a resumed run; what a killed
    process did after its last checkpoint is done again, and counts once.

    The file also says how far the run got: ``step``, the optimizer steps done, ``steps``, those of the whole run (null
    for one without an end of its own), and ``ended``, whether training has ended; not where only the time was up
    (``max_time``). It is written when training begins, after validations, with every checkpoint and at the end, so that
    a run that was killed does not look like one that ended.

    TensorBoard gets ``run/stage``, the stage of recovery that trains, as a number: 0 where everything does, 1 for the
    first stage, and so on; ``run/stages`` names them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopwatch: Stopwatch | None = None
        self._before: dict[str, float] = {}
        self._begun = False
        self._steps: int | None = None
        self._ended: bool | None = None
        self._stage = -1

    # ------------------------------------------------------------ time

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds up to now, by part."""
        spent = {} if self.stopwatch is None else self.stopwatch.seconds
        return {part: self._before.get(part, 0.0) + spent.get(part, 0.0) for part in PARTS}

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds up to now."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seconds up to the checkpoint."""
        self._before = dict(state_dict["seconds"])

    def write(self, trainer: Trainer) -> None:
        """Write the file as it is now.

        Args:
            trainer: The trainer.
        """
        if trainer.is_global_zero:
            seconds = self.seconds
            numbers = {
                "total_seconds": sum(seconds.values()),
                "parts": seconds,
                "step": trainer.global_step,
                "steps": self._steps,
                "ended": bool(self._ended),
            }
            path = Path(trainer.default_root_dir) / "results" / "time.json"
            write_atomically(path, json.dumps(numbers, indent=2) + "\n")

    def _turn_to(self, part: str) -> None:
        if self.stopwatch is not None:
            self.stopwatch.turn_to(part)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count, in training only."""
        self._before = self.seconds if trainer.global_step else {}
        self.stopwatch, self._begun = Stopwatch("other") if stage == "fit" else None, False
        self._steps, self._ended = None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins."""
        self._turn_to("training")
        self._begun, self._stage = True, -1
        self._count_steps(trainer)
        self._name_stages(trainer)
        self.write(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training rests."""
        self._turn_to("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self._turn_to("other" if trainer.sanity_checking else "training")
        self._write_in_between(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the file as it is with this checkpoint."""
        self._write_in_between(trainer)

    def _count_steps(self, trainer: Trainer) -> None:
        total = total_steps(trainer)
        self._steps = int(total) if math.isfinite(total) else None

    def _write_in_between(self, trainer: Trainer) -> None:
        if self._begun and self.stopwatch is not None:
            self.write(trainer)

    def training_over(self, trainer: Trainer, module: LightningModule, stopped: bool) -> None:
        """Training is over; called before anything acts at the end, where anything does."""
        self._turn_to("other")
        self._ended = not stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, for those who read it at the end."""
        self._turn_to("other")
        if self._ended is None:
            self._ended = not time_was_up(trainer)
        self.write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file with all that there was."""
        if self.stopwatch is None:
            return
        if not self._begun:
            # Nothing was left to train, or no time.
            self._count_steps(trainer)
            self._ended = trainer.global_step > 0 and not time_was_up(trainer)
        self.write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the file where training had begun."""
        if self._begun:
            self.write(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop counting."""
        self._before, self.stopwatch = self.seconds, None

    # ------------------------------------------------------------ stages

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Log the stage when another one has begun, and as often as the loss, so that its curve has no slopes."""
        stages = stages_of(trainer)
        active = [number for number, stage in enumerate(stages, 1) if stage.entered and not stage.left]
        stage = active[-1] if active else 0
        due = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if stages and (due or stage != self._stage):
            self._stage = stage
            for logger in trainer.loggers:
                logger.log_metrics({"run/stage": float(stage)}, step=trainer.global_step)

    def _name_stages(self, trainer: Trainer) -> None:
        stages = stages_of(trainer)
        rows = [f"| {number} | {type(stage).__name__} | {stage.first_step} |" for number, stage in enumerate(stages, 1)]
        table = "\n".join(["| run/stage | what trains | from step |", "|--:|---|--:|", "| 0 | everything | 0 |", *rows])
        if stages and trainer.is_global_zero:
            for logger in tensorboards(trainer):
                logger.experiment.add_text("run/stages", table, trainer.global_step)
