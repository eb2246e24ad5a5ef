"""A page of HTML, read with the standard library: what it holds, and that nothing in it is open or outside."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img", "br", "hr", "input", "link", "source", "wbr", "area", "base", "col", "embed", "track"}


@dataclass
class Table:
    """Rows of a table, the head first; the text of each cell."""

    rows: list[list[str]] = field(default_factory=list)


class Page(HTMLParser):
    """What a page holds.

    Args:
        text: The page.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self.tables: list[Table] = []
        self.images: list[tuple[Image.Image, dict[str, str]]] = []
        self.headings: list[tuple[int, str]] = []
        self.summaries: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in values.items()]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            kind, _, data = values["src"].partition(",")
            assert kind == "data:image/png;base64", values["src"][:60]
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            self.images.append((image, values))
        elif tag == "table":
            self.tables.append(Table())
        elif tag == "tr":
            self.tables[-1].rows.append([])
        elif tag in ("td", "th"):
            self.tables[-1].rows[-1].append("")
        elif re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        elif tag == "summary":
            self.summaries.append("")
            if self.open[-2] != "details":
                self.wrong.append("a summary outside of details")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        inside = self.open
        if inside and inside[-1] == "style":
            self.styles.append(data)
            return
        self.words.append(data)
        if any(tag in inside for tag in ("td", "th")):
            self.tables[-1].rows[-1][-1] += data
        for tag in inside:
            if re.fullmatch(r"h[1-6]", tag):
                self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if "summary" in inside:
            self.summaries[-1] += data

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(" ".join(self.words).split())

    def outside(self) -> list[str]:
        """Return everything that would be fetched from elsewhere, or run."""
        found = [
            f"<{tag}>" for tag in self.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form")
        ]
        for tag, name, value in self.attributes:
            if name.startswith("on"):
                found.append(f"{tag} {name}")
            if name == "style" and "url(" in value:
                found.append(value)
            if name in ("src", "href", "srcset", "action", "poster", "data", "background", "cite", "xlink:href"):
                inside = value.startswith(("#", "data:"))
                found += [] if inside else [f"{tag} {name}={value[:80]}"]
        for style in self.styles:
            found += re.findall(r"@import[^;]*", style)
            found += [
                place for place in re.findall(r"url\(([^)]*)\)", style) if not place.strip("'\" ").startswith("data:")
            ]
            found += re.findall(r"https?:[^\s;]*", style)
        return found

    def table_with(self, *heads: str) -> Table:
        """Return the only table whose first columns begin so."""
        found = [
            table
            for table in self.tables
            if all(
                cell.startswith(head) and bool(cell) == bool(head)
                for cell, head in zip(table.rows[0], heads, strict=False)
            )
            and len(table.rows[0]) >= len(heads)
        ]
        assert len(found) == 1, (heads, [table.rows[0] for table in self.tables])
        return found[0]
