"""Small texts: words drawn from a small vocabulary by a fixed seed, so that no network and no long file is needed."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = [
    "the",
    "expert",
    "router",
    "token",
    "layer",
    "weight",
    "Größe",
    "naïve",
    "日本語",
    "🙂",
    "mixture",
    "of",
    "experts",
    "learns,",
    "counts;",
    "and",
    "(sometimes)",
    "forgets",
    "=",
    "value",
    "+",
    "1",
    "#",
    "note\n",
    "def",
    "return",
    "self.x[0]",
    ":\n",
]


def make_text(seed: int, num_words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", str(rng.randrange(100))]) for _ in range(num_words))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Forty text files of about 3 kB in two folders."""
    for number in range(40):
        file = tmp_path / "texts" / ("a" if number % 2 else "b") / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(make_text(number), encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Forty conversations of two or four messages."""
    rows = []
    for number in range(40):
        messages = []
        for turn in range(1 + number % 2):
            messages.append({"role": "user", "content": make_text(100 * number + turn, 10)})
            messages.append({"role": "assistant", "content": make_text(100 * number + turn + 50, 15)})
        rows.append(json.dumps({"messages": messages}))
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into a .jsonl file."""

    def write(name: str, rows: list[object]) -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write
