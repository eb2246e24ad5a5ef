"""Texts beside the splits: another text, or what one of several sources has in a split.

They are for measuring what a model lost on each kind of text. The run neither trains nor calibrates on any document of
them.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from moe_lightning.data.packing import Blocks
from moe_lightning.data.preparation import PreparedText, TextOptions
from moe_lightning.data.sources import open_sources
from moe_lightning.data.splits import HELD_OUT, Piece, survey

logger = logging.getLogger(__name__)


class Domains:
    """Blocks of texts beside the splits, with the run's tokenizer and block size; cached as those of the splits are.

    Args:
        options: The options of the run.
        prepared: What was made of them.
    """

    def __init__(self, options: TextOptions, prepared: PreparedText):
        self._options = options
        self._prepared = prepared
        self._found: dict[tuple[object, ...], Blocks] = {}

    def another_text(self, sources: Sequence[str], num_blocks: int | None) -> Blocks:
        """Return blocks of another text. Documents that the run's own sources hold too are left out.

        Args:
            sources: Its sources. Text field, hub split and chat template are those of the run.
            num_blocks: Blocks wanted; `None` = all.

        Returns:
            The first blocks of its documents, in the order that the run's seed gives, each content once.

        Raises:
            FileNotFoundError: When a source is not there.
            ValueError: When there is no usable text, nothing but documents of the run, or fewer blocks.
        """
        key = ("another text", tuple(sources), num_blocks)
        if key not in self._found:
            self._found[key] = self._read(sources, num_blocks)
        return self._found[key]

    def _read(self, sources: Sequence[str], num_blocks: int | None) -> Blocks:
        options, name = self._options, ", ".join(sources)
        _check_asked(num_blocks, name)
        with _told_of_a_domain():
            corpus = open_sources(sources, options.text_field, options.hub_split, options.cache_dir)
            documents = tqdm(corpus, desc=f"reading {name}", unit="doc", total=len(corpus), disable=None, leave=False)
            found = survey(corpus, documents, options.seed, None, None)
        own = set(self._prepared.survey.hashes)
        pieces = [
            Piece(index, content)
            for index, content in zip(found.indices, found.hashes, strict=True)
            if content not in own
        ]
        if not pieces:
            raise ValueError(
                f"domain {name}: all of its {len(found.indices)} documents are in --data.sources too, so the model may "
                "have been trained on them: name another text, or one of --data.sources, whose held-out documents "
                "test_batches_of gives"
            )
        if len(pieces) < len(found.indices):
            logger.warning(
                "domain %s: %d of %d documents are in --data.sources too and are left out",
                name,
                len(found.indices) - len(pieces),
                len(found.indices),
            )
        blocks = self._prepared.packed(corpus, pieces, num_blocks or 0, name)
        _check_found(blocks, num_blocks, f"domain {name}", "give more text")
        return blocks

    def of_source(self, source: str, split: str, num_blocks: int | None) -> Blocks:
        """Return what one of the run's sources has in a held-out split, packed on its own.

        Args:
            source: One of `--data.sources`, as it is written there.
            split: `validation`, `test` or `calibration`.
            num_blocks: Blocks wanted; `None` = all.

        Returns:
            The blocks. A document that several sources hold belongs to the first of them.

        Raises:
            ValueError: When there is no such source or split, the source has no text in it, or fewer blocks.
        """
        key = (source, split, num_blocks)
        if key not in self._found:
            self._found[key] = self._part(source, split, num_blocks)
        return self._found[key]

    def _part(self, source: str, split: str, num_blocks: int | None) -> Blocks:
        prepared = self._prepared
        _check_asked(num_blocks, source)
        if source not in self._options.sources:
            raise ValueError(
                f"domain {source}: this is none of --data.sources ({', '.join(self._options.sources)}); name one of "
                "them as it is written there"
            )
        if split not in HELD_OUT:
            raise ValueError(f"domain {source}: {split} is no held-out split; these are {', '.join(HELD_OUT)}")
        if split not in prepared.splits:
            raise ValueError(f"domain {source}: there is no {split} split: --data.{split} is 0; give it a size")
        pieces = [piece for piece in prepared.pieces[split] if prepared.corpus.entry_of(piece.index) == source]
        if not pieces:
            reason = (
                "the documents are so few that splits are spans of the whole text, and none of this source lies in "
                f"the {split} span: give more documents"
                if prepared.split_by == "spans"
                else f"none of its documents fell into the {split} split: raise --data.{split}"
            )
            raise ValueError(f"domain {source}: {reason}, or measure another text")
        blocks = prepared.packed(prepared.corpus, pieces, num_blocks or 0, f"{split} of {source}")
        _check_found(blocks, num_blocks, f"the {split} split's part of {source}", f"raise --data.{split}")
        return blocks

    def sources_in(self, split: str) -> list[str]:
        """Return the sources that have text in a split, in the order of `--data.sources`.

        Args:
            split: `train`, `validation`, `test` or `calibration`; without such a split there are none.
        """
        prepared = self._prepared
        found = {prepared.corpus.entry_of(piece.index) for piece in prepared.pieces.get(split, ())}
        return [source for source in dict.fromkeys(self._options.sources) if source in found]


@contextmanager
def _told_of_a_domain() -> Iterator[None]:
    """Let errors of reading name the domain and not the option that the run's own text comes from."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        kind = type(error) if isinstance(error, OSError) else ValueError
        raise kind(str(error).replace("--data.sources", "domain")) from error


def _check_asked(num_blocks: int | None, name: str) -> None:
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"domain {name}: {num_blocks} blocks were asked for; ask for at least 1")


def _check_found(blocks: Blocks, num_blocks: int | None, what: str, remedy: str) -> None:
    if len(blocks) >= (num_blocks or 1):
        return
    info = blocks.info
    if info["kind"] == "chat":
        held = f"{len(blocks)} usable conversations of {info['documents']}"
    elif len(blocks):
        held = f"{len(blocks)} blocks of {blocks.block_size} tokens"
    else:
        held = f"{info['tokens_found']} tokens, fewer than one block of --data.block_size {blocks.block_size}"
    asked = "" if num_blocks is None else f", and {num_blocks} blocks were asked for"
    fewer = f"ask for at most {len(blocks)}, or " if len(blocks) else ""
    raise ValueError(f"{what} has {held}{asked}: {fewer}{remedy}")
