"""Texts beside the splits: whose documents they hold, counted and packed by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_lightning.data import TextDataModule
from moe_lightning.data.sources import open_sources
from tests.data.conftest import make_text

BLOCK = 32


@pytest.fixture
def options(text_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Three sources: two folders, and a pattern that is a table and a file; it holds a document of the first too."""
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "one.txt").write_text(make_text(900), encoding="utf-8")
    rows = [make_text(1000 + number, 150) for number in range(30)] + [
        (text_folder / "a" / "01.txt").read_text(encoding="utf-8")
    ]
    (tmp_path / "mixed" / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {
        "sources": [str(text_folder / "a" / "*.txt"), str(text_folder / "b" / "*.txt"), str(tmp_path / "mixed" / "*")],
        "vocab_size": 300,
        "block_size": BLOCK,
        "batch_size": 4,
        "validation": 0.1,
        "test": 0.2,
        "calibration": 0.1,
        "cache_dir": str(tmp_path / "cache"),
    }


def texts_by_source(options: dict[str, Any]) -> dict[str, list[str]]:
    """The documents of each source, read by hand."""
    found: dict[str, list[str]] = {}
    for source in options["sources"]:
        found[source] = []
        for file in sorted(Path(source).parent.iterdir()):
            text = file.read_text(encoding="utf-8")
            rows = [json.loads(line)["text"] for line in text.splitlines()] if file.suffix == ".jsonl" else [text]
            found[source] += rows
    return found


def stream(batches: Any) -> list[int]:
    return [token for batch in batches for row in batch["input_ids"].tolist() for token in row]


def packed(tokenizer: Any, texts: list[str]) -> list[int]:
    """Documents end to end, each with its end, cut at whole blocks."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return ids[: len(ids) // BLOCK * BLOCK]


def documents_in(data: TextDataModule, split: str, texts: list[str]) -> list[str]:
    """Which documents a split holds and in which order, found by their beginnings in its decoded blocks."""
    blocks = data.blocks(split)
    decoded = data.tokenizer.decode(blocks.batch(np.arange(len(blocks)))["input_ids"].flatten())
    places = {text: decoded.find(text[:60]) for text in texts}
    return sorted((text for text in places if places[text] >= 0), key=places.__getitem__)


def test_a_source_has_its_own_documents_of_the_split_and_no_other(options: dict[str, Any]) -> None:
    data = TextDataModule(**options).prepare()
    by_source = texts_by_source(options)
    first, _, mixed = options["sources"]
    [twice] = set(by_source[first]) & set(by_source[mixed])
    by_source[mixed].remove(twice)  # it is the first source's
    every = [text for texts in by_source.values() for text in texts]
    held = documents_in(data, "test", every)
    assert len(held) == data.describe()["splits"]["test"]["documents"]
    for source, texts in by_source.items():
        mine = [text for text in held if text in texts]
        assert mine, source
        loader = data.test_batches_of(source)
        assert stream(loader) == packed(data.tokenizer, mine)
        assert len(loader) == -(-len(loader.blocks) // 4)
        assert loader.blocks.info["documents"] == len(mine)
        assert source in data.sources_in("train")
    # Nothing of it was seen in training or calibration.
    for split in ("train", "validation", "calibration"):
        assert not set(held) & set(documents_in(data, split, every))
    some = data.test_batches_of(mixed, "validation", num_blocks=2)
    mine = [text for text in documents_in(data, "validation", every) if text in by_source[mixed]]
    assert stream(some) == packed(data.tokenizer, mine)[: 2 * BLOCK]


def test_another_text_holds_none_of_the_runs_documents(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    new = [make_text(5000 + number, 200) for number in range(9)]
    own = texts_by_source(options)[options["sources"][1]][:3]
    for number, text in enumerate([*new, new[4], *own]):
        (other / f"{number}.md").write_text(text, encoding="utf-8")
    data = TextDataModule(**options).prepare()
    before = data.describe()
    loader = data.domain_batches(str(other / "*.md"))
    assert "3 of 12 documents are in --data.sources too and are left out" in caplog.text
    ids = stream(loader)
    decoded = data.tokenizer.decode(ids)
    order = sorted(new, key=lambda text: decoded.find(text[:60]))
    assert ids == packed(data.tokenizer, order)
    assert order != new
    assert [batch["input_ids"].shape[0] for batch in loader][:2] == [4, 4]
    # Fewer blocks are the first ones; another object finds the same; the run's own data stay what they were.
    again = TextDataModule(**options)
    assert stream(again.domain_batches([str(other / "*.md")], 5)) == ids[: 5 * BLOCK]
    assert data.describe() == before == again.describe()
    other_seed = TextDataModule(**options | {"seed": 3, "tokenizer": before_tokenizer(data, tmp_path)})
    assert stream(other_seed.domain_batches(str(other / "*.md"))) != ids


def before_tokenizer(data: TextDataModule, tmp_path: Path) -> str:
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_blocks_are_read_once_and_cached(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lightning.data import domains, preparation

    first = TextDataModule(**options).prepare()
    found = stream(first.domain_batches("python-topics", 6)), stream(first.test_batches_of(options["sources"][0]))
    monkeypatch.setattr(preparation, "pack_texts", None)
    again = TextDataModule(**options)
    assert (
        stream(again.domain_batches("python-topics", 6)),
        stream(again.test_batches_of(options["sources"][0])),
    ) == found
    monkeypatch.setattr(domains, "open_sources", None)
    assert stream(again.domain_batches("python-topics", 6)) == found[0]


def test_processes_share_the_blocks(options: dict[str, Any]) -> None:
    data = TextDataModule(**options).prepare()
    whole = np.array(stream(data.domain_batches("python-topics", 7))).reshape(-1, BLOCK)
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        batches = list(data.domain_batches("python-topics", 7))
        part = np.concatenate([batch["input_ids"] for batch in batches])
        counted = np.concatenate([(batch["labels"] != -100).any(1) for batch in batches])
        assert np.array_equal(part[counted], whole[rank::2])
        assert len(part) == 4


def test_spans_of_few_documents(options: dict[str, Any], tmp_path: Path) -> None:
    """Each source has what lies in the span; one that has nothing there is told why."""
    names = []
    for number in range(3):
        file = tmp_path / f"long{number}.txt"
        file.write_text(make_text(7000 + number, 1500), encoding="utf-8")
        names.append(str(file))
    data = TextDataModule(**options | {"sources": names, "validation": 0, "test": 0.4}).prepare()
    assert data.describe()["split_by"] == "spans"
    in_test = data.sources_in("test")
    assert 0 < len(in_test) < 3
    decoded = data.tokenizer.decode(data.blocks("train").tokens.flatten())
    for source in names:
        if source in in_test:
            text = Path(source).read_text(encoding="utf-8")
            for block in np.array(stream(data.test_batches_of(source))).reshape(-1, BLOCK):
                piece = data.tokenizer.decode(block).strip("\ufffd").split("<|endoftext|>")[0]
                assert piece in text and piece not in decoded
        else:
            with pytest.raises(ValueError, match=r"spans of the whole text.* in the test span: give more documents"):
                data.test_batches_of(source)


def test_conversations_are_a_domain_too(options: dict[str, Any], chat_file: Path) -> None:
    data = TextDataModule(**options | {"block_size": 128}).prepare()
    batch = next(iter(data.domain_batches(str(chat_file), 8)))
    assert batch["labels"].shape == (4, 128)
    shown = data.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100])
    answers = [
        message["content"]
        for line in chat_file.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
        if message["role"] == "assistant"
    ]
    first = shown.split("<|im_end|>")[0].rstrip("\ufffd")  # the block may end within it
    assert len(first) > 20 and any(answer.startswith(first) for answer in answers)
    with pytest.raises(
        ValueError, match=r"has 40 usable conversations of 40, and 41 blocks were asked for: ask for at"
    ):
        data.domain_batches(str(chat_file), 41)


def test_mistakes_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    data = TextDataModule(**options | {"validation": 0}).prepare()
    first = options["sources"][0]
    there = len(data.test_batches_of(first).blocks)
    with pytest.raises(
        ValueError, match=rf"has {there} blocks of 32 tokens, and 999 blocks .* at most {there}, or raise"
    ):
        data.test_batches_of(first, num_blocks=999)
    there = len(data.domain_batches("python-topics").blocks)
    with pytest.raises(
        ValueError, match=rf"domain python-topics has {there} blocks .* ask for at most {there}, or give"
    ):
        data.domain_batches("python-topics", 10**6)
    with pytest.raises(ValueError, match="ask for at least 1"):
        data.domain_batches("python-topics", 0)
    with pytest.raises(ValueError, match=r"all of its 20 documents are in --data.sources too"):
        data.domain_batches(first)
    with pytest.raises(ValueError, match=r"none of --data.sources"):
        data.test_batches_of("python-topics")
    with pytest.raises(ValueError, match="there is no validation split"):
        data.test_batches_of(first, "validation")
    with pytest.raises(ValueError, match="train is no held-out split"):
        data.test_batches_of(first, "train")
    with pytest.raises(FileNotFoundError, match=r"^domain: there is no file nowhere\.txt"):
        data.domain_batches("nowhere.txt")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(
        ValueError, match=r"domain .*short\.txt has \d+ tokens, fewer than one block of --data.block_size"
    ):
        data.domain_batches(str(tmp_path / "short.txt"))
    lone = tmp_path / "lone.txt"
    lone.write_text(make_text(1, 5000), encoding="utf-8")
    data = TextDataModule(**options | {"sources": [*options["sources"], str(lone)], "test": 2, "calibration": 2})
    with pytest.raises(ValueError, match=r"none of its documents fell into the test split: raise --data.test"):
        data.test_batches_of(str(lone))


def test_every_document_knows_what_the_user_wrote_for_it(options: dict[str, Any]) -> None:
    corpus = open_sources(options["sources"])
    by_source = texts_by_source(options)
    for index, document in enumerate(corpus):
        assert document.text in by_source[corpus.entry_of(index)]
    assert len(corpus.sources) == 4
    assert [corpus.entry_of(index) for index in (0, 19, 20, 39, 40, 71)] == [
        entry for entry in options["sources"] for _ in range(2)
    ]
