"""Where documents come from: local files, hub data sets, the running Python's own library and help.

A *document* is the unit that splits never share: a text file, a line of a .jsonl file, a row of a table. Sources are
sequences that read one document at a time, so a corpus need not fit into memory.
"""

import bisect
import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.data.python_texts import PYTHON_STDLIB, PYTHON_TOPICS, python_stdlib_files, python_topics
from moe_lightning.hub import hub_within_reach

DEFAULT_TEXT_FIELD = "text"
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        name: Where it is from, for error messages.
        text: Its text; of a conversation the contents of all messages, one per line.
        messages: The conversation, or `None` for plain text.
    """

    name: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None

    @property
    def identity(self) -> bytes:
        """What makes two documents duplicates: the bytes of the text, or of the whole conversation."""
        if self.messages is None:
            return self.text.encode()
        return json.dumps(self.messages, sort_keys=True).encode()


class Source(ABC):
    """A sequence of documents, all plain text or all conversations (`is_chat`)."""

    name: str
    is_chat: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of documents."""

    @abstractmethod
    def read(self, index: int) -> Document:
        """Read document `index`."""


class TextFiles(Source):
    """Text files, one document each.

    Args:
        name: Name for messages.
        files: The files, in order.
    """

    def __init__(self, name: str, files: Sequence[Path]):
        self.name = name
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Document:
        """Read file `index`, which must be UTF-8."""
        file = self.files[index]
        try:
            return Document(str(file), file.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--data.sources: {file} is not UTF-8 text ({error.reason} at byte {error.start}); "
                "convert the file or leave it out of the pattern"
            ) from error


class Texts(Source):
    """Texts that are in memory, one document each.

    Args:
        name: Name for messages.
        texts: The texts by their names, in order.
    """

    def __init__(self, name: str, texts: dict[str, str]):
        self.name = name
        self._texts = list(texts.items())

    def __len__(self) -> int:
        return len(self._texts)

    def read(self, index: int) -> Document:
        """Return text `index`."""
        name, text = self._texts[index]
        return Document(f"{self.name} {name}", text)


class JsonLines(Source):
    """A .jsonl file, one document per line: `{text_field: "..."}` or `{"messages": [...]}`.

    Args:
        file: The file.
        text_field: The key that holds the text.
    """

    def __init__(self, file: Path, text_field: str):
        self.name = str(file)
        self.file = file
        self.text_field = text_field
        self._lines: list[tuple[int, int]] = []  # (line number, byte offset) of every line that is not blank
        offset = 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    self._lines.append((number, offset))
                offset += len(line)
        if self._lines:
            row = self._row(0)
            self.is_chat = _row_is_chat(row, text_field)

    def __len__(self) -> int:
        return len(self._lines)

    def _row(self, index: int) -> dict[str, Any]:
        number, offset = self._lines[index]
        with self.file.open("rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"--data.sources: {self.file} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"--data.sources: {self.file} line {number} is a {type(row).__name__}, not an object with a text field"
            )
        return row

    def read(self, index: int) -> Document:
        """Read the document of line `index` (blank lines not counted)."""
        name = f"{self.file} line {self._lines[index][0]}"
        return _document_of_row(self._row(index), name, self.text_field, self.is_chat)


class Table(Source):
    """Rows of a table that the library `datasets` reads (parquet files, hub data sets), one document each.

    Args:
        name: Name for messages.
        rows: A `datasets.Dataset`.
        text_field: The column that holds the text.
    """

    def __init__(self, name: str, rows: Any, text_field: str):
        self.name = name
        self.rows = rows
        self.text_field = text_field
        if len(rows):
            self.is_chat = _row_is_chat(dict.fromkeys(rows.column_names), text_field)
            if not self.is_chat and text_field not in rows.column_names:
                raise _wrong_field(name, text_field, rows.column_names)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Document:
        """Read the document of row `index`."""
        return _document_of_row(self.rows[index], f"{self.name} row {index}", self.text_field, self.is_chat)


class Corpus(Sequence[Document]):
    """All sources of a run, one after the other.

    Args:
        sources: The sources; all plain text or all chat.
        entries: For each of them what the user wrote for it: files of one glob may be several sources.

    Raises:
        ValueError: When there is no document, or when text and conversations are mixed.
    """

    def __init__(self, sources: Sequence[Source], entries: Sequence[str] | None = None):
        self.sources = list(sources)
        self.entries = [source.name for source in self.sources] if entries is None else list(entries)
        self._starts = [0]
        for source in self.sources:
            self._starts.append(self._starts[-1] + len(source))
        if not len(self):
            names = ", ".join(source.name for source in self.sources)
            raise ValueError(f"--data.sources: no document in {names}")
        kinds = {source.is_chat for source in self.sources if len(source)}
        if len(kinds) > 1:
            chat = next(source.name for source in self.sources if source.is_chat)
            text = next(source.name for source in self.sources if len(source) and not source.is_chat)
            raise ValueError(
                f"--data.sources: {chat} holds conversations and {text} holds plain text; train on one kind at a time"
            )
        self.is_chat = kinds.pop()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # no slices needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        for start, source in zip(self._starts, self.sources, strict=False):
            if index < start + len(source):
                return source.read(index - start)
        raise IndexError(index)

    def entry_of(self, index: int) -> str:
        """Return what the user wrote for the source of document `index`."""
        return self.entries[bisect.bisect_right(self._starts, index) - 1]

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            for index in range(len(source)):
                yield source.read(index)


