"""From options to blocks on disk: read, split, train or load the tokenizer, encode; all of it cached."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moe_lightning.data.cache import key_of
from moe_lightning.data.chat import resolve_chat_template
from moe_lightning.data.packing import Blocks, open_blocks, pack_chats, pack_texts
from moe_lightning.data.sources import Corpus, open_sources
from moe_lightning.data.splits import Piece, Splits, Survey, split_documents, survey
from moe_lightning.data.tokenizers import SMALLEST_VOCABULARY, load_tokenizer, tokenizer_fingerprint, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Bytes of text set aside per token when a split is asked for in blocks, before the tokenizer is known; doubled (and the
# tokenizer trained again, without them) until the blocks are full.
_BYTES_PER_TOKEN = (6, 12, 24, 48)

# Bytes left out between two spans, per token of a block: about one block of text.
_GAP_BYTES_PER_TOKEN = 4

# Not counts that say something to a person.
_INTERNAL_INFO = frozenset({"dtype", "kind", "block_size", "tokens_found"})


@dataclass(frozen=True)
class TextOptions:
    """The options of `TextDataModule` that decide what its blocks are; explained there.

    Raises:
        ValueError: When an option is out of its range.
    """

    sources: tuple[str, ...]
    tokenizer: str | None
    vocab_size: int
    block_size: int
    sizes: dict[str, int | float]
    text_field: str
    hub_split: str
    chat_template: str | None
    max_documents: int | None
    max_bytes: int | None
    seed: int
    cache_dir: Path

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("--data.sources is empty: name a file, a glob, hub:NAME, python-stdlib or python-topics")
        at_least("block_size", self.block_size, 2)
        at_least("seed", self.seed, 0)
        at_least("max_documents", self.max_documents, 1)
        at_least("max_bytes", self.max_bytes, 1)
        if self.tokenizer is None and self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--data.vocab_size {self.vocab_size}: must be at least {SMALLEST_VOCABULARY} "
                "(256 bytes and the special tokens)"
            )
        for name, size in self.sizes.items():
            if isinstance(size, bool) or not size >= 0 or (size >= 1 and size != int(size)):
                raise ValueError(
                    f"--data.{name} {size}: give a share of the text below 1, a whole number of blocks, "
                    "or 0 for no such split"
                )
        shares = sum(size for size in self.sizes.values() if size < 1)
        if shares >= 1:
            raise ValueError(
                f"{' + '.join('--data.' + name for name in self.sizes)} take {shares:g} of the text: "
                "nothing is left to train on"
            )

    def num_blocks(self, split: str) -> int:
        """Return the number of blocks that a split was asked for, 0 when it was not asked for in blocks."""
        size = self.sizes.get(split, 0)
        return int(size) if size >= 1 else 0


class PreparedText:
    """Documents divided into splits, a tokenizer, and the blocks of each split.

    Held-out splits are encoded by `prepare_text`; train, which may be large, when its blocks are first asked for:
    compressing a model that exists needs no training data.

    Args:
        options: The options.
        corpus: The documents.
        survey: What reading them found.
        splits: Which document is in which split.
        tokenizer: The tokenizer.
        tokenizer_folder: Where it is from.
    """

    def __init__(
        self,
        options: TextOptions,
        corpus: Corpus,
        survey: Survey,
        splits: Splits,
        tokenizer: "PreTrainedTokenizerFast",
        tokenizer_folder: str,
    ):
        self.survey = survey
        self.split_by = splits.by
        self.tokenizer = tokenizer
        self.tokenizer_folder = tokenizer_folder
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.corpus = corpus
        self.pieces = splits.pieces
        self._options = options
        self._blocks: dict[str, Blocks] = {}
        self.fingerprints = {
            name: self.key(corpus, pieces, options.num_blocks(name)) for name, pieces in self.pieces.items()
        }

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits in use."""
        return tuple(self.pieces)

    def _template(self, corpus: Corpus) -> str | None:
        return resolve_chat_template(self.tokenizer, self._options.chat_template) if corpus.is_chat else None

    def key(self, corpus: Corpus, pieces: Sequence[Piece], max_blocks: int) -> str:
        """Return the key of the blocks of some pieces: of all that decides what they are.

        Args:
            corpus: What the pieces are pieces of.
            pieces: The pieces, in order.
            max_blocks: Blocks at most; 0 = all.
        """
        return key_of(
            pieces=_names(pieces),
            tokenizer=self.tokenizer_fingerprint,
            block_size=self._options.block_size,
            max_blocks=max_blocks,
            template=self._template(corpus),
        )

    def packed(self, corpus: Corpus, pieces: Sequence[Piece], max_blocks: int, what: str) -> Blocks:
        """Return the blocks of some pieces, from the cache, or encoded now.

        Args:
            corpus: What the pieces are pieces of.
            pieces: The pieces, in order.
            max_blocks: Blocks at most; 0 = all.
            what: Name of the text, for the progress bar.

        Returns:
            The blocks, memory-mapped; there may be none.
        """
        options, template = self._options, self._template(corpus)
        folder = options.cache_dir / "blocks" / self.key(corpus, pieces, max_blocks)
        if (folder / "info.json").is_file():
            pass
        elif template is not None:
            progress = tqdm(pieces, desc=f"encoding {what}", unit="doc", disable=None, leave=False)
            chats = (corpus[piece.index] for piece in progress)
            pack_chats(chats, self.tokenizer, template, options.block_size, folder, max_blocks or None)
        else:
            texts = _texts(corpus, pieces, f"encoding {what}")
            pack_texts(texts, self.tokenizer, options.block_size, folder, max_blocks or None)
        return open_blocks(folder)

    def blocks(self, split: str) -> Blocks:
        """Return the blocks of a split, from the cache, or encoded now.

        Args:
            split: One of `splits`.

        Returns:
            The blocks, memory-mapped; there may be none.
        """
        if split not in self._blocks:
            max_blocks = self._options.num_blocks(split)
            self._blocks[split] = self.packed(self.corpus, self.pieces[split], max_blocks, split)
        return self._blocks[split]

    def checked_blocks(self, split: str) -> Blocks:
        """Return the blocks of a split; warn of conversations that were cut or left out.

        Args:
            split: One of `splits`.

        Returns:
            The blocks, at least one.

        Raises:
            ValueError: When there is none.
        """
        is_new = split not in self._blocks
        blocks = self.blocks(split)
        _check(split, blocks, self._options.block_size, warn=is_new)
        return blocks

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return counts and fingerprint of every split."""
        found: dict[str, dict[str, Any]] = {}
        for name, pieces in self.pieces.items():
            info = self._blocks[name].info if name in self._blocks else {"documents": len(pieces)}
            found[name] = {key: value for key, value in info.items() if key not in _INTERNAL_INFO}
            found[name]["fingerprint"] = self.fingerprints[name]
        return found


def at_least(option: str, value: int | None, smallest: int) -> None:
    """Check an option that has a smallest value.

    Args:
        option: Its name.
        value: Its value; `None` passes.
        smallest: The smallest value.

    Raises:
        ValueError: When the value is smaller.
    """
    if value is not None and value < smallest:
        raise ValueError(f"--data.{option} {value}: must be at least {smallest}")


def prepare_text(options: TextOptions) -> PreparedText:
    """Read, split, train or load the tokenizer, encode; or find all that in the cache.

    Args:
        options: The options.

    Returns:
        Splits, tokenizer and the blocks of the held-out splits.

    Raises:
        FileNotFoundError: When a source or tokenizer is not there.
        ValueError: When a source holds no usable text, or a split would have no block.
    """
    # the tokenizer first: it may be missing, and reading takes time
    given = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    corpus = open_sources(options.sources, options.text_field, options.hub_split, options.cache_dir)
    documents = tqdm(corpus, desc="reading documents", unit="doc", total=len(corpus), disable=None, leave=False)
    found = survey(corpus, documents, options.seed, options.max_documents, options.max_bytes)
    for bytes_per_token in _BYTES_PER_TOKEN:
        splits = _split(corpus, found, options, bytes_per_token)
        if given is None:
            tokenizer, folder = _trained_tokenizer(corpus, splits.pieces["train"], options)
        else:
            tokenizer, folder = given, str(options.tokenizer)
        prepared = PreparedText(options, corpus, found, splits, tokenizer, folder)
        held_out = [name for name in prepared.splits if name != "train"]
        short = [name for name in held_out if len(prepared.blocks(name)) < options.num_blocks(name)]
        if not short:
            break
    else:
        raise ValueError(
            f"--data.{short[0]} {options.sizes[short[0]]}: only {len(prepared.blocks(short[0]))} blocks of "
            f"{options.block_size} tokens could be filled; ask for fewer"
        )
    for name in held_out:
        _check(name, prepared.blocks(name), options.block_size, warn=True)
    if splits.by == "spans":
        logger.warning(
            "%d documents are too few to give each split documents of its own: the splits are spans of the text",
            len(found.indices),
        )
    if len(tokenizer) < options.vocab_size and given is None:
        logger.warning(
            "--data.vocab_size %d: the train split is so small that the tokenizer has only %d tokens",
            options.vocab_size,
            len(tokenizer),
        )
    return prepared


def _split(corpus: Corpus, found: Survey, options: TextOptions, bytes_per_token: int) -> Splits:
    total = sum(found.sizes_bytes)
    if corpus.is_chat:  # a conversation is a block, whatever its length; some may turn out not to be usable
        bytes_per_block = total / len(found.sizes_bytes) * bytes_per_token / _BYTES_PER_TOKEN[0]
    else:
        bytes_per_block = options.block_size * bytes_per_token
    targets = {name: size * (total if size < 1 else bytes_per_block) for name, size in options.sizes.items() if size}
    try:
        return split_documents(found, targets, _GAP_BYTES_PER_TOKEN * options.block_size, can_cut=not corpus.is_chat)
    except ValueError as error:
        raise ValueError(f"{error} (the sources hold {total} bytes in {len(found.indices)} documents)") from None


def _texts(corpus: Corpus, pieces: Sequence[Piece], what: str) -> Iterator[str]:
    for piece in tqdm(pieces, desc=what, unit="doc", disable=None, leave=False):
        yield piece.text_of(corpus[piece.index])


def _names(pieces: Sequence[Piece]) -> list[str]:
    return [f"{piece.content}:{piece.start}:{piece.stop}" for piece in pieces]


def _trained_tokenizer(
    corpus: Corpus, pieces: Sequence[Piece], options: TextOptions
) -> tuple["PreTrainedTokenizerFast", str]:
    texts = _texts(corpus, pieces, "training the tokenizer")
    tokenizer, folder = train_tokenizer(texts, _names(pieces), options.vocab_size, options.cache_dir)
    return tokenizer, str(folder)


def _check(split: str, blocks: Blocks, block_size: int, warn: bool) -> None:
    info = blocks.info
    if info["kind"] == "chat" and not len(blocks):
        raise ValueError(
            f"--data.sources: no conversation of the {split} split is usable: {info['without_loss']} of "
            f"{info['documents']} have no assistant's turn within --data.block_size {block_size}, "
            f"and {info['with_special_tokens']} spell out special tokens"
        )
    if not len(blocks):
        advice = "give more text" if split == "train" else f"raise --data.{split} (or set it to 0), give more text"
        raise ValueError(
            f"the {split} split has {info['tokens_found']} tokens, fewer than one block of --data.block_size "
            f"{block_size}: {advice}, or lower --data.block_size"
        )
    for count, text in {
        "truncated": f"are longer than --data.block_size {block_size} and were cut",
        "without_loss": "have no assistant's turn within the block and were left out",
        "with_special_tokens": "spell out special tokens of the tokenizer and were left out",
    }.items():
        if warn and info.get(count):
            logger.warning("%s: %d of %d conversations %s", split, info[count], info["documents"], text)
