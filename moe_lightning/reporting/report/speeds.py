"""How much faster a model is than before, and whether that is more than the spread of what was timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lightning.evaluation.records import QualityMoment, Rate
from moe_lightning.reporting.report.blocks import Cell
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.words import number

NO_DIFFERENCE = "no difference shown"
"""Where the ranges of two models overlap."""

_OURS = "moe_lightning"
_SAME_SIZE = 0.02
"""Share by which a folder on disk may differ from what its weights take: there is a header in each file."""


@dataclass(frozen=True)
class SpeedChange:
    """The speed of a model and that of the one before compression, timed with the same batch and context.

    Attributes:
        now: Tokens per second.
        before: The same before.
        in_turn: Names of both models where a benchmark timed them in turn; empty where each was timed at its moment.
    """

    now: Rate
    before: Rate
    in_turn: str = ""

    @property
    def shown(self) -> bool:
        """Whether the ranges from the slowest to the fastest run lie apart."""
        return not overlap(self.now, self.before)

    @property
    def cell(self) -> Cell:
        """The ratio where it is shown, and below it what was timed."""
        told = f"{_spread(self.now)} tokens/s; before {_spread(self.before)}"
        told += "; in turn" if self.in_turn else ""
        ratio = f"x {number(self.now.median / self.before.median, 3)}"
        return Cell(ratio if self.shown else NO_DIFFERENCE, told)


def overlap(one: Rate, other: Rate) -> bool:
    """Say whether the ranges of two rates overlap: then no difference is shown.

    Args:
        one: A rate.
        other: Another one.
    """
    return one.low <= other.high and other.low <= one.high


def speed_changes(run: Run, end: QualityMoment | None) -> dict[str, SpeedChange]:
    """Return what became of the speed, by phase.

    Args:
        run: The run.
        end: The model that it ended with.

    Returns:
        ``prefill`` and ``decode``, those that are known of both models: from a benchmark that timed them in turn where
        there is one, or else from their moments in the run.
    """
    first = run.first
    if first is None or end is None or first is end:
        return {}
    found = {}
    for phase in ("prefill", "decode"):
        now, before = end.speed.get(phase), first.speed.get(phase)
        same = now is not None and before is not None and (now.batch, now.context) == (before.batch, before.context)
        in_turn = _in_turn(run, phase, end, first, now)
        if in_turn is not None:
            found[phase] = in_turn
        elif same and now is not None and before is not None and before.median:
            found[phase] = SpeedChange(now, before)
    return found


def _in_turn(run: Run, phase: str, end: QualityMoment, first: QualityMoment, wanted: Rate | None) -> SpeedChange | None:
    """Return what a benchmark says of both models, at the batch and context of the run where it has them."""
    for benchmark in run.benchmarks.values():
        now, before = _label(benchmark["models"], end), _label(benchmark["models"], first)
        if now is None or before is None or now == before:
            continue
        rates = {label: _rates(benchmark["rows"], label, phase) for label in (now, before)}
        shared = [work for work in rates[now] if work in rates[before]]
        if not shared:
            continue
        work = (wanted.batch, wanted.context) if wanted is not None else shared[0]
        work = work if work in shared else shared[0]
        return SpeedChange(rates[now][work], rates[before][work], f"benchmark of {now} and {before}")
    return None


def _label(models: Mapping[str, Any], moment: QualityMoment) -> str | None:
    """Return the name of the first model of a benchmark that is as large as that of a moment."""
    for label, values in models.items():
        disk = values.get("bytes_on_disk")
        close = disk is None or abs(disk - moment.bytes_on_disk) <= _SAME_SIZE * moment.bytes_on_disk
        if values.get("parameters") == moment.parameters and close:
            return label
    return None


def _rates(rows: list[dict[str, Any]], label: str, phase: str) -> dict[tuple[int, int], Rate]:
    """Return what was timed of a model, by batch and context, computed by this package."""
    found = {}
    for row in rows:
        timed = row.get("tokens_per_second")
        if (
            (row["model"], row["phase"], row["implementation"]) != (label, phase, _OURS)
            or row.get("refused")
            or not timed
        ):
            continue
        low, high = timed.get("low"), timed.get("high")
        if low is not None and high is not None and timed["median"]:
            found[row["batch"], row["context"]] = Rate(timed["median"], low, high, row["batch"], row["context"])
    return found


def _spread(rate: Rate) -> str:
    return f"{number(rate.median, 3)} [{number(rate.low, 3)} to {number(rate.high, 3)}]"
