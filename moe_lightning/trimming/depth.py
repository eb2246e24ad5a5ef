"""What the methods that make a model less deep share: their budget, and the mean similarities that they rank by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.criteria.selection import round_half_up
from moe_lightning.plan import CompressionPlan, Edit, ModelShape


@dataclass(frozen=True)
class DepthBudget:
    """How much of a model's depth goes: exactly one of four.

    Attributes:
        owner: Name of the method, for messages.
        noun: What it removes, in the plural, for messages.
        count: How many go.
        ratio: Share that goes, in [0, 1]; counts round as ``floor(x + 0.5)``.
        parameters: Parameters that the model has at most afterwards.
        bytes: Bytes that its parameters take at most afterwards.
    """

    owner: str
    noun: str
    count: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: None or several are given, or one is out of range.
        """
        options = {name: getattr(self, name) for name in ("count", "ratio", "parameters", "bytes")}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"{self.owner} needs exactly one of count, ratio, parameters and bytes: got "
                f"{', '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
            )
        whole = isinstance(self.count, int) and not isinstance(self.count, bool) and self.count >= 0
        if self.count is not None and not whole:
            raise ValueError(
                f"{self.owner}: count must be a whole number of {self.noun} and not negative, got {self.count}"
            )
        if self.ratio is not None and not 0.0 <= self.ratio <= 1.0:
            raise ValueError(
                f"{self.owner}: ratio must lie in [0, 1], got {self.ratio}: 0.25 removes a quarter of the {self.noun}"
            )
        for name in ("parameters", "bytes"):
            value = options[name]
            if value is not None and not value > 0:
                raise ValueError(
                    f"{self.owner}: {name} must be more than 0, got {value}: it is what the model may have"
                )

    def number(self, shape: ModelShape, candidates: int, most: int, edits_of: Callable[[int], Sequence[Edit]]) -> int:
        """Say how many go.

        Args:
            shape: Shape of the model as it is.
            candidates: How many there are: ``ratio`` is a share of these.
            most: How many may go.
            edits_of: Edits that remove a given number.

        Returns:
            The number; for a target the smallest that meets it, 0 where the model meets it already.

        Raises:
            ValueError: More would go than may, or the target is out of reach.
        """
        if self.parameters is not None or self.bytes is not None:
            return self._number_for_target(shape, most, edits_of)
        number = self.count if self.count is not None else round_half_up((self.ratio or 0.0) * candidates)
        if number > most:
            given = f"count={self.count}" if self.count is not None else f"ratio={self.ratio} removes {number}, which"
            raise ValueError(
                f"{self.owner}: {given} is more than can go: the model has {candidates} {self.noun} at this point, "
                f"of which at most {most} can be removed: set count to at most {most}"
            )
        return int(number)

    def _number_for_target(self, shape: ModelShape, most: int, edits_of: Callable[[int], Sequence[Edit]]) -> int:
        name = "parameters" if self.parameters is not None else "bytes"
        target = getattr(self, name)
        size = getattr(shape, name)
        for number in range(most + 1):
            size = getattr(CompressionPlan(tuple(edits_of(number))).check(shape), name)
            if size <= target:
                return number
        raise ValueError(
            f"{self.owner}: {name}={target} is out of reach: with {most} {self.noun} removed the model still has "
            f"{size}: raise {name} to that, or combine {self.owner} with another method"
        )


def means(owner: str, total: Tensor, amount: Tensor) -> Tensor:
    """Divide sums by the number of tokens (or sequences) behind them.

    Args:
        owner: Name of the method, for messages.
        total: Sums, float64.
        amount: What they are sums over, float64, of a shape that broadcasts.

    Returns:
        Means, float64 on the CPU.

    Raises:
        ValueError: There were no tokens, or a mean is not finite, so that an order would be arbitrary.
    """
    mean = (total / amount).cpu()
    if not bool(torch.isfinite(mean).all()):
        reason = "no calibration token was seen" if bool((amount == 0).any()) else "a hidden state overflowed"
        raise ValueError(f"{owner}: the similarity that it ranks by is not finite ({reason}): calibrate on other data")
    return mean


def first_highest(score: Tensor) -> list[int]:
    """Return positions by falling score; of equal ones the first comes first, on all machines."""
    values = score.tolist()
    return sorted(range(len(values)), key=lambda place: (-values[place], place))
