"""How much of a model a gradual compression has taken, while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Curve = Literal["cubic", "linear"]


# No base class: the YAML parser takes a dataclass with one for a class to be named.


def _check(options: Any, what: str) -> None:
    """Check the options of a schedule.

    Args:
        options: The schedule.
        what: What start and end are shares of, for messages.
    """
    name = type(options).__name__
    for option in ("start", "end"):
        value = getattr(options, option)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{name}: {option} must be a number, a share of {what} from 0 to 1, got {value!r}: write it "
                "without quotes, e.g. 0.5"
            )
    if not 0 <= options.start < options.end < 1:
        raise ValueError(
            f"{name}: start={options.start} and end={options.end} must satisfy 0 <= start < end < 1: they are "
            f"shares of {what}, e.g. start 0 and end 0.5"
        )
    for option in ("steps", "every"):
        value = getattr(options, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {option} must be a whole number, at least 1, got {value!r}")
    if options.every > options.steps:
        raise ValueError(
            f"{name}: every={options.every} is beyond steps={options.steps}, so that there would be one step "
            "only: lower every, or give a number instead of a schedule"
        )
    if options.shape not in get_args(Curve):
        raise ValueError(f"{name}: unknown shape {options.shape!r}: choose {' or '.join(get_args(Curve))}")


def _share_at(options: Any, steps_done: int) -> float:
    """Return ``end + (start - end) (1 - t / steps)^3``, or the same without the power, held at ``end``.

    Source: 1710.01878, equation 1 (cubic).
    """
    left = 1 - min(max(steps_done, 0), options.steps) / options.steps
    return options.end + (options.start - options.end) * (left**3 if options.shape == "cubic" else left)


def _moments(options: Any) -> tuple[int, ...]:
    steps = sorted({*range(0, options.steps, options.every), options.steps})
    return tuple(step for step in steps if _share_at(options, step) > 0)


@dataclass(frozen=True)
class SparsitySchedule:
    """Prune a little every few steps, so that training can make up for it in between.

    ``s(t) = end + (start - end) (1 - t / steps)^3``, or the same without the power for ``linear``: the cubic one takes
    most while there is most to take. It is held at ``end`` from then on. Steps count from the one at which pruning
    begins.

    Attributes:
        start: Share of zeros that the first step makes, in [0, 1); 0 leaves the first step out.
        end: Share of zeros in the end, above start and below 1.
        steps: Optimizer steps from the first to the last.
        every: Steps between two; the last is at `steps` in any case.
        shape: cubic or linear.

    Source: 1710.01878, equation 1 (cubic).
    """

    start: float
    end: float
    steps: int
    every: int = 10
    shape: Curve = "cubic"

    def __post_init__(self) -> None:
        """Check the options."""
        _check(self, "zeros")

    def at(self, steps_done: int) -> float:
        """Return the share after a number of steps.

        Args:
            steps_done: Steps since the schedule began; `end` holds from `steps` on.
        """
        return _share_at(self, steps_done)

    def moments(self) -> tuple[int, ...]:
        """Return the steps at which something is taken, ascending, counted from the first of the schedule."""
        return _moments(self)


@dataclass(frozen=True)
class RatioSchedule:
    """Take a few experts every so many steps, so that training can make up for it in between.

    The shares follow the curves of `SparsitySchedule`, and are shares of the experts of the *original* model. A moment
    at which the rounded number of experts does not grow is left out. Each of the others measures the model anew.

    Attributes:
        start: Share of the experts that the first step takes, in [0, 1); 0 leaves the first step out.
        end: Share of the experts that are gone in the end, above start and below 1.
        steps: Optimizer steps from the first to the last.
        every: Steps between two; the last is at `steps` in any case.
        shape: cubic or linear.
    """

    start: float
    end: float
    steps: int
    every: int = 50
    shape: Curve = "linear"

    def __post_init__(self) -> None:
        """Check the options."""
        _check(self, "the experts")

    def at(self, steps_done: int) -> float:
        """Return the share after a number of steps.

        Args:
            steps_done: Steps since the schedule began; `end` holds from `steps` on.
        """
        return _share_at(self, steps_done)

    def moments(self) -> tuple[int, ...]:
        """Return the steps at which something is taken, ascending, counted from the first of the schedule."""
        return _moments(self)


Schedule = SparsitySchedule | RatioSchedule
