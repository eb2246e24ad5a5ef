"""All figures of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.figure import Figure

from moe_lightning.evaluation.records import BEFORE, QualityRecord
from moe_lightning.reporting.captions import Drawn, RunFigure, captioned
from moe_lightning.reporting.decisions import compression_figures, roles
from moe_lightning.reporting.dots import Dot, bars, dot_rows
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.moments import drawn_moments, joined, left_out, moments_left_out
from moe_lightning.reporting.quality_figures import (
    Candidate,
    damage_by_text,
    layer_error_curves,
    load_maps,
    novice_mass,
    tradeoff_figures,
)
from moe_lightning.reporting.run_records import CompressionRecord
from moe_lightning.reporting.slimming_maps import slimming_figures
from moe_lightning.reporting.style import CATEGORICAL
from moe_lightning.reporting.task_figures import task_figure
from moe_lightning.statistics import Statistics
from moe_lightning.statistics.groups import real_experts

FEW_TOKENS = 1000
"""Calibration tokens of an expert below which the tokens of all experts are drawn."""


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
        By name, in the order in which a report shows them; names are those of files and of TensorBoard's tags. Those of
        one of several compressions are ``compression-600/importance`` and so on.
    """
    figures: dict[str, Figure | Drawn | None] = {}
    if quality is None:
        figures |= task_figure(tasks)
    else:
        before = quality.moment(BEFORE)
        models = [Candidate(moment.name, moment.name, moment, before) for moment in drawn_moments(quality)]
        figures |= tradeoff_figures(models, "Quality", path=True)
        figures["damage_by_text"] = damage_by_text(quality)
        figures |= task_figure(tasks)
        figures["layer_errors"] = layer_error_curves(quality)
        figures |= load_maps(quality)
        figures["novice_mass"] = novice_mass(quality, _mass_before(compressions))
    gone = "" if quality is None else moments_left_out(quality)
    found = {
        name: captioned(name, figure if name.startswith("tasks") else _noted(figure, gone))
        for name, figure in figures.items()
        if figure is not None
    }
    for record in compressions:
        when = "" if record.step is None else f"step {record.step}"
        for name, figure in _of_compression(record, when).items():
            several = len(compressions) > 1
            found[f"{record.name}/{name}" if several else name] = captioned(name, figure, when if several else "")
    rest: dict[str, Figure | Drawn | None] = {
        **speed_figures(benchmarks),
        "time": time_figure(time),
        "compression_time": compression_time(compressions),
    }
    return found | {name: captioned(name, figure) for name, figure in rest.items() if figure is not None}


def _noted(figure: Figure | Drawn, note: str) -> Drawn:
    drawn = figure if isinstance(figure, Drawn) else Drawn(figure)
    return Drawn(drawn.figure, joined(drawn.note, note))


def _of_compression(record: CompressionRecord, when: str) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    statistics, before, after = record.statistics, record.shape_before, record.shape_after
    if statistics is not None and after is not None:
        figures |= compression_figures(statistics, record.criterion, after, when, record.seed)
    figures |= slimming_figures(record.modules, when, None if before is None else before.blocks)
    if "calibration_tokens" not in figures and statistics is not None and after is not None:
        figures |= few_tokens(statistics, roles(statistics.shape, after), when)
    return figures


def few_tokens(statistics: Statistics, roles: Mapping[str, Any], when: str = "") -> dict[str, Figure]:
    """Draw how many calibration tokens reached each expert, where some got few.

    Args:
        statistics: With the group ``routing``.
        roles: What became of the experts; see :func:`moe_lightning.reporting.decisions.roles`.
        when: Added to the title.

    Returns:
        ``calibration_tokens``, or nothing.
    """
    if "count" not in statistics.tensors or not statistics.shape.layouts:
        return {}
    count_LE = statistics["count"].numpy()
    real_LE = real_experts(statistics.shape).numpy()
    if not real_LE.any() or count_LE[real_LE].min() >= FEW_TOKENS:
        return {}
    figure = heat_map(
        count_LE,
        title=f"Tokens that reached each expert{', ' if when else ''}{when}",
        value_label="calibration tokens",
        layers=statistics.shape.moe_layers,
        novices=roles["novice"],
        dropped=~real_LE,
        marked=real_LE & (count_LE < FEW_TOKENS),
        marked_label=f"fewer than {FEW_TOKENS:,}",
        logarithmic=True,
        number_format=".0f",
    )
    return {"calibration_tokens": figure}


