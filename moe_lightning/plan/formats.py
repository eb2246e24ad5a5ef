"""How the weights of a matrix are stored where they are no longer plain floating-point numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Pattern = Literal["2:4", "4:8", "1:4"]
"""n:m says that n of m neighbours along the input are zero: 1:4 is 25 % zeros."""

MaskScope = Literal["row", "matrix"]
"""Zeros are chosen within each output row, or within the whole matrix."""

Kind = Literal["int4", "int8", "sparse24", "sparse"]

AUTO_GROUPS = (128, 64, 32)
"""Group sizes that ``auto`` tries, in this order."""

SCALE_BYTES = 2
"""A scale is kept in bfloat16."""


@dataclass(frozen=True)
class WeightFormat:
    """The form in which a stack of matrices is stored.

    Attributes:
        bits: 4 or 8 for integers with a scale; None for floating-point numbers.
        group_size: Inputs that share a scale: a number, ``channel`` for a whole row, or ``auto`` for the first of 128,
            64 and 32 that divides the input size.
        symmetric: The middle of the grid is zero, so that no zero points are stored.
        sparsity: Share of zeros; None with a pattern, or without zeros.
        pattern: n zeros in m neighbours along the input.
        scope: Among which weights the zeros of a sparsity were chosen.
    """

    bits: int | None = None
    group_size: int | str = 128
    symmetric: bool = False
    sparsity: float | None = None
    pattern: str | None = None
    scope: str = "row"

    @property
    def kind(self) -> Kind:
        """Which storage holds it. Zeros among integers are no storage of their own."""
        if self.bits is not None:
            return "int4" if self.bits == 4 else "int8"
        return "sparse24" if self.pattern == "2:4" else "sparse"

    @property
    def quantized(self) -> bool:
        """Whether the weights are integers with a scale."""
        return self.bits is not None

    def without_bits(self) -> WeightFormat | None:
        """Return the format of the same weights in floating point; None where no zeros are known among them."""
        if self.sparsity is None and self.pattern is None:
            return None
        return WeightFormat(sparsity=self.sparsity, pattern=self.pattern, scope=self.scope)

    def group_of(self, inputs: int) -> int:
        """Return how many inputs share a scale in a matrix of an input size.

        Raises:
            ValueError: The group size does not divide it.
        """
        if self.group_size == "channel":
            return inputs
        sizes = AUTO_GROUPS if self.group_size == "auto" else (self.group_size,)
        for size in sizes:
            if isinstance(size, int) and size > 0 and inputs % size == 0:
                return size
        if self.group_size == "auto":
            tried = ", ".join(map(str, AUTO_GROUPS))
            raise ValueError(
                f"group_size 'auto': none of {tried} divides the input size {inputs}: give a number that "
                "does, or 'channel' for one scale for each row"
            )
        raise ValueError(
            f"group_size {self.group_size} does not divide the input size {inputs}: give one that does, 'auto', or "
            "'channel' for one scale for each row"
        )

    def kept(self, outputs: int, inputs: int) -> int:
        """Return how many weights of one matrix are stored as floating-point numbers or may be other than zero."""
        if self.pattern is not None:
            zeros, size = map(int, self.pattern.split(":"))
            return outputs * inputs * (size - zeros) // size
        if self.sparsity is None:
            return outputs * inputs
        if self.scope == "row":
            return outputs * (inputs - round_half_up(self.sparsity * inputs))
        return outputs * inputs - round_half_up(self.sparsity * outputs * inputs)

    def check(self, outputs: int, inputs: int) -> None:
        """Make sure that matrices of a size can be stored so.

        Raises:
            ValueError: The group size or the pattern does not divide the input size, or a value is impossible.
        """
        if self.bits is not None:
            if self.bits not in (4, 8):
                raise ValueError(f"bits must be 4 or 8, got {self.bits}")
            self.group_of(inputs)
        if self.pattern is not None:
            if self.pattern not in get_args(Pattern):
                raise ValueError(f"pattern {self.pattern!r} is none of {', '.join(get_args(Pattern))}")
            size = int(self.pattern.split(":")[1])
            if inputs % size:
                raise ValueError(
                    f"pattern {self.pattern} needs an input size divisible by {size}, got {inputs}: give a sparsity"
                )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the share of zeros, from 0 up to but not including 1, got {self.sparsity}")
        if self.scope not in get_args(MaskScope):
            raise ValueError(f"scope {self.scope!r} is none of {', '.join(get_args(MaskScope))}")
        if self.bits is None and self.pattern is None and self.sparsity is None:
            raise ValueError("a format needs bits, a sparsity or a pattern")

    def stored_bytes(self, slots: int, outputs: int, inputs: int, weight_bytes: int) -> int:
        """Return the bytes of a stack of matrices as it is written to disk.

        Args:
            slots: Matrices.
            outputs: Rows of each.
            inputs: Columns of each.
            weight_bytes: Bytes of one floating-point weight.
        """
        rows = slots * outputs
        if self.bits is not None:
            groups = inputs // self.group_of(inputs)
            codes, zeros = (-(-inputs // 8) * 4, -(-groups // 2)) if self.bits == 4 else (inputs, groups)
            return rows * (codes + groups * SCALE_BYTES + (0 if self.symmetric else zeros))
        return slots * self.kept(outputs, inputs) * weight_bytes + rows * -(-inputs // 8)

    def to_dict(self) -> dict[str, Any]:
        """Return the values that are not the defaults."""
        return {name: value for name, value in vars(self).items() if value != getattr(type(self), name)}

    def __str__(self) -> str:
        words = []
        if self.bits is not None:
            group = "a scale a row" if self.group_size == "channel" else f"group {self.group_size}"
            words.append(f"int{self.bits}, {group}, {'symmetric' if self.symmetric else 'asymmetric'}")
        if self.pattern is not None:
            words.append(self.pattern)
        elif self.sparsity is not None:
            words.append(f"{self.sparsity:.4g} zeros")
        return ", ".join(words)


def round_half_up(value: float) -> int:
    """Round as ``floor(x + 0.5)``; Python's own rounding takes halves to the even neighbour.

    A ratio like 0.29 times 50 experts means 14.5, though its product in binary is a hair below.
    """
    return math.floor(round(value, 9) + 0.5)


def format_of(value: Any) -> WeightFormat | None:
    """Read what :meth:`WeightFormat.to_dict` wrote; None stays None.

    Raises:
        ValueError: Fields that a format does not have.
    """
    if value is None or isinstance(value, WeightFormat):
        return value
    try:
        return WeightFormat(**value)
    except TypeError as error:
        raise ValueError(f"{value!r} is not a format of weights: {error}") from None
