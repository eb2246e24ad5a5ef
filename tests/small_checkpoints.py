"""A checkpoint folder with its tokenizer, and the text for it: what the commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_lightning as ml
from tests.models import tiny_mixtral
from tests.small_runs import write_texts


def write_checkpoint(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write texts and a tiny random Mixtral that knows their tokens.

    Args:
        folder: Gets ``texts``, ``cache`` and ``hub``, the checkpoint.
        **changes: Fields of the model's config.

    Returns:
        Options of the data module.
    """
    write_texts(folder / "texts")
    data: dict[str, Any] = {
        "sources": f"{folder}/texts/*.txt",
        "vocab_size": 300,
        "block_size": 16,
        "batch_size": 2,
        "validation": 0,
        "test": 8,
        "calibration": 8,
        "cache_dir": str(folder / "cache"),
    }
    tokenizer = ml.TextDataModule(**data).prepare().tokenizer
    model = tiny_mixtral(vocab_size=len(tokenizer))
    model.save_pretrained(folder / "hub")
    tokenizer.save_pretrained(folder / "hub")
    return data
