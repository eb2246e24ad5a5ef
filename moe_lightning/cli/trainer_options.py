"""Options of the trainer that do not fit each other, before Lightning says so in words of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def clip_validation(config: dict[str, Any]) -> None:
    """Let a run that is shorter than the time between two validations validate once, at its end, and say so.

    A run of ``max_steps`` alone is one epoch of that many batches; Lightning refuses more batches between validations
    than an epoch has.

    Args:
        config: Options of the trainer; changed in place.
    """
    every, steps = config.get("val_check_interval"), int(config.get("max_steps") or -1)
    if isinstance(every, bool) or not isinstance(every, int) or config.get("max_epochs") not in (None, -1):
        return
    if steps <= 0 or config.get("fast_dev_run") or config.get("check_val_every_n_epoch", 1) is None:
        return
    batches, limit = steps * int(config.get("accumulate_grad_batches") or 1), config.get("limit_train_batches")
    if isinstance(limit, int) and not isinstance(limit, bool):
        batches = min(batches, limit)
    if 0 < batches < every:
        config["val_check_interval"] = batches
        print(
            f"note: --trainer.val_check_interval {every} is more than the {batches} batches of the run, which is "
            "validated once, at its end",
            file=sys.stderr,
        )


def processes_of(config: Mapping[str, Any]) -> int:
    """Return how many processes train, over all machines; 1 for each machine where that depends on it.

    Args:
        config: Options of the trainer.
    """
    return _count(config.get("devices")) * int(config.get("num_nodes") or 1)


def _count(devices: Any) -> int:
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() and int(text) > 0 else 1
