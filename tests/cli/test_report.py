"""``moe-lightning report``: where it writes, what it prints, and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lightning.cli import main
from moe_lightning.reporting.report import figures, read
from tests.reporting.report_runs import write_compressed_folder, write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "run_figures", lambda *data: {})
    monkeypatch.setattr(figures, "comparison_figures", lambda runs: {})


def test_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {folder / 'report.html'} and report.md" in said
    assert "Novices at step 600" in said and "perplexity, ratio to before" in said
    assert (folder / "report.html").is_file() and (folder / "report.md").is_file()
    assert main(["report", str(folder), "--output", str(tmp_path / "other" / "page.html")]) == 0
    assert (tmp_path / "other" / "page.md").is_file()


def test_several_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *folders]) == 0
    assert "wrote comparison.html and comparison.md" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").is_file()
    assert not (tmp_path / "a" / "report.html").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    broken, swept, model = tmp_path / "broken", tmp_path / "swept", run / "models" / "end"
    for folder in (broken / "results", swept, model):
        folder.mkdir(parents=True)
    (broken / "results" / "time.json").write_text("{")
    (swept / "results.md").write_text("x")
    half = write_compressed_folder(tmp_path / "half")
    (half / "plan.json").unlink()
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist: name a run directory"),
        ([str(tmp_path / "empty")], "there are no results in"),
        ([str(run / "config.fit.yaml")], "is a file: name a run directory"),
        ([str(broken)], "time.json is damaged: it is no JSON, or cut off"),
        ([str(swept)], "whose results stand in results.md there"),
        ([str(model)], f"it is a model of a run; name the run, {run}"),
        ([str(half)], "compression.json is there, but the plan.json"),
        ([str(run), str(run / ".." / "run")], "stands there twice"),
        ([str(run), "--output", str(tmp_path / "page.pdf")], "name a file that ends with .html"),
    ):
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("moe-lightning report: error: ") and words in said, said
        assert said.count("\n") == 1
    for arguments in ([], [str(run), "--nonsense"]):
        with pytest.raises(SystemExit) as left:
            main(["report", *arguments])
        assert left.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_damaged_files_are_named_and_the_rest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file of each kind, each with the words that say what is wrong with it."""
    contents = {
        "results/time.json": ("{", "it is no JSON, or cut off"),
        "results/quality.json": ("[1, 2]", "it holds a JSON list, not an object with names"),
        "results/recovery.json": ('{"boundaries": 5}', "a value has another JSON type"),
        "results/benchmark.json": ('{"version": 1}', "'rows' is missing"),
        "results/compression-600.statistics.safetensors": ("cut", "not a readable safetensors file"),
        "config.fit.yaml": ("a: [", "while parsing"),
    }
    folder = write_run(tmp_path / "run")
    for name, (content, _) in contents.items():
        (folder / name).write_text(content)
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr()
    page = (folder / "report.md").read_text()
    for name, (_, words) in contents.items():
        (line,) = [line for line in said.err.splitlines() if str(folder / name) in line]
        assert line.startswith("moe-lightning report: warning: ") and words in line
        assert Path(name).name + " is damaged" in page.replace("\\", "")
    assert "collect" not in said.err
    html = (folder / "report.html").read_text()
    for advice in (
        "add QualityEvaluation",
        "give the data a validation split",
        "add TimeSpent",
        "moe-lightning benchmark --",
    ):
        assert advice not in html, advice  # it is there, and damaged
    for name in list(contents)[:-1]:
        assert f"Not known: {folder / name} is damaged, see the summary." in html
    assert "Novices" in page and "arc_easy" in page.replace("\\", "") and "Nothing was compressed" not in page
    (folder / "results" / "compression-600.plan.json").write_text("{")
    assert main(["report", str(folder)]) == 0
    assert "What was compressed is not known" in (folder / "report.md").read_text()
    other = write_run(tmp_path / "other")
    assert main(["report", str(folder), str(other), "--output", str(tmp_path / "both.html")]) == 0
    assert "time.json is damaged" in (tmp_path / "both.html").read_text()


def test_a_run_that_was_stopped_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "results" / "time.json"
    values = json.loads(path.read_text())
    words = "stopped at step 20 of 2,000; go on with --ckpt_path last"
    for added, told in (
        ({}, False),
        ({"step": 20, "steps": 2000, "ended": True}, False),
        ({"step": 20, "steps": 2000, "ended": False}, True),
    ):
        path.write_text(json.dumps({**values, **added}))
        assert main(["report", str(folder)]) == 0
        assert (words in capsys.readouterr().out) == told
        assert (words in (folder / "report.html").read_text()) == told
    path.write_text(json.dumps({**values, "step": 20, "steps": None, "ended": False}))
    assert main(["report", str(folder)]) == 0
    assert "stopped at step 20; go on" in capsys.readouterr().out
    path.write_text(json.dumps({**values, "step": 0, "steps": 2000, "ended": False}))
    assert main(["report", str(folder)]) == 0
    assert "not finished: it was begun, and has not ended." in capsys.readouterr().out


def test_what_was_logged_before_the_last_fit_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    results = folder / "results"
    page = folder / "report.html"
    os.utime(results / "time.json", (1000, 1000))
    for path in (results / "recovery.json", results / "compression-600.plan.json"):
        os.utime(path, (900, 900))
    for tested, there in ((1001, True), (999.5, True), (998, False)):
        os.utime(results / "test.json", (tested, tested))
        assert main(["report", str(folder)]) == 0
        assert ("What the command test logged last" in page.read_text()) == there
        assert ("results/test.json is left out: it is older" in page.read_text()) != there


def test_what_no_check_foresaw_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*data: object) -> None:
        raise IndexError("list index\nout of range")

    run = write_run(tmp_path / "run")
    monkeypatch.setattr(read, "run_figures", fails)
    monkeypatch.delenv("MOE_LIGHTNING_TRACEBACK", raising=False)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(run) in said and "IndexError: list index out of range" in said
    monkeypatch.setenv("MOE_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(IndexError):
        main(["report", str(run)])


def test_neither_lightning_nor_a_model_is_needed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=1)
    code = (
        "import sys\n"
        "from moe_lightning.reporting.report import read\n"
        "read.run_figures = lambda *data: {}\n"
        "from moe_lightning.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(status, [name for name in ('lightning', 'datasets', 'jsonargparse') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"
