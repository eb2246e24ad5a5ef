"""Where the time of a run goes: counted by a clock that the test moves."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, LastCheckpoint, NoviceTuning, RecoveredShare, last_checkpoint
from moe_lightning.callbacks.spending import PARTS, spending
from moe_lightning.callbacks.time_spent import TimeSpent
from moe_lightning.compression import stopwatch
from tests.callbacks.small_fit import batches, fit, loader, tiny_module


class Clock(Callback):
    """Moves the clock: by 1 in a training batch, 100 in a validation, 10,000 and more around a compression."""

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def on_train_batch_start(self, *args: Any) -> None:
        self.now[0] += 1

    def on_validation_batch_start(self, *args: Any) -> None:
        self.now[0] += 100

    def before_compression(self, trainer: Any, module: Any) -> None:
        self.now[0] += 10_000
        with spending(trainer, "evaluation"):
            self.now[0] += 1_000_000

    def on_train_end(self, *args: Any) -> None:
        self.now[0] += 10_000_000


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless somebody moves it."""
    found = [5.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: found[0]))
    return found


def train(
    folder: Path, callbacks: list[Any], steps: int, ckpt_path: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train with a validation of 2 batches after each second step, and return what the file says."""
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **{"val_check_interval": 2, **options},
    )
    trainer.fit(
        tiny_module(),
        loader(batches(steps)),
        loader(batches(2)),
        ckpt_path=ckpt_path,
        weights_only=ckpt_path is not None,
    )
    return json.loads((folder / "results" / "time.json").read_text())


def callbacks_of(now: list[float]) -> list[Any]:
    compress = Compress([ml.Novices(ratio=0.5)], at_step=2, batches=batches(2))
    return [TimeSpent(), Clock(now), compress, NoviceTuning(at_step=3), LastCheckpoint(1)]


def test_every_part_is_counted_once(tmp_path: Path, now: list[float]) -> None:
    numbers = train(tmp_path, callbacks_of(now), steps=4)
    # Three validations: one batch before training, two batches twice.
    expected = {"training": 4, "validation": 500, "compression": 10_000, "evaluation": 1_000_000, "other": 10_000_000}
    assert numbers["parts"] == {part: expected.get(part, 0) for part in PARTS}
    assert numbers["total_seconds"] == sum(expected.values()) == now[0] - 5


def test_a_resumed_run_adds_up(tmp_path: Path, now: list[float]) -> None:
    train(tmp_path, callbacks_of(now), steps=4)
    file = last_checkpoint(tmp_path)
    saved = torch.load(file, weights_only=True)["callbacks"]["TimeSpent"]
    assert saved["seconds"]["training"] == 4
    numbers = train(tmp_path, callbacks_of(now), steps=7, ckpt_path=file)
    assert numbers["parts"]["training"] == 7
    assert numbers["parts"]["evaluation"] == 1_000_000
    assert numbers["parts"]["other"] == 20_000_000
    assert numbers["total_seconds"] == now[0] - 5


# ---------------------------------------------------------------- how far it got


class Note(Callback):
    """Note what the file says when a batch begins."""

    def __init__(self, stop: BaseException | None = None, at: int = 3) -> None:
        self.stop, self.at, self.found = stop, at, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.found.append(progress(Path(trainer.default_root_dir)))
        if self.stop is not None and trainer.global_step == self.at:
            raise self.stop


def progress(folder: Path) -> tuple[int, int | None, bool]:
    numbers = json.loads((folder / "results" / "time.json").read_text())
    return numbers["step"], numbers["steps"], numbers["ended"]


def test_a_run_that_is_killed_has_not_ended(tmp_path: Path) -> None:
    """Checkpoints are written at steps 2 and 4: a kill -9 leaves the file as it stands there."""
    note = Note()
    train(tmp_path, [TimeSpent(), note, LastCheckpoint(2)], 5, limit_val_batches=0)
    assert note.found == [(step, 5, False) for step in (0, 0, 2, 2, 4)]
    assert progress(tmp_path) == (5, 5, True)
    # The same folder again, with more steps: open again, until they are done.
    note = Note()
    train(tmp_path, [TimeSpent(), note, LastCheckpoint(9)], 7, last_checkpoint(tmp_path))
    assert note.found[0] == (5, 7, False) and progress(tmp_path) == (7, 7, True)
    # Nothing is left to train.
    train(tmp_path, [TimeSpent(), LastCheckpoint(9)], 7, last_checkpoint(tmp_path))
    assert progress(tmp_path) == (7, 7, True)


def test_a_run_that_fails_or_runs_out_of_time_has_not_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        fit(tiny_module(), tmp_path, [TimeSpent(), Note(RuntimeError("no more"))], 5)
    assert progress(tmp_path) == (3, 5, False)

    class TimeIsUp(Timer):
        """Of a clock that shows steps."""

        def time_elapsed(self, *args: Any) -> float:
            return 10.0 if saved.is_file() else 0.0

    saved = last_checkpoint(tmp_path)
    for _ in range(2):  # the second time there is none from the beginning
        path = saved if saved.is_file() else None
        train(tmp_path, [TimeSpent(), LastCheckpoint(2), TimeIsUp({"seconds": 9})], 5, path, limit_val_batches=0)
        assert progress(tmp_path) == (3, 5, False)


def test_a_run_without_a_last_step_can_end(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    note, module = Note(), tiny_module()
    # Its own schedule needs an end.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    fit(module, tmp_path, [TimeSpent(), note, Stop()], -1, batches(2), max_epochs=-1)
    assert note.found[0] == (0, None, False) and progress(tmp_path) == (2, None, True)


def test_our_callbacks_say_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that ticks whenever somebody looks at it.
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    compress = Compress([ml.ExpertDrop(keep=4)], at_step=1, batches=batches(1))
    callbacks = [TimeSpent(), compress, RecoveredShare(1, batches(2)), Export("after", 1), LastCheckpoint(1)]
    parts = train(tmp_path, callbacks, 2)["parts"]
    assert all(parts[part] > 0 for part in PARTS)


def test_without_somebody_who_counts_nothing_happens() -> None:
    with spending(SimpleNamespace(callbacks=[Callback()]), "evaluation"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="not on 'idling'"), spending(SimpleNamespace(), "idling"):  # type: ignore[arg-type]
        pass


def test_tensorboard_knows_which_stage_trains(tmp_path: Path) -> None:
    callbacks: list[Any] = [TimeSpent(), Compress([ml.Novices(ratio=0.5)], at_step=2, batches=batches(1))]
    fit(tiny_module(), tmp_path, [*callbacks, NoviceTuning(at_step=3, steps=2)], 7)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    found = {event.step: event.value for event in events.Scalars("run/stage")}
    assert found == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 0, 6: 0}
    text = events.Tensors("run/stages/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 1 | NoviceTuning | 3 |" in text
