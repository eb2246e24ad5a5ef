"""When the methods of a callback act: all at once, or a pruning method again and again with more zeros each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_lightning.compression import check_methods
from moe_lightning.method import Method
from moe_lightning.plan import ModelShape, Quantize
from moe_lightning.slimming.base import Slimming
from moe_lightning.slimming.schedule import SparsitySchedule


@dataclass(frozen=True)
class Act:
    """What is done at one step.

    Attributes:
        after_steps: Optimizer steps since the first.
        methods: Methods in order, with numbers in the place of schedules.
        sparsity: Share of zeros that the pruning method of a schedule makes; None where there is none.
    """

    after_steps: int
    methods: tuple[Method, ...]
    sparsity: float | None = None


def schedule_of(method: Method) -> SparsitySchedule | None:
    """Return how the sparsity of a method grows; None where the method acts once."""
    return method.schedule if isinstance(method, Slimming) else None


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
    places = [place for place, method in enumerate(methods) if schedule_of(method) is not None]
    if not places:
        return (Act(0, tuple(methods)),)
    if len(places) > 1:
        names = " and ".join(type(methods[place]).__name__ for place in places)
        raise ValueError(f"Compress: {names} have a schedule each: give each a Compress of its own")
    gradual = methods[places[0]]
    schedule = schedule_of(gradual)
    assert isinstance(gradual, Slimming) and schedule is not None
    before, behind = methods[: places[0]], methods[places[0] + 1 :]
    for method in (*before, *behind):
        if isinstance(method, Slimming) and isinstance(method.edit(0, "experts"), Quantize):
            raise ValueError(
                f"Compress: {type(method).__name__} stores integers, which {type(gradual).__name__} could not prune "
                f"further along its schedule: give {type(method).__name__} a Compress of its own, {schedule.steps} "
                "steps later or more"
            )
    acts = {}
    for moment in schedule.moments():
        sparsity = schedule.at(moment)
        acts[moment] = Act(moment, (gradual.at_sparsity(sparsity),), sparsity)
    if before or behind:
        first = acts.get(0, Act(0, ()))
        acts[0] = dataclasses.replace(first, methods=(*before, *first.methods, *behind))
    return tuple(acts[moment] for moment in sorted(acts))


def check_acts(shape: ModelShape, acts: Iterable[tuple[int | float, Act]]) -> ModelShape:
    """Try acts out on a shape, one after the other.

    Args:
        shape: Shape of the model as it is.
        acts: Steps and acts, in the order in which they come.

    Returns:
        The shape that they lead to.

    Raises:
        ValueError: A method does not fit what the acts before it leave, or weights that were pruned would come back.
    """
    for step, act in acts:
        try:
            shape = check_methods(shape, act.methods)
        except ValueError as error:
            raise ValueError(f"Compress at step {step}: {error}") from None
    return shape
