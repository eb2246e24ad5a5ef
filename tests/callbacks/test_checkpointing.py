"""Checkpoints are whole or not there, and random numbers go on as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import AtomicCheckpointIO, Compress, LastCheckpoint, RandomState, last_checkpoint
from moe_lightning.callbacks.random_state import random_states, set_random_states
from moe_lightning.callbacks.spending import undisturbed
from moe_lightning.data import TextDataModule
from moe_lightning.modules import MixtralModule
from tests.small_runs import small_options


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)
    save = torch.save

    def fail_in_the_middle(content: Any, file: Any) -> None:
        save(content, file)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail_in_the_middle)
    with pytest.raises(OSError, match="no space"):
        writer.save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    monkeypatch.undo()
    writer.save_checkpoint({"step": torch.tensor(3)}, path)
    assert torch.load(path, weights_only=True)["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_last_checkpoint_needs_a_positive_interval() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        LastCheckpoint(every_n_train_steps=0)


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(numpy.random.normal()), float(torch.rand(()))


def test_random_states_return_through_a_file(tmp_path: Path) -> None:
    draw()
    torch.save(random_states(), tmp_path / "states.pt")
    first = draw()
    draw()
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == first


def test_what_is_measured_beside_a_run_leaves_no_trace_in_it() -> None:
    states = random_states()
    first = draw()
    set_random_states(states)
    with torch.inference_mode():
        with pytest.raises(OSError), undisturbed(Trainer(accelerator="cpu", logger=False, barebones=True)):
            draw()
            kept = torch.ones(2)
            raise OSError
        assert torch.is_inference_mode_enabled() and not kept.is_inference()
    assert draw() == first


class Gambler(Callback):
    """Draws random numbers in validation."""

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        draw()


def trained(folder: Path, callbacks: list[Callback], **options: Any) -> dict[str, torch.Tensor]:
    settings = small_options(folder)
    torch.manual_seed(5)
    module = MixtralModule(**settings["model"])
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        logger=False,
        callbacks=callbacks,
        default_root_dir=str(folder / "run"),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    datamodule = TextDataModule(**settings["data"])
    datamodule.prepare()
    torch.manual_seed(6)
    trainer.fit(module, datamodule)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_validation_does_not_change_training(tmp_path: Path) -> None:
    """The model has dropout: each step draws numbers."""
    without = trained(tmp_path, [RandomState()], enable_checkpointing=False, limit_val_batches=0)
    often = trained(tmp_path, [RandomState(), Gambler()], enable_checkpointing=False, val_check_interval=1)
    assert all(torch.equal(value, often[name]) for name, value in without.items())


def test_last_checkpoint_from_python(tmp_path: Path) -> None:
    """Without the command line too: atomic, at one place, with the end of the run."""
    weights = trained(tmp_path, [RandomState(), LastCheckpoint(every_n_train_steps=2)], val_check_interval=2)
    saved = torch.load(last_checkpoint(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == 5
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in weights.items())
    assert saved["hyper_parameters"]["plan"]["edits"] == []


class Killed(Callback):
    """Dies in the middle of a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def test_a_compression_is_saved_with_the_step_after_it(tmp_path: Path) -> None:
    """Whoever dies before the next regular save loses neither the calibration nor more than a step."""
    callbacks = [
        RandomState(),
        Compress([ml.ExpertDrop(keep=3)], at_step=2, calibration_batches=1),
        Killed(3),
        LastCheckpoint(every_n_train_steps=100),
    ]
    with pytest.raises(SystemExit):
        trained(tmp_path, callbacks, limit_val_batches=0, accumulate_grad_batches=2)
    saved = torch.load(last_checkpoint(tmp_path / "run"), weights_only=True)
    assert saved["global_step"] == 3
    assert [edit["kind"] for edit in saved["hyper_parameters"]["plan"]["edits"]] == ["keep_experts"] * 2
    assert saved["callbacks"][callbacks[1].state_key]["done"]
