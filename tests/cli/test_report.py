"""``moe-lightning report``: where it writes, what it prints, and mistakes in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lightning.cli import main
from moe_lightning.reporting.report import figures, read
from tests.reporting.report_runs import write_run

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
    broken = write_run(tmp_path / "broken")
    (broken / "results" / "time.json").write_text("{")
    for arguments, words in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist: name a run directory"),
        ([str(tmp_path / "empty")], "there are no results in"),
        ([str(run / "config.fit.yaml")], "is a file: name a run directory"),
        ([str(broken)], "time.json is damaged"),
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
