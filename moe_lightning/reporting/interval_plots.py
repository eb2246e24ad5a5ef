"""Numbers with their intervals: curves against the size of the model, and rankings.

P points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from moe_lightning.reporting.panels import legend_below, new_panels
from moe_lightning.reporting.style import (
    CATEGORICAL,
    FAINT,
    FONT_POINTS,
    INK,
    SMALL_POINTS,
    Look,
    axis_label,
    looks,
    new_figure,
)


@dataclass(frozen=True)
class Curve:
    """Numbers with intervals over something.

    Attributes:
        x: Places `[P]`.
        y: Numbers `[P]`.
        low: Lower ends of their intervals `[P]`.
        high: Upper ends `[P]`.
    """

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike
    high: ArrayLike


@dataclass(frozen=True)
class RankedValue:
    """One line of a ranking.

    Attributes:
        name: What it is.
        value: The number.
        low: Lower end of its interval.
        high: Upper end.
        group: Decides colour and marker.
    """

    name: str
    value: float
    low: float
    high: float
    group: str


def interval_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    title: str,
    x_label: str,
    x_unit: str = "",
    y_label: str,
    y_unit: str = "",
    logarithmic: bool = True,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Draw curves with intervals, one panel for each group of them; the same name has the same colour everywhere.

    Args:
        panels: Title of each panel and its curves by name.
        title: Above the picture.
        x_label: What the places are.
        x_unit: Of the places.
        y_label: What the numbers are.
        y_unit: Of the numbers.
        logarithmic: Whether the numbers have a logarithmic axis.
        reference: A number with a horizontal line, and its name.

    Returns:
        The figure.

    Raises:
        ValueError: No panels, or more than six names, which nobody can tell apart.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    if not names:
        raise ValueError("there is no curve to draw: give at least one panel with one curve")
    shown = looks(names)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = new_panels(rows, columns, 3.4 if columns > 1 else 5.6, 2.5 if columns > 1 else 3.2, title)
    cells = [axes for line in grid for axes in line]
    for axes, (heading, curves) in zip(cells, panels.items(), strict=False):
        axes.set_title(heading, fontsize=FONT_POINTS, loc="left", color=INK)
        _draw_curves(axes, curves, shown)
        _finish(axes, reference)
    for axes in cells[: len(panels)]:
        if logarithmic:
            log_axis(axes, "y")
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    for number, axes in enumerate(cells[: len(panels)]):
        if number % columns == 0:
            axes.set_ylabel(axis_label(y_label, y_unit), fontsize=FONT_POINTS)
        if number + columns >= len(panels):
            axes.set_xlabel(axis_label(x_label, x_unit), fontsize=FONT_POINTS)
            axes.tick_params(labelbottom=True)
    legend_below(figure, [_line_handle(name, look) for name, look in shown.items()])
    return figure


def _draw_curves(axes: Any, curves: Mapping[str, Curve], shown: Mapping[str, Look]) -> None:
    everywhere = numpy.concatenate([numpy.asarray(curve.x, dtype=float) for curve in curves.values()])
    # Points of equal budget stand side by side, or their intervals hide each other.
    step = 0.012 * max(float(numpy.ptp(everywhere)), 1e-9)
    middle = (len(shown) - 1) / 2
    for name, curve in curves.items():
        number, look = list(shown).index(name), shown[name]
        x, y, low, high = (numpy.asarray(part, dtype=float) for part in (curve.x, curve.y, curve.low, curve.high))
        # All curves begin at the same point.
        shifted = x + numpy.where(x > 0, (number - middle) * step, 0.0)
        axes.errorbar(
            shifted,
            y,
            # Rounding may put an end of the interval of an exact number a hair on the wrong side of it.
            yerr=numpy.maximum(numpy.stack([y - low, high - y]), 0.0),
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            markersize=4.5,
            linewidth=1.4,
            elinewidth=1.0,
            capsize=2.0,
        )


def _line_handle(name: str, look: Look) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        linestyle=look.dash,
        markersize=5,
        linewidth=1.4,
        label=name,
    )


def _finish(axes: Any, reference: tuple[float, str] | None) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if reference is not None:
        value, name = reference
        axes.axhline(value, color=FAINT, linewidth=1.0, linestyle=":")
        axes.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SMALL_POINTS,
            color=INK,
        )


# Numbers of a decade that people read, from few to many.
_READABLE = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
_NARROW = 4.0


def log_axis(axes: Any, name: str) -> None:
    """Make an axis logarithmic, with up to nine plain numbers on it. To be called when everything is drawn.

    Args:
        axes: The axes.
        name: ``x`` or ``y``.
    """
    axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    low, high = sorted(getattr(axes, f"get_{name}lim")())
    # Where little room lies between the ends, even steps are what people expect.
    ticks = _within(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), low, high)
    if high / low > _NARROW:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = []
        for factors in _READABLE:
            found = _within([factor * 10.0**decade for decade in decades for factor in factors], low, high)
            if len(found) > 9:
                break
            ticks = found
            if len(ticks) >= 4:
                break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())


def _within(ticks: Iterable[float], low: float, high: float) -> list[float]:
    return [round(float(tick), 12) for tick in ticks if low <= tick <= high]


def name_rows(axes: Any, names: Sequence[str], label: str, spine: str) -> None:
    """Name the rows 0, 1, ... of a picture, the first on top, and what their numbers are.

    Args:
        axes: The axes.
        names: Of the rows.
        label: Of the numbers, with their unit.
        spine: The line that is drawn: ``bottom``, below the numbers, or ``left``, where bars begin.
    """
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label, fontsize=FONT_POINTS)
    axes.grid(color="#e4e4e4", linewidth=0.6, axis="x")
    axes.set_axisbelow(True)
    axes.spines[spine].set_visible(True)
    axes.spines[spine].set_color(FAINT)


def interval_ranking(
    values: Sequence[RankedValue],
    *,
    title: str,
    value_label: str,
    unit: str = "",
    logarithmic: bool = True,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Draw numbers with their intervals one below the other, in the order given.

    Args:
        values: The lines, the first on top.
        title: Above the picture.
        value_label: What the numbers are.
        unit: Of the numbers.
        logarithmic: Whether they have a logarithmic axis.
        reference: A number with a vertical line, and its name.

    Returns:
        The figure.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not values:
        raise ValueError("there is nothing to rank: give at least one value")
    figure, axes = new_figure(7.6, 1.3 + 0.21 * len(values), title)
    groups = list(dict.fromkeys(value.group for value in values))
    # There may be more groups than can be told apart: those of the lines further below are grey.
    shown = looks(groups[: len(CATEGORICAL)]) | {group: Look(FAINT, "o") for group in groups[len(CATEGORICAL) :]}
    for place, value in enumerate(values):
        look = shown[value.group]
        axes.errorbar(
            [value.value],
            [place],
            xerr=[[max(value.value - value.low, 0.0)], [max(value.high - value.value, 0.0)]],
            color=look.colour,
            marker=look.marker,
            markersize=5,
            elinewidth=1.2,
            capsize=2.0,
            linestyle="none",
        )
    name_rows(axes, [value.name for value in values], axis_label(value_label, unit), "bottom")
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(color="#e4e4e4", linewidth=0.6, axis="y")
    if reference is not None:
        axes.axvline(reference[0], color=INK, linewidth=1.0, linestyle=":", label=reference[1])
    if logarithmic:
        log_axis(axes, "x")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=group)
        for group, look in shown.items()
    ]
    if reference is not None:
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=":", label=reference[1]))
    legend_below(figure, handles)
    return figure
