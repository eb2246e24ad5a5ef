"""What there is to know of a cell beside its numbers: how much of it was measured, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lightning.compression import ModuleStatus
from moe_lightning.compression.layerwise import measures
from moe_lightning.method import Method
from moe_lightning.slimming.view import FALLBACKS

MOST_NAMED = 8
"""Names in a line."""


@dataclass(frozen=True)
class Measured:
    """How much of a cell was made from measurements.

    Attributes:
        starved: Experts of which matrices were made smaller and that fewer calibration tokens reach than min_tokens.
        fallbacks: Matrices that were made without the measurement that their method asks for.
        matrices: Matrices that were made smaller.
    """

    starved: int = 0
    fallbacks: int = 0
    matrices: int = 0

    def __str__(self) -> str:
        parts = []
        if self.starved:
            parts.append(f"{self.starved:,} starved experts")
        if self.fallbacks:
            parts.append(f"{self.fallbacks:,} of {self.matrices:,} matrices without measurement")
        return ", ".join(parts)


def measured(methods: Sequence[Method], modules: Mapping[str, ModuleStatus], min_tokens: int) -> Measured:
    """Count what few tokens, or none, reached.

    Args:
        methods: What was applied.
        modules: What became of each module.
        min_tokens: Below it an expert is starved.
    """
    statuses = [status for module in modules.values() for status in module.matrices.values()]
    fallen = [any(part.startswith(FALLBACKS) for part in status.split(", then ")) for status in statuses]
    starved = 0
    if any(map(measures, methods)):
        for module in modules.values():
            owners = {int(name.partition(".")[0]) for name in module.matrices if name[0].isdigit()}
            starved += sum(module.tokens.get(owner, min_tokens) < min_tokens for owner in owners)
    return Measured(starved, sum(fallen), len(statuses))


def own_passes(methods: Sequence[Method]) -> bool:
    """Say whether methods measure what the pass that all cells share cannot know.

    That is: the inputs of matrices, the model as an earlier method leaves it, or the sensitivity of layers.

    Args:
        methods: In the order in which they are applied.
    """
    return any(measures(method) or method.measures_sensitivity for method in methods) or any(
        method.needs for method in methods[1:]
    )


def named(names: Sequence[str]) -> str:
    """Return names in a line, and how many there are more.

    Args:
        names: The names.
    """
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
