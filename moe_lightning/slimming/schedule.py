"""How sparsity grows while a model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Curve = Literal["cubic", "linear"]


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
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"SparsitySchedule: {name} must be a number, a share of zeros from 0 to 1, got {value!r}: write "
                    "it without quotes, e.g. 0.5"
                )
        if not 0 <= self.start < self.end < 1:
            raise ValueError(
                f"SparsitySchedule: start={self.start} and end={self.end} must satisfy 0 <= start < end < 1: "
                "they are shares of zeros, e.g. start 0 and end 0.5"
            )
        for name in ("steps", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SparsitySchedule: {name} must be a whole number, at least 1, got {value!r}")
        if self.every > self.steps:
            raise ValueError(
                f"SparsitySchedule: every={self.every} is beyond steps={self.steps}, so that there would be one step "
                "only: lower every, or give a number instead of a schedule"
            )
        if self.shape not in get_args(Curve):
            raise ValueError(f"SparsitySchedule: unknown shape {self.shape!r}: choose {' or '.join(get_args(Curve))}")

    def at(self, steps_done: int) -> float:
        """Return the share of zeros after a number of steps.

        Args:
            steps_done: Steps since pruning began; `end` holds from `steps` on.
        """
        left = 1 - min(max(steps_done, 0), self.steps) / self.steps
        return self.end + (self.start - self.end) * (left**3 if self.shape == "cubic" else left)

    def moments(self) -> tuple[int, ...]:
        """Return the steps at which something is pruned, ascending, counted from the one at which pruning begins."""
        steps = sorted({*range(0, self.steps, self.every), self.steps})
        return tuple(step for step in steps if self.at(step) > 0)
