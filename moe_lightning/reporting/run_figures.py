"""All figures of one run, and those that put several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from moe_lightning.evaluation.records import QualityRecord
from moe_lightning.reporting.run_records import CompressionRecord


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


def run_figures(
    quality: QualityRecord | None,
    compressions: Sequence[CompressionRecord],
    tasks: Mapping[str, Any] | None = None,
    benchmarks: Sequence[Mapping[str, Any]] = (),
    time: Mapping[str, Any] | None = None,
) -> dict[str, RunFigure]:
    """Draw everything that there is data for.

    Args:
        quality: What was measured at the moments of the run, or None.
        compressions: What :func:`moe_lightning.reporting.run_records.read_compressions` returned.
        tasks: What ``lm_eval.json`` holds, or None.
        benchmarks: What the ``benchmark*.json`` files hold.
        time: What ``time.json`` holds, or None.

    Returns:
        By name, in the order in which a report shows them; names are those of files and of TensorBoard's tags.
    """
    return {}
