"""Reading calibration batches, and counting them over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Batches = Iterable[Mapping[str, Any]]


def inputs_and_mask(batch: Mapping[str, Any], number: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the tokens of a batch, and which of them count, on a device.

    Args:
        batch: ``input_ids [batch, sequence]`` and optional ``attention_mask`` (0 = padding).
        number: Its number, for messages.
        device: Where to.

    Returns:
        ``[batch, sequence]``, and bool ``[batch, sequence]`` or None where all tokens count.

    Raises:
        ValueError: The batch has no ``input_ids``.
    """
    if "input_ids" not in batch:
        raise ValueError(f"calibration batch {number} has no 'input_ids', only {sorted(batch)}")
    mask = batch.get("attention_mask")
    mask = None if mask is None or bool(mask.bool().all()) else mask.bool().to(device)
    return batch["input_ids"].to(device), mask


def over_all_ranks(values: Tensor) -> Tensor:
    """Return sums over all processes of a distributed run; the values themselves where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def checked_counts(num_batches: int, num_tokens: int, device: torch.device) -> int:
    """Return the number of batches of all processes.

    Raises:
        ValueError: Nothing was seen.
    """
    # Every rank learns the same numbers before one of them may stop: a rank without batches waits for the others' sums.
    num_batches, num_tokens = over_all_ranks(torch.tensor([num_batches, num_tokens], device=device)).tolist()
    if not num_batches:
        raise ValueError("there are no calibration batches: give at least one (calibration_batches >= 1)")
    if not num_tokens:
        raise ValueError("the calibration batches hold no token outside the padding")
    return num_batches


def size_in_words(count: int) -> str:
    """Write a number of bytes with a fitting unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
