"""Everything that a run left in its folder, read back."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.evaluation.intervals import Interval, paired_intervals
from moe_lightning.evaluation.records import BEFORE, QualityMoment, QualityRecord
from moe_lightning.reporting.captions import RunFigure, captioned
from moe_lightning.reporting.run_figures import compression_time, run_figures
from moe_lightning.reporting.run_records import CompressionRecord, recorded_compressions

EXPECTED = (
    "a run directory (config.fit.yaml, results/quality.json, results/compression-STEP.json, ...) or the output folder "
    "of moe-lightning compress (compression.json, plan.json)"
)
"""What ``report`` is given."""

MOST_DRAWN = 3
"""Compressions that are all drawn."""

VERSION = 1
"""Of lm_eval.json and benchmark.json."""


@dataclass(frozen=True)
class Run:
    """What a run left. What is not there is None or empty.

    Attributes:
        folder: The run directory, or the output folder of ``moe-lightning compress``.
        name: How it is called.
        quality: Quality of the model at its moments.
        compressions: What was done to it, in the order of the steps.
        left_out: Names of compressions in the folder that the model did not go through: the run was resumed from a
            checkpoint of before them.
        tasks: ``lm_eval.json``.
        time: ``time.json``: ``total_seconds`` and ``parts``.
        recovery: ``recovery.json``.
        tested: ``test.json``: what the test step logged.
        validated: ``validate.json``, likewise.
        benchmarks: Contents of ``benchmark*.json``, by name.
        configs: YAML of the options, by command.
        offline: ``compression.json`` of ``moe-lightning compress``.
    """

    folder: Path
    name: str
    quality: QualityRecord | None = None
    compressions: list[CompressionRecord] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tasks: dict[str, Any] | None = None
    time: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    tested: dict[str, float] | None = None
    validated: dict[str, float] | None = None
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)
    offline: dict[str, Any] | None = None

    @property
    def moments(self) -> list[QualityMoment]:
        """Moments at which quality was measured, in their order."""
        return [] if self.quality is None else self.quality.moments

    @property
    def first(self) -> QualityMoment | None:
        """The model before its first compression, or None."""
        return None if self.quality is None else self.quality.moment(BEFORE)

    @property
    def task_moments(self) -> list[dict[str, Any]]:
        """Moments of ``lm_eval.json`` that have tasks: ``name``, ``step``, ``limit``, ``tasks``, ``mean``."""
        return [] if self.tasks is None else [moment for moment in self.tasks["moments"] if moment["tasks"]]

    @property
    def drawn(self) -> list[CompressionRecord]:
        """Compressions whose own figures are drawn: of a longer schedule the first and the last."""
        records = self.compressions
        return records if len(records) <= MOST_DRAWN else [records[0], records[-1]]

    @functools.cached_property
    def figures(self) -> dict[str, RunFigure]:
        """All figures by name, drawn when first asked for, which takes seconds."""
        figures = run_figures(self.quality, self.drawn, self.tasks, tuple(self.benchmarks.values()), self.time)
        if len(self.drawn) < len(self.compressions):
            spent = compression_time(self.compressions)  # of all of them
            figures |= {} if spent is None else {"compression_time": captioned("compression_time", spent)}
        return figures

    def intervals(self, moment: QualityMoment, text: str) -> dict[str, Interval]:
        """Return what is known of a model on a text, with intervals.

        Args:
            moment: When.
            text: Name of the text.

        Returns:
            By name: ``perplexity``, ``bits_per_byte``, and where it was measured ``divergence`` and ``agreement``;
            ``perplexity_ratio`` where the model before compression was measured on the same blocks.
        """
        return paired_intervals(moment.texts[text], None if self.first is None else self.first.texts.get(text))


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read what a run left.

    Args:
        folder: A run directory, or the output folder of ``moe-lightning compress``.

    Returns:
        The run; files that are not there are None.

    Raises:
        FileNotFoundError: There is no such folder, or nothing of a run in it.
        ValueError: A file is damaged; the message names it.
    """
    path = Path(folder)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}: name {EXPECTED}")
    results = path / "results"
    quality = results / "quality.json"
    offline = path / "compression.json"
    measured = _quality(quality) if quality.is_file() else None
    recorded = recorded_compressions(path, measured)
    run = Run(
        folder=path,
        name=path.resolve().name,
        quality=measured,
        compressions=recorded.records,
        left_out=recorded.left_out,
        tasks=_read(results / "lm_eval.json", _tasks),
        time=_read(results / "time.json", _time),
        recovery=_read(results / "recovery.json", _recovery),
        tested=_read(results / "test.json", _numbers),
        validated=_read(results / "validate.json", _numbers),
        benchmarks={file.stem: _read(file, _benchmark) for file in sorted(results.glob("benchmark*.json"))},
        configs={file.name.split(".")[1]: _text(file) for file in sorted(path.glob("config.*.yaml"))},
        offline=_read(offline, _offline) if (path / "plan.json").is_file() else None,
    )
    found = (getattr(run, name) for name in run.__dataclass_fields__ if name not in ("folder", "name"))
    if not any(found):
        raise FileNotFoundError(f"there are no results in {path}: name {EXPECTED}")
    return run


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}: write it anew, or remove it") from None


