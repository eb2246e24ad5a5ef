"""Numbers with their intervals in rows, several in each; and bars with their numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_lightning.evaluation.intervals import Interval
from moe_lightning.reporting.interval_plots import log_axis, name_rows
from moe_lightning.reporting.panels import legend_below
from moe_lightning.reporting.style import (
    CATEGORICAL,
    INK,
    SMALL_POINTS,
    Look,
    axis_label,
    looks,
    new_figure,
)


@dataclass(frozen=True)
class Dot:
    """A number.

    Attributes:
        value: The number.
        low: Lower end of its interval; the number itself where there is none.
        high: Upper end, likewise.
    """

    value: float
    low: float
    high: float


def interval_dot(interval: Interval) -> Dot:
    """Return a number with its interval; ends that are not known (of a single block) are the number itself.

    Args:
        interval: The number.
    """
    return Dot(
        interval.value, *(end if math.isfinite(end) else interval.value for end in (interval.low, interval.high))
    )


def dot_rows(
    rows: Mapping[str, Mapping[str, Dot]],
    *,
    title: str,
    value_label: str,
    unit: str = "",
    reference: tuple[float, str] | None = None,
    logarithmic: bool = False,
    shown: Mapping[str, Look] | None = None,
) -> Figure:
    """Draw numbers with their intervals in rows, one below the other, and side by side in a row.

    Args:
        rows: Name of each row, the first on top, and its numbers by name, e.g. of a moment of a run.
        title: Above the picture.
        value_label: What the numbers are.
        unit: Of the numbers.
        reference: A number with a vertical line, and its name.
        logarithmic: Whether they have a logarithmic axis.
        shown: How the numbers of each name look; as everywhere where None.

    Returns:
        The figure.

    Raises:
        ValueError: There is nothing to draw, or more than six names in a row.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        raise ValueError("there is nothing to draw: give at least one row with one number")
    shown = looks(names) if shown is None else {name: shown[name] for name in names}
    gap = 0.62 / max(len(names), 2)
    height = 1.25 + max(0.26, 0.13 + 0.12 * len(names)) * len(rows)
    figure, axes = new_figure(7.0, min(12.0, max(2.2, height)), title)
    for place, row in enumerate(rows.values()):
        for name, dot in row.items():
            look = shown[name]
            axes.errorbar(
                [dot.value],
                [place + gap * (names.index(name) - (len(names) - 1) / 2)],
                xerr=[[max(dot.value - dot.low, 0.0)], [max(dot.high - dot.value, 0.0)]],
                color=look.colour,
                marker=look.marker,
                markersize=5,
                elinewidth=1.2,
                capsize=2.0,
                linestyle="none",
            )
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color="#eeeeee", linewidth=0.8)
    name_rows(axes, list(rows), axis_label(value_label, unit), "bottom")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=name)
        for name, look in shown.items()
    ]
    if reference is not None:
        axes.axvline(reference[0], color=INK, linewidth=1.0, linestyle=":")
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=":", label=reference[1]))
    if logarithmic:
        log_axis(axes, "x")
    if len(handles) > 1:
        legend_below(figure, handles)
    return figure


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    value_label: str,
    unit: str = "",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draw numbers as bars, the first on top.

    Args:
        values: Numbers by name, in the unit.
        title: Above the picture.
        value_label: What the numbers are.
        unit: Of the numbers.
        labels: What stands beside a bar; its number where it is not named.

    Returns:
        The figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not values:
        raise ValueError("there is nothing to draw: give at least one number")
    figure, axes = new_figure(7.0, 1.2 + 0.27 * len(values), title)
    numbers = numpy.asarray(list(values.values()), dtype=float)
    drawn = axes.barh(range(len(values)), numbers, color=CATEGORICAL[0], height=0.66)
    told = [(labels or {}).get(name, f"{value:.4g}") for name, value in values.items()]
    axes.bar_label(drawn, told, padding=4, fontsize=SMALL_POINTS, color=INK)
    _room_for_labels(axes, float(numbers.max()), max(map(len, told)))
    name_rows(axes, list(values), axis_label(value_label, unit), "left")
    return figure


def _room_for_labels(axes: Any, largest: float, letters: int) -> None:
    # A letter is about a hundredth of the width of such a figure.
    share = min(0.5, 0.02 + 0.013 * letters)
    axes.set_xlim(0.0, (largest if largest > 0 else 1.0) / (1.0 - share))
