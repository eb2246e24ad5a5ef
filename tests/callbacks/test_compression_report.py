"""The report of a real run: written when everything else is, and never at the cost of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, QualityEvaluation, TimeSpent, compression_report
from moe_lightning.callbacks.compression_report import CompressionReport
from moe_lightning.reporting.report import read
from moe_lightning.reporting.report.words import duration
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import SIZES, random_batches
from tests.reporting.pages import Page

CALIBRATION = random_batches(2, batch=2, sequence=16, seed=5)
HELD_OUT = batches(3, seed=8)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "run_figures", lambda *data: {})


def compress() -> Compress:
    return Compress(
        [ml.Novices(ratio=0.5), ml.GPTQ(group_size=16)], at_step=2, batches=CALIBRATION, min_tokens=1, max_fallback=1.0
    )


def test_a_run_has_a_report_with_everything_that_callbacks_left(tmp_path: Path) -> None:
    """The report stands first in the list, and holds what the others write at the end."""
    quality = QualityEvaluation(divergence_tokens=64, layer_tokens=32, speed=False, batches=HELD_OUT)
    fit(tiny_module(), tmp_path, [CompressionReport(), compress(), quality, TimeSpent()], steps=4, validation=HELD_OUT)
    page = Page((tmp_path / "report.html").read_text())
    assert page.outside() == [] and page.wrong == [] and page.images
    for table in page.tables:
        assert {len(row) for row in table.rows} == {len(table.rows[0])}
    assert [cell.partition("step")[0] for cell in page.tables[0].rows[0]] == ["", "before", "compressed", "end"]
    summary = json.loads((tmp_path / "results" / "compression-2.json").read_text())
    matrices = [name for module in summary["matrices"].values() for name in module]
    assert len(page.table_with("module", "matrix").rows) == 1 + len(matrices)
    assert len(matrices) == SIZES["num_hidden_layers"] * SIZES["num_local_experts"]  # half of them, two each
    assert len(page.table_with("module", "status").rows) == 1 + len(summary["modules"])
    counts = [table for table in page.tables if table.rows[0][1:2] == ["expert 0"]]
    assert counts and all(len(table.rows) == 1 + SIZES["num_hidden_layers"] for table in counts)
    total = json.loads((tmp_path / "results" / "time.json").read_text())["total_seconds"]
    assert page.table_with("part", "time").rows[-1][1] == duration(total)
    # Novices do not need them: the report does.
    titles = [values["alt"] for _, values in page.images]
    assert any("imilar" in title for title in titles) and any("go first" in title for title in titles), titles
    assert (tmp_path / "report.md").is_file() and list((tmp_path / "figures").glob("*.png"))


def test_the_report_of_a_test_has_its_numbers(tmp_path: Path, undrawn: None) -> None:
    module = tiny_module()
    report = CompressionReport()
    trainer = fit(module, tmp_path, [compress(), report], steps=4)
    assert "perplexity" not in Page((tmp_path / "report.html").read_text()).tables[0].rows[1][0]
    trainer.test(module, loader(HELD_OUT), verbose=False)
    page = Page((tmp_path / "report.html").read_text())
    logged = float(trainer.callback_metrics["test/perplexity"])
    assert page.tables[0].rows[1][0] == "perplexity"
    assert float(page.tables[0].rows[1][3]) == pytest.approx(logged, rel=1e-3)


def test_a_run_that_left_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_module(), tmp_path, [CompressionReport()], steps=1)
    assert "left nothing to report" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_a_report_that_fails_is_told_and_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Last(Callback):
        done = False

        def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            self.done = True

    def broken(run: Any) -> None:
        raise RuntimeError("no ink\nleft")

    monkeypatch.setattr(compression_report, "write_report", broken)
    report, last = CompressionReport(), Last()
    with pytest.warns(
        UserWarning, match=r"report could not be written \(RuntimeError: no ink left\).*moe-lightning report"
    ):
        trainer = fit(tiny_module(), tmp_path, [report, compress(), last], steps=3)
    assert trainer.state.finished and last.done
    assert isinstance(report.error, RuntimeError)


def test_a_run_that_fails_has_no_report(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            raise RuntimeError("in training")

    with pytest.raises(RuntimeError, match="in training"):
        fit(tiny_module(), tmp_path, [compress(), CompressionReport(), Fails()], steps=3)
    assert not (tmp_path / "report.html").exists()
