"""The options that all methods for whole experts share."""

from __future__ import annotations

import math

from moe_lightning.criteria.selection import Scope
from moe_lightning.statistics import criterion_named


def check_budget(owner: str, ratio: float | None, keep: float | None, criterion: str, scope: Scope) -> None:
    """Check a method's options as soon as it is made.

    Args:
        owner: Name of the method, for messages.
        ratio: Share of the experts to remove.
        keep: Number of experts to keep a layer.
        criterion: Name of the criterion.
        scope: Where the budget holds.

    Raises:
        ValueError: Both or none of ``ratio`` and ``keep``, one out of range, or an unknown name; the message names the
            option.
    """
    if (ratio is None) == (keep is None):
        raise ValueError(f"{owner} needs either ratio or keep, and not both: got ratio={ratio}, keep={keep}")
    if ratio is not None and not 0.0 <= ratio < 1.0:
        raise ValueError(f"{owner}: ratio must lie in [0, 1), got {ratio}: 0.25 removes a quarter of the experts")
    if keep is not None and not 0 <= keep < math.inf:
        raise ValueError(f"{owner}: keep must not be negative and must be a number, got {keep}")
    if scope not in ("layer", "global"):
        raise ValueError(f"{owner}: unknown scope {scope!r}: choose layer or global")
    if keep is not None and scope == "layer" and keep != int(keep):
        raise ValueError(f"{owner}: keep must be a whole number with scope=layer, got {keep}")
    try:
        criterion_named(criterion)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None
