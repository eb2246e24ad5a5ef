"""Figures of values per layer and expert, as matplotlib objects without any global state.

They are made with the object-oriented interface (no pyplot: no window, no list of open figures, nothing to close), in
colours that colour-blind people can tell apart, and can be read at the size of a README.

Legend: L MoE layers, E experts of the original model, T points in time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps, patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

# Even steps in lightness, and the same to people with any common colour blindness.
SEQUENTIAL = "viridis"
# Okabe and Ito's colours that stand out on white, with markers and dashes for prints without colour.
CATEGORICAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")
INK, FAINT, EMPTY = "#222222", "#8a8a8a", "#e9e9e9"
MAX_NUMBERED_COLUMNS, MAX_NUMBERED_CELLS = 16, 256
FONT_POINTS, SMALL_POINTS = 10.0, 8.5


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

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that do not fit.
    """
    values_LE = numpy.asarray(values, dtype=numpy.float64)
    if values_LE.ndim != 2 or values_LE.size == 0:
        raise ValueError(f"a heat-map needs values [layers, experts], not an array of shape {values_LE.shape}")
    num_layers, num_experts = values_LE.shape
    layers = _numbers("layers", layers, num_layers)
    experts = _numbers("experts", experts, num_experts)
    missing_LE = ~numpy.isfinite(values_LE)
    dropped_LE = missing_LE if dropped is None else _marks("dropped", dropped, values_LE.shape)
    novices_LE = numpy.zeros_like(missing_LE) if novices is None else _marks("novices", novices, values_LE.shape)
    undefined_LE = missing_LE & ~dropped_LE

    numbered = num_experts <= MAX_NUMBERED_COLUMNS and values_LE.size <= MAX_NUMBERED_CELLS
    width = min(12.0, max(5.6, 2.0 + (0.52 if numbered else 0.16) * num_experts))
    height = min(11.0, max(2.6, 1.7 + (0.34 if numbered else 0.2) * num_layers))
    figure, axes = _figure(width, height, title)
    shown_LE = numpy.ma.masked_array(values_LE, mask=missing_LE | dropped_LE)
    norm = _norm(shown_LE, limits)
    image = axes.imshow(shown_LE, cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")
    for row, column in numpy.argwhere(dropped_LE):
        _cross_out(axes, column, row)
    for row, column in numpy.argwhere(undefined_LE):
        axes.add_patch(_cell(column, row, facecolor=EMPTY, edgecolor="none"))
    for row, column in numpy.argwhere(novices_LE & ~dropped_LE):
        ink = _contrast(image, shown_LE[row, column])
        axes.add_patch(_cell(column, row, facecolor="none", edgecolor=ink, hatch="////", linewidth=0.0, alpha=0.55))
    if numbered:
        form = number_format or _number_format(shown_LE)
        for row, column in numpy.argwhere(~shown_LE.mask):
            _write_number(axes, image, column, row, float(values_LE[row, column]), form)
    _cell_borders(axes, num_layers, num_experts)
    _number_axis(axes.xaxis, experts)
    _number_axis(axes.yaxis, layers)
    axes.set_xlabel("expert", fontsize=FONT_POINTS)
    axes.set_ylabel("layer", fontsize=FONT_POINTS)

    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label(_label(value_label, unit), fontsize=FONT_POINTS)
    bar.ax.tick_params(labelsize=SMALL_POINTS)
    bar.outline.set_visible(False)
    if reference is not None and 0.0 <= float(norm(reference[0])) <= 1.0:
        _mark_reference(bar, *reference)
    handles = []
    if (novices_LE & ~dropped_LE).any():
        handles.append(Patch(facecolor="white", edgecolor=INK, hatch="////", linewidth=0.5, label="novice"))
    if dropped_LE.any():
        handles.append(_CrossedPatch(label="not there (dropped)"))
    if undefined_LE.any():
        handles.append(Patch(facecolor=EMPTY, edgecolor="none", label=undefined_label))
    if handles:
        _legend_below(figure, handles)
    return figure


def step_curves(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    title: str,
    value_label: str,
    unit: str = "",
    layers: Sequence[int] | None = None,
    reference: tuple[float, str] | None = None,
    events: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one curve over training steps for each layer; colour is depth.

    Args:
        steps: ``[T]``.
        values: ``[T, L]``, in the unit. NaN leaves a gap.
        title: Above the picture.
        value_label: What the values are.
        unit: Of the values, ``""`` for pure numbers.
        layers: Numbers of the layers, L of them; 0, 1, ... when None.
        reference: A value with a horizontal line, and its name.
        events: Steps with a vertical line, by their names.

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that do not fit.
    """
    steps_T = numpy.asarray(steps, dtype=numpy.float64)
    values_TL = numpy.asarray(values, dtype=numpy.float64)
    if values_TL.ndim != 2 or steps_T.shape != values_TL.shape[:1]:
        raise ValueError(f"curves need values [times, layers] for {steps_T.shape} steps, not shape {values_TL.shape}")
    layers = _numbers("layers", layers, values_TL.shape[1])
    figure, axes = _figure(7.0, 3.4, title)
    # The lightest yellow cannot be seen on white.
    colours = colormaps[SEQUENTIAL](numpy.linspace(0.0, 0.88, len(layers)))
    for number, layer in enumerate(layers):
        axes.plot(
            steps_T,
            values_TL[:, number],
            color=colours[number],
            linestyle=DASHES[number % len(DASHES)],
            linewidth=1.6,
            label=f"layer {layer}",
        )
    _finish_curves(axes, "training step", _label(value_label, unit), reference)
    for name, step in (events or {}).items():
        axes.axvline(step, color=INK, linewidth=1.0, linestyle=":")
        axes.annotate(
            name,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize=SMALL_POINTS,
            color=INK,
        )
    columns = 1 + (len(layers) - 1) // 12
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=SMALL_POINTS,
        frameon=False,
        ncols=columns,
        handlelength=2.6,
    )
    return figure


def layer_curves(
    series: Mapping[str, ArrayLike],
    *,
    title: str,
    value_label: str,
    unit: str = "",
    layers: Sequence[int] | None = None,
    reference: tuple[float, str] | None = None,
) -> Figure:
    """Draw curves over the depth of the model, for example the same quantity before and after compression.

    Args:
        series: Name of each curve and its values ``[L]``, in the unit. NaN leaves a gap.
        title: Above the picture.
        value_label: What the values are.
        unit: Of the values, ``""`` for pure numbers.
        layers: Numbers of the layers, L of them; 0, 1, ... when None.
        reference: A value with a horizontal line, and its name.

    Returns:
        The figure.

    Raises:
        ValueError: No series, more than six (nobody can tell them apart), or lengths that differ.
    """
    if not 1 <= len(series) <= len(CATEGORICAL):
        raise ValueError(f"{len(series)} curves cannot be told apart in one picture: give 1 to {len(CATEGORICAL)}")
    arrays = {name: numpy.asarray(values, dtype=numpy.float64) for name, values in series.items()}
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"curves over layers need values [layers] of one length, not shapes {sorted(shapes)}")
    layers = _numbers("layers", layers, next(iter(shapes))[0])
    figure, axes = _figure(7.0, 3.2, title)
    for number, (name, values_L) in enumerate(arrays.items()):
        axes.plot(
            layers,
            values_L,
            color=CATEGORICAL[number],
            marker=MARKERS[number],
            linestyle=DASHES[number % len(DASHES)],
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    _finish_curves(axes, "layer", _label(value_label, unit), reference)
    axes.legend(loc="best", fontsize=SMALL_POINTS, frameon=False)
    return figure


def figure_pixels(figure: Figure, dots_per_inch: float = 110.0) -> NDArray[numpy.uint8]:
    """Return the picture as ``[height, width, 3]`` bytes, red, green, blue.

    Args:
        figure: The figure.
        dots_per_inch: Resolution.
    """
    figure.set_dpi(dots_per_inch)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Figure, path: str | os.PathLike[str], dots_per_inch: float = 110.0) -> None:
    """Write the picture; the ending of the name says the format (``.png``, ``.svg``, ``.pdf``).

    The file is there as a whole or not at all.

    Args:
        figure: The figure.
        path: The file.
        dots_per_inch: Resolution.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=dots_per_inch, facecolor="white")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _CrossedPatch(Patch):
    """Entry of a legend that looks like a crossed-out cell."""

    def __init__(self, label: str) -> None:
        super().__init__(facecolor="white", edgecolor=FAINT, hatch="xx", linewidth=0.5, label=label)


def _numbers(name: str, numbers: Sequence[int] | None, count: int) -> list[int]:
    result = list(range(count)) if numbers is None else list(numbers)
    if len(result) != count:
        raise ValueError(f"{len(result)} numbers of {name} for values of {count} {name}")
    return result


def _marks(name: str, marks: ArrayLike, shape: tuple[int, ...]) -> NDArray[numpy.bool_]:
    result = numpy.asarray(marks, dtype=bool)
    if result.shape != shape:
        raise ValueError(f"{name} has shape {result.shape}, the values have {shape}")
    return result


def _label(text: str, unit: str) -> str:
    return f"{text} [{unit}]" if unit else text


def _figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=FONT_POINTS + 1, loc="left", color=INK)
    axes.tick_params(labelsize=SMALL_POINTS, length=2.5, color=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _norm(shown_LE: Any, limits: tuple[float | None, float | None]) -> Normalize:
    shown = shown_LE.compressed()
    low = float(shown.min()) if shown.size else 0.0
    high = float(shown.max()) if shown.size else 1.0
    low = low if limits[0] is None else limits[0]
    high = high if limits[1] is None else limits[1]
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


def _contrast(image: Any, value: Any) -> str:
    """Return black or white, whichever is easier to read on the colour of a value."""
    if not numpy.isfinite(numpy.ma.filled(value, numpy.nan)):
        return INK
    red, green, blue, _ = image.cmap(image.norm(float(value)))
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else "black"


def _write_number(axes: Any, image: Any, column: int, row: int, value: float, form: str) -> None:
    text = axes.text(
        column,
        row,
        format(value, form),
        ha="center",
        va="center",
        fontsize=SMALL_POINTS,
        color=_contrast(image, value),
    )
    # A rim in the colour of the cell keeps the hatch of a novice away from the digits.
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=image.cmap(image.norm(value)))])


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


def _number_axis(axis: Any, numbers: list[int]) -> None:
    every = 1 + (len(numbers) - 1) // 20
    # Steps that people count in.
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, every) if step >= every)
    places = list(range(0, len(numbers), every))
    axis.set_ticks(places, labels=[str(numbers[place]) for place in places])


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


def _finish_curves(axes: Any, x_label: str, y_label: str, reference: tuple[float, str] | None) -> None:
    axes.set_xlabel(x_label, fontsize=FONT_POINTS)
    axes.set_ylabel(y_label, fontsize=FONT_POINTS)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if reference is not None:
        value, name = reference
        axes.axhline(value, color=FAINT, linewidth=1.2)
        axes.annotate(
            name,
            (0.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=SMALL_POINTS,
            color=FAINT,
        )
