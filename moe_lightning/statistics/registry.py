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
        selector: Whether it chooses whole sets of experts, so that no expert has a score of its own; ``function`` then
            raises ValueError.
    """

    name: str
    needs: frozenset[str]
    function: ScoreFunction
    source: str
    selector: bool = False


@dataclass(frozen=True)
class Family:
    """Criteria whose names carry numbers, e.g. ``power:1,1,1``.

    Attributes:
        name: What stands before the colon.
        form: The whole name with placeholders, for messages.
        make: From what stands behind the colon to the criterion; raises ValueError with what is possible.
    """

    name: str
    form: str
    make: Callable[[str], Criterion]


CRITERIA: dict[str, Criterion] = {}

FAMILIES: dict[str, Family] = {}


def register_criterion(
    name: str, needs: set[str], source: str, selector: bool = False
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that adds a score function to the registry."""

    def add(function: ScoreFunction) -> ScoreFunction:
        CRITERIA[name] = Criterion(name, frozenset(needs), function, source, selector)
        return function

    return add


def register_family(name: str, form: str) -> Callable[[Callable[[str], Criterion]], Callable[[str], Criterion]]:
    """Return a decorator that adds a maker of criteria whose names are ``name:arguments``."""

    def add(make: Callable[[str], Criterion]) -> Callable[[str], Criterion]:
        FAMILIES[name] = Family(name, form, make)
        return make

    return add


def criterion_named(name: str) -> Criterion:
    """Return a criterion by its name.

    Args:
        name: A name of the registry, or one of a family with its numbers (``power:1,1,1``, ``residual:16``).

    Raises:
        ValueError: There is none of that name; the message lists those that there are.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    family, colon, arguments = name.partition(":")
    if colon and family in FAMILIES:
        return FAMILIES[family].make(arguments)
    hint = f" ({FAMILIES[name].form} needs its numbers)" if name in FAMILIES else ""
    known = ", ".join([*sorted(CRITERIA), *sorted(family.form for family in FAMILIES.values())])
    raise ValueError(f"unknown criterion {name!r}{hint}: choose one of {known}")
