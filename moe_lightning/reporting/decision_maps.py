"""What was decided where: experts that stay or go, and the order in which layers go.

L layers, E experts of the original model, N numbers of layers that go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from moe_lightning.reporting.panels import legend_below, new_panels
from moe_lightning.reporting.style import EMPTY, FONT_POINTS, INK, SMALL_POINTS, row_numbers

STATES = ("stays", "merged into another", "replaced by a novice", "gone")
"""What an expert can be after a decision; the numbers in a map are places in this list."""

# Dark to light with even steps, and apart in hue for colour-blind people.
STATE_COLOURS = ("#1f4e79", "#56B4E9", "#E69F00", EMPTY)


def decision_maps(
    maps: Mapping[tuple[str, str], ArrayLike], *, title: str, layers: Sequence[int] | None = None
) -> Figure:
    """Draw who stays and who goes for several decisions, as a grid of small maps.

    Args:
        maps: By (row, column) of the grid, for example (criterion, scope): states ``[L, E]``, see :data:`STATES`.
        title: Above the picture.
        layers: Numbers of the layers; 0, 1, ... when None.

    Returns:
        The figure. Beside every layer stands how many of its experts go.

    Raises:
        ValueError: No maps, maps of different shapes, or a state that there is not.
    """
    arrays = {name: numpy.asarray(states, dtype=int) for name, states in maps.items()}
    shapes = {states.shape for states in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"decision maps need states [layers, experts] of one shape, not {sorted(shapes)}")
    num_layers, num_experts = next(iter(shapes))
    if any(states.min() < 0 or states.max() >= len(STATES) for states in arrays.values()):
        raise ValueError(f"states must be places in {STATES}")
    numbers = row_numbers("layers", layers, num_layers)
    row_names = list(dict.fromkeys(row for row, _ in arrays))
    column_names = list(dict.fromkeys(column for _, column in arrays))
    # Wide enough for the title and the legend, too.
    width = min(5.0, max(1.9, 0.16 * num_experts + 0.8, 5.2 / len(column_names)))
    height = min(4.0, max(1.0, 0.17 * num_layers + 0.5))
    figure, grid = new_panels(len(row_names), len(column_names), width, height, title)
    for line, row_name in zip(grid, row_names, strict=True):
        for axes, column_name in zip(line, column_names, strict=True):
            if (row_name, column_name) in arrays:
                _draw_states(axes, arrays[row_name, column_name])
            else:
                axes.set_visible(False)
    for axes, column_name in zip(grid[0], column_names, strict=True):
        axes.set_visible(True)
        axes.set_title(column_name, fontsize=FONT_POINTS, color=INK)
    for line, row_name in zip(grid, row_names, strict=True):
        first = line[0]
        first.set_ylabel(f"{row_name}\n\nlayer", fontsize=SMALL_POINTS)
        every = 1 + (num_layers - 1) // 12
        first.set_yticks(range(0, num_layers, every), labels=[str(number) for number in numbers[::every]])
    for axes in grid[-1]:
        axes.set_xlabel("expert", fontsize=SMALL_POINTS)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    present = sorted({int(state) for states in arrays.values() for state in numpy.unique(states)})
    handles: list[Any] = [
        Patch(facecolor=STATE_COLOURS[state], edgecolor="#bbbbbb", linewidth=0.5, label=STATES[state])
        for state in present
    ]
    handles.append(Patch(facecolor="none", edgecolor="none", label="right: experts of the layer that go"))
    legend_below(figure, handles)
    return figure


def _draw_states(axes: Any, states_LE: NDArray[numpy.int_]) -> None:
    num_layers, num_experts = states_LE.shape
    norm = BoundaryNorm(numpy.arange(len(STATES) + 1) - 0.5, len(STATES))
    axes.imshow(states_LE, cmap=ListedColormap(STATE_COLOURS), norm=norm, aspect="auto", interpolation="nearest")
    if num_experts <= 64:
        axes.set_xticks(numpy.arange(num_experts + 1) - 0.5, minor=True)
        axes.set_yticks(numpy.arange(num_layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8 if num_experts <= 16 else 0.3)
        axes.tick_params(which="minor", length=0)
    if num_layers <= 32:
        for layer, count in enumerate((states_LE > 0).sum(1)):
            axes.text(
                num_experts - 0.3, layer, str(count), va="center", ha="left", fontsize=SMALL_POINTS - 1.5, color=INK
            )


def dropping_order(orders: Mapping[str, ArrayLike], *, title: str, rows: Sequence[int] | None = None) -> Figure:
    """Draw which layers are gone when one, two, ... of them go.

    Args:
        orders: Name of each method and, bool ``[L, N]``, whether layer l is gone when n + 1 layers go.
        title: Above the picture.
        rows: Numbers of the layers; 0, 1, ... when None.

    Returns:
        The figure.

    Raises:
        ValueError: No methods, or different numbers of layers.
    """
    arrays = {name: numpy.asarray(gone, dtype=bool) for name, gone in orders.items()}
    heights = {gone.shape[0] for gone in arrays.values()}
    if len(heights) != 1 or any(gone.ndim != 2 for gone in arrays.values()):
        raise ValueError("dropping orders need arrays [layers, numbers that go] with the same layers")
    num_layers = heights.pop()
    numbers = row_numbers("layers", rows, num_layers)
    widest = max(gone.shape[1] for gone in arrays.values())
    width = min(4.0, max(2.3, 0.22 * widest + 1.0))
    # Not so many side by side that nobody can read them in a narrow page.
    columns = max(1, min(len(arrays), int(8.0 / width)))
    lines = -(-len(arrays) // columns)
    figure, grid = new_panels(
        lines,
        columns,
        width,
        min(6.0, max(1.7, 0.2 * num_layers + 0.9)),
        title,
        share=False,
    )
    cells = [axes for line in grid for axes in line]
    colours = ListedColormap([EMPTY, CATEGORICAL_GONE])
    for axes, (name, gone) in zip(cells, arrays.items(), strict=False):
        axes.imshow(gone, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xticks(numpy.arange(gone.shape[1] + 1) - 0.5, minor=True)
        axes.set_yticks(numpy.arange(num_layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0 if num_layers <= 32 else 0.3)
        axes.tick_params(which="minor", length=0)
        axes.set_title(name, fontsize=FONT_POINTS, loc="left", color=INK)
        axes.set_xlabel("layers that go", fontsize=SMALL_POINTS)
        step = 1 + (gone.shape[1] - 1) // 10
        axes.set_xticks(
            range(0, gone.shape[1], step), labels=[str(place + 1) for place in range(0, gone.shape[1], step)]
        )
        every = 1 + (num_layers - 1) // 16
        axes.set_yticks(range(0, num_layers, every), labels=[str(number) for number in numbers[::every]])
    for axes in cells[len(arrays) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("layer", fontsize=SMALL_POINTS)
    legend_below(
        figure,
        [
            Patch(facecolor=EMPTY, edgecolor="#bbbbbb", linewidth=0.5, label="stays"),
            Patch(facecolor=CATEGORICAL_GONE, label="goes"),
        ],
    )
    return figure


CATEGORICAL_GONE = "#D55E00"
