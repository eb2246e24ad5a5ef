"""Results of tasks: shares of right answers in percent in one picture, each other metric in one of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moe_lightning.evaluation.task_names import is_accuracy
from moe_lightning.reporting.captions import Drawn
from moe_lightning.reporting.dots import Dot, dot_rows
from moe_lightning.reporting.moments import joined, left_out
from moe_lightning.reporting.style import CATEGORICAL, Look

_TITLE = "Tasks of the lm-evaluation-harness"


def task_figure(tasks: Mapping[str, Any] | None) -> dict[str, Drawn]:
    """Draw the results of tasks at each moment of a run, and their means.

    Args:
        tasks: What ``lm_eval.json`` holds.

    Returns:
        As :func:`task_figures`; of more than six moments the first and the last three are drawn.
    """
    moments = {moment["name"]: moment for moment in (tasks or {}).get("moments", ()) if moment["tasks"]}
    names = list(moments)
    if len(moments) > len(CATEGORICAL):
        moments = {name: moments[name] for name in [*names[:3], *names[-3:]]}
    note = left_out("between the first three and the last three", [name for name in names if name not in moments])
    return task_figures(moments, means=True, note=note)


def task_figures(
    results: Mapping[str, Mapping[str, Any]],
    *,
    means: bool = False,
    shown: Mapping[str, Look] | None = None,
    note: str = "",
) -> dict[str, Drawn]:
    """Draw results of tasks side by side.

    Args:
        results: By the name of a moment or of a run, what ``lm_eval.json`` holds of a moment; up to six.
        means: Whether means are drawn: of those whose results are all shares of right answers.
        shown: How each of them looks, or None.
        note: What the captions say besides.

    Returns:
        ``tasks``, in percent, and ``tasks_METRIC`` for what is no share of right answers; those that have a number.
    """
    rows: dict[str, dict[str, dict[str, Dot]]] = {}
    unknown: list[str] = []
    for name, moment in results.items():
        for task, result in moment["tasks"].items():
            metric, label = result["metric"], f"{task} ({result['metric']})"
            scale = 100.0 if is_accuracy(metric) else 1.0
            dot = _dot(result["value"], result.get("stderr"), scale)
            if dot is None:
                unknown.append(f"{label} of {name}")
            else:
                rows.setdefault("" if is_accuracy(metric) else metric, {}).setdefault(label, {})[name] = dot
    shares = rows.get("", {})
    if means and len(shares) > 1:
        known = {name: dot for name, moment in results.items() if (dot := _mean(moment)) is not None}
        if known:
            shares["mean"] = known
    note = joined(note, left_out("without a number", unknown))
    found = {}
    for metric in sorted(rows):
        values = [dot.value for row in rows[metric].values() for dot in row.values()]
        name = f"tasks_{re.sub('[^A-Za-z0-9]+', '_', metric).strip('_')}" if metric else "tasks"
        figure = dot_rows(
            rows[metric],
            title=_TITLE,
            value_label=metric or "score",
            unit="" if metric else "%",
            logarithmic=bool(metric) and max(values) > 4 * min(values) > 0,
            shown=shown,
        )
        found[name] = Drawn(figure, note)
    return found


def _dot(value: Any, error: Any, scale: float) -> Dot | None:
    """Return a result with its standard error; None where it is no number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    reach = error if isinstance(error, int | float) and math.isfinite(error) else 0.0
    return Dot(scale * value, scale * (value - reach), scale * (value + reach))


def _mean(moment: Mapping[str, Any]) -> Dot | None:
    results = moment["tasks"].values()
    whole = all(is_accuracy(result["metric"]) and _dot(result["value"], None, 1.0) is not None for result in results)
    return _dot(moment.get("mean"), None, 100.0) if whole else None
