"""The report of one run, from the summary to the settings."""

from __future__ import annotations

from moe_lightning import __version__
from moe_lightning.reporting.report.blocks import Page, Section
from moe_lightning.reporting.report.compressions import done_section, matrices_section, tokens_section
from moe_lightning.reporting.report.costs import size_section, speed_section, time_section
from moe_lightning.reporting.report.figures import drawn_figures, with_figures
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

FOOTER = f"Made by moe-lightning {__version__} from the files of the run."


def report_page(run: Run) -> Page:
    """Return the report of a run.

    Args:
        run: The run.
    """
    figures = drawn_figures(run)
    sections = [
        summary_section(run),
        done_section(run),
        quality_section(run),
        tasks_section(run),
        recovery_section(run),
        size_section(run),
        speed_section(run),
        _decision_section(run, "What the decision saw" in figures),
        _routing_section(run, "Where the tokens go" in figures),
        matrices_section(run),
        tokens_section(run),
        time_section(run),
        samples_section(run),
        settings_section(run),
    ]
    what = "a folder of moe-lightning compress" if run.offline is not None else "a run of moe-lightning"
    subtitle = f"{what}: what was done, what it cost, what it bought"
    return Page(run.name, subtitle, with_figures(sections, figures), FOOTER)


def _decision_section(run: Run, drawn: bool) -> Section:
    how = "methods that measure the model leave them" if run.compressions else "nothing was compressed"
    return Section(
        "What the decision saw",
        [] if drawn else missing(run, "There are no statistics to draw", how, file="*statistics.safetensors"),
    )


def _routing_section(run: Run, drawn: bool) -> Section:
    how = "moe-lightning collect measures it" if run.offline is not None else HOW_QUALITY
    title = "Where the tokens go"
    return Section(
        title, [] if drawn else missing(run, "Routing on held-out text was not measured", how, file="quality.json")
    )
