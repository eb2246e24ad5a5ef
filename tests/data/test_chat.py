import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe_lightning.data.chat import ChatEncoder, resolve_chat_template
from moe_lightning.data.packing import open_blocks, pack_chats
from moe_lightning.data.sources import Document, open_sources
from moe_lightning.data.tokenizers import CHATML_TEMPLATE, train_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(["hello there, how are you? fine, thanks! \u00e9\u65e5"] * 3, ["x"], 300, tmp_path)[0]


MESSAGES = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "fine, \u00e9\u65e5\n"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "thanks!"},
)


def test_only_what_the_assistant_says_is_in_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatEncoder(tokenizer, CHATML_TEMPLATE).encode("x", MESSAGES)

    # independently: every segment encoded by itself (special tokens cut the text there, so the tokens are the same)
    ids: list[int] = []
    loss: list[bool] = []
    for message in MESSAGES:
        is_assistant = message["role"] == "assistant"
        for text, counts in [
            ("<|im_start|>", False),
            (message["role"] + "\n", False),
            (message["content"], is_assistant),
            ("<|im_end|>", is_assistant),
            ("\n", False),
        ]:
            new = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += new
            loss += [counts] * len(new)
    assert tokenizer.decode(chat.ids) == tokenizer.decode(ids)
    said = tokenizer.decode(chat.ids[chat.loss])
    assert said == "fine, \u00e9\u65e5\n<|im_end|>thanks!<|im_end|>"
    assert chat.loss.sum() == sum(loss)
    special = np.isin(chat.ids, tokenizer.all_special_ids)
    assert not chat.token_bytes[special].any()
    plain = tokenizer.decode(chat.ids, skip_special_tokens=True)
    assert chat.token_bytes.sum() == len(plain.encode())


def test_batches_are_padded_masked_and_labelled(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = [Document("x", "", MESSAGES), Document("y", "", MESSAGES[1:3])]
    pack_chats(documents, tokenizer, CHATML_TEMPLATE, 128, tmp_path / "blocks")
    blocks = open_blocks(tmp_path / "blocks")
    batch = blocks.batch(np.array([0, 1]))
    encoder = ChatEncoder(tokenizer, CHATML_TEMPLATE)
    for row, document in enumerate(documents):
        assert document.messages is not None
        chat = encoder.encode("x", document.messages)
        length = len(chat.ids)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (128 - length)
        assert batch["input_ids"][row].tolist() == [*chat.ids, *[tokenizer.pad_token_id] * (128 - length)]
        labels = [int(number) if counts else -100 for number, counts in zip(chat.ids, chat.loss, strict=True)]
        assert batch["labels"][row].tolist() == labels + [-100] * (128 - length)
        assert batch["token_bytes"][row].tolist() == [*chat.token_bytes, *[0] * (128 - length)]
    assert blocks.info["loss_tokens"] == int((batch["labels"] != -100).sum())


def test_what_cannot_be_learnt_from_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = [
        Document("fits", "", MESSAGES[1:3]),
        Document("too long", "", (*MESSAGES[1:3], {"role": "user", "content": "how " * 100})),
        Document("no answer", "", MESSAGES[:2]),
        Document("answer cut off", "", ({"role": "user", "content": "how " * 100}, *MESSAGES[2:3])),
        Document("injection", "", ({"role": "user", "content": "x<|im_end|>"}, *MESSAGES[2:3])),
    ]
    pack_chats(documents, tokenizer, CHATML_TEMPLATE, 64, tmp_path / "blocks")
    info = open_blocks(tmp_path / "blocks").info
    assert (info["documents"], info["blocks"], info["truncated"]) == (5, 2, 1)
    assert (info["without_loss"], info["with_special_tokens"]) == (2, 1)


def test_a_template_that_rewrites_earlier_turns_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    # keeps only the last answer, as templates of reasoning models do with their thoughts
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else '' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match=r"rewrites earlier turns .* --data.chat_template"):
        ChatEncoder(tokenizer, template).encode("x", MESSAGES[1:])


def test_the_template_is_the_tokenizers_own_or_the_option(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert resolve_chat_template(tokenizer, None) == CHATML_TEMPLATE
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert resolve_chat_template(tokenizer, str(file)) == "{{ messages }}"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template: give one by --data.chat_template"):
        resolve_chat_template(tokenizer, None)
    assert resolve_chat_template(tokenizer, "chatml") == CHATML_TEMPLATE
    with pytest.raises(FileNotFoundError, match="neither a file nor the word chatml"):
        resolve_chat_template(tokenizer, "nothing.jinja")


def test_a_trained_chat_tokenizer_keeps_its_template_when_saved(chat_file: Path, tmp_path: Path) -> None:
    from moe_lightning.data import TextDataModule, load_tokenizer

    data = TextDataModule(
        [str(chat_file)],
        vocab_size=300,
        block_size=512,
        batch_size=2,
        validation=4,
        test=0.1,
        calibration=0.1,
        cache_dir=str(tmp_path / "cache"),
    )
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "token_bytes", "attention_mask"}
    assert len(data.blocks("validation")) == 4
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == CHATML_TEMPLATE
    counts = data.describe()["splits"]
    assert sum(split["documents"] for split in counts.values()) <= 40
    row = batch["labels"][0]
    said = data.tokenizer.decode(row[row != -100])
    answers = [m["content"] for d in open_sources(str(chat_file)) for m in d.messages or () if m["role"] == "assistant"]
    assert any(said.startswith(answer[:20]) for answer in answers)
    assert torch.equal(batch["input_ids"][batch["labels"] != -100], batch["labels"][batch["labels"] != -100])
    assert json.loads(json.dumps(data.describe())) == data.describe()
