"""What was paid against what was bought: quality against size or speed, with the Pareto front.

P points of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from moe_lightning.reporting.interval_plots import log_axis
from moe_lightning.reporting.panels import legend_below, new_panels
from moe_lightning.reporting.style import FAINT, FONT_POINTS, INK, OTHER, SMALL_POINTS, Look, axis_label, looks_or_other

_WIDE = 3.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""


@dataclass(frozen=True)
class ParetoPoint:
    """A model.

    Attributes:
        name: Beside its point.
        x: What it costs, or how fast it is.
        y: What was lost: less is better.
        low: Lower end of the interval of y; None where there is none.
        high: Upper end, likewise.
        x_low: Lower end of the spread of x, likewise.
        x_high: Upper end.
        group: In the legend, and decides colour and marker: a moment of a run, or a family of methods.
        look: How it looks, where its group does not decide that.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    group: str = ""
    look: Look | None = None


@dataclass(frozen=True)
class ParetoPanel:
    """Points over one cost.

    Attributes:
        label: What the cost is, beside its axis.
        unit: Of the cost.
        points: The models.
        more_is_better: The cost is none, but a gain, such as speed.
    """

    label: str
    unit: str
    points: Sequence[ParetoPoint]
    more_is_better: bool = False


def front(points: Sequence[ParetoPoint], more_is_better: bool = False) -> list[ParetoPoint]:
    """Return the points to which no other one is preferable in one respect and at least equal in the other.

    Args:
        points: The points.
        more_is_better: Whether larger x are better.

    Returns:
        Ascending by x.
    """
    sign = -1.0 if more_is_better else 1.0
    best, found = math.inf, []
    for point in sorted(points, key=lambda point: (sign * point.x, point.y)):
        if point.y < best:
            best = point.y
            found.append(point)
    return sorted(found, key=lambda point: point.x)


def pareto_plot(
    panels: Sequence[ParetoPanel],
    *,
    title: str,
    y_label: str,
    y_unit: str = "",
    reference: tuple[float, str] | None = None,
    path: bool = False,
) -> Figure:
    """Draw models by what they cost and what they lost, with the Pareto front as a line of steps.

    Args:
        panels: One for each cost, side by side; they share the axis of the loss.
        title: Above the picture.
        y_label: What the loss is.
        y_unit: Of the loss.
        reference: A loss with a horizontal line, and its name.
        path: Join the points of each panel in their order by a thin line: the way of a run.

    Returns:
        The figure. Of more than six groups the last ones are grey, with the names of their points beside them.

    Raises:
        ValueError: There is nothing to draw.
    """
    points = [point for panel in panels for point in panel.points]
    if not points:
        raise ValueError("there is nothing to draw: give at least one point")
    shown = looks_or_other(list(dict.fromkeys(point.group for point in points)))
    width = 3.6 if len(panels) > 1 else 6.2
    figure, (line,) = new_panels(1, len(panels), width, 3.5, title, share=False)
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None and end > 0]
    for axes, panel in zip(line, panels, strict=True):
        if axes is not line[0]:
            axes.sharey(line[0])
            axes.tick_params(labelleft=False)
        if path and len(panel.points) > 1:
            axes.plot(
                [point.x for point in panel.points],
                [point.y for point in panel.points],
                color=FAINT,
                linewidth=0.9,
                linestyle=":",
                zorder=1,
            )
        _draw_front(axes, panel)
        for point in panel.points:
            look = point.look or shown[point.group]
            axes.errorbar(
                [point.x],
                [point.y],
                yerr=_reach(point.y, point.low, point.high),
                xerr=_reach(point.x, point.x_low, point.x_high),
                color=look.colour,
                marker=look.marker,
                markersize=7,
                elinewidth=1.1,
                capsize=2.5,
                linestyle="none",
                zorder=3,
            )
        axes.set_xlabel(axis_label(panel.label, panel.unit), fontsize=FONT_POINTS)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["left", "bottom"]].set_visible(True)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.margins(0.14)
        _scale_x(axes, [point.x for point in panel.points])
    if reference is not None:
        for axes in line:
            axes.axhline(reference[0], color=INK, linewidth=0.9, linestyle="--", zorder=1)
    if ends and max(ends) / min(ends) > _WIDE:
        log_axis(line[0], "y")
    line[0].set_ylabel(axis_label(y_label, y_unit), fontsize=FONT_POINTS)
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", markersize=7, label=group)
        for group, look in _legend(points, shown).items()
    ]
    handles.append(Line2D([], [], color=FAINT, linewidth=1.6, label="Pareto front"))
    if path:
        handles.append(Line2D([], [], color=FAINT, linewidth=0.9, linestyle=":", label="in the order of time"))
    if reference is not None:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle="--", label=reference[1]))
    legend_below(figure, handles)
    # Places of points are known when everything has its room.
    figure.draw_without_rendering()
    for axes, panel in zip(line, panels, strict=True):
        _label_points(figure, axes, panel.points)
    return figure


