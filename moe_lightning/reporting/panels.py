"""Figures of several panels that share their axes."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_lightning.reporting.style import FAINT, FONT_POINTS, INK, SMALL_POINTS


def new_panels(
    rows: int, columns: int, panel_width: float, panel_height: float, title: str, *, share: bool = True
) -> tuple[Figure, list[list[Any]]]:
    """Return a figure with a grid of axes in the style of all figures.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        panel_width: Width of a panel, in inches.
        panel_height: Height of a panel, in inches.
        title: Above the picture.
        share: Whether all panels have the same limits.

    Returns:
        The figure and its axes by row and column.
    """
    figure = Figure(figsize=(0.5 + columns * panel_width, 0.6 + rows * panel_height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=FONT_POINTS + 1, x=0.01, ha="left", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for line in grid:
        for axes in line:
            axes.tick_params(labelsize=SMALL_POINTS, length=2.5, color=FAINT)
            for spine in axes.spines.values():
                spine.set_visible(False)
    return figure, [list(line) for line in grid]


def legend_below(figure: Figure, handles: list[Any]) -> None:
    """Put a legend below all panels, in as many columns as the figure is wide enough for.

    Args:
        figure: The figure.
        handles: Its entries.
    """
    longest = max(len(handle.get_label()) for handle in handles)
    # A letter is about half as wide as high; the symbol and the gap take four letters' room.
    inches = (longest + 7) * 0.55 * SMALL_POINTS / 72
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        fontsize=SMALL_POINTS,
        frameon=False,
    )
