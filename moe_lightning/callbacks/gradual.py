"""When the methods of a callback act: all at once, or one of them again and again, taking more each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_lightning.method import Method
from moe_lightning.plan import Quantize
from moe_lightning.slimming.base import Slimming


@dataclass(frozen=True)
class Act:
    """What is done at one step.

    Attributes:
        after_steps: Optimizer steps since the first.
        methods: Methods in order, with numbers in the place of schedules.
        share: What the method of a schedule has taken by then; None where there is none.
        taken: What that is a share of.
    """

    after_steps: int
    methods: tuple[Method, ...]
    share: float | None = None
    taken: Literal["zeros", "of the experts"] = "zeros"


def acts_of(methods: Sequence[Method]) -> tuple[Act, ...]:
    """Cut a list of methods into acts.

    Only a method with a schedule acts again. The others act once, at the first step, in their place in the list: those
    before it find the weights whole, those behind it as its first act left them.

    Args:
        methods: Methods in the order in which they are applied.

    Returns:
        Acts, ascending; one where no method has a schedule.

    Raises:
        ValueError: Two methods with schedules, or one beside a method that quantises: integers are not pruned further.
    """
    places = [place for place, method in enumerate(methods) if method.schedule is not None]
    if not places:
        return (Act(0, tuple(methods)),)
    if len(places) > 1:
        names = " and ".join(type(methods[place]).__name__ for place in places)
        raise ValueError(f"Compress: {names} have a schedule each: give each a Compress of its own")
    gradual = methods[places[0]]
    schedule = gradual.schedule
    assert schedule is not None
    before, behind = methods[: places[0]], methods[places[0] + 1 :]
    prunes = isinstance(gradual, Slimming)
    for method in (*before, *behind):
        if prunes and isinstance(method, Slimming) and isinstance(method.edit(0, "experts"), Quantize):
            raise ValueError(
                f"Compress: {type(method).__name__} stores integers, which {type(gradual).__name__} could not prune "
                f"further along its schedule: give {type(method).__name__} a Compress of its own, "
                f"{schedule.moments()[-1]} steps later or more"
            )
    acts = {}
    for moment in schedule.moments():
        share = schedule.at(moment)
        acts[moment] = Act(moment, (gradual.at_share(share),), share, "zeros" if prunes else "of the experts")
    if before or behind:
        first = acts.get(0, Act(0, ()))
        acts[0] = dataclasses.replace(first, methods=(*before, *first.methods, *behind))
    return tuple(acts[moment] for moment in sorted(acts))
