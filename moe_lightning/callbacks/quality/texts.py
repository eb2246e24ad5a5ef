"""Which texts a run is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from moe_lightning.callbacks.compress import compressions_of
from moe_lightning.callbacks.processes import of_all_processes
from moe_lightning.compression.layerwise import need_batches
from moe_lightning.data import BlockLoader, TextDataModule
from moe_lightning.evaluation.comparison import Batch
from moe_lightning.evaluation.quality import Text

Split = Literal["test", "validation"]

LEAST_BLOCKS = 2
"""Of the first text: an interval needs as many."""


def find_texts(
    trainer: Trainer,
    split: Split,
    num_batches: int | None,
    domains: Mapping[str, str | list[str]],
    domain_blocks: int,
    batches: Iterable[Batch] | None,
) -> list[Text]:
    """Return the texts to measure on, the same blocks in all processes: the split, its sources, other domains.

    Args:
        trainer: The trainer.
        split: The split that comes first.
        num_batches: Batches of it; None takes all.
        domains: Sources of further texts, by name.
        domain_blocks: Blocks of each further text; of each of several sources at most so many.
        batches: Batches in the place of the split.

    Raises:
        ValueError: There is no such split, it is too small, a domain cannot be opened, or processes see other blocks.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    has_domains = isinstance(datamodule, TextDataModule)
    if domains and not has_domains:
        raise ValueError("QualityEvaluation: domains need a TextDataModule, which reads them as it reads its own text")
    sources = datamodule.sources_in(split) if has_domains and batches is None else []
    known = _calibration_sources(trainer)
    first = Text(split, _first(trainer, datamodule, split, num_batches, batches), _calibrated(sources, known))
    if first.num_blocks < LEAST_BLOCKS:
        raise ValueError(
            f"QualityEvaluation: the {split} split gives {first.num_blocks} block, and an interval needs at least "
            f"{LEAST_BLOCKS}: raise --data.{split} or num_batches"
        )
    texts = [first]
    for source in sources if len(sources) > 1 else ():
        loader = datamodule.test_batches_of(source, split)
        found = BlockLoader(loader.blocks, datamodule.eval_batch_size, domain_blocks)
        texts.append(Text(source, found, _calibrated([source], known)))
    for name, wanted in domains.items():
        with _of_option(f"domains {name!r}", domain_blocks):
            loader = datamodule.domain_batches(wanted, domain_blocks)
        named = [wanted] if isinstance(wanted, str) else wanted
        texts.append(Text(name, BlockLoader(loader.blocks, datamodule.eval_batch_size), _calibrated(named, known)))
    names = [text.name for text in texts]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(
            f"QualityEvaluation: two texts are called {double!r}: a split, a source of the data and a domain must have "
            "names of their own: give the domain another one"
        )
    if len(set(of_all_processes(trainer, tuple(text.fingerprint for text in texts)))) > 1:
        raise ValueError(
            "QualityEvaluation: the processes see different blocks to measure on, and all must see the same "
            "ones, which they share between them: train with a TextDataModule, or pass batches=..."
        )
    return texts


def _calibration_sources(trainer: Trainer) -> set[str]:
    """Return the sources that the run calibrates on; none where it does not, or on batches of unknown origin."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, TextDataModule):
        return set()
    measuring = [item for item in compressions_of(trainer) if need_batches(item.methods)]
    # A test may be one of a run whose Compress is not in its list.
    calibrates = bool(measuring) or trainer.state.fn == "test"
    unknown = any(item.batches is not None for item in measuring)
    return set(datamodule.sources_in("calibration")) if calibrates and not unknown else set()


def _calibrated(sources: Iterable[str], known: set[str]) -> bool | None:
    """Say whether calibration saw text of some sources; None where they are not known, or those of calibration."""
    named = set(sources)
    return bool(named & known) if named and known else None


@contextmanager
def _of_option(option: str, domain_blocks: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"QualityEvaluation: {option} (domain_blocks {domain_blocks}): {error}") from error


def _first(
    trainer: Trainer, datamodule: Any, split: Split, num_batches: int | None, batches: Iterable[Batch] | None
) -> Iterable[Batch]:
    if batches is None and isinstance(datamodule, TextDataModule):
        try:
            blocks = datamodule.blocks(split)
        except ValueError as error:
            raise ValueError(f"QualityEvaluation: {error}, choose another split, or leave it out") from None
        size = datamodule.eval_batch_size
        there = -(-len(blocks) // size)
        _check_number(num_batches, there, split)
        return BlockLoader(blocks, size, None if num_batches is None else num_batches * size)
    source = batches if batches is not None else _loader(trainer, datamodule, split)
    if source is None:
        raise ValueError(
            f"QualityEvaluation measures on the {split} split, and there is none: train with a TextDataModule, choose "
            "another split, pass batches=..., or leave it out"
        )
    # Copies on the CPU: a loader may give the same memory again, or other blocks the next time.
    with torch.inference_mode(False):
        kept = [
            {name: value.detach().cpu().clone() for name, value in batch.items() if isinstance(value, Tensor)}
            for batch in islice(source, num_batches)
        ]
    _check_number(num_batches, len(kept), split)
    return kept


def _check_number(wanted: int | None, there: int, split: str) -> None:
    if wanted is not None and wanted > there:
        raise ValueError(
            f"QualityEvaluation: num_batches={wanted}, but the {split} split has {there} batches: ask for fewer, or "
            f"raise --data.{split}"
        )


def _loader(trainer: Trainer, datamodule: Any, split: Split) -> Iterable[Batch] | None:
    loaders: Any = trainer.val_dataloaders if split == "validation" else trainer.test_dataloaders
    hook = {"validation": "val_dataloader", "test": "test_dataloader"}[split]
    if loaders is None and hasattr(datamodule, hook):
        loaders = getattr(datamodule, hook)()
    if isinstance(loaders, list | tuple):
        loaders = loaders[0] if loaders else None
    return loaders
