"""Runs that kill themselves, for the resume tests.

Run as a program this reads legs as JSON from its standard input and executes each in a fork of itself: a leg is a real
process that really dies of SIGKILL, while torch and transformers are imported only once. No gradient is computed before
a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

MOMENTS = (
    "batch_start",
    "batch_end",
    "validation",
    "saving",
    "compressing",
    "compressed",
    "train_end",
)


def kill_this_process() -> None:
    """Die as if the power went: nothing is flushed, closed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(Callback):
    """Kill the process at an exact moment.

    Args:
        moment: ``batch_start`` or ``batch_end`` of training, in the middle of ``validation``, while ``saving``, with
            half of a checkpoint written, before the work of a ``Compress`` or after it, or at the end of training.
        step: Optimizer steps done by then.
    """

    def __init__(self, moment: str, step: int) -> None:
        super().__init__()
        assert moment in MOMENTS
        self.moment = moment
        self.step = step

    def _check(self, moment: str, trainer: Trainer) -> None:
        if moment == self.moment and trainer.global_step == self.step and not trainer.sanity_checking:
            kill_this_process()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.moment != "saving":
            return
        save = torch.save

        def save_half(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(content, file, *args, **kwargs)
            if trainer.global_step == self.step:
                file.flush()
                os.truncate(file.name, os.path.getsize(file.name) // 2)
                kill_this_process()

        torch.save = save_half

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._check("batch_start", trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._check("batch_end", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._check("validation", trainer)

    def before_compression(self, trainer: Trainer, *args: Any) -> None:
        self._check("compressing", trainer)

    def after_compression(self, trainer: Trainer, *args: Any) -> None:
        self._check("compressed", trainer)

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        self._check("train_end", trainer)


def run_forked(arguments: list[str], log: Path) -> int:
    """Run a command in a fork.

    Args:
        arguments: Of ``moe-lightning``.
        log: Where its output goes.

    Returns:
        Its exit status; minus the signal that killed it.
    """
    from moe_lightning.cli import main

    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = main(arguments)
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    import moe_lightning.cli.lightning  # noqa: F401 - before the first fork, so that no leg has to

    for leg in json.load(sys.stdin):
        print(json.dumps({"name": leg["name"], "status": run_forked(leg["arguments"], Path(leg["log"]))}), flush=True)
