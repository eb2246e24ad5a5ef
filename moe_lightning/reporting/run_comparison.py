"""Figures that put several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_lightning.evaluation.records import BEFORE, QualityMoment, QualityRecord
from moe_lightning.reporting.captions import RunFigure, captioned
from moe_lightning.reporting.curves import layer_curves
from moe_lightning.reporting.dots import Dot, dot_rows, interval_dot
from moe_lightning.reporting.quality_figures import Candidate, ratios, tradeoff_figures
from moe_lightning.reporting.run_figures import score_dot
from moe_lightning.reporting.run_records import CompressionRecord
from moe_lightning.reporting.style import CATEGORICAL, family_of


class ComparedRun(NamedTuple):
    """What is compared of a run.

    Attributes:
        quality: What was measured at its moments, or None.
        compressions: What was done.
        tasks: What ``lm_eval.json`` holds, or None.
    """

    quality: QualityRecord | None
    compressions: Sequence[CompressionRecord] = ()
    tasks: Mapping[str, Any] | None = None


def comparison_figures(runs: Mapping[str, ComparedRun]) -> dict[str, RunFigure]:
    """Draw what several runs ended with: quality against bytes and speed, texts, tasks, errors by depth.

    In the plots of quality against cost colour and marker say the family of methods, and the models before compression
    are one point where they are alike.

    Args:
        runs: By name.

    Returns:
        By name; those that there is data for in two runs or more.
    """
    ends = {name: (run, end) for name, run in runs.items() if (end := last_moment(run.quality)) is not None}
    figures: dict[str, Figure | None] = {}
    if ends:
        figures |= tradeoff_figures(_candidates(ends), "Quality of the runs", path=False)
        figures["damage_by_text"] = _texts(ends)
    figures["tasks"] = _tasks(runs)
    figures["layer_errors"] = _layers(ends)
    return {name: captioned(name, figure) for name, figure in figures.items() if figure is not None}


def last_moment(quality: QualityRecord | None) -> QualityMoment | None:
    """Return the moment that a run ended with: a test of the same model counts only where there is no other.

    Args:
        quality: The record.
    """
    moments = [] if quality is None else quality.moments
    trained = [moment for moment in moments if moment.name != "test"] or moments
    return trained[-1] if trained else None


def _candidates(ends: Mapping[str, tuple[ComparedRun, QualityMoment]]) -> list[Candidate]:
    found: list[Candidate] = []
    originals: set[tuple[Any, ...]] = set()
    for name, (run, end) in ends.items():
        before = None if run.quality is None else run.quality.moment(BEFORE)
        if before is not None and before is not end:
            # Alike as far as a picture shows: what they lost is none by definition.
            speed = next(iter(before.speed.values()), None)
            alike = before.bytes, before.bytes_on_disk, None if speed is None else round(speed.median, -2)
            if alike not in originals:
                found.append(Candidate("before" if not originals else f"before {name}", "original", before, before))
            originals.add(alike)
        family = family_of([method for record in run.compressions for method in record.methods])
        found.append(Candidate(name, family, end, before))
    return found


def _texts(ends: Mapping[str, tuple[ComparedRun, QualityMoment]]) -> Figure | None:
    rows: dict[str, dict[str, Dot]] = {}
    for name, (run, end) in ends.items():
        before = None if run.quality is None else run.quality.moment(BEFORE)
        for text in list(end.texts)[: len(CATEGORICAL)]:
            known = ratios(end, before, text)
            if before is not end and "perplexity_ratio" in known:
                rows.setdefault(name, {})[text] = interval_dot(known["perplexity_ratio"])
    texts = {text for row in rows.values() for text in row}
    if len(rows) < 2 or len(texts) > len(CATEGORICAL):
        return None
    return dot_rows(
        rows,
        title="What was lost on each text",
        value_label="perplexity, in units of that before compression",
        reference=(1.0, "before"),
    )


def _tasks(runs: Mapping[str, ComparedRun]) -> Figure | None:
    rows: dict[str, dict[str, Dot]] = {}
    ended = 0
    for name, run in runs.items():
        moments = [moment for moment in (run.tasks or {}).get("moments", ()) if moment["tasks"]]
        trained = [moment for moment in moments if moment["name"] != "test"] or moments
        if not trained:
            continue
        ended += 1
        for task, result in trained[-1]["tasks"].items():
            dot = score_dot(result["value"], result.get("stderr"))
            rows.setdefault(f"{task} ({result['metric']})", {})[name] = dot
    if ended < 2 or ended > len(CATEGORICAL):
        return None
    return dot_rows(rows, title="Tasks of the lm-evaluation-harness", value_label="score", unit="%")


def _layers(ends: Mapping[str, tuple[ComparedRun, QualityMoment]]) -> Figure | None:
    measured = {name: end.layer_errors for name, (_, end) in ends.items()}
    errors = {name: found for name, found in measured.items() if any(error > 0 for error in found.values())}
    if not 1 < len(errors) <= len(CATEGORICAL):
        return None
    blocks = sorted({block for found in errors.values() for block in found})
    return layer_curves(
        {name: [100 * found.get(block, math.nan) for block in blocks] for name, found in errors.items()},
        title="Error of what leaves each block",
        value_label="squared error, relative",
        unit="%",
        layers=blocks,
        layer_label="decoder layer",
        logarithmic=True,
    )