def _mass_before(compressions: Sequence[CompressionRecord]) -> dict[int, list[float]] | None:
    """Return the share of the routing weight of every expert on the calibration data of the first compression."""
    first = next((record.statistics for record in compressions if record.statistics is not None), None)
    if first is None or "gate_sum" not in first.tensors:
        return None
    mass_LE = numpy.nan_to_num(first["gate_sum"].numpy())
    return {
        layer: (row / max(row.sum(), 1e-300)).tolist()
        for layer, row in zip(first.shape.moe_layers, mass_LE, strict=True)
    }


# ---------------------------------------------------------------- numbers of others


def speed_figures(benchmarks: Sequence[Mapping[str, Any]]) -> dict[str, Drawn]:
    """Draw what was timed, a picture for each phase.

    Args:
        benchmarks: What the ``benchmark*.json`` files hold.

    Returns:
        ``speed_prefill`` and ``speed_decode``, those that were timed. Up to six models and implementations stand side
        by side in a row for each batch and context; more have a row each, with up to six batches and contexts in it.
    """
    figures = {}
    for phase in ("prefill", "decode"):
        rows: dict[str, dict[str, Dot]] = {}
        refused: dict[str, None] = {}
        for row in (row for benchmark in benchmarks for row in benchmark["rows"] if row["phase"] == phase):
            place = f"{row['batch']} x {row['context']:,} tokens"
            name = f"{row['model']}, {row['implementation']}"
            rate = row.get("tokens_per_second")
            if row.get("refused") is None and rate is not None:
                rows.setdefault(place, {})[name] = Dot(rate["median"], rate["low"], rate["high"])
            else:
                refused[f"{name}, {place}"] = None
        if not rows:
            continue
        title, note = f"Speed of {phase}, by batch x context", left_out("refused", list(refused))
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        if len(names) > len(CATEGORICAL):
            places = list(rows)[: len(CATEGORICAL)]
            note = joined(note, left_out("too many", list(rows)[len(CATEGORICAL) :]))
            turned = {name: {place: rows[place][name] for place in places if name in rows[place]} for name in names}
            rows, title = {name: row for name, row in turned.items() if row}, f"Speed of {phase}"
        values = [dot.value for row in rows.values() for dot in row.values()]
        figure = dot_rows(
            rows,
            title=title,
            value_label="tokens per second",
            logarithmic=max(values) > 4 * min(values) > 0,
        )
        figures[f"speed_{phase}"] = Drawn(figure, note)
    return figures


_UNITS = ((2 * 3600.0, 3600.0, "h"), (120.0, 60.0, "min"), (0.0, 1.0, "s"))


def _time_bars(seconds: Mapping[str, float], title: str) -> Figure | None:
    known = {part: value for part, value in seconds.items() if value > 0}
    total = sum(known.values())
    if not total:
        return None
    _, length, unit = next(entry for entry in _UNITS if total >= entry[0])
    ordered = dict(sorted(known.items(), key=lambda item: -item[1]))
    return bars(
        {part: value / length for part, value in ordered.items()},
        title=title,
        value_label="time",
        unit=unit,
        labels={part: f"{value / length:.3g} {unit} ({value / total:.1%})" for part, value in ordered.items()},
    )


def time_figure(time: Mapping[str, Any] | None) -> Figure | None:
    """Draw where the time of a run went.

    Args:
        time: What ``time.json`` holds.
    """
    return _time_bars(time["parts"], "Where the time went") if time else None


def compression_time(compressions: Sequence[CompressionRecord]) -> Figure | None:
    """Draw where the time of all compressions of a run went.

    Args:
        compressions: The compressions.
    """
    total: dict[str, float] = {}
    for record in compressions:
        for part, seconds in record.summary.get("seconds", {}).items():
            total[part] = total.get(part, 0.0) + seconds
    return _time_bars(total, "Where the time of compressing went")