def _legend(points: Sequence[ParetoPoint], shown: Mapping[str, Look]) -> dict[str, Look]:
    """Return the looks of groups; grey, but with its marker, of a group whose points have several colours."""
    found: dict[str, Look] = {}
    for group, look in shown.items():
        own = {point.look or look for point in points if point.group == group}
        one = next(iter(own))
        if group:
            several = len({each.colour for each in own}) > 1
            found["others" if one == OTHER else group] = Look(FAINT, one.marker) if several else one
    return found


def _reach(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    ends = [end if end is not None and math.isfinite(end) else value for end in (low, high)]
    reach = [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]]
    return None if low is None and high is None else reach


def _draw_front(axes: Any, panel: ParetoPanel) -> None:
    chosen = front(panel.points, panel.more_is_better)
    where: Any = "pre" if panel.more_is_better else "post"
    axes.step(
        [point.x for point in chosen],
        [point.y for point in chosen],
        where=where,
        color=FAINT,
        linewidth=1.6,
        zorder=2,
    )


def _scale_x(axes: Any, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > _WIDE:
        low, high = min(values), max(values)
        margin = (high / low) ** 0.14
        axes.set_xlim(low / margin, high * margin)
        log_axis(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


# Where a name may stand around its point, in points: to the right and above first.
_PLACES = tuple(
    (across, up, side, edge)
    for reach in (7, 15, 26)
    for across, up, side, edge in (
        (reach, reach / 2, "left", "bottom"),
        (reach, -reach / 2, "left", "top"),
        (-reach, reach / 2, "right", "bottom"),
        (-reach, -reach / 2, "right", "top"),
        (0, reach, "center", "bottom"),
        (0, -reach, "center", "top"),
    )
)


def _label_points(figure: Figure, axes: Any, points: Sequence[ParetoPoint]) -> None:
    """Write names beside points, where they cover no point and no other name as far as there is such a place."""
    scale = figure.dpi / 72
    places = numpy.array([axes.transData.transform((point.x, point.y)) for point in points])
    marks = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in places]
    for point in points:
        for low, high in (
            ((point.x, point.low), (point.x, point.high)),
            ((point.x_low, point.y), (point.x_high, point.y)),
        ):
            if None not in (*low, *high):
                ends = [axes.transData.transform(end) for end in (low, high)]
                marks.append(Bbox.from_extents(*ends[0], *ends[1]).padded(2 * scale))
    frame, written = axes.bbox, list[Bbox]()
    for (x, y), point in sorted(zip(places, points, strict=True), key=lambda item: -item[0][1]):
        options = [(_box(point.name, x, y, scale, *place), place) for place in _PLACES]

        def cost(option: tuple[Bbox, Any]) -> tuple[float, float]:
            box, place = option
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            covered = sum(box.overlaps(other) for other in (*marks, *written))
            return covered + 3 * outside, _PLACES.index(place)

        box, (across, up, side, edge) = min(options, key=cost)
        written.append(box)
        label = axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=(across, up),
            textcoords="offset points",
            ha=side,
            va=edge,
            fontsize=SMALL_POINTS,
            color=INK,
            zorder=4,
        )
        label.set_in_layout(False)


def _box(text: str, x: float, y: float, scale: float, across: float, up: float, side: str, edge: str) -> Bbox:
    width, height = 0.56 * SMALL_POINTS * len(text) * scale, 1.25 * SMALL_POINTS * scale
    left = x + across * scale - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * width
    bottom = y + up * scale - (height if edge == "top" else 0.0)
    return Bbox.from_bounds(left, bottom, width, height)
