from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe_lightning.data import packing
from moe_lightning.data.packing import open_blocks, pack_texts
from moe_lightning.data.tokenizers import byte_table, train_tokenizer
from tests.data.conftest import make_text

TEXTS = [make_text(seed, 50 + 10 * seed) for seed in range(20)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, ["x"], 400, tmp_path)[0]


def naive_blocks(tokenizer: PreTrainedTokenizerFast, texts: list[str], block_size: int) -> torch.Tensor:
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(stream[: len(stream) // block_size * block_size]).reshape(-1, block_size)


@pytest.mark.parametrize("part_characters", [1 << 20, 300])
def test_blocks_equal_a_naive_concatenation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_characters: int
) -> None:
    monkeypatch.setattr(packing, "_PART_CHARACTERS", part_characters)
    pack_texts(TEXTS, tokenizer, 33, tmp_path / "blocks")
    blocks = open_blocks(tmp_path / "blocks")
    expected = naive_blocks(tokenizer, TEXTS, 33)
    batch = blocks.batch(np.arange(len(blocks)))
    assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(batch["labels"], expected)
    assert "attention_mask" not in batch
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert blocks.info["documents"] == 20
    assert blocks.info["tokens"] == expected.numel()
    assert blocks.info["bytes"] == int(batch["token_bytes"].sum())
    # what is cut off at the end is less than a block; everything else of the text is there
    table = byte_table(tokenizer)
    assert table is not None
    assert sum(len(text.encode()) for text in TEXTS) - blocks.info["bytes"] < 33 * table.max()


def test_long_texts_are_cut_into_parts_that_give_the_same_text_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PART_CHARACTERS", 100)
    text = "\n".join(make_text(seed, 8) for seed in range(50))
    parts = list(packing._parts(text))
    assert "".join(parts) == text
    assert 5 < len(parts) <= len(text) / 100 + 1


def test_batches_are_not_views_of_the_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pack_texts(TEXTS, tokenizer, 16, tmp_path / "blocks")
    blocks = open_blocks(tmp_path / "blocks")
    first = blocks.batch(np.array([0, 1]))
    first["input_ids"][:] = 0
    assert not torch.equal(first["input_ids"], first["labels"])
    assert torch.equal(blocks.batch(np.array([0, 1]))["input_ids"], first["labels"])


def test_no_more_blocks_than_wanted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pack_texts(TEXTS, tokenizer, 16, tmp_path / "blocks", max_blocks=3)
    blocks = open_blocks(tmp_path / "blocks")
    assert torch.equal(blocks.batch(np.arange(3))["input_ids"], naive_blocks(tokenizer, TEXTS, 16)[:3])
    assert len(blocks) == 3


def test_a_failure_leaves_no_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def texts():
        yield "some text"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        pack_texts(texts(), tokenizer, 4, tmp_path / "new" / "blocks")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_damaged_cache_says_what_to_delete(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pack_texts(TEXTS, tokenizer, 16, tmp_path / "blocks")
    file = tmp_path / "blocks" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tokens.bin is damaged .*: delete the folder"):
        open_blocks(tmp_path / "blocks")


def test_text_shorter_than_a_block_gives_none(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pack_texts(["a"], tokenizer, 16, tmp_path / "blocks")
    blocks = open_blocks(tmp_path / "blocks")
    assert len(blocks) == 0
    assert blocks.info["tokens_found"] == 2
