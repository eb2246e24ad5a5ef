"""Figures that put several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_lightning.evaluation.records import BEFORE, TEST, QualityMoment, QualityRecord
from moe_lightning.reporting.captions import Drawn, RunFigure, captioned
from moe_lightning.reporting.dots import Dot, interval_dot
from moe_lightning.reporting.moments import joined, left_out, same_model
from moe_lightning.reporting.quality_figures import Candidate, damage_rows, error_curves, ratios, tradeoff_figures
from moe_lightning.reporting.run_records import CompressionRecord
from moe_lightning.reporting.style import CATEGORICAL, FAINT, Look, family_of, looks_of_runs
from moe_lightning.reporting.task_figures import task_figures


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

    In all of them the colour says the run and the marker its family of methods; runs behind the sixth are grey, or left
    out where only colours tell who is who. Models before compression are one point where they are one model.

    Args:
        runs: By name.

    Returns:
        By name; those that there is data for in two runs or more.
    """
    families = {
        name: family_of([method for record in run.compressions for method in record.methods])
        for name, run in runs.items()
    }
    shown = looks_of_runs(families)
    ends = {name: (run, end) for name, run in runs.items() if (end := last_moment(run.quality)) is not None}
    figures: dict[str, Drawn | None] = {}
    if ends:
        candidates = _originals(ends)
        candidates += [
            Candidate(name, families[name], end, _before(run), shown[name]) for name, (run, end) in ends.items()
        ]
        note = _reading(list(ends), shown)
        for name, drawn in tradeoff_figures(candidates, "Quality of the runs", path=False).items():
            figures[name] = Drawn(drawn.figure, joined(drawn.note, note))
        figures["damage_by_text"] = _texts(ends)
    figures |= _tasks(runs, shown)
    figures["layer_errors"] = _layers(ends, shown)
    return {name: captioned(name, drawn) for name, drawn in figures.items() if drawn is not None}


def _reading(names: list[str], shown: Mapping[str, Look]) -> str:
    if len(names) < 2:
        return ""
    grey = [name for name in names if shown[name].colour == FAINT]
    rest = f" Grey, for want of colours: {', '.join(grey)}." if grey else ""
    return f"The colour says the run, as in the other figures here, the marker its family of methods.{rest}"


def last_moment(quality: QualityRecord | None) -> QualityMoment | None:
    """Return the moment that a run ended with: a test of the same model counts only where there is no other.

    Args:
        quality: The record.
    """
    moments = [] if quality is None else quality.moments
    trained = [moment for moment in moments if moment.name != TEST] or moments
    return trained[-1] if trained else None


def _before(run: ComparedRun) -> QualityMoment | None:
    return None if run.quality is None else run.quality.moment(BEFORE)


def _originals(ends: Mapping[str, tuple[ComparedRun, QualityMoment]]) -> list[Candidate]:
    """Return the models that runs began with: a point for all runs that began with the same."""
    groups: list[tuple[QualityMoment, list[str]]] = []
    for name, (run, end) in ends.items():
        before = _before(run)
        if before is None or before is end:
            continue
        same = next((names for moment, names in groups if same_model(before, moment)), None)
        if same is None:
            groups.append((before, [name]))
        else:
            same.append(name)
    found = []
    for moment, names in groups:
        whose = names if len(names) <= 2 else [names[0], f"{len(names) - 1} more"]
        name = "before" if len(groups) == 1 else f"before {', '.join(whose)}"
        found.append(Candidate(name, "original", moment, moment))
    return found


def _texts(ends: Mapping[str, tuple[ComparedRun, QualityMoment]]) -> Drawn | None:
    rows: dict[str, dict[str, Dot]] = {}
    alone: list[str] = []
    broken: list[str] = []
    texts = list(dict.fromkeys(text for _, end in ends.values() for text in end.texts))
    for name, (run, end) in ends.items():
        before = _before(run)
        for text in (text for text in texts[: len(CATEGORICAL)] if text in end.texts):
            ratio = ratios(end, before, text).get("perplexity_ratio") if before is not end else None
            if ratio is not None and ratio.finite:
                rows.setdefault(name, {})[text] = interval_dot(ratio)
            else:
                (alone if ratio is None else broken).append(f"{name} on {text}")
    if len(rows) < 2:
        return None
    note = joined(
        left_out("too many texts", texts[len(CATEGORICAL) :]),
        left_out("not measured before on the same blocks", alone),
        left_out("not finite", broken),
    )
    return damage_rows(rows, note)


def _tasks(runs: Mapping[str, ComparedRun], shown: Mapping[str, Look]) -> dict[str, Drawn]:
    found: dict[str, Mapping[str, Any]] = {}
    for name, run in runs.items():
        moments = [moment for moment in (run.tasks or {}).get("moments", ()) if moment["tasks"]]
        trained = [moment for moment in moments if moment["name"] != TEST] or moments
        if trained:
            found[name] = trained[-1]
    if len(found) < 2:
        return {}
    drawn, note = _first(found)
    return task_figures(drawn, shown=shown, note=note)


def _first(found: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what fits into one picture, and a sentence about the rest."""
    names = list(found)
    drawn = {name: found[name] for name in names[: len(CATEGORICAL)]}
    return drawn, left_out("more runs than colours", names[len(CATEGORICAL) :])


def _layers(ends: Mapping[str, tuple[ComparedRun, QualityMoment]], shown: Mapping[str, Look]) -> Drawn | None:
    measured = {name: end.layer_errors for name, (_, end) in ends.items()}
    known = {name: found for name, found in measured.items() if any(error > 0 for error in found.values())}
    if len(known) < 2:
        return None
    errors, note = _first(known)
    return Drawn(error_curves(errors, shown), note)
