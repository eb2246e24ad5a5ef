"""What a page is made of, without saying how it looks: the HTML and the Markdown are written from the same blocks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

FIGURE_DOTS_PER_INCH = 110.0
"""Dots of a figure as it is shown; the picture itself has twice as many."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table, or a fact.

    Attributes:
        text: What it says.
        small: What stands below it in smaller letters: an interval, a remark.
    """

    text: str
    small: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: What it says.
        kind: ``plain``, ``note`` (remarks, what is missing and how to get it) or ``warning``.
    """

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Facts:
    """A few numbers that are read first.

    Attributes:
        facts: Name and value of each.
    """

    facts: list[tuple[str, Cell]]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: Names of the columns.
        rows: Rows; as many cells in each as there are columns. The first one names the row.
        align: A letter for each column: ``l`` left, ``r`` right (numbers), ``t`` long text as it is, with its lines.
        caption: What it shows, and in which units.
    """

    head: list[Cell]
    rows: list[list[Cell]]
    align: str
    caption: str = ""

    def __post_init__(self) -> None:
        """Refuse a table with holes.

        Raises:
            ValueError: A row has another number of cells than there are columns.
        """
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"{len(row)} cells in a row of a table with the columns {self._columns}")
        if len(self.align) != len(self.head) or set(self.align) - set("lrt"):
            raise ValueError(f"alignment {self.align!r} does not fit the columns {self._columns}")

    @property
    def _columns(self) -> str:
        return ", ".join(cell.text for cell in self.head)


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Of its file, without the ending.
        data: PNG, with twice the dots that it is shown with.
        width: In CSS pixels.
        height: The same.
        title: What it shows, in a few words; also for those who do not see it.
        caption: How to read it.
    """

    name: str
    data: bytes = field(repr=False)
    width: int
    height: int
    title: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Figures beside each other, as many as the window has room for.

    Attributes:
        pictures: The figures.
    """

    pictures: list[Picture]


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file.

    Attributes:
        text: The text.
        language: Of it, for Markdown.
    """

    text: str
    language: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when somebody asks for them.

    Attributes:
        summary: What is there, with the counts that most want to know.
        blocks: The blocks.
    """

    summary: str
    blocks: list[Block]


@dataclass(frozen=True)
class Part:
    """A part of a section, with a heading of its own.

    Attributes:
        title: Its heading.
        blocks: The blocks.
    """

    title: str
    blocks: list[Block]


Block = Text | Facts | Table | Gallery | Code | Details | Part


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        title: Its heading.
        blocks: What is in it.
    """

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "-".join("".join(letter if letter.isalnum() else " " for letter in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        subtitle: What stands below.
        sections: Its sections.
        footer: What made it.
    """

    title: str
    subtitle: str
    sections: list[Section]
    footer: str


def table(head: Sequence[Cell | str], rows: Sequence[Sequence[Cell | str]], align: str, caption: str = "") -> Table:
    """Return a table of cells and plain words.

    Args:
        head: Names of the columns.
        rows: Cells, or what they say.
        align: As in :class:`Table`; its last letter holds for all further columns.
        caption: What it shows.

    Raises:
        ValueError: A row does not fit.
    """
    first, *others = ([cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in (head, *rows))
    return Table(first, others, align.ljust(len(head), align[-1]), caption)


def transposed(given: Table) -> Table:
    """Return a table with its rows as columns.

    Args:
        given: The table.
    """
    head, *rows = zip(given.head, *given.rows, strict=True)
    return Table(list(head), list(map(list, rows)), "l" + "r" * (len(head) - 1), given.caption)


def picture(name: str, figure: Figure, title: str, caption: str) -> Picture:
    """Draw a figure.

    Args:
        name: Of its file, without the ending.
        figure: The figure.
        title: What it shows.
        caption: How to read it.
    """
    data = io.BytesIO()
    # Without the version of the library in it, equal figures are equal bytes.
    metadata = {"Software": None}
    figure.savefig(data, format="png", dpi=2 * FIGURE_DOTS_PER_INCH, facecolor="white", metadata=metadata)
    width, height = (round(inches * FIGURE_DOTS_PER_INCH) for inches in figure.get_size_inches())
    return Picture(name, data.getvalue(), width, height, title, caption)


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    """Return all pictures of some blocks, those inside others too.

    Args:
        blocks: The blocks.
    """
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Gallery):
            found += block.pictures
        elif isinstance(block, Details | Part):
            found += pictures(block.blocks)
    return found
