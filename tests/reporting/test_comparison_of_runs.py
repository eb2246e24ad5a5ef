"""Several runs side by side: what they gave back, how they differ beyond doubt, which settings they do not share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lightning.evaluation.intervals import paired_differences
from moe_lightning.reporting.report import (
    comparison,
    comparison_text,
    figures,
    read,
    read_run,
    write_comparison,
    write_report,
)
from moe_lightning.reporting.report.blocks import Text
from tests.reporting.pages import Page
from tests.reporting.report_runs import write_compressed_folder, write_run

CONFIG = """\
run_dir: {name}
model: {{learning_rate: {rate}, betas: [0.9, 0.95]}}
trainer:
  callbacks:
  - class_path: moe_lightning.callbacks.Compress
    init_args:
      at_step: 600
      methods:
      - class_path: moe_lightning.Novices
        init_args: {{ratio: {ratio}, criterion: mone}}
{more}
"""
LORA = """\
  - class_path: moe_lightning.callbacks.LoRARecovery
    init_args: {at_step: 600, rank: 8}
"""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "comparison_figures", lambda runs: {})
    monkeypatch.setattr(read, "run_figures", lambda *data: {})


def three_runs(folder: Path) -> list[Path]:
    """Write two runs that were measured on the same blocks, and a folder of compress."""
    one = write_run(folder / "one" / "run", worse=0.2)
    two = write_run(folder / "two" / "run", worse=0.6)
    for path, name, rate, ratio, more in ((one, "one", 0.001, 0.5, ""), (two, "two", 0.001, 0.25, LORA)):
        (path / "config.fit.yaml").write_text(CONFIG.format(name=name, rate=rate, ratio=ratio, more=more))
    return [one, two, write_compressed_folder(folder / "three")]


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in three_runs(tmp_path)]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    assert page.outside() == [] and page.wrong == []
    for table in page.tables:
        assert {len(row) for row in table.rows} == {len(table.rows[0])}
    names = ["one/run", "two/run", tmp_path.name + "/three"]
    names[2] = "three" if page.tables[0].rows[0][3] == "three" else page.tables[0].rows[0][3]
    rows = {row[0]: row[1:] for row in page.tables[0].rows}
    assert rows["run"] == names
    assert rows["methods"] == ["Novices", "Novices", "Novices"]
    assert rows["parameters"] == ["600,00060.0 %"] * 3
    assert rows["perplexity, ratio to before"][2] == "1.1000 (B)"  # of what text was not written down
    assert [cell != "-" for cell in rows["ratio right after compressing"]] == [True, True, False]
    assert page.images and (tmp_path / "comparison-figures").is_dir()
    markdown = (tmp_path / "comparison.md").read_text()
    assert markdown.count("](comparison-figures/") == len(page.images)


def test_pairs_are_compared_on_the_same_blocks(tmp_path: Path, undrawn: None) -> None:
    runs = [read_run(folder) for folder in three_runs(tmp_path)]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    rows = page.table_with("text", "run", "compared with").rows[1:]
    assert [row[:3] for row in rows] == [["test", "one/run", "two/run"], ["python-topics", "one/run", "two/run"]]
    mine, theirs = (run.moments[-1].texts["test"].scores for run in runs[:2])
    ratio = paired_differences(mine, theirs)["perplexity_ratio"]
    assert float(((mine.nats - theirs.nats).sum() / mine.tokens.sum()).exp()) == pytest.approx(ratio.value)
    assert rows[0][3] == f"{ratio.value:.4f}[{ratio.low:.4f}, {ratio.high:.4f}]"
    assert ratio.high < 1 and rows[0][6] == "one/run"


def test_other_blocks_are_said_and_not_compared(tmp_path: Path, undrawn: None) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", fingerprint="other")
    page = Page(write_comparison([read_run(one), read_run(two)], tmp_path / "c.html").read_text())
    assert "Measured on different blocks, so not compared: one and two" in page.text
    assert not [table for table in page.tables if "compared with" in table.rows[0]]


def test_only_settings_that_differ_are_shown(tmp_path: Path, undrawn: None) -> None:
    runs = [read_run(folder) for folder in three_runs(tmp_path)]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    table = next(table for table in page.tables if table.rows[-1][0].startswith("trainer."))
    rows = {row[0]: row[1:] for row in table.rows[1:]}
    assert rows.pop("trainer.callbacks.Compress.methods.Novices.ratio") == ["0.5", "0.25", "-"]
    # A callback that only one run has is one line, not all its options.
    assert rows.pop("trainer.callbacks.LoRARecovery") == ["-", "yes", "-"]
    assert not [name for name in rows if name.startswith(("trainer", "model.", "run_dir"))]
    assert "No options were kept with" in page.text


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"a: 2026-13-45", b"a: \xff"])
def test_damaged_options_are_not_said_to_be_missing(tmp_path: Path, undrawn: None, content: bytes) -> None:
    folders = three_runs(tmp_path)[:2]
    for folder in folders:
        (folder / "config.test.yaml").unlink()
    folders.append(write_run(tmp_path / "bare" / "run"))
    for file in folders[2].glob("config.*.yaml"):
        file.unlink()
    damaged = folders[1] / "config.fit.yaml"
    damaged.write_bytes(content)
    runs = [read_run(folder) for folder in folders]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    assert f"{damaged} is damaged" in page.text
    assert "No options were kept with bare/run." in page.text
    alone = Page(write_report(runs[1]).read_text()).text
    assert f"{damaged} is damaged" in alone and "options were not kept" not in alone


def test_many_runs_stand_in_rows_and_are_compared_with_the_first(tmp_path: Path, undrawn: None) -> None:
    runs = [read_run(write_run(tmp_path / f"run{place}", layers=1, worse=0.1 * place)) for place in range(6)]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    assert [row[0] for row in page.tables[0].rows] == ["run", *(f"run{place}" for place in range(6))]
    rows = page.table_with("text", "run", "compared with").rows[1:]
    assert {row[1] for row in rows} == {"run0"} and len(rows) == 2 * 5
    assert "compared with run0 only" in page.text


def test_the_console_has_a_column_for_each_run(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in three_runs(tmp_path)[:2]]
    lines = comparison_text(runs).splitlines()
    assert lines[0].split() == ["run", "one/run", "two/run"]
    assert any(line.startswith("perplexity, ratio to before") and line.count("[") == 2 for line in lines)
    torch.testing.assert_close(runs[0].moments[0].texts["test"].scores.tokens, torch.full((12,), 15))


def test_numbers_of_different_texts_are_marked(tmp_path: Path, undrawn: None) -> None:
    """Two runs on the same blocks, one on others, one with another tokenizer and the same split."""
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    folders.append(write_run(tmp_path / "three", fingerprint="others"))
    page = Page(write_comparison([read_run(folder) for folder in folders[:2]], tmp_path / "same.html").read_text())
    assert "must not be compared" not in page.text and "(A)" not in page.text
    runs = [read_run(folder) for folder in folders]
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    assert page.text.index("must not be compared") < page.text.index("ratio right after compressing")
    rows = {row[0]: row[1:] for row in page.tables[0].rows}
    for name in ("perplexity", "perplexity, ratio to before", "bits per byte", "ratio right after compressing"):
        assert [cell.count("(A)") + 2 * cell.count("(B)") for cell in rows[name]] == [1, 1, 2], name
    assert "(" not in "".join(rows["parameters"])
    assert "tokenizers differ" not in page.text
    assert "WARNING: These runs were not measured on the same text" in comparison_text(runs)
    for run, tokenizer in zip(runs, "xyz", strict=True):
        assert run.quality is not None
        run.quality.context["data"]["tokenizer"] = tokenizer
    assert "Bits per byte do, but only where the text is the same" in comparison_text(runs)


def test_folders_of_compress_are_told_with_options_and_why_they_are_not_drawn(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [read_run(folder) for folder in three_runs(tmp_path)]
    monkeypatch.setattr(comparison, "drawn_comparison", lambda named: [Text("drawn")])
    page = Page(write_comparison(runs, tmp_path / "comparison.html").read_text())
    rows = page.table_with("run", "methods", "folder").rows[1:]
    assert [row[1] for row in rows] == ["Novices(ratio=0.5, criterion='mone')"] * 3
    (told,) = [line for line in page.text.splitlines() if "Not in figures of quality:" in line] or [page.text]
    assert "Not in figures of quality: " in told and "three, where it was not measured" in told
