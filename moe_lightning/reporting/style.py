"""What all figures share: colours, sizes, and how they are made and written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Look:
    """How one thing looks in every figure.

    Attributes:
        colour: Of line and marker.
        marker: For prints without colour.
        dash: Of its line.
    """

    colour: str
    marker: str
    dash: str = "-"


_CYCLE = tuple(
    Look(colour, marker, DASHES[place % len(DASHES)])
    for place, (colour, marker) in enumerate(zip(CATEGORICAL, MARKERS, strict=True))
)
_BLUE, _VERMILLION, _GREEN, _PURPLE, _SKY, _ORANGE = CATEGORICAL

LOOKS: dict[str, Look] = {
    # Moments of a run.
    "before": Look(INK, "o", "-"),
    "compressed": Look(_VERMILLION, "s", "--"),
    "end": Look(_BLUE, "^", "-."),
    "test": Look(_PURPLE, "D", ":"),
    "compressed-2": Look(_ORANGE, "v", "--"),
    "compressed-3": Look(_GREEN, "P", ":"),
    # Families of methods, see family_of.
    "original": Look(INK, "o"),
    "experts dropped": Look(_BLUE, "s"),
    "novices": Look(_ORANGE, "D"),
    "merged": Look(_SKY, "P"),
    "layers dropped": Look(_PURPLE, "v"),
    "channels dropped": Look(_GREEN, "<"),
    "pruned": Look(_GREEN, "^"),
    "quantised": Look(_VERMILLION, "X"),
    "several": Look(FAINT, "*"),
    # Operators of a sweep, by the word before the colon.
    "delete": Look(_BLUE, "s"),
    "keep_router": Look(_SKY, "P"),
    "mean": Look(_ORANGE, "D"),
    "zero": Look(_PURPLE, "v"),
    "gate2_mean": Look(_VERMILLION, "X"),
    "low_rank": Look(_GREEN, "^"),
    "ranks by itself": Look(FAINT, "o"),
}
"""What looks the same everywhere, by name."""

FAMILIES: dict[str, str] = {
    "ExpertDrop": "experts dropped",
    "Novices": "novices",
    "Merge": "merged",
    "LayerDrop": "layers dropped",
    "BlockDrop": "layers dropped",
    "Angular": "layers dropped",
    "ChannelDrop": "channels dropped",
    "Magnitude": "pruned",
    "Wanda": "pruned",
    "SparseGPT": "pruned",
    "RTN": "quantised",
    "GPTQ": "quantised",
    "AWQ": "quantised",
}
"""Family of each method that makes a model smaller, by the name of its class."""


def family_of(methods: Sequence[str]) -> str:
    """Return the family that some methods look like.

    Args:
        methods: In words, each beginning with the name of its class: ``Novices(ratio=0.5)``.

    Returns:
        ``original`` where none of them makes a model smaller, ``several`` where they are of different families.
    """
    names = (method.partition("(")[0] for method in methods)
    found = {FAMILIES[name] for name in names if name in FAMILIES}
    return "several" if len(found) > 1 else next(iter(found), "original")


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Return how some things look in one figure: those of :data:`LOOKS` as everywhere, the others as is left.

    Args:
        names: Different names, at most six.

    Raises:
        ValueError: More, which nobody can tell apart.
    """
    if len(names) > len(CATEGORICAL):
        raise ValueError(f"{len(names)} curves cannot be told apart in one picture: give at most {len(CATEGORICAL)}")
    found: dict[str, Look] = {}
    for name in names:
        known = LOOKS.get(name, LOOKS.get(FAMILIES.get(name, name.partition(":")[0])))
        if known is not None and known not in found.values():
            found[name] = known
    used = {look.colour for look in found.values()}
    free = [look for look in _CYCLE if look.colour not in used] + [look for look in _CYCLE if look.colour in used]
    left = iter(look for look in free if look not in found.values())
    return {name: found[name] if name in found else next(left) for name in names}


OTHER = Look(FAINT, "h")
"""Of what cannot have a look of its own any more: its name stands beside it."""


def looks_or_other(names: Sequence[str]) -> dict[str, Look]:
    """Return how any number of things look: the first ones as :func:`looks` says, the others like :data:`OTHER`.

    Args:
        names: Different names.
    """
    own = len(names) if len(names) <= len(CATEGORICAL) else len(CATEGORICAL) - 1
    return looks(names[:own]) | dict.fromkeys(names[own:], OTHER)


def looks_of_runs(families: Mapping[str, str]) -> dict[str, Look]:
    """Return how runs look in all figures of a page: the colour says the run, the marker its family of methods.

    The first run of a family has the family's own colour where it is free. Runs behind the sixth are grey.

    Args:
        families: What :func:`family_of` returned of each run, by the name of the run.
    """
    coloured = list(families)[: len(CATEGORICAL)]
    own: dict[str, str] = {}
    for name in coloured:
        colour = LOOKS[families[name]].colour
        if colour in CATEGORICAL and colour not in own.values():
            own[name] = colour
    free = iter(colour for colour in CATEGORICAL if colour not in own.values())
    for name in coloured:
        own[name] = own.get(name) or next(free)
    return {
        name: Look(own.get(name, FAINT), LOOKS[family].marker, DASHES[place % len(DASHES)])
        for place, (name, family) in enumerate(families.items())
    }


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
