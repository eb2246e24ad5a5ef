import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from moe_lightning.data import TextDataModule, load_tokenizer

SPLITS = ["train", "validation", "test", "calibration"]


@pytest.fixture
def options(text_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "sources": [str(text_folder / "**" / "*.txt")],
        "vocab_size": 300,
        "block_size": 32,
        "batch_size": 4,
        "validation": 0.1,
        "test": 0.1,
        "calibration": 10,
        "cache_dir": str(tmp_path / "cache"),
    }


def test_no_text_is_in_two_splits_and_none_is_lost(options: dict[str, Any], text_folder: Path) -> None:
    data = TextDataModule(**options).prepare()
    assert set(data.describe()["splits"]["train"]) == {"documents", "fingerprint"}
    texts = [file.read_text(encoding="utf-8") for file in text_folder.rglob("*.txt")]
    owner: dict[str, str] = {}
    for split in SPLITS:
        stream = data.blocks(split).batch(np.arange(len(data.blocks(split))))["input_ids"].flatten()
        for part in data.tokenizer.decode(stream).split("<|endoftext|>"):
            if len(part) < 200:
                continue
            [text] = [text for text in texts if part in text]
            assert owner.setdefault(text, split) == split
    assert set(owner.values()) == set(SPLITS)
    counts = data.describe()["splits"]
    assert counts["calibration"]["blocks"] == 10
    assert counts["train"]["blocks"] == len(data.blocks("train"))
    assert len(owner) == sum(split["documents"] for split in counts.values())


