from pathlib import Path

import pytest

from moe_lightning.data.sources import Corpus, Document, Source
from moe_lightning.data.splits import HELD_OUT, Piece, Splits, split_documents, survey

SHARES = dict.fromkeys(HELD_OUT, 0.1)


class Texts(Source):
    def __init__(self, texts: list[str]):
        self.name = "texts"
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, index: int) -> Document:
        return Document(str(index), self.texts[index])


def split(texts: list[str], shares: dict[str, float] = SHARES, seed: int = 0, gap: int = 50) -> tuple[Corpus, Splits]:
    corpus = Corpus([Texts(texts)])
    found = survey(corpus, corpus, seed, None, None)
    total = sum(found.sizes_bytes)
    return corpus, split_documents(found, {name: share * total for name, share in shares.items()}, gap, can_cut=True)


def texts_of(corpus: Corpus, splits: Splits) -> dict[str, list[str]]:
    return {name: [piece.text_of(corpus[piece.index]) for piece in pieces] for name, pieces in splits.pieces.items()}


def test_every_document_is_in_one_split_of_about_the_wanted_size() -> None:
    texts = [f"document {number} " * (5 + number % 7) for number in range(200)]
    found = texts_of(*split(texts))
    assert sorted(text for split in found.values() for text in split) == sorted(texts)
    total = sum(map(len, texts))
    for name in HELD_OUT:
        assert 0.1 * total <= sum(map(len, found[name])) <= 0.12 * total


def test_duplicates_never_reach_a_second_split() -> None:
    texts = [f"document {number % 50}" for number in range(200)] + ["  \n", ""]
    corpus, splits = split(texts)
    every = [text for found in texts_of(corpus, splits).values() for text in found]
    assert len(every) == len(set(every)) == 50
    found = survey(corpus, corpus, 0, None, None)
    assert (found.num_duplicates, found.num_empty) == (150, 2)


def test_the_order_of_files_does_not_matter_and_the_seed_does() -> None:
    texts = [f"document {number}" for number in range(100)]
    one, two, other = texts_of(*split(texts)), texts_of(*split(texts[::-1])), texts_of(*split(texts, seed=1))
    assert one == two
    assert one["test"] != other["test"]
    assert one["train"] != sorted(one["train"])


def test_few_documents_become_spans_with_gaps() -> None:
    texts = ["".join(f"{word:07}\u00e9" for word in range(start, start + 1000)) for start in (0, 1000, 2000)]
    corpus, splits = split(texts, gap=90)
    assert splits.by == "spans"
    found = texts_of(corpus, splits)
    # every nine bytes are a number of their own, so spans can be told apart
    words = {name: {word for text in parts for word in text.split("\u00e9")[1:-1]} for name, parts in found.items()}
    names = list(words)
    for number, name in enumerate(names):
        assert words[name]
        for other in names[number + 1 :]:
            assert not words[name] & words[other]
    order = [int(texts[piece.index][:7]) // 1000 for piece in splits.pieces["train"]]
    laid = "".join(texts[number] for number in order).encode()
    # train begins at the first byte, and between two spans ninety bytes are in neither
    total = sum(len(text.encode()) for text in texts)
    ends = {name: (parts[0], parts[-1]) for name, parts in splits.pieces.items()}
    assert ends["train"][0].start == 0
    assert ends["calibration"][1].stop is None
    assert sum(len(text.encode()) for parts in found.values() for text in parts) == pytest.approx(
        total - 3 * 90, abs=12
    )
    assert laid.startswith("".join(found["train"]).encode())


def test_one_huge_document_does_not_swallow_a_small_split() -> None:
    texts = [f"small {number} " * 20 for number in range(40)] + ["huge " * 5000]
    for seed in range(10):
        corpus, splits = split(texts, {"validation": 0.05}, seed=seed)
        assert splits.by == "documents"
        assert texts[-1] in texts_of(corpus, splits)["train"]


def test_pieces_cut_at_characters() -> None:
    document = Document("x", "a\u00e9\u65e5b")
    assert Piece(0, "", 2, 5).text_of(document) == ""
    assert Piece(0, "", 1, 6).text_of(document) == "\u00e9\u65e5"
    assert Piece(0, "", 3).text_of(document) == "\u65e5b"


def test_too_little_text_is_an_error_that_names_the_options() -> None:
    with pytest.raises(ValueError, match=r"gaps of 50: give more text, lower --data.validation"):
        split(["short text"])
    corpus = Corpus([Texts(["a", "b", "c"])])
    found = survey(corpus, corpus, 0, None, None)
    with pytest.raises(ValueError, match=r"3 conversations are too few .* at least 8"):
        split_documents(found, {"test": 1.0}, 50, can_cut=False)
    empty = Corpus([Texts([" ", ""])])
    with pytest.raises(ValueError, match=r"--data.sources: texts holds no text \(2 empty"):
        survey(empty, empty, 0, None, None)


def test_limits_keep_the_first_documents_of_the_seeded_order(tmp_path: Path) -> None:
    corpus = Corpus([Texts([f"document {number:03}" for number in range(100)] + ["long " * 1000])])
    every = survey(corpus, corpus, 0, None, None)
    assert survey(corpus, corpus, 0, 7, None).hashes == every.hashes[:7]
    small = survey(corpus, corpus, 0, None, 125)
    assert sum(small.sizes_bytes) <= 125
    assert len(small.hashes) == 10
    assert len(survey(corpus, corpus, 0, None, 3).hashes) == 1
