"""Continuations are those of a loop over forward passes, whatever the batch; prompts are pieces of the text."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.data import TextDataModule, train_tokenizer
from moe_lightning.evaluation.samples import continuations, default_prompts, prompt_ids
from tests.models import random_batches, tiny_mixtral

WORDS = [
    "the",
    "router",
    "sends",
    "every",
    "token",
    "to",
    "those",
    "experts",
    "that",
    "know",
    "it",
    "while",
    "others",
    "rest",
]
PROMPTS = ["the", "every token to the experts that know it", "novices answer the router", "rest while", "and the ot"]
SIZES = {"vocab_size": 300, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer([" ".join(WORDS)] * 3, ["x"], 300, tmp_path_factory.mktemp("tokenizer"))[0]


def compressed(*methods: Any, **options: Any) -> Any:
    model = tiny_mixtral(**SIZES, **options)
    ml.compress(model, random_batches(vocab_size=300), methods)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "uncompressed": lambda: tiny_mixtral(**SIZES),
    "novices and a dropped block": lambda: compressed(ml.BlockDrop(count=1), ml.Novices(ratio=0.5)),
    "int4": lambda: compressed(ml.GPTQ(group_size=16)),
}


def by_hand(model: Any, ids: list[int], new_tokens: int, end: int | None) -> list[int]:
    """The likeliest token of a pass over everything so far, again and again, without a cache."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < new_tokens:
            token = int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
            if token == end:
                break
            found.append(token)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_writes_what_a_loop_over_passes_does(name: str, tokenizer: Any) -> None:
    model = MODELS[name]()
    found = continuations(model, tokenizer, PROMPTS, 12, batch_size=3)
    assert [sample.prompt for sample in found] == PROMPTS
    for sample in found:
        ids = by_hand(model, tokenizer(sample.prompt)["input_ids"], 12, tokenizer.eos_token_id)
        assert sample.continuation == tokenizer.decode(ids, skip_special_tokens=True), sample.prompt
    assert found == [continuations(model, tokenizer, [prompt], 12)[0] for prompt in PROMPTS]
    assert len({sample.continuation for sample in found}) > 1


def test_int4_writes_in_bf16_too(tokenizer: Any) -> None:
    model = compressed(ml.GPTQ(group_size=16), dtype=torch.bfloat16)
    found = continuations(model, tokenizer, PROMPTS, 6)
    assert found == continuations(model, tokenizer, PROMPTS, 6)
    assert all(sample.continuation for sample in found)


def test_a_text_ends_where_the_model_ends_it(tokenizer: Any) -> None:
    """A short answer beside a long one in a batch; also where padding is the end-of-text token."""
    model = tiny_mixtral(**SIZES)
    ids = by_hand(model, tokenizer(PROMPTS[0])["input_ids"], 10, None)
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(ids[4])
    assert ids.index(ids[4]) == 4
    for padding in (other.pad_token, None):
        other.pad_token = padding
        found = continuations(model, other, PROMPTS, 10)
        assert found[0].continuation == tokenizer.decode(ids[:4])
        lengths = set()
        for sample in found:
            expected = by_hand(model, tokenizer(sample.prompt)["input_ids"], 10, ids[4])
            assert sample.continuation == other.decode(expected, skip_special_tokens=True)
            lengths.add(len(expected))
        assert len(lengths) > 1


