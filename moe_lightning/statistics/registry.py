"""The registry of criteria that ``Statistics.score`` reads; the criteria stand in ``moe_lightning.criteria``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# (statistics, seed) -> score. Statistics itself reads this registry, so its class is not named here.
ScoreFunction = Callable[[Any, int], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A way to score experts.

    Attributes:
        name: Its name in options and files.
        needs: Groups of statistics that it reads.
        function: ``(statistics, seed) -> score [layers, experts]``, larger = keep.
        source: Paper and equation.
    """

    name: str
    needs: frozenset[str]
    function: ScoreFunction
    source: str


CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str, needs: set[str], source: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that adds a score function to the registry."""

    def add(function: ScoreFunction) -> ScoreFunction:
        CRITERIA[name] = Criterion(name, frozenset(needs), function, source)
        return function

    return add


def criterion_named(name: str) -> Criterion:
    """Return a criterion by its name.

    Raises:
        ValueError: There is none of that name; the message lists those that there are.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}: choose one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]
