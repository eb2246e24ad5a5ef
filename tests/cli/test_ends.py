"""How commands end that somebody stops, or that nobody reads on."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest

from moe_lightning.cli import main
from moe_lightning.cli import report as report_command
from moe_lightning.cli.commands import begun, run_command


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def unread(*_: Any) -> Any:
    raise BrokenPipeError(32, "Broken pipe")


def test_an_interrupt_while_a_command_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["plan", "--statistics", "x"]) == 130
    assert capsys.readouterr().err == "moe-lightning plan: interrupted\n"


def test_an_interrupt_of_the_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        """Work."""
        with begun():
            raise KeyboardInterrupt("interrupted: 2 of 8 are kept")

    monkeypatch.setattr(report_command, "main", lambda _: run_command("report", work, []))
    assert main(["report"]) == 130
    assert capsys.readouterr().err == "moe-lightning report: interrupted: 2 of 8 are kept\n"
    monkeypatch.setenv("MOE_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        main(["report"])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["no-command"]])
def test_silence_where_nobody_reads(arguments: list[str]) -> None:
    """As behind ``2>&1 | head``, which is gone already."""
    read, write = os.pipe()
    os.close(read)
    code = f"import sys; from moe_lightning.cli import main; sys.exit(main({arguments}))"
    both = {"stdout": write, "stderr": write} if arguments == ["no-command"] else {"stdout": write, "stderr": -1}
    done = subprocess.run([sys.executable, "-c", code], **both, check=False)  # type: ignore[call-overload]
    os.close(write)
    assert done.returncode == 141
    assert not done.stderr


def test_no_command_takes_a_closed_pipe_for_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor for nothing where it is another pipe than the one that is printed to."""

    def work() -> None:
        """Work."""
        unread()

    with pytest.raises(BrokenPipeError):
        run_command("plan", work, [])
    monkeypatch.setattr(report_command, "report", unread)
    with pytest.raises(BrokenPipeError):
        main(["report", "folder"])
    assert capsys.readouterr().err.strip() == ""
