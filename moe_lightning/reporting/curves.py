"""Curves over training steps and over the depth of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from moe_lightning.reporting.interval_plots import log_axis
from moe_lightning.reporting.panels import legend_below
from moe_lightning.reporting.style import (
    CATEGORICAL,
    DASHES,
    FAINT,
    FONT_POINTS,
    INK,
    SEQUENTIAL,
    SMALL_POINTS,
    Look,
    axis_label,
    looks,
    new_figure,
    row_numbers,
)


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
    layers = row_numbers("layers", layers, values_TL.shape[1])
    figure, axes = new_figure(7.0, 3.4, title)
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
    _finish_curves(axes, "training step", axis_label(value_label, unit), reference)
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
    logarithmic: bool = False,
    layer_label: str = "layer",
    shown: Mapping[str, Look] | None = None,
) -> Figure:
    """Draw curves over the depth of the model, for example the same quantity before and after compression.

    Args:
        series: Name of each curve and its values ``[L]``, in the unit. NaN leaves a gap.
        title: Above the picture.
        value_label: What the values are.
        unit: Of the values, ``""`` for pure numbers.
        layers: Numbers of the layers, L of them; 0, 1, ... when None.
        reference: A value with a horizontal line, and its name.
        logarithmic: Whether the values have a logarithmic axis, which leaves out what is zero.
        layer_label: What the places are, beside the axis.
        shown: How each curve looks; as everywhere where None.

    Returns:
        The figure. Curves that are named like a moment of a run look as everywhere.

    Raises:
        ValueError: No series, more than six (nobody can tell them apart), or lengths that differ.
    """
    if not 1 <= len(series) <= len(CATEGORICAL):
        raise ValueError(f"{len(series)} curves cannot be told apart in one picture: give 1 to {len(CATEGORICAL)}")
    arrays = {name: numpy.asarray(values, dtype=numpy.float64) for name, values in series.items()}
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"curves over layers need values [layers] of one length, not shapes {sorted(shapes)}")
    layers = row_numbers("layers", layers, next(iter(shapes))[0])
    figure, axes = new_figure(7.0, 3.4, title)
    found = looks(list(arrays)) if shown is None else {name: shown[name] for name in arrays}
    for name, look in found.items():
        values_L = numpy.where(arrays[name] > 0, arrays[name], numpy.nan) if logarithmic else arrays[name]
        axes.plot(
            layers,
            values_L,
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    _finish_curves(axes, layer_label, axis_label(value_label, unit), reference)
    if logarithmic:
        log_axis(axes, "y")
    legend_below(figure, axes.get_legend_handles_labels()[0])
    return figure


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
