"""Which figure stands in which section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moe_lightning.reporting.captions import RunFigure
from moe_lightning.reporting.report.blocks import Block, Gallery, Part, Picture, Section, Text, picture
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.run_comparison import ComparedRun, comparison_figures

SECTION_OF = {
    "quality_against": "Summary",
    "damage_by_text": "Quality by text",
    "layer_errors": "Quality by text",
    "tasks": "Tasks",
    "speed": "Speed",
    "load": "Where the tokens go",
    "novice_mass": "Where the tokens go",
    "importance": "What the decision saw",
    "use_and_variance": "What the decision saw",
    "similarity": "What the decision saw",
    "dropping_order": "What the decision saw",
    "error": "Status of every module and matrix",
    "calibration_tokens": "Tokens per expert",
    "time": "Where the time went",
    "compression_time": "Where the time went",
}
"""Section by the beginning of a figure's name."""

REST = "More figures"


def drawn_figures(run: Run) -> dict[str, list[Block]]:
    """Draw a run.

    Args:
        run: The run.

    Returns:
        Figures by the title of their section.
    """
    found: dict[str, dict[str, list[Picture]]] = {}
    for name, figure in run.figures.items():
        folder, _, plain = name.rpartition("/")
        place = found.setdefault(_section_of(plain), {})
        place.setdefault(folder, []).append(_picture(name, figure))
    blocks = {title: _with_parts(groups) for title, groups in found.items()}
    if len(run.drawn) < len(run.compressions):
        note = Text(
            f"Of {len(run.compressions)} compressions the first and the last are drawn; TensorBoard has all.", "note"
        )
        for title in {_section_of("importance"), _section_of("error")} & blocks.keys():
            blocks[title] = [*blocks[title], note]
    return blocks


def with_figures(sections: Iterable[Section], figures: Mapping[str, Sequence[Block]]) -> list[Section]:
    """Put figures behind what stands in their sections, and those that belong nowhere into one of their own.

    Args:
        sections: The sections.
        figures: Figures by the title of their section.
    """
    left = dict(figures)
    filled = [Section(section.title, [*section.blocks, *left.pop(section.title, ())]) for section in sections]
    rest = [block for blocks in left.values() for block in blocks]
    if rest:
        filled.insert(-1, Section(REST, rest))
    return filled


def drawn_comparison(named: Mapping[str, Run]) -> list[Block]:
    """Draw several runs side by side.

    Args:
        named: The runs by name.

    Returns:
        The figures; empty where there is too little to draw.
    """
    runs = {name: ComparedRun(run.quality, run.compressions, run.tasks) for name, run in named.items()}
    drawn = [_picture(name, figure) for name, figure in comparison_figures(runs).items()]
    return [Gallery(drawn)] if drawn else []


def _picture(name: str, drawn: RunFigure) -> Picture:
    return picture(name.replace("/", "-"), drawn.figure, drawn.title, drawn.caption)


def _section_of(name: str) -> str:
    return next((title for start, title in SECTION_OF.items() if f"{name}_".startswith(f"{start}_")), REST)


def _with_parts(groups: Mapping[str, list[Picture]]) -> list[Block]:
    plain = groups.get("")
    blocks: list[Block] = [Gallery(plain)] if plain else []
    return [*blocks, *(Part(folder, [Gallery(drawn)]) for folder, drawn in groups.items() if folder)]
