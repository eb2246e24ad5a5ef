"""`TextDataModule`: text in, batches of token blocks out."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import lightning

from moe_lightning.data.cache import cache_folder, key_of
from moe_lightning.data.domains import Domains
from moe_lightning.data.packing import Batch, Blocks
from moe_lightning.data.preparation import PreparedText, TextOptions, at_least, prepare_text
from moe_lightning.data.prompts import PromptLoader, read_prompts
from moe_lightning.data.sources import PYTHON_STDLIB
from moe_lightning.data.stream import BlockLoader, TrainStream
from moe_lightning.data.tokenizers import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
            other file is one document), `hub:NAME` or `hub:NAME:CONFIG` for a data set of the Hugging Face hub,
            `python-stdlib`, the library sources of the running Python, or `python-topics`, the topics of its help:
            English prose, about half a megabyte.
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
        seed: Decides the splits and, without order_seed, the order of the training batches.
        order_seed: Decides the order of the training batches alone, with the same splits.
        cache_dir: Folder for cached tokenizers and blocks; the default is `~/.cache/moe_lightning`. It can be deleted
            at any time between runs.

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
        order_seed: int | None = None,
        cache_dir: str | None = None,
    ):
        super().__init__()
        self.options = TextOptions(
            sources=(sources,) if isinstance(sources, str) else tuple(sources),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            block_size=block_size,
            sizes={"validation": validation, "test": test, "calibration": calibration},
            text_field=text_field,
            hub_split=hub_split,
            chat_template=chat_template,
            max_documents=max_documents,
            max_bytes=max_bytes,
            seed=seed,
            cache_dir=cache_folder(cache_dir),
        )
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.order_seed = seed if order_seed is None else order_seed
        at_least("order_seed", self.order_seed, 0)
        at_least("batch_size", self.batch_size, 1)
        at_least("eval_batch_size", self.eval_batch_size, 1)
        self.prompts = prompts
        self.prompts_file = prompts_file
        if prompts is not None and prompts_file is not None:
            raise ValueError("--data.prompts and --data.prompts_file exclude each other: give one")
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self._prepared: PreparedText | None = None
        self._domains: Domains | None = None

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.options.block_size

    def prepare(self) -> "TextDataModule":
        """Read, split, train or load the tokenizer, encode; or find all that in the cache. Idempotent.

        The train split is encoded when it is first used.

        Returns:
            This object: `TextDataModule(...).prepare().calibration_batches(8)`.

        Raises:
            FileNotFoundError: When a source or tokenizer is not there.
            ValueError: When a source holds no usable text, or a split would have no block.
        """
        self._prepare()
        return self

    def _prepare(self) -> PreparedText:
        if self._prepared is None:
            self._prepared = prepare_text(self.options)
            self._tokenizer = self._prepared.tokenizer
        return self._prepared

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer; prepares what is needed for it on first use."""
        if self._tokenizer is None:
            if self.options.tokenizer is not None:
                self._tokenizer = load_tokenizer(self.options.tokenizer)
            else:
                self._tokenizer = self._prepare().tokenizer
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
        prepared = self._prepare()
        if split not in prepared.splits:
            raise ValueError(f"there is no {split} split: --data.{split} is 0; give it a size")
        return prepared.checked_blocks(split)

    def describe(self) -> dict[str, Any]:
        """Return what the data are, as plain values: for the origin of a plan, for reports.

        Returns:
            `sources`, `seed`, `block_size`, `split_by`, `duplicates`, `empty`, `tokenizer` (fingerprint), `vocab_size`,
            `fingerprint` (of everything), and per split `documents`, `fingerprint` and, if it was encoded (train is
            encoded only when it is used), `blocks`, `tokens`, `bytes`.
        """
        prepared = self._prepare()
        return {
            "sources": list(self.options.sources),
            "seed": self.options.seed,
            "block_size": self.options.block_size,
            "split_by": prepared.split_by,
            "duplicates": prepared.survey.num_duplicates,
            "empty": prepared.survey.num_empty,
            "tokenizer": prepared.tokenizer_fingerprint,
            "vocab_size": len(prepared.tokenizer),
            "fingerprint": key_of(splits=prepared.fingerprints),
            "splits": prepared.describe(),
        }

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Fill the cache, on one process per machine."""
        trainer = self.trainer
        if trainer is not None and trainer.predicting and self.options.tokenizer is not None:
            return
        self.prepare()
        if trainer is not None and trainer.state.fn == "fit":
            self.blocks("train")

    def setup(self, stage: str) -> None:
        """Open tokenizer and blocks, from the cache that `prepare_data` filled.

        Args:
            stage: `fit`, `validate`, `test` or `predict`. For `predict` with a given tokenizer no source is read.
        """
        if stage == "predict":
            # a missing file is better known before a model runs
            count, processes = len(read_prompts(self.prompts, self.prompts_file)), self._rank[1]
            if count < processes:
                raise ValueError(
                    f"{count} prompt(s) cannot be shared by {processes} processes: use --trainer.devices {count} "
                    "or give more prompts"
                )
        if stage == "predict" and self.options.tokenizer is not None:
            _ = self.tokenizer
        else:
            self.prepare()
        if stage == "fit":
            self.blocks("train")

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
            seed=self.order_seed,
            length=length,
            rank=self._rank[0],
            world_size=self._rank[1],
            fingerprint=self._prepare().fingerprints["train"],
        )

    @property
    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _eval_loader(self, blocks: Blocks) -> BlockLoader:
        rank, world_size = self._rank
        return BlockLoader(blocks, self.eval_batch_size, rank=rank, world_size=world_size, equal_ranks=world_size > 1)

    def val_dataloader(self) -> BlockLoader | list[Any]:
        """Return the validation batches, or nothing when `--data.validation` is 0."""
        return self._eval_loader(self.blocks("validation")) if self.options.sizes["validation"] else []

    def test_dataloader(self) -> BlockLoader:
        """Return the test batches."""
        return self._eval_loader(self.blocks("test"))

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
                f"{num_batches} calibration batches of {self.eval_batch_size} blocks were asked for, but the "
                f"calibration split has {len(blocks)} blocks: ask for at most {len(blocks) // self.eval_batch_size}, "
                "or raise --data.calibration"
            )
        rank, world_size = self._rank
        return BlockLoader(blocks, self.eval_batch_size, num_blocks, rank=rank, world_size=world_size)

    def further_batches(self, num_batches: int | None = None) -> Iterable[Batch]:
        """Return the batches of the calibration split that `calibration_batches(num_batches)` leaves out.

        Args:
            num_batches: Batches that are taken already; `None` = the whole split.

        Returns:
            A sized iterable of batches, for as many passes as wanted.

        Raises:
            ValueError: When there are none.
        """
        blocks = self.blocks("calibration")
        first = len(blocks) if num_batches is None else num_batches * self.eval_batch_size
        if first >= len(blocks):
            raise ValueError(
                f"there are no further calibration batches: calibration_batches={num_batches} takes all {len(blocks)} "
                f"blocks of the calibration split: set it to less than {-(-len(blocks) // self.eval_batch_size)}, or "
                "raise --data.calibration"
            )
        rank, world_size = self._rank
        return BlockLoader(blocks, self.eval_batch_size, rank=rank, world_size=world_size, first_block=first)

    def _beside_the_splits(self) -> Domains:
        if self._domains is None:
            self._domains = Domains(self.options, self._prepare())
        return self._domains

    def domain_batches(self, sources: str | list[str], num_blocks: int | None = None) -> BlockLoader:
        """Return batches of another text, with this tokenizer and block size: what a model does on it was not trained.

        Args:
            sources: As the option `sources`. Documents that the data hold too are left out.
            num_blocks: Blocks, `eval_batch_size` of them in a batch; `None` = all.

        Returns:
            A sized iterable, always of the same batches; several processes share the blocks between them.

        Raises:
            FileNotFoundError: When a source is not there.
            ValueError: When there is no usable text, nothing but documents of these data, or fewer blocks.
        """
        names = [sources] if isinstance(sources, str) else sources
        return self._eval_loader(self._beside_the_splits().another_text(names, num_blocks))

    def test_batches_of(self, source: str, split: str = "test", num_blocks: int | None = None) -> BlockLoader:
        """Return batches of what one of the sources has in a held-out split, packed on its own.

        Args:
            source: One of the option `sources`, as it is written there.
            split: `validation`, `test` or `calibration`.
            num_blocks: Blocks; `None` = all.

        Returns:
            As `domain_batches`.

        Raises:
            ValueError: When there is no such source or split, the source has no text in it, or fewer blocks.
        """
        return self._eval_loader(self._beside_the_splits().of_source(source, split, num_blocks))

    def sources_in(self, split: str) -> list[str]:
        """Return those of the option `sources` that have text in a split.

        Args:
            split: `train`, `validation`, `test` or `calibration`; without such a split there are none.
        """
        return self._beside_the_splits().sources_in(split)

    def predict_dataloader(self) -> PromptLoader:
        """Return the prompts: `input_ids` and `attention_mask` padded on the left, and `prompt`, the texts."""
        rank, world_size = self._rank
        prompts = read_prompts(self.prompts, self.prompts_file)
        return PromptLoader(prompts, self.tokenizer, self.eval_batch_size, rank=rank, world_size=world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint must know of the data: the tokenizer."""
        folder = self._prepared.tokenizer_folder if self._prepared else self.options.tokenizer
        return {"tokenizer": self._tokenizer_fingerprint(), "tokenizer_folder": folder}

    def _tokenizer_fingerprint(self) -> str:
        return self._prepared.tokenizer_fingerprint if self._prepared else tokenizer_fingerprint(self.tokenizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was made with the same tokenizer.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: When the tokenizer is another one: token ids would mean other words, silently.
        """
        if state_dict.get("tokenizer") != self._tokenizer_fingerprint():
            folder = state_dict.get("tokenizer_folder")
            raise ValueError(
                "the checkpoint was trained with another tokenizer than these data have"
                + ("" if self.options.tokenizer else " (a new one was trained, because data or options changed)")
                + f": give its own by --data.tokenizer{f' {folder}' if folder else ''}"
            )
