import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_lightning.data.tokenizers import (
    TextEncoder,
    byte_table,
    bytes_of_offsets,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXTS = [
    "  The quick brown f\u00f6x\tjumps\r\n\r\nover 13 lazy \u72d7 and \U0001f642\U0001f3fd e\u0301.  \n",
    "def f(x):\n    return x  # <|endoftext|> is text here\n",
    "\u00a0",
]


@pytest.fixture
def trained(tmp_path: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 5, ["1"], 320, tmp_path)[0]


def sentence_piece_like() -> PreTrainedTokenizerFast:
    # like those of Llama and Mixtral: spaces become a character of their own, unknown characters fall back to bytes
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ["\u2581", "\u2581the", "t", "h", "e", "he", "the", "quick"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("h", "e"), ("t", "he"), ("\u2581", "the")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[SEP]"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def byte_level_with_normaliser() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize("kind", [sentence_piece_like, word_piece, byte_level_with_normaliser])
def test_bytes_of_tokens_sum_to_those_of_the_text_for_other_tokenizers(kind) -> None:
    tokenizer = kind()
    assert byte_table(tokenizer) is None
    for text, (ids, token_bytes) in zip(TEXTS, TextEncoder(tokenizer).encode(TEXTS), strict=True):
        assert token_bytes is not None
        assert len(ids) == len(token_bytes)
        assert (token_bytes >= 0).all()
        if len(ids):
            assert token_bytes.sum() == len(text.encode())


def test_bytes_of_tokens_of_a_byte_level_tokenizer_are_exact_token_by_token(trained: PreTrainedTokenizerFast) -> None:
    table = byte_table(trained)
    assert table is not None
    decode = {char: byte for byte, char in bytes_to_unicode().items()}
    for text, (ids, token_bytes) in zip(TEXTS, TextEncoder(trained).encode(TEXTS), strict=True):
        assert token_bytes is None
        pieces = [bytes(decode[char] for char in trained.convert_ids_to_tokens(int(number))) for number in ids]
        assert b"".join(pieces) == text.encode()
        assert table[ids].tolist() == [len(piece) for piece in pieces]
    assert table[trained.all_special_ids].tolist() == [0, 0, 0, 0]


def bytes_to_unicode() -> dict[int, str]:
    # the alphabet of GPT-2, written out anew
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def test_bytes_of_offsets_by_hand() -> None:
    text = " a\u00e9\u65e5\U0001f642 "
    # the space in front is swallowed, three tokens share one character, the space behind belongs to nobody
    offsets = [(1, 2), (2, 3), (3, 4), (3, 4), (3, 4), (4, 5)]
    assert bytes_of_offsets(text, offsets).tolist() == [2, 2, 3, 0, 0, 5]
    assert bytes_of_offsets(text, []).tolist() == []


def test_special_tokens_in_a_text_stay_text(trained: PreTrainedTokenizerFast) -> None:
    [(ids, _)] = TextEncoder(trained).encode(["a<|endoftext|>b"])
    assert not set(ids.tolist()) & set(trained.all_special_ids)
    assert trained.decode(ids) == "a<|endoftext|>b"
    # and the user's object is as before
    assert trained.eos_token_id in trained("a<|endoftext|>b")["input_ids"]


def test_what_a_tokenizer_puts_first_starts_every_document(trained: PreTrainedTokenizerFast) -> None:
    assert TextEncoder(sentence_piece_like()).prefix == [0]
    assert TextEncoder(trained).prefix == []


def test_a_cached_tokenizer_is_not_trained_again(tmp_path: Path) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("the texts were read")
        yield ""

    first, folder = train_tokenizer(TEXTS, ["hash"], 300, tmp_path)
    again, same = train_tokenizer(unread(), ["hash"], 300, tmp_path)
    assert folder == same
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)
    assert first.get_vocab() == again.get_vocab()
    for other in [(["other"], 300), (["hash"], 301)]:
        with pytest.raises(AssertionError, match="were read"):
            train_tokenizer(unread(), *other, tmp_path)
    # what failed left nothing behind
    assert [entry.name for entry in (tmp_path / "tokenizers").iterdir()] == [folder.name]


def test_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from moe_lightning.data import train_tokenizer, tokenizer_fingerprint\n"
        "print(tokenizer_fingerprint(train_tokenizer(json.loads(sys.argv[1]), ['x'], 400, Path(sys.argv[2]))[0]))"
    )
    texts = json.dumps([Path(json.__file__).read_text(), *TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", code, texts, str(tmp_path / "other")], capture_output=True, text=True, check=True
    )
    own = train_tokenizer(json.loads(texts), ["x"], 400, tmp_path / "own")[0]
    assert done.stdout.split()[-1] == tokenizer_fingerprint(own)


def test_a_fingerprint_survives_saving_and_tells_tokenizers_apart(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "saved")) == tokenizer_fingerprint(trained)
    other = train_tokenizer(TEXTS * 5, ["1"], 310, tmp_path)[0]
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(trained)


def test_a_checkpoint_folder_without_tokenizer_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .* --data.tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"--data.tokenizer: cannot read the tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--data.tokenizer: .* is not a folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"--data.tokenizer: there is no folder 'some/name' here .* network"):
        load_tokenizer("some/name")


def test_a_tokenizer_without_end_of_text_is_an_error(trained: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="names no end-of-text token"):
        load_tokenizer(tmp_path / "bare")


def test_a_vocabulary_smaller_than_the_alphabet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data.vocab_size 259 is too small: .* 260"):
        train_tokenizer(TEXTS, ["x"], 259, tmp_path)


def test_offsets_and_bytes_agree_with_numpy_on_random_text() -> None:
    rng = np.random.default_rng(0)
    text = "".join(chr(int(point)) for point in rng.choice([65, 233, 26085, 128578], size=200))
    cuts = np.sort(rng.choice(199, size=30, replace=False) + 1).tolist()
    offsets = list(zip([0, *cuts], [*cuts, 200], strict=True))
    assert bytes_of_offsets(text, offsets).tolist() == [len(text[a:b].encode()) for a, b in offsets]