def test_the_tokenizer_is_trained_on_the_train_split_only(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lightning.data import preparation

    shown: list[str] = []
    train = preparation.train_tokenizer

    def listen(texts: Iterable[str], *arguments: Any) -> Any:
        shown.extend(texts)
        return train(shown, *arguments)

    monkeypatch.setattr(preparation, "train_tokenizer", listen)
    data = TextDataModule(**options).prepare()
    packed = data.tokenizer.decode(data.blocks("train").tokens.flatten())
    assert "<|endoftext|>".join(shown).startswith(packed[:-1000])
    for split in SPLITS[1:]:
        assert not any(data.tokenizer.decode(data.blocks(split).tokens[1]) in text for text in shown)


def test_everything_is_the_same_in_another_process_and_another_cache(options: dict[str, Any], tmp_path: Path) -> None:
    code = (
        "import json, sys, hashlib\n"
        "from moe_lightning.data import TextDataModule\n"
        "data = TextDataModule(**json.loads(sys.argv[1])).prepare()\n"
        "batch = next(iter(data.train_dataloader()))['input_ids']\n"
        "print(json.dumps([data.describe(), batch.tolist()]))"
    )
    other = json.dumps(options | {"cache_dir": str(tmp_path / "other")})
    done = subprocess.run([sys.executable, "-c", code, other], capture_output=True, text=True, check=True)
    described, batch = json.loads(done.stdout.splitlines()[-1])
    data = TextDataModule(**options)
    assert next(iter(data.train_dataloader()))["input_ids"].tolist() == batch
    assert data.describe() == described


def test_the_cache_is_used(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = TextDataModule(**options).prepare()
    from moe_lightning.data import preparation

    monkeypatch.setattr(preparation, "pack_texts", None)
    again = TextDataModule(**options).prepare()
    assert again.describe() == first.describe()
    assert torch.equal(next(iter(again.val_dataloader()))["input_ids"], next(iter(first.val_dataloader()))["input_ids"])
    monkeypatch.undo()
    # every setting is in the key
    sizes = {"validation": 0.1, "test": 0.1, "calibration": 0.1}
    keys = [
        TextDataModule(**options | sizes | change).describe()["splits"]["train"]["fingerprint"]
        for change in [{}, {"block_size": 16}, {"vocab_size": 290}, {"max_documents": 30}, {"seed": 2}]
    ]
    assert len(set(keys)) == 5


def test_the_seed_changes_splits_and_order(options: dict[str, Any]) -> None:
    one, two = TextDataModule(**options).prepare(), TextDataModule(**options | {"seed": 1}).prepare()
    for split in SPLITS:
        assert one.describe()["splits"][split]["fingerprint"] != two.describe()["splits"][split]["fingerprint"]


def test_the_order_has_a_seed_of_its_own(options: dict[str, Any]) -> None:
    def numbers(**changes: Any) -> list[list[int]]:
        stream = TextDataModule(**options | changes).prepare().train_dataloader()
        return [stream.block_numbers(index).tolist() for index in range(4)]

    assert numbers(order_seed=7) != numbers() == numbers(order_seed=options.get("seed", 0))
    one, two = TextDataModule(**options).prepare(), TextDataModule(**options | {"order_seed": 7}).prepare()
    assert one.describe()["splits"] == two.describe()["splits"]


def test_few_files_give_spans_and_a_warning(
    options: dict[str, Any], text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = TextDataModule(**options | {"sources": str(text_folder / "a" / "01.txt"), "calibration": 0.1})
    assert data.describe()["split_by"] == "spans"
    assert "1 documents are too few" in caplog.text
    text = (text_folder / "a" / "01.txt").read_text(encoding="utf-8")
    for split in SPLITS:
        found = data.tokenizer.decode(data.blocks(split).tokens[0]).strip("\ufffd")
        assert found in text


def test_calibration_batches_are_always_the_same(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    batches = data.calibration_batches(2)
    first, second = ([batch["input_ids"].tolist() for batch in batches] for _ in range(2))
    assert first == second
    assert [len(batch) for batch in first] == [4, 4]
    assert sum(len(batch["input_ids"]) for batch in data.calibration_batches()) == 10
    with pytest.raises(ValueError, match=r"3 calibration batches of 4 .* has 10 blocks: ask for at most 2"):
        data.calibration_batches(3)


def test_further_batches_are_those_that_calibration_leaves_out(options: dict[str, Any]) -> None:
    data = TextDataModule(**options)
    parts = [*data.calibration_batches(1), *data.further_batches(1)]
    whole = list(data.calibration_batches())
    assert [batch["input_ids"].tolist() for batch in parts] == [batch["input_ids"].tolist() for batch in whole]
    for taken in (3, None):
        with pytest.raises(ValueError, match=r"no further calibration batches: .* set it to less than 3"):
            data.further_batches(taken)


def test_a_trained_tokenizer_can_be_named(options: dict[str, Any], tmp_path: Path) -> None:
    first = TextDataModule(**options).prepare()
    first.tokenizer.save_pretrained(tmp_path / "model")
    again = TextDataModule(**options | {"tokenizer": str(tmp_path / "model"), "vocab_size": 4096})
    assert again.describe() == first.describe()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--data.tokenizer"):
        TextDataModule(**options | {"tokenizer": str(tmp_path / "empty")}).prepare()


def test_prompts_are_padded_on_the_left(options: dict[str, Any], tmp_path: Path) -> None:
    prompts = ["the expert", "the", "router token layer"]
    data = TextDataModule(**options | {"prompts": prompts, "eval_batch_size": 2})
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [batch["prompt"] for batch in batches] == [prompts[:2], prompts[2:]]
    for batch in batches:
        for prompt, ids, mask in zip(batch["prompt"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert data.tokenizer.decode(ids[mask.bool()]) == prompt
            assert mask.tolist() == sorted(mask.tolist())
            assert set(ids[~mask.bool()].tolist()) <= {data.tokenizer.pad_token_id}
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo three\n")
    assert TextDataModule(**options | {"prompts_file": str(file)}).predict_dataloader().prompts == ["one", "two three"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a\\nb"}\n')
    assert TextDataModule(**options | {"prompts_file": str(rows)}).predict_dataloader().prompts == ["a\nb"]
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r'line 1 has no field "prompt"'):
        TextDataModule(**options | {"prompts_file": str(rows)}).setup("predict")
    with pytest.raises(ValueError, match=r"nothing to continue: give --data.prompts"):
        TextDataModule(**options).setup("predict")


def test_predict_with_a_given_tokenizer_reads_no_source(options: dict[str, Any], tmp_path: Path) -> None:
    TextDataModule(**options).tokenizer.save_pretrained(tmp_path / "model")
    data = TextDataModule("nothing.txt", tokenizer=str(tmp_path / "model"), prompts=["x"])
    data.setup("predict")
    assert len(data.predict_dataloader()) == 1


def test_fewer_prompts_than_processes_are_an_error(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TextDataModule(**options, prompts=["x"])
    monkeypatch.setattr(TextDataModule, "_rank", (0, 2))
    with pytest.raises(ValueError, match=r"1 prompt\(s\) cannot be shared by 2 processes: use --trainer.devices 1"):
        data.setup("predict")


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"validation": -0.1}, r"--data.validation -0.1"),
        ({"test": 1.5}, r"--data.test 1.5"),
        ({"validation": 0.5, "test": 0.5}, "nothing is left to train on"),
        ({"vocab_size": 100}, r"--data.vocab_size 100"),
        ({"seed": -1}, r"--data.seed -1"),
        ({"order_seed": -1}, r"--data.order_seed -1"),
        ({"block_size": 1}, r"--data.block_size 1"),
        ({"batch_size": 0}, r"--data.batch_size 0"),
        ({"max_bytes": 0}, r"--data.max_bytes 0"),
        ({"sources": []}, r"--data.sources is empty"),
        ({"prompts": ["x"], "prompts_file": "x"}, "exclude each other"),
    ],
)
def test_bad_options_are_errors_at_once(options: dict[str, Any], changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        TextDataModule(**options | changed)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"block_size": 20000}, r"(split has \d+ tokens, fewer than one block of|too little for held-out)"),
        ({"validation": 1e-5, "calibration": 0}, r"the (validation|train) split has|too little"),
        ({"calibration": 10**6}, r"--data.calibration|too little"),
    ],
)
def test_splits_that_cannot_be_filled_name_their_option(
    options: dict[str, Any], changed: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        TextDataModule(**options | changed).prepare()


def test_a_split_that_was_not_asked_for_is_absent(options: dict[str, Any]) -> None:
    data = TextDataModule(**options | {"validation": 0, "test": 0, "calibration": 0})
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"no test split: --data.test is 0"):
        data.test_dataloader()
    with pytest.raises(ValueError, match=r"no calibration split: --data.calibration is 0"):
        data.calibration_batches(1)


def test_every_option_can_be_given_on_a_command_line(options: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    found = parser.parse_args(
        ["--data.sources=a.txt", "--data.validation=64", "--data.test=0.01", '--data.prompts=["a","b"]']
    ).data
    assert (found.sources, found.prompts) == ("a.txt", ["a", "b"])
    assert (found.validation, found.test) == (64, 0.01)
    assert isinstance(found.validation, int)
    assert parser.parse_args(['--data.sources=["a.txt", "b.txt"]']).data.sources == ["a.txt", "b.txt"]
    help_text = parser.format_help()
    assert "below 1 a share of the text" in " ".join(help_text.split())


def test_the_standard_library_is_a_data_set(tmp_path: Path) -> None:
    data = TextDataModule(
        max_bytes=200_000, vocab_size=400, block_size=64, validation=8, test=8, calibration=8, cache_dir=str(tmp_path)
    )
    assert len(data.blocks("train")) > 200
    assert data.describe()["sources"] == ["python-stdlib"]
    assert load_tokenizer(data.state_dict()["tokenizer_folder"]).eos_token == "<|endoftext|>"