def open_sources(
    sources: str | Sequence[str], text_field: str = "text", hub_split: str = "train", cache_dir: Path | None = None
) -> Corpus:
    """Open every source.

    Args:
        sources: One or more of: a file, a glob (`**` goes into folders), `hub:NAME[:CONFIG]`, `python-stdlib`,
            `python-topics`.
        text_field: Key or column of .jsonl files and tables that holds the text.
        hub_split: Split of hub data sets, slices such as `train[:1000]` included.
        cache_dir: Where `datasets` keeps its copy of parquet files.

    Returns:
        The documents, files of a glob in sorted order.

    Raises:
        FileNotFoundError: When a file does not exist, a glob matches nothing, or a hub data set cannot be loaded.
        ValueError: When a source holds no text, or the text field is not there.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise ValueError("--data.sources is empty: name a file, a glob, hub:NAME, python-stdlib or python-topics")
    opened: list[Source] = []
    entries: list[str] = []
    for name in names:
        if name == PYTHON_STDLIB:
            opened.append(TextFiles(PYTHON_STDLIB, python_stdlib_files()))
        elif name == PYTHON_TOPICS:
            opened.append(Texts(PYTHON_TOPICS, python_topics()))
        elif name.startswith(HUB_PREFIX):
            opened.append(_open_hub(name, text_field, hub_split))
        else:
            opened.extend(_open_local(name, text_field, cache_dir))
        entries += [name] * (len(opened) - len(entries))
    return Corpus(opened, entries)


def _open_local(name: str, text_field: str, cache_dir: Path | None) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        raise IsADirectoryError(
            f"--data.sources: {name} is a folder; name the files in it, for example {name}/**/*.txt"
        )
    else:
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not files:
        if glob.has_magic(name):
            raise FileNotFoundError(f"--data.sources: no file matches {name} (looked in {Path.cwd()})")
        raise FileNotFoundError(
            f"--data.sources: there is no file {name} (looked in {Path.cwd()}); a hub data set is written hub:{name}"
        )
    found: list[Source] = []
    plain: list[Path] = []
    for file in files:
        if file.suffix == ".jsonl":
            found.append(JsonLines(file, text_field))
        elif file.suffix == ".parquet":
            found.append(_open_parquet(file, text_field, cache_dir))
        else:
            plain.append(file)
    return ([TextFiles(name, plain)] if plain else []) + found


def _open_parquet(file: Path, text_field: str, cache_dir: Path | None) -> Table:
    import datasets  # slow to import, and needed for tables only

    try:
        rows = datasets.load_dataset(
            "parquet",
            data_files=[str(file)],
            split="train",
            cache_dir=None if cache_dir is None else str(cache_dir / "datasets"),
        )
    except Exception as error:  # the library wraps what pyarrow says in several types
        raise ValueError(f"--data.sources: cannot read {file} as parquet: {error.__cause__ or error}") from error
    return Table(str(file), rows, text_field)


def _open_hub(name: str, text_field: str, hub_split: str) -> Table:
    import datasets

    dataset, _, configuration = name.removeprefix(HUB_PREFIX).partition(":")
    if not dataset:
        raise ValueError(f"--data.sources {name}: write hub:NAME or hub:NAME:CONFIG")
    reached = True
    try:
        with hub_within_reach() as reached:
            rows = datasets.load_dataset(dataset, configuration or None, split=hub_split)
    except Exception as error:  # network, name, configuration, split: the library has a dozen types for these
        if isinstance(error, ConnectionError) and not reached:
            raise FileNotFoundError(
                f"--data.sources {name}: the hub data set {dataset!r} is not in the cache, and the Hugging Face hub "
                "cannot be reached (no network, or HF_HUB_OFFLINE is set). Fetch it where there is a network and bring "
                f"that HF_HOME here, or use local files or {PYTHON_STDLIB}"
            ) from error
        raise FileNotFoundError(
            f"--data.sources {name}: cannot load the split {hub_split!r} of the hub data set {dataset!r} "
            f"({type(error).__name__}: {error}). Check the name, --data.hub_split and the network; without a network "
            f"use local files or {PYTHON_STDLIB}"
        ) from error
    return Table(name, rows, text_field)


def _row_is_chat(row: dict[str, Any], text_field: str) -> bool:
    # A field that was asked for by name and is not there is a mistake, and no conversation.
    return text_field == "messages" or (
        "messages" in row and text_field == DEFAULT_TEXT_FIELD and text_field not in row
    )


def _wrong_field(name: str, text_field: str, fields: Sequence[str]) -> ValueError:
    return ValueError(
        f"--data.text_field: {name} has no field {text_field!r}; its fields are {', '.join(sorted(fields)) or '(none)'}"
    )


def _document_of_row(row: dict[str, Any], name: str, text_field: str, is_chat: bool) -> Document:
    if is_chat:
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        ):
            raise ValueError(
                f'--data.sources: {name} needs "messages": a list of {{"role": ..., "content": text}}, as its first row'
            )
        messages = json.loads(_without_surrogates(json.dumps(messages, ensure_ascii=False)))
        return Document(name, "\n".join(message["content"] for message in messages), tuple(messages))
    if text_field not in row:
        raise _wrong_field(name, text_field, list(row))
    text = row[text_field]
    if not isinstance(text, str):
        raise ValueError(f"--data.text_field: {text_field!r} of {name} is {type(text).__name__}, not text")
    return Document(name, _without_surrogates(text))


def _without_surrogates(text: str) -> str:
    # JSON can hold half of a surrogate pair, which no UTF-8 text can
    return text.encode("utf-8", "replace").decode()
