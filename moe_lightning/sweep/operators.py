"""The words that a sweep's config has for operators, and the methods that they mean.

A parameter budget is the same for all of them: an operator that stores more for what it takes away must take away more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_lightning.criteria import Scope
from moe_lightning.method import Method
from moe_lightning.trimming import Angular, BlockDrop, ChannelDrop, ExpertDrop, LayerDrop, Merge, Novices

SCOPES: tuple[Scope, ...] = ("layer", "global", "sensitivity")

Maker = Callable[[str, dict[str, Any]], Method]

SCORED: dict[str, Maker] = {
    "delete": lambda _, options: ExpertDrop(**options),
    "keep_router": lambda _, options: ExpertDrop(**options, router="keep"),
    "mean": lambda _, options: Novices(**options, novice="mean"),
    "zero": lambda _, options: Novices(**options, novice="zero"),
    "gate2_mean": lambda _, options: Novices(**options, novice="gate2_mean"),
    "low_rank": lambda rank, options: Novices(**options, novice="low_rank", rank=int(rank)),
}
"""Operators for experts that a criterion chooses, by the word before the colon."""

UNSCORED: dict[str, Maker] = {
    "layer_drop": lambda _, options: LayerDrop(**options),
    "block_drop": lambda mode, options: BlockDrop(**options, **_given("mode", mode)),
    "angular": lambda tokens, options: Angular(**options, **_given("tokens", tokens)),
    "channels": lambda _, options: ChannelDrop(**options),
    "merge": lambda algorithm, options: Merge(**options, **_given("algorithm", algorithm)),
}
"""Operators that rank by themselves."""

USUAL: dict[str, str] = {
    "mone": "mean",
    "mone_l1": "mean",
    "mone_paper": "mean",
    "mone_paper_l1": "mean",
    "variance": "mean",
    "variance_l1": "mean",
    "residual": "gate2_mean",
}
"""What a criterion was published with, where that is not ``delete``."""


def _given(option: str, value: str) -> dict[str, Any]:
    return {option: value} if value else {}


def split_operator(operator: str) -> tuple[str, str]:
    """Return the word before the colon and what stands behind it.

    Raises:
        ValueError: An unknown operator, or a low rank without its rank.
    """
    kind, _, detail = operator.partition(":")
    if kind != "usual" and kind not in SCORED and kind not in UNSCORED:
        known = [*SCORED, "usual", *UNSCORED]
        known[known.index("low_rank")] = "low_rank:RANK"
        raise ValueError(f"unknown operator {operator!r}: choose from {', '.join(known)}")
    if kind == "low_rank" and not (detail.isdecimal() and int(detail) > 0):
        raise ValueError(f"operator {operator!r}: name a rank, e.g. low_rank:16")
    if detail and kind in SCORED and kind != "low_rank":
        raise ValueError(f"operator {operator!r}: {kind} has no options: write {kind}")
    return kind, detail


def usual_operator(criterion: str) -> str:
    """Return the operator that a criterion was published with; for ``residual:RANK`` the map of that rank."""
    family, colon, rank = criterion.partition(":")
    if family == "residual" and colon and int(rank) > 0:
        return f"low_rank:{rank}"
    return USUAL.get(family, "delete")


def operator_method(operator: str, criterion: str, scope: str, parameters: int, seed: int) -> Method:
    """Return the method that an operator means.

    Args:
        operator: As in a config.
        criterion: Name of the criterion; not used by operators that rank by themselves.
        scope: Where the budget holds, likewise.
        parameters: Most parameters that the model may have.
        seed: Seed of the criterion random.

    Raises:
        ValueError: The operator is unknown, or the method refuses the options.
    """
    kind, detail = split_operator(operator)
    if kind in UNSCORED:
        return UNSCORED[kind](detail, {"parameters": parameters})
    return SCORED[kind](detail, {"parameters": parameters, "criterion": criterion, "scope": scope, "seed": seed})
