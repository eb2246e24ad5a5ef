"""Pages as files: one HTML file that holds everything, and a Markdown file with its figures beside it."""

from __future__ import annotations

import base64
import functools
import os
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from moe_lightning.files import write_atomically
from moe_lightning.reporting.report.blocks import Cell, Page, Picture, pictures
from moe_lightning.reporting.report.page import report_page
from moe_lightning.reporting.report.read import Run

REPORT = "report.html"


def write_report(run: Run, folder: str | os.PathLike[str] | None = None, name: str = REPORT) -> Path:
    """Write the report of a run.

    Args:
        run: What it left.
        folder: Where to write; the folder of the run when not given.
        name: Of the HTML file. The Markdown has the same name with the ending ``.md``; its figures lie in ``figures``,
            or in ``NAME-figures`` where the file has another name than ``report.html``.

    Returns:
        The HTML file.
    """
    return write_page(report_page(run), Path(folder if folder is not None else run.folder) / name)


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page as HTML and Markdown.

    Args:
        page: The page.
        path: The HTML file.

    Returns:
        The HTML file.
    """
    path = Path(path)
    folder = "figures" if path.name == REPORT else f"{path.stem}-figures"
    for drawn in pictures([block for section in page.sections for block in section.blocks]):
        write_atomically(path.parent / folder / f"{drawn.name}.png", drawn.data)
    write_atomically(path.with_suffix(".md"), markdown_text(page, folder))
    return write_atomically(path, html_text(page))


def html_text(page: Page) -> str:
    """Return a page as HTML that needs nothing beside it.

    Args:
        page: The page.
    """
    return _environment(html=True).get_template("page.html").render(page=page)


def markdown_text(page: Page, folder: str) -> str:
    """Return a page as Markdown.

    Args:
        page: The page.
        folder: Where its figures lie, as seen from the file.
    """
    text = _environment(html=False).get_template("page.md").render(page=page, folder=folder)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@functools.cache
def _environment(html: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("moe_lightning.reporting.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "embedded": _embedded,
        "words": markdown_words,
        "cell": _markdown_cell,
        "fence": _fence,
    }
    return environment


def _embedded(drawn: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(drawn.data).decode()}"


_SPECIAL = re.compile(r"[\\`*~|$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
_AT_START = re.compile(r"^(\s*)([#+>-]|\d+[.)])(?=\s|$)")


def markdown_words(text: str) -> str:
    """Return words so that Markdown shows them as they are, in one line.

    Args:
        text: The words; their lines become lines of the same paragraph or cell.
    """
    return _AT_START.sub(lambda found: f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", _in_line(text))


def _in_line(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(lambda found: "\\" + found[0], text)
    return "<br>".join(text.splitlines())


def _markdown_cell(cell: Cell) -> str:
    small = cell.small if not cell.small or cell.small.startswith("[") else f"({cell.small})"
    return " ".join(_in_line(text) for text in (cell.text, small) if text) or " "


def _fence(text: str) -> str:
    """Return a fence that no line of the text ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
