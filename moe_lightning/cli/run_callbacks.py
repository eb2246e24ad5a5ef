"""What the command line adds to the callbacks of a run, and what it asks of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from moe_lightning.callbacks import Compress, RecoveredShare, TimeSpent
from moe_lightning.callbacks.compress import compressions_of
from moe_lightning.cli.run_directory import RunDirectory
from moe_lightning.files import write_atomically


class SaveRunConfig(SaveConfigCallback):
    """Write the options with their values to ``RUN/config.<command>.yaml``."""

    def __init__(self, parser: LightningArgumentParser, config: Any, command: str = "fit", **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)
        self.command = command

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file."""
        text = self.parser.dump(self.config, skip_unset=False)
        write_atomically(Path(trainer.default_root_dir) / f"config.{self.command}.yaml", text)


class NoteBeginning(Callback):
    """Know whether the work itself has begun, or only its preparation, in which mistakes are found.

    Args:
        directory: Run directory, which is told.
    """

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__()
        self.directory = directory
        self.has_begun = False

    def _note(self, trainer: Trainer) -> None:
        if not self.has_begun and not trainer.sanity_checking:
            self.has_begun = True
            if trainer.is_global_zero:
                self.directory.begin()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note it."""
        self._note(trainer)

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        """Note it where nothing was left but what happens at the end."""
        self._note(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note it."""
        self._note(trainer)

    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note it."""
        self._note(trainer)

    def on_predict_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note it."""
        self._note(trainer)


def check_names(callbacks: Sequence[Callback]) -> None:
    """Raise where two callbacks would keep their state in checkpoints under one name.

    Args:
        callbacks: Callbacks of a run.

    Raises:
        ValueError: Two have the same name.
    """
    names = [callback.state_key for callback in callbacks if type(callback).state_dict is not Callback.state_dict]
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"--trainer.callbacks: {name} stands there {count} times: give one of them another name or step, or "
                "leave it out (methods that a Compress applies at the same step go into one list)"
            )


def usual_measurements(callbacks: Sequence[Callback], validation: float) -> list[Callback]:
    """Return what measures where the time of a fit goes and, where it compresses, what comes back; unless it has them.

    Args:
        callbacks: Callbacks of a run.
        validation: Size of the validation split; 0 where there is none to measure on.
    """
    compresses = any(isinstance(callback, Compress) for callback in callbacks)
    kinds = set(map(type, callbacks))
    wanted: list[Callback] = [] if TimeSpent in kinds else [TimeSpent()]
    if compresses and validation and RecoveredShare not in kinds:
        wanted.append(RecoveredShare())
    return wanted


def how_to_go_on(trainer: Trainer) -> str:
    """Say how a run that has ended goes on; nothing where a compression at its end forbids it.

    Args:
        trainer: The trainer, with the states of the run's last checkpoint.
    """
    if any(item.ends_the_run for item in compressions_of(trainer)):
        return ", and its model was compressed there; to go on, start a new run from the folder that was exported then"
    return "; to go on, give it more steps by --trainer.max_steps"
