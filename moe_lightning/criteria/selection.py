"""From scores and a budget to the experts that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Scope = Literal["layer", "global"]


def round_half_up(value: float) -> int:
    """Round as ``floor(x + 0.5)``; Python's own rounding takes halves to the even neighbour.

    A ratio like 0.29 times 50 experts means 14.5, though its product in binary is a hair below.
    """
    return math.floor(round(value, 9) + 0.5)


def kept_counts(
    candidates: Sequence[Sequence[int]], ratio: float | None, keep: float | None, scope: Scope
) -> tuple[list[int], int]:
    """Turn a budget into numbers of experts.

    Args:
        candidates: Experts of each layer that may go or stay.
        ratio: Share to remove; None where ``keep`` is given.
        keep: Number to keep a layer; under ``global`` the mean over layers.
        scope: Where the budget holds.

    Returns:
        The number kept in each layer under ``layer`` (under ``global`` an even share, for information), and the total
        kept.

    Raises:
        ValueError: More would be kept than there are.
    """
    sizes = [len(layer) for layer in candidates]
    if keep is not None and any(keep > size for size in sizes) and scope == "layer":
        raise ValueError(f"keep={keep} is more than the {min(sizes)} experts of a layer: keep fewer")
    if scope == "layer":
        counts = [size - round_half_up((ratio or 0.0) * size) if keep is None else int(keep) for size in sizes]
        return counts, sum(counts)
    total = sum(sizes)
    # The number that goes is what is rounded: round((M - n) * L) of 2406.02500, as with a ratio.
    kept = total - round_half_up((ratio or 0.0) * total if keep is None else total - keep * len(sizes))
    if kept > total:
        raise ValueError(f"keep={keep} is more than the mean of {total / len(sizes):g} experts a layer: keep fewer")
    return [kept // len(sizes)] * len(sizes), kept


def kept_experts(
    score_LE: Tensor,
    candidates: Sequence[Sequence[int]],
    *,
    ratio: float | None = None,
    keep: float | None = None,
    scope: Scope = "layer",
    floor: int = 0,
) -> list[tuple[int, ...]]:
    """Choose the experts that stay. Ties go by layer, then by expert: the same on all machines.

    Args:
        score_LE: Scores, ``[layers, experts]``, larger = keep.
        candidates: For each layer the experts to choose from.
        ratio: Share to remove, in [0, 1); counts round as ``floor(x + 0.5)``.
        keep: Number to keep a layer; under ``global`` the mean over layers.
        scope: ``layer`` holds the budget in each layer, ``global`` over all layers with raw scores.
        floor: Experts that every layer keeps at least.

    Returns:
        For each layer the experts that stay, ascending.

    Raises:
        ValueError: The floor and the budget exclude each other.

    Source: 2406.02500 (layer-wise and global Expert Drop); the lowest scores go, of equal ones the first.
    """
    counts, total = kept_counts(candidates, ratio, keep, scope)
    ranked = sorted(
        (float(score_LE[row, expert]), row, expert) for row, experts in enumerate(candidates) for expert in experts
    )
    left = [len(layer) for layer in candidates]
    least = [floor] * len(left) if scope == "global" else [max(count, floor) for count in counts]
    to_drop = sum(left) - total
    gone: set[tuple[int, int]] = set()
    for _, row, expert in ranked:
        if len(gone) == to_drop:
            break
        if left[row] > least[row]:
            left[row] -= 1
            gone.add((row, expert))
    if len(gone) < to_drop:
        raise ValueError(
            f"the budget keeps {total} experts in {len(left)} layers but every layer must keep {floor}: "
            f"keep at least {floor * len(left)}"
        )
    return [
        tuple(sorted(expert for expert in experts if (row, expert) not in gone))
        for row, experts in enumerate(candidates)
    ]