def test_without_any_token_to_pad_with_prompts_go_one_by_one(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = bare.pad_token = None
    model = tiny_mixtral(**SIZES)
    found = continuations(model, bare, PROMPTS, 5)
    for sample in found:
        ids = by_hand(model, bare(sample.prompt)["input_ids"], 5, None)
        assert sample.continuation == bare.decode(ids, skip_special_tokens=True)


def test_model_and_random_numbers_are_left_alone(tokenizer: Any) -> None:
    model = tiny_mixtral(**SIZES)
    plain = continuations(model, tokenizer, PROMPTS, 8)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    # What a published model may ask for, and what would change every token.
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_new_tokens": 1}.items():
        setattr(model.generation_config, name, value)
    settings = model.generation_config
    state = torch.get_rng_state()
    assert continuations(model, tokenizer, PROMPTS, 8) == plain
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings and settings.temperature == 5.0
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_prompts_begin_as_the_tokenizer_begins_a_text(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    begun = copy.deepcopy(tokenizer)
    begun.bos_token = "<|im_start|>"
    number = begun.convert_tokens_to_ids("<|im_start|>")
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)]
    )
    plain = tokenizer("the")["input_ids"]
    # The template of a chat writes it already.
    assert prompt_ids(begun, ["the", "<|im_start|>the"]) == [[number, *plain]] * 2
    assert prompt_ids(tokenizer, ["the"]) == [plain]


def test_mistakes_are_named(tokenizer: Any) -> None:
    model = tiny_mixtral(**SIZES)
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        continuations(model, tokenizer, ["the", ""], 4)
    with pytest.raises(ValueError, match="new_tokens 0"):
        continuations(model, tokenizer, ["the"], 0)
    with pytest.raises(ValueError, match="anything to continue"):
        default_prompts([], tokenizer)
    filler = {"input_ids": torch.full((2, 9), 50), "labels": torch.full((2, 9), -100)}
    with pytest.raises(ValueError, match="anything to continue"):
        default_prompts([filler], tokenizer)
    assert continuations(model, tokenizer, [], 4) == []


def numbered(count: int) -> list[str]:
    """Texts in which every sentence says where it is from."""
    return [" ".join(f"text {number} {word} {WORDS[word % 7]}," for word in range(60)) for number in range(count)]


def test_prompts_are_beginnings_of_documents(tmp_path: Path) -> None:
    for number, text in enumerate(numbered(30)):
        (tmp_path / f"{number}.txt").write_text(text)
    data = TextDataModule(str(tmp_path / "*.txt"), vocab_size=400, block_size=64, test=0.3, cache_dir=str(tmp_path))
    tokenizer = data.tokenizer
    found = default_prompts(data.test_dataloader(), tokenizer, count=4, tokens=20)
    assert len(set(found)) == 4
    for prompt in found:
        number = prompt.split()[1]
        text = (tmp_path / f"{number}.txt").read_text()
        # The beginning, up to the end of a word.
        assert text.startswith(prompt) and text[len(prompt)] == " "
        assert 12 <= len(tokenizer(prompt)["input_ids"]) <= 20
    assert len({prompt.split()[1] for prompt in found}) == 4


def test_prompts_from_the_middle_have_whole_words(tokenizer: Any) -> None:
    text = " ".join(random.Random(0).choices(WORDS, k=600))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // 50 * 50].reshape(-1, 50)
    found = default_prompts([{"input_ids": blocks}], tokenizer, count=3, tokens=16)
    assert len(found) == 3
    assert all(f" {prompt} " in text for prompt in found)


def test_prompts_of_conversations_end_where_the_answer_begins(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[n % 14]} {n}?"},
                {"role": "assistant", "content": "it rests"},
            ]
        }
        for n in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextDataModule(str(tmp_path / "chat.jsonl"), vocab_size=300, block_size=64, test=4, cache_dir=str(tmp_path))
    questions = {
        f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n" for row in rows
    }
    found = default_prompts(data.test_dataloader(), data.tokenizer, count=3)
    assert len(set(found)) == 3 and set(found) <= questions
    model = tiny_mixtral(**SIZES)
    for sample in continuations(model, data.tokenizer, found, 5):
        ids = data.tokenizer(sample.prompt)["input_ids"]
        assert data.tokenizer.decode(ids) == sample.prompt
        assert sample.continuation == data.tokenizer.decode(by_hand(model, ids, 5, 0), skip_special_tokens=True)