def _read(path: Path, checked: Callable[[Any], Any]) -> Any:
    """Read a JSON file, or return None where there is none."""
    if not path.is_file():
        return None
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged: {why}: write it anew, or remove it") from error


def _quality(path: Path) -> QualityRecord:
    record = QualityRecord.load(path)
    try:
        for moment in record.moments:
            str(moment.name), int(moment.step)
            for name in ("parameters", "bytes", "bytes_on_disk", "flops"):
                int(getattr(moment, name))
            for speed in moment.speed.values():
                float(speed.median), float(speed.low), float(speed.high), int(speed.batch), int(speed.context)
            for error in moment.layer_errors.values():
                float(error)
            for text in moment.texts.values():
                lengths = {len(text.scores.tokens), len(text.scores.nats), len(text.scores.bytes)}
                if len(lengths) > 1 or not min(lengths):
                    raise ValueError(f"{moment.name}: the sums are not of the same blocks")
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}: write it anew, or remove it") from error
    return record


def _check_version(values: dict[str, Any]) -> None:
    if values["version"] != VERSION:
        raise ValueError(f"version {values['version']}, this release reads {VERSION}")


def _tasks(values: Any) -> dict[str, Any]:
    _check_version(values)
    for moment in values["moments"]:
        str(moment["name"]), int(moment["step"]), float(moment["mean"] or 0)
        for task in moment["tasks"].values():
            str(task["metric"]), float(task["value"] or 0), float(task.get("stderr") or 0)
            int(task.get("samples") or 0)
        float(moment.get("limit") or 0)
    return dict(values)


def _time(values: Any) -> dict[str, Any]:
    parts = {str(name): float(seconds) for name, seconds in values["parts"].items()}
    return {"total_seconds": float(values["total_seconds"]), "parts": parts}


def _recovery(values: Any) -> dict[str, Any]:
    for boundary in values["boundaries"]:
        int(boundary["step"]), str(boundary["event"])
        for value in (boundary["loss"], *map(boundary.get, ("added", "recovered_share", "tokens"))):
            float(value or 0)
    for name in ("before", "lost"):
        float(values.get(name) or 0)
    for end in values.get("lost_interval") or ():
        float(end)
    return dict(values)


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _benchmark(values: Any) -> dict[str, Any]:
    _check_version(values)
    for row in values["rows"]:
        for name in ("model", "implementation", "phase", "batch", "context"):
            row[name]
        if row.get("refused") is None:
            float(row["tokens_per_second"]["median"])
        for timed in (row.get("tokens_per_second") or {}, row.get("milliseconds") or {}):
            for name in ("median", "low", "high"):
                float(timed.get(name) or 0)
        for name in ("floor_milliseconds", "peak_bytes", "weight_bytes", "relative_error"):
            float(row.get(name) or 0)
    for model in values["models"].values():
        for name in ("parameters", "bytes", "bytes_on_disk", "flops"):
            float(model.get(name) or 0)
    return {**values, "context": dict(values["context"]), "models": dict(values["models"])}


def _offline(values: Any) -> dict[str, Any]:
    for name in ("before", "after"):
        for number in ("perplexity", "parameters", "bytes", "bytes_on_disk", "tokens_per_second"):
            float(values[name][number])
    return dict(values)
