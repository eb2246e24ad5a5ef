"""What waits for the end of training: stages are over before it, and nothing happens where only the time was up."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, LastCheckpoint, LoRARecovery
from moe_lightning.callbacks.at_step import time_was_up
from moe_lightning.plan import MergeLora, Quantize
from moe_lightning.surgery import plan_of
from tests.callbacks.recovery.stage_runs import load_checkpoint, train_batches
from tests.callbacks.small_fit import batches, fit, loader, tiny_module


def rounding() -> Compress:
    return Compress([ml.RTN(group_size=16)], at_step="end")


class Stop(Callback):
    """End the run after a step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 3


class UseUp(Callback):
    """Let the time of a run be up after a step, whatever the clock says."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            for timer in trainer.callbacks:
                if isinstance(timer, Timer):
                    timer._duration = 0.0


def kinds_of(model: Any) -> list[type]:
    return [type(edit) for edit in plan_of(model).edits]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_what_acts_at_the_end_finds_the_stages_over(order: tuple[int, ...], tmp_path: Path) -> None:
    """Stopped early, wherever each stands in the list: fold the terms in, then round, then write."""
    given = [LoRARecovery(1, rank=2), rounding(), Export("final")]
    # A folder that is written before the rounding holds what is not rounded, which is a plain Mixtral.
    rounded = order.index(1) < order.index(2)
    module, _ = run(tmp_path, [Stop(), *(given[place] for place in order)], steps=8)
    kinds = kinds_of(module.model)
    assert kinds[6:12] == [MergeLora] * 6 and set(kinds[12:]) == {Quantize}
    written = kinds_of(ml.from_pretrained(tmp_path / "models" / "final"))
    assert written == (kinds if rounded else [])
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["callbacks"]["LoRARecovery[at_step=1]"]["left"]


def test_early_stopping_is_an_end(tmp_path: Path) -> None:
    module = tiny_module()
    stopping = EarlyStopping("val/loss", patience=0, min_delta=100.0, check_on_train_epoch_end=False)
    given = [rounding(), LoRARecovery(0, rank=2), stopping]
    trainer = fit(module, tmp_path, given, steps=8, validation=batches(2, seed=3), val_check_interval=2)
    assert trainer.global_step < 8
    assert kinds_of(module.model)[-1] is Quantize and MergeLora in kinds_of(module.model)


def run(
    folder: Path, callbacks: list[Any], steps: int = 6, path: Path | None = None, **options: Any
) -> tuple[Any, Trainer]:
    module = tiny_module()
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[*callbacks, LastCheckpoint(every_n_train_steps=100)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(train_batches(1) * steps), ckpt_path=path, weights_only=True)
    return module, trainer


@pytest.mark.parametrize("first", ["stage", "rounding"])
def test_where_only_the_time_was_up_nothing_happens(
    first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of that moment goes on, and ends where a run does that had the time."""

    def given() -> list[Any]:
        pair = [LoRARecovery(1, rank=2), rounding()]
        return [*(pair if first == "stage" else pair[::-1]), Export("final")]

    module, trainer = run(tmp_path, [UseUp(3), *given()], max_time={"days": 1})
    assert trainer.global_step == 3 and MergeLora not in kinds_of(module.model)
    assert not (tmp_path / "models").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "the time was up" in line]
    names = "LoRARecovery, Compress" if first == "stage" else "Compress, LoRARecovery"
    assert len(lines) == 1 and lines[0].startswith("step 3: the time was up before training ended")
    assert f"({names}, Export)" in lines[0] and "go on with --ckpt_path last" in lines[0]
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert not load_checkpoint(path)["callbacks"]["LoRARecovery[at_step=1]"]["left"]
    module, _ = run(tmp_path, given(), path=path)
    whole, _ = run(tmp_path / "whole", given())
    assert kinds_of(module.model) == kinds_of(whole.model) and kinds_of(whole.model)[-1] is Quantize
    states = module.state_dict(), whole.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert (tmp_path / "models" / "final").is_dir()


def test_a_last_step_that_takes_the_last_of_the_time_is_the_end(tmp_path: Path) -> None:
    module, trainer = run(tmp_path, [rounding(), UseUp(6), LoRARecovery(1, rank=2)], max_time={"days": 1})
    assert trainer.global_step == 6 and kinds_of(module.model)[-1] is Quantize


def test_the_clock_of_the_first_process_decides() -> None:
    asked: list[bool] = []

    def broadcast(value: bool) -> bool:
        asked.append(value)
        return True

    timer = Timer({"days": 1})
    trainer: Any = SimpleNamespace(
        global_step=3, estimated_stepping_batches=8, callbacks=[timer], strategy=SimpleNamespace(broadcast=broadcast)
    )
    assert time_was_up(trainer) and asked == [False]
    trainer.global_step = 8
    assert not time_was_up(trainer) and asked == [False]


def test_what_acts_at_the_end_may_take_the_rest_of_the_time(tmp_path: Path) -> None:
    """Whether the time was up is known before the first of them acts."""

    class Slow(Export):
        def act(self, trainer: Any, module: Any) -> None:
            super().act(trainer, module)
            for timer in trainer.callbacks:
                if isinstance(timer, Timer):
                    timer._duration = 0.0
                    assert (timer.time_remaining() or time.monotonic()) <= 0

    run(tmp_path, [Stop(), Slow("first"), Export("second")], max_time={"days": 1})
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"first", "second"}
