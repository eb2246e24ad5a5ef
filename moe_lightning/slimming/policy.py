"""What holds for every method that measures the inputs of matrices: how much memory, and how few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Starved = Literal["warn", "top_up", "fallback", "error"]
"""What becomes of an expert that too few calibration tokens reach."""


class TooFewTokens(RuntimeError):
    """Fewer calibration tokens reach experts than the policy allows: no fault, but an outcome. The message says all.

    No ``ValueError``: every option was right, and whether there are enough tokens is known when they are counted.
    """


@dataclass(frozen=True)
class SlimmingPolicy:
    """Options of ``ml.compress`` for methods that measure what enters each matrix.

    Attributes:
        min_tokens: An expert that fewer calibration tokens reach is starved.
        starved: ``warn``: use what there is. ``top_up``: draw further calibration sequences that reach it.
            ``fallback``: treat it as if no token reached it (rounding to nearest, magnitudes). ``error``: fail.
        top_up: Further calibration batches, for ``starved="top_up"``.
        max_fallback: Largest share of a method's matrices that may be made without measurement, in [0, 1].
        max_moment_bytes: Memory for the moments of the inputs that are measured at a time, and for what is solved with
            them, in bytes.

    Raises:
        ValueError: An option that has no meaning, or ``top_up`` without batches.
    """

    min_tokens: int = 32
    starved: Starved = "warn"
    top_up: Iterable[Mapping[str, Any]] | None = field(default=None, repr=False, compare=False)
    max_fallback: float = 0.1
    max_moment_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        """Check every option."""
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be a whole number, at least 0, not {self.min_tokens!r}")
        if self.starved not in get_args(Starved):
            raise ValueError(f"starved must be one of {', '.join(get_args(Starved))}, not {self.starved!r}")
        if self.starved == "top_up" and self.top_up is None:
            raise ValueError(
                "starved='top_up' draws further calibration batches: give them as top_up=..., or choose starved='warn'"
            )
        number = isinstance(self.max_fallback, int | float) and not isinstance(self.max_fallback, bool)
        if not number or not 0 <= self.max_fallback <= 1:
            raise ValueError(f"max_fallback must be a share from 0 to 1, not {self.max_fallback!r}")
        whole = isinstance(self.max_moment_bytes, int) and not isinstance(self.max_moment_bytes, bool)
        if not whole or self.max_moment_bytes < 1:
            raise ValueError(
                f"max_moment_bytes must be a positive number of bytes, not {self.max_moment_bytes!r}: the default is "
                f"{4 * 2**30}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what decides about weights as plain types, for a plan's history."""
        return {name: getattr(self, name) for name in ("min_tokens", "starved", "max_fallback")}
