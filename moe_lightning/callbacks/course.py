"""What will happen to a model's structure in the course of a run, known before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from moe_lightning.callbacks.gradual import Act
from moe_lightning.compression import check_methods
from moe_lightning.plan import ModelShape


@dataclass(frozen=True)
class Change:
    """A change of structure that is to come.

    Attributes:
        step: Optimizer step before which it happens; infinity for the end of the run.
        act: What is done.
        first: It happens before everything else of that step, wherever its callback stands in the list.
    """

    step: float
    act: Act
    first: bool = False


@runtime_checkable
class ChangesStructure(Protocol):
    """A callback that changes the structure of the model."""

    def changes(self, trainer: Trainer) -> Iterable[Change]:
        """Return its changes that are still to come, in their order."""


Moment = tuple[float, int]
"""A step, and the place of a callback in the list: callbacks of one step act in the order of the list."""


def course_of(trainer: Trainer) -> list[tuple[Moment, str, Act]]:
    """Return all changes of structure that are to come, in the order in which they happen, with who makes them.

    Args:
        trainer: The trainer, whose callbacks say what they will do.
    """
    course = []
    for place, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(callback, ChangesStructure):
            for change in callback.changes(trainer):
                moment = change.step, -1 if change.first else place
                course.append((moment, type(callback).__name__, change.act))
    return sorted(course, key=lambda item: item[0])


def shape_at(trainer: Trainer, shape: ModelShape, moment: Moment, included: bool = False) -> ModelShape:
    """Return the shape that a model will have at a moment.

    Args:
        trainer: The trainer.
        shape: Shape of the model as it is.
        moment: A step and a place in the list of callbacks.
        included: What happens at this very moment counts, too.

    Raises:
        ValueError: A change does not fit what the changes before it leave, or weights that were pruned would come back.
    """
    for when, owner, act in course_of(trainer):
        if when < moment or (included and when == moment):
            try:
                shape = check_methods(shape, act.methods)
            except ValueError as error:
                raise ValueError(f"{owner} {in_words(when[0])}: {error}") from None
    return shape


def in_words(step: float | str) -> str:
    """Say when something happens.

    Args:
        step: Optimizer step; infinity or ``end`` for the end of the run.
    """
    return "at the end" if step in (math.inf, "end") else f"at step {float(step):.0f}"
