"""The model that a run keeps as its teacher: when it is missing, who writes it, and the type in which it is held."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, RouterDistillation
from moe_lightning.callbacks.recovery import teachers
from moe_lightning.callbacks.recovery.teacher_folders import is_floating, keep_model, opening
from moe_lightning.callbacks.recovery.teachers import TeacherSource
from tests.callbacks.recovery.stage_runs import load_checkpoint, train_batches
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import random_batches, tiny_mixtral

CALIBRATION = random_batches(2, batch=2, sequence=16, seed=5)


class Save(Callback):
    """Write a checkpoint after each step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def run(folder: Path, callbacks: list[Any], start: str | None = None) -> Any:
    module = tiny_module()
    trainer = Trainer(
        max_steps=8,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[*callbacks, *([] if start else [Save(folder)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(train_batches(1) * 8), ckpt_path=folder / start if start else None, weights_only=True)
    return module


def little_by_little() -> Compress:
    """At steps 1, 3 and 5; the first share of the six experts is none."""
    ratio = ml.RatioSchedule(0.02, 0.5, steps=4, every=2)
    return Compress([ml.ExpertDrop(ratio=ratio)], at_step=1, batches=CALIBRATION, min_tokens=1)


def test_an_act_that_took_nothing_left_the_model_as_it_was(tmp_path: Path) -> None:
    def given() -> list[Any]:
        return [little_by_little(), RouterDistillation(5, teacher="before", learning_rate=0.02)]

    whole = run(tmp_path, given())
    states = {step: load_checkpoint(tmp_path / f"{step}.ckpt")["callbacks"] for step in (2, 4)}
    acted = {step: next(state for key, state in found.items() if "Compress" in key) for step, found in states.items()}
    assert [(state["acts"], state["changed"]) for state in acted.values()] == [(1, False), (2, True)]
    shutil.rmtree(tmp_path / "teacher")
    module = run(tmp_path, given(), "2.ckpt")
    pair = whole.state_dict(), module.state_dict()
    assert pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_an_act_that_took_something_did_not(tmp_path: Path) -> None:
    run(tmp_path, [little_by_little()])
    late = [little_by_little(), RouterDistillation(6, teacher="before")]
    run(tmp_path, late, "2.ckpt")
    with pytest.raises(ValueError, match="the checkpoint holds a compressed model"):
        run(tmp_path, [little_by_little(), RouterDistillation(6, teacher="before")], "4.ckpt")


class Strategy:
    """One of two processes: notes what is sent to the other, or gives what the first one sent."""

    def __init__(self, received: str | None = None) -> None:
        self.sent: list[Any] = []
        self.received = received
        self.root_device = torch.device("cpu")

    def broadcast(self, value: Any) -> Any:
        self.sent.append(value)
        return self.received if self.received is not None else value


def one_of_two(folder: Path, strategy: Strategy, first: bool) -> Any:
    return SimpleNamespace(
        strategy=strategy,
        is_global_zero=first,
        default_root_dir=str(folder),
        callbacks=[],
        global_step=2,
        progress_bar_callback=None,
    )


def test_no_process_waits_for_a_teacher_that_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module()
    module.configure_model()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(teachers, "keep_model", full)
    strategy, source = Strategy(), TeacherSource("before")
    with pytest.raises(OSError, match="disk full"):
        source.before_compression(one_of_two(tmp_path, strategy, True), module)
    assert strategy.sent == ["OSError: disk full"], "the others are told before this one fails"
    waiting = one_of_two(tmp_path, Strategy("OSError: disk full"), False)
    with pytest.raises(RuntimeError, match=r"the first process could not keep the teacher in .*: OSError: disk full"):
        source.before_compression(waiting, module)
    assert source.state_dict()["fingerprint"] is None
    monkeypatch.setattr(teachers, "keep_model", lambda *_: None)
    strategy = Strategy()
    source.before_compression(one_of_two(tmp_path, strategy, True), module)
    assert strategy.sent == [None] and source.state_dict()["fingerprint"] is not None


class Look(Callback):
    """Note the types of the teacher's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()
        self.kl = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        teacher = pl_module.objective.teacher
        if teacher is not None:
            self.types |= {value.dtype for value in teacher.model.parameters()}
            self.kl = float(trainer.callback_metrics["train/kl"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_folder_is_held_in_the_type_in_which_it_computes(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_mixtral(seed=3)
    ml.save_pretrained(model, tmp_path / "floating")
    # The weights in bf16 say what those in fp32 do, up to what bf16 tells apart.
    look = Look()
    stage = RouterDistillation(0, teacher=str(tmp_path / "floating"), hidden_weight=0.1)
    fit(tiny_module(), tmp_path, [look, stage], steps=1, precision=precision)
    held = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert look.types == {held}
    count = sum(value.numel() for value in model.parameters()) * held.itemsize
    assert f"teacher {tmp_path / 'floating'}: {count / 2**20:,.1f} MiB of weights" in capsys.readouterr().out
    assert opening(tmp_path / "floating", held, torch.device("cpu")).bytes == count
    again = Look()
    fit(tiny_module(), tmp_path, [again, RouterDistillation(0, teacher=str(tmp_path / "floating"))], steps=1)
    assert look.kl == pytest.approx(again.kl, rel=0.02)


def test_packed_weights_are_held_beside_their_own_type(tmp_path: Path) -> None:
    model = tiny_mixtral(seed=3)
    ml.compress(model, random_batches(2), ml.RTN(bits=8, group_size=16), progress=False)
    ml.save_pretrained(model, tmp_path / "packed")
    look = Look()
    stage = RouterDistillation(0, teacher=str(tmp_path / "packed"))
    fit(tiny_module(), tmp_path, [look, stage], steps=1, precision="bf16-mixed")
    assert look.types == {torch.float32}
    assert not is_floating(tmp_path / "packed") and not is_floating(model) and is_floating(tiny_mixtral())


def on_device(kind: str) -> Any:
    strategy = SimpleNamespace(root_device=torch.device(kind))
    mixed = SimpleNamespace(precision="bf16-mixed")
    return SimpleNamespace(strategy=strategy, precision_plugin=mixed, callbacks=[], default_root_dir="nowhere")


def test_before_is_held_in_that_type_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU it stays mapped; elsewhere it is known by the numbers that it was kept with, whatever its type."""
    student, source = tiny_mixtral(), TeacherSource("before")
    assert source._dtype(on_device("cpu"), student) is torch.float32
    assert source._dtype(on_device("cuda"), student) is torch.bfloat16
    look = Look()
    monkeypatch.setattr(TeacherSource, "_dtype", lambda *_: torch.bfloat16)
    compress = Compress([ml.ExpertDrop(ratio=0.5)], at_step=1, batches=CALIBRATION)
    stage = RouterDistillation(1, teacher="before")
    module = tiny_module()
    trainer = fit(module, tmp_path, [look, compress, stage], steps=2, train=batches(2))
    assert look.types == {torch.bfloat16}
    kept = ml.from_pretrained(tmp_path / "teacher")
    assert kept.dtype is torch.float32
    keep_model(tiny_mixtral(seed=5), tmp_path / "teacher")
    assert stage.source is not None
    with pytest.raises(ValueError, match="not the one that this run began with"):
        stage.source._load(trainer, module)
