"""Everything that a run left in its folder, read back."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_lightning.evaluation.intervals import Interval, paired_intervals
from moe_lightning.evaluation.records import BEFORE, QualityMoment, QualityRecord
from moe_lightning.reporting.captions import RunFigure, captioned
from moe_lightning.reporting.run_figures import compression_time, run_figures
from moe_lightning.reporting.run_records import CompressionRecord, recorded_compressions, told_damage

EXPECTED = (
    "a run directory (config.fit.yaml, results/quality.json, results/compression-STEP.json, ...) or the output folder "
    "of moe-lightning compress (compression.json, plan.json)"
)
"""What ``report`` is given."""

MOST_DRAWN = 3
"""Compressions that are all drawn."""

VERSION = 1
"""Of lm_eval.json and benchmark.json."""

OPTIONS = "config.*.yaml"
"""Files that commands write their options to."""

COPIED_SECONDS = 1.0
"""Difference in age of files that may come from copying them."""


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
        damaged: Files that could not be read, each with what is wrong with it; what they hold is None or empty here.
        stale: Names of files of logged numbers that are older than what the last fit wrote; they are left out.
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
    damaged: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)

    @property
    def compressions_damaged(self) -> bool:
        """Whether files of compressions could not be read, so that what was done is not known."""
        names = [Path(path).name for path in self.damaged]
        return any(name.startswith(("compression", "plan")) and name.endswith(".json") for name in names)

    @property
    def options_damaged(self) -> bool:
        """Whether files of options could not be read, so that they are not known."""
        return any(Path(path).match(OPTIONS) for path in self.damaged)

    @property
    def stopped(self) -> str:
        """Where the run was stopped before its end, in words; empty where it was not, or it is not known."""
        known = self.time or {}
        if known.get("ended") is not False or known.get("step") is None:
            return ""
        if not known["step"]:  # what a fit writes when it begins: killed, or still at work
            return "it was begun, and has not ended"
        steps = f" of {known['steps']:,}" if known.get("steps") is not None else ""
        return f"stopped at step {known['step']:,}{steps}; go on with --ckpt_path last"

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
        The run; files that are not there or damaged are None.

    Raises:
        FileNotFoundError: There is no such folder, or nothing of a run in it.
        ValueError: Files are damaged, and nothing else is there; the message names them.
    """
    path = Path(folder)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {kind}: name {EXPECTED}")
    results = path / "results"
    reader = _Reader()
    measured = reader.read(results / "quality.json", _quality)
    recorded = recorded_compressions(path, measured, reader.damaged)
    stale = [name for name in ("test.json", "validate.json") if _is_stale(results / name)]
    benchmarks = {file.stem: reader.read(file, _benchmark) for file in sorted(results.glob("benchmark*.json"))}
    run = Run(
        folder=path,
        name=path.resolve().name,
        quality=measured,
        compressions=recorded.records,
        left_out=recorded.left_out,
        tasks=reader.read(results / "lm_eval.json", _tasks),
        time=reader.read(results / "time.json", _time),
        recovery=reader.read(results / "recovery.json", _recovery),
        tested=None if "test.json" in stale else reader.read(results / "test.json", _numbers),
        validated=None if "validate.json" in stale else reader.read(results / "validate.json", _numbers),
        benchmarks={name: values for name, values in benchmarks.items() if values is not None},
        configs=reader.configs(path),
        offline=reader.read(path / "compression.json", _offline) if (path / "plan.json").is_file() else None,
        damaged=reader.damaged,
        stale=stale,
    )
    held = [name for name in run.__dataclass_fields__ if name not in ("folder", "name", "damaged", "stale")]
    if run.damaged and not any(getattr(run, name) for name in held if name != "configs"):
        told = "; ".join(f"{file} is damaged: {why}" for file, why in run.damaged.items())
        raise ValueError(f"nothing is left to report in {path}: {told}: write it anew, or remove it")
    if not any(getattr(run, name) for name in held):
        raise FileNotFoundError(f"there are no results in {path}: {_instead(path)}")
    return run


class _Reader:
    """Reads files, and notes those that it cannot read.

    Attributes:
        damaged: Those, each with what is wrong with it.
    """

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}

    def read(self, path: Path, checked: Callable[[Any], Any]) -> Any:
        """Read a JSON file; None where there is none, or it is damaged."""
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"it holds a JSON {_KINDS.get(type(values), 'value')}, not an object with names")
            return checked(values)
        except Exception as error:
            self.damaged[str(path)] = " ".join(told_damage(error).split())
            return None

    def configs(self, folder: Path) -> dict[str, str]:
        """Return the options by command; of what is no YAML the text alone."""
        found = {}
        for path in sorted(folder.glob(OPTIONS)):
            try:
                text = path.read_text(encoding="utf-8")
                found[path.name.split(".")[1]] = text
                if not isinstance(yaml.safe_load(text) or {}, dict):
                    raise ValueError("it holds no options")
            except (ValueError, yaml.YAMLError) as error:
                self.damaged[str(path)] = " ".join(str(error).split())
        return found


_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _is_stale(logged: Path) -> bool:
    """Say whether a fit wrote something after numbers were logged: then they are of an earlier model.

    Files that were copied together are about as old as each other, in any order.
    """
    fits = [logged.with_name("time.json"), logged.with_name("recovery.json"), *logged.parent.glob("*.plan.json")]
    written = max((path.stat().st_mtime for path in fits if path.is_file()), default=0.0)
    return logged.is_file() and logged.stat().st_mtime < written - COPIED_SECONDS


def _instead(path: Path) -> str:
    """Say what to do with a folder that holds nothing that a report is written of."""
    if (path / "compression.json").is_file():
        return "compression.json is there, but the plan.json that moe-lightning compress wrote beside it is not"
    swept = [name for name in ("results.md", "results.csv") if (path / name).is_file()]
    if swept:
        return f"it is a folder of moe-lightning sweep, whose results stand in {' and '.join(swept)} there"
    above = path.resolve().parent
    if above.name == "models" and (above.parent / "results").is_dir():
        return f"it is a model of a run; name the run, {above.parent}"
    return f"name {EXPECTED}"


def _quality(values: dict[str, Any]) -> QualityRecord:
    record = QualityRecord.from_dict(values)
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
    known = {name: None if values.get(name) is None else int(values[name]) for name in ("step", "steps")}
    return {"total_seconds": float(values["total_seconds"]), "parts": parts, **known, "ended": values.get("ended")}


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
        for name in ("parameters", "bytes", "bytes_on_disk", "flops", "routed_flops", "sequence_length"):
            float(model.get(name) or 0)
    context = dict(values["context"])
    int(context.get("measurements") or 0)
    return {**values, "context": context, "models": dict(values["models"])}


def _offline(values: Any) -> dict[str, Any]:
    for name in ("before", "after"):
        for number in ("perplexity", "parameters", "bytes", "bytes_on_disk", "tokens_per_second"):
            float(values[name][number])
    return dict(values)
