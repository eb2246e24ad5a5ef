"""Heat-maps of values per layer and expert.

Legend: L MoE layers, E experts of the original model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.path import Path
from numpy.typing import ArrayLike, NDArray

from moe_lightning.reporting.interval_plots import log_axis
from moe_lightning.reporting.style import (
    CATEGORICAL,
    EMPTY,
    FAINT,
    FONT_POINTS,
    INK,
    SEQUENTIAL,
    SMALL_POINTS,
    axis_label,
    new_figure,
    row_numbers,
)

MAX_NUMBERED_COLUMNS, MAX_NUMBERED_CELLS = 16, 256


def heat_map(
    values: ArrayLike,
    *,
    title: str,
    value_label: str,
    unit: str = "",
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    novices: ArrayLike | None = None,
    dropped: ArrayLike | None = None,
    undefined_label: str = "no value",
    limits: tuple[float | None, float | None] = (None, None),
    reference: tuple[float, str] | None = None,
    number_format: str | None = None,
    columns: Sequence[str] | None = None,
    column_label: str = "expert",
    marked: ArrayLike | None = None,
    marked_label: str = "marked",
    dropped_label: str = "not there (dropped)",
    logarithmic: bool = False,
) -> Figure:
    """Draw values of each layer and expert as colours.

    Args:
        values: ``[L, E]``, in the unit. Cells that are not finite have no colour.
        title: Above the picture.
        value_label: What the values are; beside the colour bar.
        unit: Of the values, ``""`` for pure numbers.
        layers: Numbers of the layers, L of them; 0, 1, ... when None.
        experts: Numbers of the experts, E of them; 0, 1, ... when None.
        novices: Bool ``[L, E]``: cells that are hatched, because the expert is a novice.
        dropped: Bool ``[L, E]``: cells that are crossed out, because the expert is not there any more. When None, all
            cells that are NaN.
        undefined_label: Meaning of a cell that is NaN but not dropped, for the legend.
        limits: Values of the darkest and lightest colour; taken from the data where None.
        reference: A value that is marked on the colour bar, and its name.
        number_format: Format of the numbers in the cells, e.g. ``.2f``; chosen from the values when None. Numbers are
            left out where there are too many cells.
        columns: Names of the columns, where they are no experts.
        column_label: What the columns are.
        marked: Bool ``[L, E]``: cells with a coloured corner.
        marked_label: What that says, for the legend.
        dropped_label: Meaning of a crossed-out cell, for the legend.
        logarithmic: Even steps of colour for even ratios; what is zero has the colour of the smallest.

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that do not fit.
    """
    values_LE = numpy.asarray(values, dtype=numpy.float64)
    if values_LE.ndim != 2 or values_LE.size == 0:
        raise ValueError(f"a heat-map needs values [layers, experts], not an array of shape {values_LE.shape}")
    num_layers, num_experts = values_LE.shape
    layers = row_numbers("layers", layers, num_layers)
    names = columns if columns is not None else list(map(str, row_numbers("experts", experts, num_experts)))
    if len(names) != num_experts:
        raise ValueError(f"{len(names)} names of columns for values of {num_experts} columns")
    missing_LE = ~numpy.isfinite(values_LE)
    dropped_LE = missing_LE if dropped is None else _marks("dropped", dropped, values_LE.shape)
    novices_LE = numpy.zeros_like(missing_LE) if novices is None else _marks("novices", novices, values_LE.shape)
    marked_LE = numpy.zeros_like(missing_LE) if marked is None else _marks("marked", marked, values_LE.shape)
    undefined_LE = missing_LE & ~dropped_LE

    numbered = num_experts <= MAX_NUMBERED_COLUMNS and values_LE.size <= MAX_NUMBERED_CELLS
    # So many lines to the inch that a small cell gets one.
    hatch = "////" if num_experts <= 16 else "/" * 7
    # Wider ones could not be read at the width of a page.
    width = min(8.6, max(5.6, 2.0 + (0.52 if numbered else 0.16) * num_experts))
    height = min(11.0, max(2.9, 1.7 + (0.34 if numbered else 0.2) * num_layers))
    figure, axes = new_figure(width, height, title)
    shown_LE = numpy.ma.masked_array(values_LE, mask=missing_LE | dropped_LE)
    norm = _norm(shown_LE, limits, logarithmic)
    coloured_LE = numpy.ma.maximum(shown_LE, norm.vmin or 0.0) if logarithmic else shown_LE
    image = axes.imshow(coloured_LE, cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")
    for row, column in numpy.argwhere(dropped_LE):
        _cross_out(axes, column, row)
    for row, column in numpy.argwhere(undefined_LE):
        axes.add_patch(_cell(column, row, facecolor=EMPTY, edgecolor="none"))
    for row, column in numpy.argwhere(novices_LE & ~dropped_LE):
        ink = _contrast(image, coloured_LE[row, column])
        axes.add_patch(_cell(column, row, facecolor="none", edgecolor=ink, hatch=hatch, linewidth=0.0, alpha=0.55))
    if numbered:
        form = number_format or _number_format(shown_LE)
        for row, column in numpy.argwhere(~shown_LE.mask):
            text = format(float(values_LE[row, column]), form)
            hatched = bool(novices_LE[row, column])
            _write_number(axes, image, column, row, float(coloured_LE[row, column]), text, hatched)
    if marked_LE.any():
        _mark_corners(axes, numpy.argwhere(marked_LE), 0.55 if numbered else 0.16)
    _cell_borders(axes, num_layers, num_experts)
    _number_axis(axes.xaxis, names)
    _number_axis(axes.yaxis, list(map(str, layers)))
    axes.set_xlabel(column_label, fontsize=FONT_POINTS)
    axes.set_ylabel("layer", fontsize=FONT_POINTS)

    # As high as the map, however high that is.
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06, aspect=max(20.0, 7.0 * height))
    bar.set_label(axis_label(value_label, unit), fontsize=FONT_POINTS)
    bar.ax.tick_params(labelsize=SMALL_POINTS)
    if logarithmic:
        log_axis(bar.ax, "y")
    bar.outline.set_visible(False)
    if reference is not None and 0.0 <= float(norm(reference[0])) <= 1.0:
        _mark_reference(bar, *reference)
    handles = []
    if (novices_LE & ~dropped_LE).any():
        handles.append(Patch(facecolor="white", edgecolor=INK, hatch=hatch, linewidth=0.5, label="novice"))
    if dropped_LE.any():
        handles.append(_CrossedPatch(label=dropped_label))
    if undefined_LE.any():
        handles.append(Patch(facecolor=EMPTY, edgecolor="none", label=undefined_label))
    if marked_LE.any():
        handles.append(Patch(facecolor=CATEGORICAL[1], edgecolor="white", label=marked_label))
    if handles:
        _legend_below(figure, handles)
    return figure


class _CrossedPatch(Patch):
    """Entry of a legend that looks like a crossed-out cell."""

    def __init__(self, label: str) -> None:
        super().__init__(facecolor="white", edgecolor=FAINT, hatch="xx", linewidth=0.5, label=label)


def _marks(name: str, marks: ArrayLike, shape: tuple[int, ...]) -> NDArray[numpy.bool_]:
    result = numpy.asarray(marks, dtype=bool)
    if result.shape != shape:
        raise ValueError(f"{name} has shape {result.shape}, the values have {shape}")
    return result


def _norm(shown_LE: Any, limits: tuple[float | None, float | None], logarithmic: bool) -> Normalize:
    shown = shown_LE.compressed()
    if logarithmic:
        shown = shown[shown > 0] if (shown > 0).any() else numpy.ones(1)
    low = float(shown.min()) if shown.size else 0.0
    high = float(shown.max()) if shown.size else 1.0
    low = low if limits[0] is None else limits[0]
    high = high if limits[1] is None else limits[1]
    if logarithmic:
        return LogNorm(low, high if high > low else 2 * low)
    return Normalize(low, high if high > low else low + 1.0)


def _cell(column: int, row: int, **style: Any) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, **style)


def _cross_out(axes: Any, column: int, row: int) -> None:
    axes.add_patch(_cell(column, row, facecolor="white", edgecolor="none"))
    for direction in (-1, 1):
        axes.add_line(
            Line2D(
                [column - 0.32, column + 0.32],
                [row - 0.32 * direction, row + 0.32 * direction],
                color=FAINT,
                linewidth=0.9,
            )
        )


def _mark_corners(axes: Any, cells: NDArray[numpy.int_], cell_inches: float) -> None:
    points = min(8.0, 0.4 * 72 * cell_inches)
    corner = Path([(0, 0), (-1, 0), (0, -1), (0, 0)])
    # Twice the size: matplotlib takes the longest side of a path as half a marker.
    axes.scatter(
        cells[:, 1] + 0.5,
        cells[:, 0] - 0.5,
        s=(2 * points) ** 2,
        marker=corner,
        facecolor=CATEGORICAL[1],
        edgecolor="white",
        linewidth=0.1 * points,
        zorder=3,
    )
    # A point on the edge must not move the limits.
    axes.autoscale(False)


def _contrast(image: Any, value: Any) -> str:
    """Return black or white, whichever is easier to read on the colour of a value."""
    if not numpy.isfinite(numpy.ma.filled(value, numpy.nan)):
        return INK
    red, green, blue, _ = image.cmap(image.norm(float(value)))
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else "black"


def _write_number(axes: Any, image: Any, column: int, row: int, value: float, number: str, hatched: bool) -> None:
    colour = image.cmap(image.norm(value))
    text = axes.text(
        column,
        row,
        number,
        ha="center",
        va="center",
        fontsize=SMALL_POINTS,
        color=_contrast(image, value),
    )
    if hatched:
        # The hatch of a novice stays at the edge of its cell: through digits it makes them unreadable.
        text.set_bbox({"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.25"})


def _number_format(shown_LE: Any) -> str:
    shown = numpy.abs(shown_LE.compressed())
    largest = float(shown.max()) if shown.size else 0.0
    if (shown == numpy.round(shown)).all() or largest >= 100:
        return ".0f"
    return ".1f" if largest >= 2 else ".2f"


def _cell_borders(axes: Any, num_layers: int, num_experts: int) -> None:
    axes.set_xticks(numpy.arange(num_experts + 1) - 0.5, minor=True)
    axes.set_yticks(numpy.arange(num_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0 if num_experts <= 32 else 0.3)
    axes.tick_params(which="minor", length=0)


def _number_axis(axis: Any, names: Sequence[str]) -> None:
    every = 1 + (len(names) - 1) // 20
    # Steps that people count in.
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, every) if step >= every)
    places = list(range(0, len(names), every))
    axis.set_ticks(places, labels=[names[place] for place in places])


def _mark_reference(bar: Any, value: float, name: str) -> None:
    bar.ax.axhline(value, color="white", linewidth=3.0)
    bar.ax.axhline(value, color="black", linewidth=1.2)
    bar.ax.annotate(
        name,
        (0.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        rotation=90,
        fontsize=SMALL_POINTS,
        color=INK,
    )


def _legend_below(figure: Figure, handles: list[Any]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=SMALL_POINTS,
        frameon=False,
        handlelength=1.6,
        handleheight=1.1,
    )
