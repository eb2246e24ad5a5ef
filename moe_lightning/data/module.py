"""`TextDataModule`: text in, batches of token blocks out."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning
import torch
from tqdm import tqdm

from moe_lightning.data.cache import cache_folder, key_of
from moe_lightning.data.chat import resolve_chat_template
from moe_lightning.data.packing import Batch, Blocks, open_blocks, pack_chats, pack_texts
from moe_lightning.data.prompts import PromptLoader, read_prompts
from moe_lightning.data.sources import PYTHON_STDLIB, Corpus, open_sources
from moe_lightning.data.splits import HELD_OUT, Piece, Splits, Survey, split_documents, survey
from moe_lightning.data.stream import BlockLoader, TrainStream
from moe_lightning.data.tokenizers import SMALLEST_VOCABULARY, load_tokenizer, tokenizer_fingerprint, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Bytes of text set aside per token when a split is asked for in blocks, before the tokenizer is known; doubled (and the
# tokenizer trained again, without them) until the blocks are full.
_BYTES_PER_TOKEN = (6, 12, 24, 48)

# Bytes left out between two spans, per token of a block: about one block of text.
_GAP_BYTES_PER_TOKEN = 4


class TextDataModule(lightning.LightningDataModule):
    """Text as blocks of tokens, in four splits that share no document: train, validation, test, calibration.

    A document is a file, a line of a .jsonl file or a row of a table. Documents with equal content are used once. With
    fewer than four documents per split the splits are contiguous spans of the text with a gap between them. Everything
    is a function of the sources and the options: the same on every machine and rank.

    Plain text is packed: documents follow each other, each ended by the tokenizer's end-of-text token, cut into blocks.
    Conversations (.jsonl lines or rows with `messages`) fill one block each, padded; only the assistant's turns are in
    the loss. Tokenizers and blocks are cached under a key of content and settings.

    Args:
        sources: One source or a list: files or globs (`texts/**/*.md`; .jsonl and .parquet files are tables, every
            other file is one document), `hub:NAME` or `hub:NAME:CONFIG` for a data set of the Hugging Face hub, or
            `python-stdlib`, the library sources of the running Python.
        tokenizer: A folder with a tokenizer (a checkpoint folder, for example) or a hub name. Without one, a byte-level
            BPE is trained on the train split.
        vocab_size: Number of tokens of a BPE that is trained here, at least 260.
        block_size: Tokens per block.
        batch_size: Blocks per training batch on each device.
        eval_batch_size: Blocks per batch of the other splits and prompts per batch; the default is `batch_size`.
        validation: Size of the validation split: below 1 a share of the text, from 1 on a number of blocks, 0 = none.
        test: Size of the test split, likewise.
        calibration: Size of the calibration split, likewise. Compression looks at these documents only.
        text_field: Key (.jsonl) or column (tables) that holds the text.
        hub_split: Split of hub data sets, slices such as `train[:10000]` included.
        chat_template: Template of conversations: a Jinja file or the word `chatml`; the default is the tokenizer's own.
        max_documents: Use only this many documents (the first ones of the order that the seed gives).
        max_bytes: Use only as many documents as fit into this many bytes of text.
        prompts: Texts that `predict` continues.
        prompts_file: A file of prompts: one per line, or .jsonl with a field `prompt`.
        seed: Decides the splits and the order of the training batches.
        cache_dir: Folder for cached tokenizers and blocks; the default is `~/.cache/moe_lightning`.

    Raises:
        ValueError: When an option is out of its range.
    """

    def __init__(
        self,
        sources: str | list[str] = PYTHON_STDLIB,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        block_size: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        validation: int | float = 0.05,
        test: int | float = 0.05,
        calibration: int | float = 0.05,
        text_field: str = "text",
        hub_split: str = "train",
        chat_template: str | None = None,
        max_documents: int | None = None,
        max_bytes: int | None = None,
        prompts: list[str] | None = None,
        prompts_file: str | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ):
        super().__init__()
        self.sources = [sources] if isinstance(sources, str) else list(sources)
        self.tokenizer_name = tokenizer
        self.vocab_size_wanted = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.sizes: dict[str, int | float] = {"validation": validation, "test": test, "calibration": calibration}
        self.text_field = text_field
        self.hub_split = hub_split
        self.chat_template = chat_template
        self.max_documents = max_documents
        self.max_bytes = max_bytes
        self.prompts = prompts
        self.prompts_file = prompts_file
        self.seed = seed
        self.cache_dir = cache_folder(cache_dir)
        self._check_options()
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._tokenizer_folder = tokenizer or ""
        self._blocks: dict[str, Blocks] = {}
        self._split_by = ""
        self._survey: Survey | None = None
        self._fingerprints: dict[str, str] = {}

    def _check_options(self) -> None:
        for name, value, smallest in [
            ("block_size", self.block_size, 2),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("max_documents", self.max_documents, 1),
            ("max_bytes", self.max_bytes, 1),
        ]:
            if value is not None and value < smallest:
                raise ValueError(f"--data.{name} {value}: must be at least {smallest}")
        if self.tokenizer_name is None and self.vocab_size_wanted < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--data.vocab_size {self.vocab_size_wanted}: must be at least {SMALLEST_VOCABULARY} "
                "(256 bytes and the special tokens)"
            )
        if not self.sources:
            raise ValueError("--data.sources is empty: name a file, a glob, hub:NAME or python-stdlib")
        for name, size in self.sizes.items():
            if isinstance(size, bool) or size < 0 or (size > 1 and size != int(size)):
                raise ValueError(
                    f"--data.{name} {size}: a share of the text below 1, a whole number of blocks, or 0 for no such split"
                )
        shares = sum(size for size in self.sizes.values() if size < 1)
        if shares >= 1:
            raise ValueError(
                f"--data.validation, --data.test and --data.calibration take {shares:g} of the text: nothing is left to train on"
            )
        if self.prompts is not None and self.prompts_file is not None:
            raise ValueError("--data.prompts and --data.prompts_file exclude each other: give one")

    # What is read, split, encoded

    def prepare(self) -> "TextDataModule":
        """Read, split, train or load the tokenizer, encode; or find all that in the cache. Idempotent.

        Returns:
            This object: `TextDataModule(...).prepare().calibration_batches(8)`.

        Raises:
            FileNotFoundError: When a source or tokenizer is not there.
            ValueError: When a source holds no usable text, or a split would have no block.
            RuntimeError: When a hub name cannot be loaded.
        """
        if self._blocks:
            return self
        if self.tokenizer_name is not None:
            self._tokenizer = load_tokenizer(self.tokenizer_name)  # first: it may be missing, and reading takes time
        corpus = open_sources(self.sources, self.text_field, self.hub_split, self.cache_dir)
        documents = tqdm(corpus, desc="reading documents", unit="doc", total=len(corpus), disable=None, leave=False)
        self._survey = survey(corpus, documents, self.seed, self.max_documents, self.max_bytes)
        for bytes_per_token in _BYTES_PER_TOKEN:
            splits = self._split(corpus, self._survey, bytes_per_token)
            tokenizer = self._tokenizer_for(corpus, splits.pieces["train"])
            blocks = {name: self._encode(corpus, name, pieces, tokenizer) for name, pieces in splits.pieces.items()}
            short = [name for name in HELD_OUT if name in blocks and len(blocks[name]) < self._num_blocks(name)]
            if not short:
                break
        else:
            raise ValueError(
                f"--data.{short[0]} {self.sizes[short[0]]}: only {len(blocks[short[0]])} blocks of {self.block_size} tokens "
                "could be filled; ask for fewer"
            )
        self._check_blocks(blocks)
        self._warn_of_dropped(blocks)
        if splits.by == "spans":
            logger.warning(
                "%d documents are too few to give each split documents of its own: the splits are contiguous spans of the text",
                len(self._survey.indices),
            )
        self._tokenizer, self._blocks, self._split_by = tokenizer, blocks, splits.by
        return self

    def _num_blocks(self, name: str) -> int:
        size = self.sizes.get(name, 0)
        return int(size) if size >= 1 else 0

    def _split(self, corpus: Corpus, found: Survey, bytes_per_token: int) -> Splits:
        total = sum(found.sizes_bytes)
        mean = total / len(found.sizes_bytes)
        targets: dict[str, float] = {}
        for name, size in self.sizes.items():
            if 0 < size < 1:
                targets[name] = size * total
            elif size >= 1:
                # a conversation is a block, whatever its length
                targets[name] = size * (mean if corpus.is_chat else self.block_size * bytes_per_token)
        try:
            return split_documents(found, targets, _GAP_BYTES_PER_TOKEN * self.block_size, can_cut=not corpus.is_chat)
        except ValueError as error:
            raise ValueError(f"{error} (the sources hold {total} bytes in {len(found.indices)} documents)") from None

    def _tokenizer_for(self, corpus: Corpus, pieces: Sequence[Piece]) -> "PreTrainedTokenizerFast":
        if self.tokenizer_name is not None:
            assert self._tokenizer is not None
            return self._tokenizer
        texts = self._texts(corpus, pieces, "training the tokenizer")
        names = [f"{piece.content}:{piece.start}:{piece.stop}" for piece in pieces]
        tokenizer, folder = train_tokenizer(texts, names, self.vocab_size_wanted, self.cache_dir)
        self._tokenizer_folder = str(folder)
        if len(tokenizer) < self.vocab_size_wanted:
            logger.warning(
                "--data.vocab_size %d: the train split is so small that the tokenizer has only %d tokens",
                self.vocab_size_wanted,
                len(tokenizer),
            )
        return tokenizer

    def _texts(self, corpus: Corpus, pieces: Sequence[Piece], what: str) -> Iterator[str]:
        for piece in tqdm(pieces, desc=what, unit="doc", disable=None, leave=False):
            yield piece.text_of(corpus[piece.index])

    def _encode(
        self, corpus: Corpus, name: str, pieces: Sequence[Piece], tokenizer: "PreTrainedTokenizerFast"
    ) -> Blocks:
        template = resolve_chat_template(tokenizer, self.chat_template) if corpus.is_chat else None
        max_blocks = self._num_blocks(name) or None
        key = key_of(
            pieces=[f"{piece.content}:{piece.start}:{piece.stop}" for piece in pieces],
            tokenizer=tokenizer_fingerprint(tokenizer),
            block_size=self.block_size,
            max_blocks=max_blocks,
            template=template,
        )
        self._fingerprints[name] = key
        folder = self.cache_dir / "blocks" / key
        if not (folder / "info.json").is_file():
            if template is not None:
                progress = tqdm(pieces, desc=f"encoding {name}", unit="doc", disable=None, leave=False)
                chats = (corpus[piece.index] for piece in progress)
                pack_chats(chats, tokenizer, template, self.block_size, folder, max_blocks)
            else:
                texts = self._texts(corpus, pieces, f"encoding {name}")
                pack_texts(texts, tokenizer, self.block_size, folder, max_blocks)
        return open_blocks(folder)

    def _check_blocks(self, blocks: dict[str, Blocks]) -> None:
        for name, found in blocks.items():
            if len(found):
                continue
            if found.info["kind"] == "chat":
                raise ValueError(
                    f"--data.sources: no conversation of the {name} split is usable: {found.info['without_loss']} of "
                    f"{found.info['documents']} have no assistant's turn within --data.block_size {self.block_size}, and "
                    f"{found.info['with_special_tokens']} spell out special tokens"
                )
            advice = "give more text" if name == "train" else f"raise --data.{name} (or set it to 0), give more text"
            raise ValueError(
                f"the {name} split has {found.info['tokens_found']} tokens, fewer than one block of --data.block_size "
                f"{self.block_size}: {advice}, or lower --data.block_size"
            )

    def _warn_of_dropped(self, blocks: dict[str, Blocks]) -> None:
        for name, found in blocks.items():
            for key, text in {
                "truncated": f"are longer than --data.block_size {self.block_size} and were cut",
                "without_loss": "have no assistant's turn within the block and were left out",
                "with_special_tokens": "spell out special tokens of the tokenizer and were left out",
            }.items():
                if found.info.get(key):
                    logger.warning(
                        "%s: %d of %d conversations %s", name, found.info[key], found.info["documents"], text
                    )

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer; prepares what is needed for it on first use."""
        if self._tokenizer is None:
            if self.tokenizer_name is not None:
                self._tokenizer = load_tokenizer(self.tokenizer_name)
            else:
                self.prepare()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids: what the model's embedding must have at least."""
        return len(self.tokenizer)

    def blocks(self, split: str) -> Blocks:
        """Return the blocks of a split.

        Args:
            split: `train`, `validation`, `test` or `calibration`.

        Returns:
            The blocks.

        Raises:
            ValueError: When there is no such split.
        """
        self.prepare()
        if split not in self._blocks:
            raise ValueError(f"there is no {split} split: --data.{split} is 0; give it a size")
        return self._blocks[split]

    def describe(self) -> dict[str, Any]:
        """Return what the data are, as plain values: for the origin of a plan, for reports.

        Returns:
            `sources`, `seed`, `block_size`, `split_by`, `duplicates`, `empty`, `tokenizer` (fingerprint), `vocab_size`,
            `fingerprint` (of everything), and per split `documents`, `blocks`, `tokens`, `bytes`, `fingerprint`.
        """
        self.prepare()
        assert self._survey is not None
        splits = {
            name: {
                key: value
                for key, value in found.info.items()
                if key not in ("dtype", "kind", "block_size", "tokens_found")
            }
            | {"fingerprint": self._fingerprints[name]}
            for name, found in self._blocks.items()
        }
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        return {
            "sources": list(self.sources),
            "seed": self.seed,
            "block_size": self.block_size,
            "split_by": self._split_by,
            "duplicates": self._survey.num_duplicates,
            "empty": self._survey.num_empty,
            "tokenizer": tokenizer,
            "vocab_size": self.vocab_size,
            "fingerprint": key_of(splits=json.dumps(splits, sort_keys=True), tokenizer=tokenizer),
            "splits": splits,
        }

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Fill the cache, on one process per machine."""
        if self._needs_blocks():
            self.prepare()

    def setup(self, stage: str) -> None:
        """Open tokenizer and blocks, from the cache that `prepare_data` filled.

        Args:
            stage: `fit`, `validate`, `test` or `predict`. For `predict` with a given tokenizer no source is read.
        """
        if stage == "predict":
            read_prompts(self.prompts, self.prompts_file)  # a missing file is better known before a model runs
        if stage == "predict" and not self._needs_blocks():
            _ = self.tokenizer
        else:
            self.prepare()

    def _needs_blocks(self) -> bool:
        predicting = self.trainer is not None and self.trainer.predicting
        return not (predicting and self.tokenizer_name is not None)

    def train_dataloader(self) -> TrainStream:
        """Return the training stream.

        With `max_steps` (and no `max_epochs`) one epoch is the whole run, `max_steps * accumulate_grad_batches`
        batches; otherwise one epoch is one pass over the blocks.

        Returns:
            The stream, at its first batch.

        Raises:
            ValueError: When the trainer has an option that such a stream cannot follow.
        """
        length = None
        trainer = self.trainer
        if trainer is not None:
            for option in ("overfit_batches", "reload_dataloaders_every_n_epochs"):
                if getattr(trainer, option):
                    raise ValueError(
                        f"--trainer.{option} does not go with one resumable stream of batches; to overfit, give little "
                        "text by --data.max_documents"
                    )
            if trainer.max_steps > 0 and trainer.max_epochs in (None, -1):
                length = trainer.max_steps * trainer.accumulate_grad_batches
        return TrainStream(
            self.blocks("train"),
            self.batch_size,
            seed=self.seed,
            length=length,
            rank=self._rank[0],
            world_size=self._rank[1],
            fingerprint=self._fingerprints["train"],
        )

    @property
    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, split: str) -> BlockLoader:
        rank, world_size = self._rank
        return BlockLoader(
            self.blocks(split), self.eval_batch_size, rank=rank, world_size=world_size, equal_ranks=world_size > 1
        )

    def val_dataloader(self) -> BlockLoader | list[Any]:
        """Return the validation batches, or nothing when `--data.validation` is 0."""
        return self._loader("validation") if self.sizes["validation"] else []

    def test_dataloader(self) -> BlockLoader:
        """Return the test batches."""
        return self._loader("test")

    def calibration_batches(self, num_batches: int | None = None) -> Iterable[Batch]:
        """Return batches of the calibration split, always the same ones in the same order.

        Args:
            num_batches: How many batches of `eval_batch_size` blocks; `None` = the whole split. Several processes share
                these blocks between them.

        Returns:
            A sized iterable of batches, for as many passes as wanted.

        Raises:
            ValueError: When the split has fewer.
        """
        blocks = self.blocks("calibration")
        num_blocks = len(blocks) if num_batches is None else num_batches * self.eval_batch_size
        if num_blocks > len(blocks) or num_blocks < 1:
            raise ValueError(
                f"{num_batches} calibration batches of {self.eval_batch_size} blocks were asked for, but the calibration "
                f"split has {len(blocks)} blocks: ask for 1 to {len(blocks) // self.eval_batch_size}, or raise --data.calibration"
            )
        rank, world_size = self._rank
        return BlockLoader(blocks, self.eval_batch_size, num_blocks, rank=rank, world_size=world_size)

    def predict_dataloader(self) -> PromptLoader:
        """Return the prompts: `input_ids` and `attention_mask` padded on the left, and `prompt`, the texts."""
        rank, world_size = self._rank
        prompts = read_prompts(self.prompts, self.prompts_file)
        return PromptLoader(prompts, self.tokenizer, self.eval_batch_size, rank=rank, world_size=world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint must know of the data: the tokenizer."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer), "tokenizer_folder": str(self._tokenizer_folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: When the tokenizer is another one: token ids would mean other words, silently.
        """
        if state_dict.get("tokenizer") != tokenizer_fingerprint(self.tokenizer):
            folder = state_dict.get("tokenizer_folder")
            raise ValueError(
                "the checkpoint was trained with another tokenizer than these data have"
                + ("" if self.tokenizer_name else " (a new one was trained, because data or options changed)")
                + f": give its own by --data.tokenizer{f' {folder}' if folder else ''}"
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch; strings stay.

        Args:
            batch: The batch.
            device: The device.
            dataloader_idx: Not used.

        Returns:
            The batch on the device.
        """
        return cast(Any, super().transfer_batch_to_device(batch, device, dataloader_idx))
