"""The progress display: readable lines in a log, one line that is rewritten on a terminal."""

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from moe_lightning.callbacks import CompactProgress
from moe_lightning.callbacks.at_step import say
from moe_lightning.callbacks.progress import duration, short
from tests.callbacks.small_fit import batches, fit, loader, tiny_module


class Talker(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            say(trainer, "something happened")


def test_log_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = CompactProgress(seconds=0)
    fit(
        tiny_module(),
        tmp_path,
        [progress, Talker()],
        steps=4,
        validation=batches(3),
        val_check_interval=2,
        enable_progress_bar=True,
    )
    lines = capsys.readouterr().out.splitlines()
    assert not any("\r" in line or "\x1b" in line for line in lines)
    assert [line for line in lines if line.startswith("step 1/4  loss ")]
    assert [line for line in lines if line.startswith("step 4/4  loss ")]
    assert "something happened" in lines
    assert [line for line in lines if line == "validation batch 3/3"]
    results = [line for line in lines if ": validation perplexity " in line]
    assert [line.split(":")[0] for line in results] == ["step 2", "step 4"]
    assert any("val perplexity" in line and "tokens/s" in line and "lr " in line and " left" in line for line in lines)
    assert lines[-1].startswith("trained to step 4 in 0:")


def test_lines_are_sparse_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_module(), tmp_path, [CompactProgress(seconds=3600)], steps=6, enable_progress_bar=True)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(steps) == 2  # the first and the last


def test_terminal_rewrites_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompactProgress, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "40")
    fit(tiny_module(), tmp_path, [CompactProgress(), Talker()], steps=4, enable_progress_bar=True)
    out = capsys.readouterr().out
    assert "\r\x1b[2K" in out
    drawn = [piece for piece in out.replace("\n", "\r\x1b[2K").split("\r\x1b[2K") if piece.startswith("step")]
    assert all(len(piece) < 40 for piece in drawn)
    # A message stands on a line of its own, and the running line is drawn again below it.
    assert "\r\x1b[2Ksomething happened\nstep" in out


def test_test_and_predict_show_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny_module()
    trainer = Trainer(
        logger=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=[CompactProgress(seconds=0)],
        enable_checkpointing=False,
    )
    trainer.test(module, loader(batches(3)), verbose=False)
    trainer.validate(module, loader(batches(2)), verbose=False)
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith(("test", "validation"))] == [
        "test batch 1/3",
        "test batch 2/3",
        "test batch 3/3",
        "validation batch 1/2",
        "validation batch 2/2",
    ]


def test_disabled_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = CompactProgress(seconds=0)
    progress.disable()
    progress.print("hidden")
    progress._show("hidden", force=True)
    assert capsys.readouterr().out == ""
    progress.enable()
    progress.print("shown")
    assert capsys.readouterr().out == "shown\n"
    assert not sys.stdout.isatty()


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "0.00123"), (3.2149, "3.21"), (25.07, "25.1"), (1234.5, "1234"), (12345, "12.3k")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (float("inf"), "-")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_negative_seconds_are_an_error() -> None:
    with pytest.raises(ValueError, match="seconds must not be negative"):
        CompactProgress(seconds=-1)
