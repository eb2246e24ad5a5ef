"""Titles and captions of the figures of reports."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunFigure:
    """A figure of a report.

    Attributes:
        figure: The figure.
        title: What it shows, in a few words.
        caption: How to read it, in a sentence or two.
    """

    figure: Figure
    title: str
    caption: str


@dataclass(frozen=True)
class Drawn:
    """A figure, and what its caption must say besides.

    Attributes:
        figure: The figure.
        note: Sentences, e.g. about what is not drawn; may be empty.
    """

    figure: Figure
    note: str = ""


_FRONT = "The first held-out text. On the line of steps are the models that no other one beats in both respects."
CAPTIONS: dict[str, tuple[str, str]] = {
    "quality_against_bytes": ("Quality against size", _FRONT),
    "quality_against_speed": ("Quality against speed", f"{_FRONT} Horizontal bars are the spread of several runs."),
    "damage_by_text": (
        "What was lost on each text",
        "Perplexity in units of that before compression, with 95 % intervals in pairs over blocks; right of the line "
        "the model got worse. Text that calibration did not see shows what the calibration data hides.",
    ),
    "tasks": (
        "Tasks of the lm-evaluation-harness",
        "Bars are one standard error; none where the harness gives none. What is no share of right answers has a "
        "picture of its own.",
    ),
    "layer_errors": (
        "Error of what leaves each block",
        "Squared difference from the model before compression, in percent of the squared output there: where it "
        "arises, and whether later layers mend it or let it grow.",
    ),
    "load": (
        "Load of the experts",
        "Share of the routed tokens. Novices are hatched, experts that went are crossed out.",
    ),
    "novice_mass": (
        "Routing weight that goes to novices",
        "Share of each layer's routing weight that novices get; before: what the same experts got. It tells how much "
        "of the layer's output a few constants or small maps stand for.",
    ),
    "importance": (
        "Score of the experts",
        "What the experts were ranked by, in percent of the largest. Hatched ones become novices, "
        "those with a coloured corner go.",
    ),
    "use_and_variance": (
        "Who stays: use and variance of the experts",
        "Filled experts stay, hollow ones go. A dashed line is where the score parts them, where it can be drawn on "
        "these axes.",
    ),
    "similarity": (
        "Similarity of the hidden states between blocks",
        "Mean cosine of the residual stream at all pairs of places: bright squares along the diagonal are runs of "
        "blocks that change little.",
    ),
    "similarity_by_depth": (
        "What blocks leave as it was",
        "Mean cosine of a block's input and output, and of the residual stream around its MoE sub-layer: near 1 it "
        "changes little.",
    ),
    "dropping_order": ("Which layers would go first", "By column: the layers that go when one, two, ... of them go."),
    "error": (
        "Error of the matrices",
        "Squared error of the outputs on calibration tokens, in percent of their squares. A coloured corner: made "
        "without the measurement that the method asks for.",
    ),
    "calibration_tokens": (
        "Calibration tokens of each expert",
        "How many tokens reached each expert; what is measured on few is little known.",
    ),
    "time": ("Where the time went", "Every moment counts once, as what was done then."),
    "compression_time": ("Where the time of the compressions went", "All compressions of the run together."),
    "speed": ("Tokens per second", "Median of the repeats, bars from the slowest to the fastest."),
}
"""Title and caption by the beginning of a figure's name."""


def captioned(name: str, figure: Figure | Drawn, title: str = "") -> RunFigure:
    """Return a figure with its title and caption.

    Args:
        name: Its name; what stands behind the names of :data:`CAPTIONS`, ``load_before``, is added to the title.
        figure: The figure; a note is added to the caption.
        title: Added to the title.
    """
    drawn = figure if isinstance(figure, Drawn) else Drawn(figure)
    known = name if name in CAPTIONS else next(key for key in CAPTIONS if name.startswith(f"{key}_"))
    more = ", ".join(part for part in (name.removeprefix(known).removeprefix("_"), title) if part)
    heading, caption = CAPTIONS[known]
    told = f"{caption} {drawn.note}" if drawn.note else caption
    return RunFigure(drawn.figure, f"{heading}: {more}" if more else heading, told)
