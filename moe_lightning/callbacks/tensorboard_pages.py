"""Pages of TensorBoard's custom scalars: charts that belong together, from several callbacks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

Pages = Mapping[str, Mapping[str, list[Any]]]
"""By page and chart: the kind of chart, and regular expressions of its tags (matched from their beginning)."""

EXPERTS: Pages = {
    "experts": {
        "load": ["Multiline", ["experts_train/load_max$", "experts_train/load_min$"]],
        "routing entropy": ["Multiline", ["experts_train/routing_entropy$", "experts_val/routing_entropy$"]],
        "novice mass": ["Multiline", ["experts_train/novice_mass$", "experts_val/novice_mass$"]],
    }
}
RECOVERY: Pages = {
    "recovery": {
        "loss": ["Multiline", ["recovery/loss$", "val/loss$"]],
        "recovered share": ["Multiline", ["recovery/recovered_share$"]],
        "stage": ["Multiline", ["run/stage$"]],
    }
}
QUALITY: Pages = {
    "quality": {
        "perplexity": ["Multiline", ["quality(_before)?/(.*/)?perplexity$"]],
        "perplexity, in units of that before": ["Multiline", ["quality/(.*/)?perplexity_ratio$"]],
        "KL from the model before": ["Multiline", ["quality/(.*/)?divergence$"]],
        "same next token as the model before": ["Multiline", ["quality/(.*/)?agreement$"]],
        "error of what leaves each block": ["Multiline", ["quality/layer_error/"]],
        "bytes": ["Multiline", ["quality(_before)?/bytes$", "quality(_before)?/bytes_on_disk$"]],
        "tokens per second": ["Multiline", ["quality(_before)?/(prefill|decode)_tokens_per_second$"]],
    }
}

# TensorBoard shows the last layout of a run, so that each writer's must hold all pages.
_WRITTEN: WeakKeyDictionary[Any, dict[str, dict[str, list[Any]]]] = WeakKeyDictionary()


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers of a run.

    Args:
        trainer: The trainer.
    """
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def add_pages(trainer: Trainer, pages: Pages) -> None:
    """Add pages to those that a run has already.

    Args:
        trainer: The trainer.
        pages: The pages.
    """
    if not trainer.is_global_zero:
        return
    for logger in tensorboards(trainer):
        writer = logger.experiment
        layout = _WRITTEN.setdefault(writer, {})
        before = copy.deepcopy(layout)
        for page, charts in pages.items():
            layout.setdefault(page, {}).update(charts)
        if layout != before:
            writer.add_custom_scalars(layout)
