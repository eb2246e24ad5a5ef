"""``moe-lightning report``: what a run did, cost and bought on one page; several runs side by side.

It reads files only: no model, no GPU, no Lightning.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

COMPARISON = "comparison.html"

DESCRIPTION = """\
Write the report of a run directory, or of a folder that compress wrote, as one HTML file that holds everything and as
Markdown with its figures beside it. Of several folders write a comparison.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        print(f"moe-lightning report: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> _Parser:
    parser = _Parser(prog="moe-lightning report", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="run directory, or output folder of compress")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the HTML file; the Markdown has the same name with the ending .md. When not given: DIR/report.html for "
        f"one folder, {COMPARISON} here for several",
    )
    return parser


def report(folders: Sequence[str], output: str | None = None) -> Path:
    """Write the report of a run, or a comparison of several.

    Args:
        folders: Run directories, or output folders of ``compress``.
        output: The HTML file; ``DIR/report.html`` for one folder and ``comparison.html`` for several when not given.

    Returns:
        The HTML file.

    Raises:
        FileNotFoundError: A folder is not there or holds no results.
        ValueError: Nothing in it can be read, a folder stands there twice, or the output has another ending.
    """
    path = None if output is None else Path(output)
    if path is not None and path.suffix != ".html":
        raise ValueError(f"--output {output}: name a file that ends with .html; the Markdown is written beside it")
    if path is not None and path.is_dir():
        raise ValueError(f"--output {output}: this is a folder: name a file, e.g. {path / 'report.html'}")
    resolved = [Path(folder).resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise ValueError(f"{folders[place]} stands there twice: compare it with another run")
    # A mistake in the arguments is told before the heavy imports.
    from moe_lightning.files import check_writable
    from moe_lightning.reporting.report import (
        comparison_text,
        damage_of,
        read_run,
        summary_text,
        write_comparison,
        write_report,
    )

    if len(folders) == 1:
        target = path or Path(folders[0]) / "report.html"
        run = read_run(folders[0])
        _warn(damage_of(run))
        check_writable(target)
        written = write_report(run, target.parent, target.name)
        print(summary_text(run))
    else:
        target = path or Path(COMPARISON)
        runs = [read_run(folder) for folder in folders]
        for run in runs:
            _warn(damage_of(run))
        check_writable(target)
        written = write_comparison(runs, target)
        print(comparison_text(runs))
    print(f"wrote {written} and {written.with_suffix('.md').name}")
    return written


def _warn(told: Sequence[str]) -> None:
    for words in told:
        print(f"moe-lightning report: warning: {words}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0, or 2 where the arguments do not fit or a folder cannot be read.
    """
    given = _parser().parse_args(list(arguments))
    try:
        report(given.folders, given.output)
    except BrokenPipeError:
        raise  # nobody reads what is printed, see moe_lightning.cli.main
    except (ValueError, OSError) as error:
        if os.environ.get("MOE_LIGHTNING_TRACEBACK"):
            raise
        print(f"moe-lightning report: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        # Something in the files that no check foresaw: no traceback for somebody who only wants to read a report.
        if os.environ.get("MOE_LIGHTNING_TRACEBACK"):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"moe-lightning report: error: the files in {', '.join(given.folders)} hold something unexpected ({told}); "
            "MOE_LIGHTNING_TRACEBACK=1 shows where",
            file=sys.stderr,
        )
        return 2
    return 0
