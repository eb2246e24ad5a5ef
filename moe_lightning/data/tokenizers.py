"""Tokenizers: loading one, training a byte-level BPE, and how many bytes of text each token stands for."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lightning.data.cache import atomic_folder, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING, MESSAGE_START, MESSAGE_END)

# Byte-level BPE starts from the 256 bytes and the special tokens.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Any of these makes a folder one with a tokenizer; a configuration file alone does not.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def holds_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds a tokenizer.

    Args:
        folder: A folder; it need not exist.

    Returns:
        Whether there is a file with a vocabulary in it.
    """
    return any((Path(folder) / file).is_file() for file in _VOCABULARY_FILES)


def load_tokenizer(name: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a folder or of a hub repository.

    Args:
        name: A folder with `tokenizer.json` (a checkpoint folder, for example), or a hub name.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: When a folder holds no tokenizer (a model must never get another tokenizer than its own), or
            a hub repository cannot be reached.
        ValueError: When what is there is not a fast tokenizer, or has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    if path.is_dir():
        if not holds_tokenizer(path):
            raise FileNotFoundError(
                f"the folder {path} holds no tokenizer ({', '.join(_VOCABULARY_FILES[:3])}, ...): name the tokenizer "
                "that its model was trained with by --data.tokenizer FOLDER_OR_HUB_NAME"
            )
    elif path.exists() or path.is_absolute() or str(name).startswith((".", "~")):
        raise FileNotFoundError(f"--data.tokenizer: {path} is not a folder; name a folder with tokenizer.json in it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else str(name))
    except Exception as error:
        if path.is_dir():
            raise ValueError(f"--data.tokenizer: cannot read the tokenizer in {path}: {error}") from error
        raise FileNotFoundError(
            f"--data.tokenizer: there is no folder {str(name)!r} here (looked in {Path.cwd()}) and no such tokenizer "
            f"could be loaded from the hub ({type(error).__name__}); check the name and the network"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"--data.tokenizer: {name} is a {type(tokenizer).__name__}, which is not backed by the library tokenizers; "
            "convert it to tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--data.tokenizer: the tokenizer of {name} names no end-of-text token (eos_token) to separate documents"
        )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], content_hashes: Sequence[str], vocab_size: int, cache_folder: Path
) -> tuple["PreTrainedTokenizerFast", Path]:
    """Train a byte-level BPE, or load it from the cache when the same texts were seen with the same settings.

    Special tokens: `<|endoftext|>` (id 0), `<|pad|>` (1), and `<|im_start|>`, `<|im_end|>` of the ChatML template.

    Args:
        texts: The texts; not read when the cache has the tokenizer.
        content_hashes: A hash of each text: with `vocab_size` the key of the cache.
        vocab_size: Wanted number of tokens, at least 260. A small text may give fewer.
        cache_folder: Folder for cached tokenizers.

    Returns:
        The tokenizer, and the folder where it lies.

    Raises:
        ValueError: When `vocab_size` is smaller than the alphabet.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--data.vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens make "
            f"{SMALLEST_VOCABULARY}"
        )
    key = key_of(
        kind="byte-level-bpe", hashes=list(content_hashes), vocab_size=vocab_size, version=tokenizers.__version__
    )
    folder = cache_folder / "tokenizers" / key
    if not (folder / "tokenizer.json").is_file():
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=sys.stderr.isatty(),
        )
        trained.train_from_iterator(texts, trainer)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=trained,
            eos_token=END_OF_TEXT,
            pad_token=PADDING,
            additional_special_tokens=[MESSAGE_START, MESSAGE_END],
        )
        wrapped.chat_template = CHATML_TEMPLATE
        with atomic_folder(folder) as new:
            wrapped.save_pretrained(new)
    # read back even when just trained: a run that trains and a run that finds it cached have the same object
    return load_tokenizer(folder), folder


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a hash of what a tokenizer does: vocabulary, merges, normalisation, special tokens.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        32 hex digits, the same before and after `save_pretrained`.
    """
    description = json.loads(_plain_copy(tokenizer).to_str())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return key_of(
        tokenizer=hashlib.blake2b(json.dumps(description, sort_keys=True).encode()).hexdigest(), special=special
    )


def padding_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the id to pad with: that of the padding token, or of the end of text where there is none."""
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(found)


def _plain_copy(tokenizer: "PreTrainedTokenizerFast") -> Any:
    # a copy: truncation, padding and the treatment of special tokens are switched without touching the user's object
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


class TextEncoder:
    """Turns texts into token ids and the number of UTF-8 bytes that each token stands for.

    For every text the bytes sum to exactly those of the text. With a byte-level BPE without normalisation the bytes of
    a token depend on its id only (`byte_table`). Otherwise they follow from the offsets: a token stands for the text
    from the end of its predecessor to its own end, the last one also for what is left; so white space that a normaliser
    swallows counts, and of several tokens for one character the first counts.

    Special tokens that are spelled out in a text are encoded as plain text: documents cannot inject them.

    Args:
        tokenizer: A fast tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self._backend = _plain_copy(tokenizer)
        self._backend.encode_special_tokens = True
        self.eos_id = int(tokenizer.eos_token_id)
        first = tokenizer("")["input_ids"][:1]
        # Tokenizers that begin every text with a token of their own (<s>) get it at the start of every document.
        self.prefix = [int(first[0])] if first and first[0] == tokenizer.bos_token_id else []
        self.byte_table = byte_table(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Encode texts, without any special token.

        Args:
            texts: The texts.

        Returns:
            For each text the ids (int64 [tokens]) and, without a byte table, the bytes (int64 [tokens]).
        """
        # the fast variant leaves out offsets
        encode_batch = self._backend.encode_batch if self.byte_table is None else self._backend.encode_batch_fast
        found: list[tuple[np.ndarray, np.ndarray | None]] = []
        for text, encoding in zip(texts, encode_batch(list(texts), add_special_tokens=False), strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int64)
            found.append((ids, None if self.byte_table is not None else bytes_of_offsets(text, encoding.offsets)))
        return found


def bytes_of_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Share the UTF-8 bytes of a text among its tokens.

    Args:
        text: The text.
        offsets: First character, and character after the last one, of every token.

    Returns:
        Bytes [tokens], int64; their sum is that of the text (if there is a token at all).
    """
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    # bytes before character i, for i = 0 ... len(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    return np.diff(before[ends], prepend=0)


def byte_table(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray | None:
    """Return the bytes that each token id stands for, where the id alone decides that.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        Bytes [vocabulary], int64, 0 for special tokens; `None` when the tokenizer is not a byte-level one, normalises
        its input, or adds or drops white space.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if description.get("normalizer") or '"ByteLevel"' not in json.dumps(description.get("pre_tokenizer")):
        return None
    if description["model"].get("type") != "BPE" or description["model"].get("byte_fallback"):
        return None
    table = np.zeros(len(tokenizer), dtype=np.int64)
    for token, number in description["model"]["vocab"].items():
        table[number] = len(token)  # in the byte-level alphabet one character stands for one byte
    for added in description["added_tokens"]:
        table[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    # the proof of the pudding, with everything that normalisers and pre-tokenizers are known to change
    probe = "  Hello  w\u00f6rld\t\r\n\n \u65e5\u672c e\u0301 \ufb01 \U0001f642 \u00a0x  "
    backend = _plain_copy(tokenizer)
    backend.encode_special_tokens = True
    ids = backend.encode(probe, add_special_tokens=False).ids
    return table if int(table[ids].sum()) == len(probe.encode()) else None
