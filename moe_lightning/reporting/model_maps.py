"""How alike the blocks of a model are, and which experts are used and vary.

C places between blocks, L layers, E experts of the original model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from moe_lightning.reporting.interval_plots import log_axis
from moe_lightning.reporting.style import (
    FAINT,
    FONT_POINTS,
    INK,
    SEQUENTIAL,
    SMALL_POINTS,
    new_figure,
    row_numbers,
)

BoundaryOf = Literal["product", "frequency", "deviation"]
"""What is parted by a boundary."""


def similarity_map(values: ArrayLike, *, title: str, blocks: Sequence[int] | None = None) -> Figure:
    """Draw how alike the hidden states between the blocks of a model are.

    Args:
        values: Mean cosine ``[C, C]``: place i is the input of block i, the last place is the output of the last block.
        title: Above the picture.
        blocks: Numbers of the blocks, C - 1 of them; 0, 1, ... when None.

    Returns:
        The figure.

    Raises:
        ValueError: Not a square.
    """
    cosine_CC = numpy.asarray(values, dtype=numpy.float64)
    if cosine_CC.ndim != 2 or cosine_CC.shape[0] != cosine_CC.shape[1] or cosine_CC.shape[0] < 2:
        raise ValueError(f"a similarity map needs values [places, places], not shape {cosine_CC.shape}")
    places = cosine_CC.shape[0]
    names = [str(number) for number in row_numbers("blocks", blocks, places - 1)] + ["out"]
    side = min(8.0, max(3.6, 1.6 + 0.45 * places)) if places <= 12 else min(8.0, 3.0 + 0.14 * places)
    figure, axes = new_figure(side + 1.0, side, title)
    image = axes.imshow(cosine_CC, cmap=SEQUENTIAL, interpolation="nearest", vmax=1.0)
    if places <= 12:
        for row in range(places):
            for column in range(places):
                red, green, blue, _ = image.cmap(image.norm(cosine_CC[row, column]))
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
                axes.text(
                    column,
                    row,
                    f"{cosine_CC[row, column]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=SMALL_POINTS,
                    color="white" if dark else "black",
                )
    every = 1 + (places - 1) // 16
    shown = sorted({*range(0, places - 1, every), places - 1})
    axes.set_xticks(shown, labels=[names[place] for place in shown])
    axes.set_yticks(shown, labels=[names[place] for place in shown])
    axes.set_xlabel("input of block (out: output of the last)", fontsize=FONT_POINTS)
    axes.set_ylabel("input of block", fontsize=FONT_POINTS)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label("mean cosine of hidden states", fontsize=FONT_POINTS)
    bar.ax.tick_params(labelsize=SMALL_POINTS)
    bar.outline.set_visible(False)
    return figure


def frequency_variance(
    frequency: ArrayLike,
    deviation: ArrayLike,
    kept: ArrayLike,
    *,
    title: str,
    frequency_label: str,
    deviation_label: str,
    layers: Sequence[int] | None = None,
    boundary: float | Sequence[float] | None = None,
    boundary_of: BoundaryOf = "product",
    boundary_label: str = "boundary",
) -> Figure:
    """Draw how often each expert is used against how much its output varies, and which experts stay.

    Args:
        frequency: ``[L, E]``, above zero where it is drawn.
        deviation: ``[L, E]``, likewise.
        kept: Bool ``[L, E]``.
        title: Above the picture.
        frequency_label: What the frequency is, with its unit.
        deviation_label: What the deviation is, with its unit.
        layers: Numbers of the layers; 0, 1, ... when None.
        boundary: Number at which experts stay: for all layers, or for each of them; NaN for none.
        boundary_of: What the number is of: ``product`` of both, on these axes a straight line; ``frequency``;
            ``deviation``.
        boundary_label: Its name.

    Returns:
        The figure. Experts that are never used, or that never vary, have no place on it and are counted in the legend;
        those that are NaN are no experts.

    Raises:
        ValueError: Shapes that differ, or boundaries of other layers than there are.
    """
    x_LE, y_LE = numpy.asarray(frequency, dtype=float), numpy.asarray(deviation, dtype=float)
    kept_LE = numpy.asarray(kept, dtype=bool)
    if not (x_LE.shape == y_LE.shape == kept_LE.shape) or x_LE.ndim != 2:
        raise ValueError(f"expected three arrays [layers, experts], got {x_LE.shape}, {y_LE.shape}, {kept_LE.shape}")
    numbers = row_numbers("layers", layers, x_LE.shape[0])
    if not isinstance(boundary, int | float | None) and len(boundary) != len(numbers):
        raise ValueError(f"{len(boundary)} boundaries for {len(numbers)} layers: give one number, or one for each")
    shown_LE = (x_LE > 0) & (y_LE > 0)
    figure, axes = new_figure(6.6, 4.2, title)
    colours = colormaps[SEQUENTIAL](numpy.linspace(0.0, 0.88, len(numbers)))
    # Of many points each must be small, or they are one blot.
    size, width = (38, 1.3) if shown_LE.sum() <= 320 else (12, 0.8)
    for row, colour in enumerate(colours):
        for state, face in ((True, colour), (False, "none")):
            chosen = shown_LE[row] & (kept_LE[row] == state)
            axes.scatter(
                x_LE[row, chosen], y_LE[row, chosen], s=size, facecolors=[face], edgecolors=[colour], linewidths=width
            )
    for name in ("x", "y"):
        log_axis(axes, name)
    handles: list[Any] = [
        Line2D([], [], marker="o", linestyle="none", color=INK, label="stays"),
        Line2D([], [], marker="o", linestyle="none", color=INK, markerfacecolor="none", label="goes"),
    ]
    single = isinstance(boundary, int | float)
    each: Sequence[float] = [boundary] if isinstance(boundary, int | float) else boundary or ()
    lines = [(number, INK if single else colours[row]) for row, number in enumerate(each) if number > 0]
    if lines and shown_LE.any():
        for number, colour in lines:
            _draw_boundary(axes, number, boundary_of, colour)
        label = boundary_label if single else f"{boundary_label}, by layer"
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label=label))
    missing = int((~shown_LE & ~(numpy.isnan(x_LE) | numpy.isnan(y_LE))).sum())
    if missing:
        handles.append(Line2D([], [], linestyle="none", label=f"{missing} without a place (never used)"))
    every = 1 + (len(numbers) - 1) // 12
    handles += [
        Line2D([], [], marker="s", linestyle="none", color=colours[row], label=f"layer {numbers[row]}")
        for row in range(0, len(numbers), every)
    ]
    axes.set_xlabel(frequency_label, fontsize=FONT_POINTS)
    axes.set_ylabel(deviation_label, fontsize=FONT_POINTS)
    axes.grid(color="#e4e4e4", linewidth=0.6, which="both")
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=SMALL_POINTS, frameon=False)
    return figure


def _draw_boundary(axes: Any, number: float, boundary_of: BoundaryOf, colour: Any) -> None:
    """Draw a line and leave the limits as they are."""
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    if boundary_of == "product":
        line_x = numpy.geomspace(x_low, x_high, 64)
        axes.plot(line_x, number / line_x, color=colour, linestyle="--", linewidth=1.2)
    else:
        draw = axes.axvline if boundary_of == "frequency" else axes.axhline
        draw(number, color=colour, linestyle="--", linewidth=1.2)
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low, y_high)
