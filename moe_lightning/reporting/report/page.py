"""The report of one run, from the summary to the settings."""

from __future__ import annotations

from moe_lightning import __version__
from moe_lightning.reporting.report.blocks import Block, Page, Part, Section, picture
from moe_lightning.reporting.report.compressions import done_section, matrices_section, tokens_section
from moe_lightning.reporting.report.costs import size_section, speed_section, time_section
from moe_lightning.reporting.report.quality import (
    missing,
    quality_section,
    recovery_section,
    samples_section,
    tasks_section,
)
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.settings import settings_section
from moe_lightning.reporting.report.summary import HOW_QUALITY, summary_section
from moe_lightning.reporting.run_figures import RunFigure, run_figures

FOOTER = f"Made by moe-lightning {__version__} from the files of the run; it holds no address of another file or place."


def report_page(run: Run) -> Page:
    """Return the report of a run.

    Args:
        run: The run.
    """
    sections = [
        summary_section(run),
        done_section(run),
        quality_section(run),
        tasks_section(run),
        recovery_section(run),
        size_section(run),
        speed_section(run),
        figures_section(run),
        matrices_section(run),
        tokens_section(run),
        time_section(run),
        samples_section(run),
        settings_section(run),
    ]
    what = "a folder of moe-lightning compress" if run.offline is not None else "a run of moe-lightning"
    return Page(run.name, f"{what}: what was done, what it cost, what it bought", sections, FOOTER)


def figures_section(run: Run) -> Section:
    """Return all figures.

    Args:
        run: The run.
    """
    figures = run_figures(run.quality, run.compressions, run.tasks, tuple(run.benchmarks.values()), run.time)
    blocks = figure_blocks(figures)
    if not blocks:
        blocks = missing(run, "There is nothing to draw", HOW_QUALITY)
    return Section("Figures", blocks)


def figure_blocks(figures: dict[str, RunFigure]) -> list[Block]:
    """Return figures as blocks: those of one folder of names together, under its name.

    Args:
        figures: By name, e.g. ``importance`` or ``compression-600/importance``.
    """
    blocks: list[Block] = []
    groups: dict[str, list[Block]] = {}
    for name, drawn in figures.items():
        folder, _, _ = name.rpartition("/")
        shown = picture(name.replace("/", "-"), drawn.figure, drawn.title, drawn.caption)
        if folder not in groups:
            groups[folder] = []
            blocks.append(Part(folder, groups[folder]))
        groups[folder].append(shown)
    plain = groups.get("", [])
    return [*plain, *(block for block in blocks if isinstance(block, Part) and block.title)]
