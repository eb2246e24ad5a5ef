"""What the compressions of a run left in its folder, read back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.compression import ModuleStatus
from moe_lightning.evaluation.records import QualityRecord
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.statistics import Statistics

_PLAN = ".plan.json"
_NAME = re.compile(r"compression-(\d+|end)(?:-(\d+))?")


@dataclass(frozen=True)
class CompressionRecord:
    """One compression.

    Attributes:
        name: Of its files, e.g. ``compression-600``; ``compression`` in a folder of ``moe-lightning compress``.
        step: Optimizer steps done; None where there was no training.
        summary: The numbers of its JSON file, those of ``CompressionResult.summary()`` at the top; empty where an
            earlier release wrote none.
        plan: The whole plan of the model afterwards, earlier edits included.
        statistics: What the first method decided by, or None.
        shape_before: Shape of the model before; None where an earlier release left nothing that tells it.
        shape_after: The same after.
    """

    name: str
    step: int | None
    summary: dict[str, Any]
    plan: CompressionPlan
    statistics: Statistics | None
    shape_before: ModelShape | None
    shape_after: ModelShape | None

    @property
    def methods(self) -> list[str]:
        """The methods in words; their names only, where an earlier release wrote no more."""
        told = self.summary.get("methods")
        return list(told) if told else [str(step.get("method", "")) for step in self._own_history]

    @property
    def criterion(self) -> str | None:
        """What the first method scored experts by, or None."""
        if "criterion" in self.summary:
            return self.summary["criterion"]
        return self._own_history[0].get("criterion") if self._own_history else None

    @property
    def seed(self) -> int:
        """Seed of the first method."""
        found = self.summary.get("seed", self._own_history[0].get("seed") if self._own_history else None)
        return int(found or 0)

    @property
    def modules(self) -> dict[str, ModuleStatus]:
        """What happened to each module that was changed."""
        statuses = self.summary.get("modules", {})
        parts = {name: self.summary.get(name, {}) for name in ("tokens", "matrices", "errors", "losses")}
        return {
            name: ModuleStatus(
                status,
                {int(expert): count for expert, count in parts["tokens"].get(name, {}).items()},
                *(parts[part].get(name, {}) for part in ("matrices", "errors", "losses")),
            )
            for name, status in statuses.items()
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """Where the whole plan comes from, a dict for each method, those of earlier compressions first."""
        return [step for step in self.plan.origin.get("history", []) if isinstance(step, dict)]

    @property
    def _own_history(self) -> list[dict[str, Any]]:
        """Return the entries of the history that this compression made: the last ones."""
        return self.history[-len(self.summary.get("methods") or (None,)) :]


@dataclass(frozen=True)
class RecordedCompressions:
    """The compressions of a run's model, and what else lies in its folder.

    Attributes:
        records: In the order of their steps, each going on from the one before.
        left_out: Names of the records that are not in the history of that model: the run was resumed from a checkpoint
            of before them, and went on otherwise.
    """

    records: list[CompressionRecord]
    left_out: list[str]


def read_compressions(folder: str | Path) -> list[CompressionRecord]:
    """Read the compressions of a run, or the one of a folder that ``moe-lightning compress`` wrote.

    Args:
        folder: The run directory, or the output folder.

    Returns:
        Those of :func:`recorded_compressions`.

    Raises:
        ValueError: A file is damaged.
    """
    return recorded_compressions(folder).records


def recorded_compressions(
    folder: str | Path, quality: QualityRecord | None = None, damaged: dict[str, str] | None = None
) -> RecordedCompressions:
    """Read the compressions of a run, and say which records in its folder are of another branch of it.

    Args:
        folder: The run directory, or the output folder of ``moe-lightning compress``.
        quality: What was measured in the run. It travels in checkpoints, so that it is of the model that the run ended
            with: where there are several branches, the one that it agrees with counts. Without it, or where it agrees
            with several, the one that was written last does.
        damaged: Where damaged files go to, each with what is wrong with it; what they hold is left out.

    Returns:
        The records; empty where there is none. One whose plan was not written any more (the process was killed in
        between) is left out: a resumed run does it again.

    Raises:
        ValueError: A file is damaged, and nothing is given to put that into.
    """
    folder, found = Path(folder), []
    if (folder / "plan.json").is_file() and (folder / "compression.json").is_file():
        numbers, plan, statistics = (
            folder / name for name in ("compression.json", "plan.json", "statistics.safetensors")
        )
        offline = _read_or_note("compression", numbers, plan, statistics, damaged)
        found += [] if offline is None else [offline]
    results = folder / "results"
    plans = plan_files(results)
    records: dict[str, CompressionRecord] = {}
    for name, path in sorted(plans.items(), key=lambda item: _order(item[0])):
        statistics = results / f"{name}.statistics.safetensors"
        record = _read_or_note(name, results / f"{name}.json", path, statistics, damaged)
        if record is not None:
            records[name] = record
    if not records:
        return RecordedCompressions(_with_shapes(found), [])
    order = list(records)
    # Where branches end; of several the state of the run says the truth first, then when each was written.
    plans_of = [record.plan for record in records.values()]
    ends = [
        name
        for name in order
        if all(is_beginning(plan, records[name].plan) for plan in plans_of if is_beginning(records[name].plan, plan))
    ]
    last = max(
        ends, key=lambda name: (_agrees(records[name], quality), plans[name].stat().st_mtime_ns, order.index(name))
    )
    kept = [name for name in order if is_beginning(records[name].plan, records[last].plan)]
    found += [records[name] for name in kept]
    return RecordedCompressions(_with_shapes(found), [name for name in order if name not in kept])


def plan_files(results: Path) -> dict[str, Path]:
    """Return the plans of the compressions in a folder of results, by the names of the compressions.

    Args:
        results: ``RUN/results``.
    """
    found = {path.name.removesuffix(_PLAN): path for path in results.glob(f"compression-*{_PLAN}")}
    return {name: path for name, path in found.items() if _NAME.fullmatch(name)}


def is_beginning(earlier: CompressionPlan, plan: CompressionPlan) -> bool:
    """Say whether a plan goes on from an earlier one: its edits and its history begin with those of that one.

    Args:
        earlier: The earlier plan.
        plan: The plan.
    """
    begun, whole = (_history(given) for given in (earlier, plan))
    return plan.starts_with(earlier) and whole[: len(begun)] == begun


def _history(plan: CompressionPlan) -> list[Any]:
    # As JSON has it: one of the plans may never have been in a file.
    return list(plan.to_dict()["origin"].get("history") or [])


def _agrees(record: CompressionRecord, quality: QualityRecord | None) -> bool:
    """Say whether the last compression that quality was measured after is this one."""
    moments = [] if quality is None else [item for item in quality.moments if item.name.startswith("compressed")]
    after = record.summary.get("after")
    if not moments or not isinstance(after, dict):
        return False
    return (moments[-1].step, moments[-1].parameters) == (record.step, after.get("parameters"))


def _order(name: str) -> tuple[float, int]:
    place = _NAME.fullmatch(name)
    assert place is not None
    return math.inf if place[1] == "end" else int(place[1]), int(place[2] or 1)


class _Damaged(ValueError):
    """A file that cannot be read.

    Attributes:
        path: The file.
        why: What is wrong with it.
    """

    def __init__(self, path: Path, why: str, told: str = "is damaged") -> None:
        super().__init__(f"{path} {told}: {why}")
        self.path, self.why = path, why


def _read_or_note(
    name: str, numbers: Path, plan: Path, statistics: Path, damaged: dict[str, str] | None
) -> CompressionRecord | None:
    """Read a compression; note damaged files and go on without what they hold, where there is something to note in."""
    if damaged is None:
        return _read(name, numbers, plan, _statistics(statistics))
    try:
        measured = _statistics(statistics)
    except _Damaged as error:
        damaged[str(error.path)], measured = error.why, None
    try:
        return _read(name, numbers, plan, measured)
    except _Damaged as error:
        damaged[str(error.path)] = error.why
        return None


def _statistics(path: Path) -> Statistics | None:
    try:
        return Statistics.load(path) if path.is_file() else None
    except Exception as error:
        # Statistics of a run cannot be collected again, so that the advice of the reader does not fit.
        why = told_damage(error).partition(": collect")[0].removeprefix(f"{path}: ").removeprefix(f"{path} is ")
        raise _Damaged(path, why, "holds no statistics") from None


def _read(name: str, numbers: Path, plan: Path, measured: Statistics | None) -> CompressionRecord:
    try:
        summary = json.loads(numbers.read_text(encoding="utf-8")) if numbers.is_file() else {}
        # The command writes the numbers of the compression under a name of their own.
        summary = {**summary, **summary.pop("compression", {})}
        shapes = [_shape(summary.get(key)) for key in ("shape_before", "shape_after")]
    except Exception as error:
        raise _Damaged(numbers, told_damage(error), "is no record of a compression") from None
    try:
        decided = CompressionPlan.from_json(plan.read_text(encoding="utf-8"))
    except Exception as error:
        raise _Damaged(plan, told_damage(error)) from None
    before = shapes[0] or (None if measured is None else measured.shape)
    record = CompressionRecord(name, _step(name, summary, decided), summary, decided, measured, before, shapes[1])
    try:
        # What is read from it later, so that a mistake is told with the name of the file.
        _ = list(map(str, record.methods)), record.criterion, record.seed, record.modules
        for key in ("touched_parameters", "claimed_parameters", "parameters_before", "parameters_after"):
            int(summary.get(key) or 0)
    except Exception as error:
        raise _Damaged(numbers, told_damage(error), "is no record of a compression") from None
    return record


def told_damage(error: Exception) -> str:
    """Say what is wrong with a file.

    Args:
        error: What was raised when it was read.
    """
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON, or cut off ({error})"
    if isinstance(error, TypeError | AttributeError):
        return f"a value has another JSON type than it should have ({error})"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__


def _shape(values: dict[str, Any] | None) -> ModelShape | None:
    return None if values is None else ModelShape.from_dict(values)


def _step(name: str, summary: dict[str, Any], plan: CompressionPlan) -> int | None:
    if isinstance(summary.get("step"), int):
        return int(summary["step"])
    history = plan.origin.get("history") or [{}]
    calibration = history[-1].get("calibration") if isinstance(history[-1], dict) else None
    step = (calibration or {}).get("step") if name != "compression" else None
    place = _NAME.fullmatch(name)
    if not isinstance(step, int) and place is not None and place[1] != "end":
        step = int(place[1])
    return step if isinstance(step, int) else None


def _with_shapes(records: list[CompressionRecord]) -> list[CompressionRecord]:
    """Work out the shapes that files of earlier releases do not hold from those that are known."""
    known = [shape for record in records for shape in (record.shape_before, record.shape_after) if shape is not None]
    if not known:
        return records
    original = known[0].uncompressed()
    found: list[CompressionRecord] = []
    for record in records:
        before = record.shape_before or (found[-1].shape_after if found else None)
        after = record.shape_after or record.plan.check(original)
        values = (record.name, record.step, record.summary, record.plan, record.statistics)
        found.append(CompressionRecord(*values, before, after))
    return found
