"""What all figures share: colours, sizes, and how they are made and written."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lightning.files import write_atomically

# Even steps in lightness, and the same to people with any common colour blindness.
SEQUENTIAL = "viridis"
# Okabe and Ito's colours that stand out on white, with markers and dashes for prints without colour.
CATEGORICAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":")
INK, FAINT, EMPTY = "#222222", "#8a8a8a", "#e9e9e9"
FONT_POINTS, SMALL_POINTS = 10.0, 8.5


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
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=dots_per_inch, facecolor="white")
    write_atomically(path, picture.getvalue())


def row_numbers(name: str, numbers: Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers of rows or columns: those given, or 0, 1, ..."""
    result = list(range(count)) if numbers is None else list(numbers)
    if len(result) != count:
        raise ValueError(f"{len(result)} numbers of {name} for values of {count} {name}")
    return result


def axis_label(text: str, unit: str) -> str:
    """Return an axis label with its unit in brackets."""
    return f"{text} [{unit}]" if unit else text


def new_figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    """Return a figure of a size in inches and its axes, titled and without a frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=FONT_POINTS + 1, loc="left", color=INK)
    axes.tick_params(labelsize=SMALL_POINTS, length=2.5, color=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes
