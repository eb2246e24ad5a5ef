"""Numbers as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_lightning.evaluation.intervals import Interval
from moe_lightning.evaluation.records import Rate
from moe_lightning.reporting.report.blocks import Cell

NOTHING = Cell("-")
"""What was not measured."""

NOT_FINITE = "not finite"
"""What was measured, and is NaN or infinity: the model is broken."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits, thousands apart; ``-`` where there is none.

    Args:
        value: The number.
        digits: Significant digits.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent >= 15 or exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def decimals(value: float | None, places: int) -> str:
    """Write a number with so many decimals; ``-`` where there is none.

    Args:
        value: The number.
        places: Decimals.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{round(value, places) + 0.0:,.{places}f}"  # + 0.0: no minus before zero


def percent(value: float | None, places: int = 1) -> str:
    """Write a share in percent; ``-`` where there is none.

    Args:
        value: The share, 1 for all.
        places: Decimals.
    """
    if value is None:
        return "-"
    return f"{100 * value:,.{places}f} %" if math.isfinite(value) else NOT_FINITE


def data_size(count: float | None) -> str:
    """Write a number of bytes in the unit that suits it.

    Args:
        count: Bytes.
    """
    if count is None:
        return "-"
    power = min(len(_UNITS) - 1, int(math.log(max(count, 1), 1024)))
    return f"{count:,.0f} B" if power == 0 else f"{count / 1024**power:,.1f} {_UNITS[power]}"


def duration(seconds: float | None) -> str:
    """Write a time in the units that suit it.

    Args:
        seconds: The time.
    """
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def between(interval: Interval, places: int, factor: float = 1.0) -> str:
    """Write the ends of an interval; nothing where they are not known.

    Args:
        interval: The interval.
        places: Decimals.
        factor: What the ends are multiplied by, 100 for percent.
    """
    if math.isnan(interval.low) or math.isnan(interval.high):
        return ""
    return f"[{decimals(factor * interval.low, places)}, {decimals(factor * interval.high, places)}]"


def with_interval(interval: Interval | None, places: int) -> Cell:
    """Return a cell of a number with its interval.

    Args:
        interval: The number, or None.
        places: Decimals.
    """
    if interval is None:
        return NOTHING
    if 0 < abs(interval.value) < 5 * 10**-places:  # too small for so many decimals
        ends = between(interval, places) and f"[{number(interval.low, 2)}, {number(interval.high, 2)}]"
        return Cell(number(interval.value, 2), ends)
    return Cell(decimals(interval.value, places), between(interval, places))


def share_with_interval(interval: Interval | None, places: int = 2) -> Cell:
    """Return a cell of a share in percent with its interval.

    Args:
        interval: The share, or None.
        places: Decimals.
    """
    if interval is None:
        return NOTHING
    return Cell(percent(interval.value, places), between(interval, places, 100))


def places_of(values: Sequence[float], digits: int = 4) -> int:
    """Return how many decimals give the largest of some numbers so many digits, at most 4 decimals.

    Args:
        values: The numbers.
        digits: Digits.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    before = math.floor(math.log10(largest)) + 1 if largest >= 1 else 1
    return min(4, max(0, digits - before))


def rate(speed: Rate | None) -> Cell:
    """Return a cell of a rate with its spread.

    Args:
        speed: Tokens per second, or None.
    """
    if speed is None:
        return NOTHING
    return Cell(number(speed.median, 3), f"{number(speed.low, 3)} to {number(speed.high, 3)}")


def change(now: float | None, before: float | None) -> str:
    """Write a number in percent of another one; nothing where either is missing.

    Args:
        now: The number.
        before: The other one.
    """
    return "" if now is None or not before else f"{100 * now / before:,.1f} %"
