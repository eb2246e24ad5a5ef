"""What a benchmark measured, as plain data and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.evaluation.benchmark_check import PHASES, Phase
from moe_lightning.files import write_atomically
from moe_lightning.sizes import data_size

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often.

    Attributes:
        batch_sizes: Sequences at a time.
        contexts: Tokens of each: that go in (prefill), or that are there before (decoding).
        new_tokens: Steps of decoding in a repeat.
        repeats: Runs that are timed.
        warmup: Runs before that.
        tolerance: Of the comparison; by the type of the weights where None.
        phases: Which of prefill and decoding are timed; both are compared.
    """

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int = 32
    repeats: int = 5
    warmup: int = 2
    tolerance: float | None = None
    phases: tuple[Phase, ...] = PHASES

    def __post_init__(self) -> None:
        """Refuse what times nothing.

        Raises:
            ValueError: An option is out of range.
        """
        for name in ("batch_sizes", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} {list(values)}: give numbers from 1 on")
        for name, least in (("new_tokens", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: it must be at least {least}")

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, with what is decoded."""
        return max(self.contexts) + self.new_tokens

    def num_rows(self, entrants: int) -> int:
        """Say how many rows a benchmark has when nothing interrupts it.

        Args:
            entrants: Models with their implementations.
        """
        return len(self.contexts) * len(self.batch_sizes) * len(self.phases) * entrants


@dataclass(frozen=True)
class TimedRow:
    """One measurement, or why there is none.

    Attributes:
        model: Label of the model.
        implementation: Of its experts.
        phase: Prefill or decoding.
        batch: Sequences.
        context: Tokens of each that go in, or are there before.
        weight_bytes: Bytes of the weights in memory, in the form that a checkpoint holds: some packed weights take a
            few percent more in the form in which they work on a CPU.
        tokens_per_second: Of all sequences: ``median``, ``low`` (slowest run) and ``high``.
        milliseconds: Of a pass, which is the whole prefill or a step of decoding: ``median``, ``low`` (fastest run) and
            ``high``.
        flops: FLOPs of a pass that the floor counts: with the experts and novices that its tokens picked in this run.
        floor_milliseconds: The least that the machine allows.
        peak_bytes: Largest memory on a GPU, the model's own weights included and those of others not; None on a CPU.
        relative_error: Of the comparison.
        agreement: Share of tokens with the same likeliest successor as in the slow computation.
        refused: Why it was not timed, or None.
        failed: Whether that is a failure, and nothing that was known before. Not in the JSON.
    """

    model: str
    implementation: str
    phase: str
    batch: int
    context: int
    weight_bytes: int
    tokens_per_second: dict[str, float] | None = None
    milliseconds: dict[str, float] | None = None
    flops: float | None = None
    floor_milliseconds: float | None = None
    peak_bytes: int | None = None
    relative_error: float | None = None
    agreement: float | None = None
    refused: str | None = None
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold."""
        return {name: value for name, value in vars(self).items() if name != "failed"}

    @property
    def name(self) -> str:
        """Say what was measured."""
        return f"{self.model}, {self.implementation}, {self.phase}, {self.batch} x {self.context}"


@dataclass(frozen=True)
class BenchmarkRecord:
    """All measurements of a benchmark and what they were made on.

    Attributes:
        context: Device, threads, types, versions, machine, settings.
        models: By label: folder, parameters, bytes, FLOPs.
        rows: The measurements.
    """

    context: dict[str, Any]
    models: dict[str, dict[str, Any]]
    rows: list[TimedRow]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it before all was measured."""
        return bool(self.context.get("interrupted"))

    @property
    def failures(self) -> list[TimedRow]:
        """Rows that failed."""
        return [row for row in self.rows if row.failed]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold."""
        rows = [row.to_dict() for row in self.rows]
        return {"version": VERSION, "context": self.context, "models": self.models, "rows": rows}

    def save(self, path: Path) -> None:
        """Write JSON, and the table beside it as Markdown; each whole or not at all.

        Args:
            path: The JSON file.
        """
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        write_atomically(path.with_suffix(".md"), self.markdown())

    def baseline(self, row: TimedRow) -> TimedRow | None:
        """Return what a row is compared with in tables: eager experts in the same cell, or else the last model's first.

        Args:
            row: One of the rows.
        """
        cell = (row.phase, row.batch, row.context)
        timed = [
            other
            for other in self.rows
            if (other.phase, other.batch, other.context) == cell and other.tokens_per_second is not None
        ]
        eager = [other for other in timed if other.implementation == "eager"]
        last = [other for other in timed if other.model == list(self.models)[-1]]
        return next(iter([*eager, *last]), None)

    def table(self) -> list[list[str]]:
        """Return the header and the lines of the table, without columns in which nothing was measured."""
        header = ["model", "experts", "phase", "batch", "context", "tokens/s", "slowest-fastest", "x base", "ms"]
        header += ["floor ms", "of floor", "GFLOP", "peak", "weights", "error"]
        left_out = set()
        if self.context.get("repeats") == 1:
            left_out.add("slowest-fastest")
        if all(row.peak_bytes is None for row in self.rows):
            left_out.add("peak")  # as on a CPU
        kept = [column for column, name in enumerate(header) if name not in left_out]
        return [[line[column] for column in kept] for line in (header, *map(self._line, self.rows))]

    def _line(self, row: TimedRow) -> list[str]:
        cells = [row.model, row.implementation, row.phase, str(row.batch), str(row.context)]
        weights = data_size(row.weight_bytes)
        rate, took = row.tokens_per_second, row.milliseconds
        if rate is None or took is None:
            return [*cells, "refused", *("-" for _ in range(7)), weights, "-"]
        base = self.baseline(row)
        times = "-" if base is None or base.tokens_per_second is None else _times(rate, base.tokens_per_second)
        floor = row.floor_milliseconds
        cells += [_number(rate["median"]), f"{_number(rate['low'])}-{_number(rate['high'])}", times]
        cells += [_number(took["median"]), "-" if floor is None else _number(floor)]
        cells += ["-" if floor is None else f"{floor / took['median']:.1%}"]
        cells += ["-" if row.flops is None else _number(row.flops / 1e9)]
        cells += ["-" if row.peak_bytes is None else data_size(row.peak_bytes), weights]
        return [*cells, "-" if row.relative_error is None else f"{row.relative_error:.0e}"]

    def text(self) -> str:
        """Return the table for a terminal, with what was refused below it."""
        lines = self.table()
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        told = [
            "  ".join(
                cell.ljust(width) if column < _LEFT else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*told, *self._refusals()])

    def _refusals(self) -> list[str]:
        """Say what was not timed and why, once for each reason."""
        cells: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.refused:
                place = f"{row.phase} {row.batch} x {row.context}"
                cells.setdefault((f"{row.model}, {row.implementation}", row.refused), []).append(place)
        return [f"refused: {who}: {why} ({', '.join(places)})" for (who, why), places in cells.items()]

    def markdown(self) -> str:
        """Return the table in Markdown, with what it was measured on above and what was refused below."""
        header, *lines = self.table()
        rules = "---|" * _LEFT + "--:|" * (len(header) - _LEFT)
        table = [f"| {' | '.join(header)} |", f"|{rules}", *(f"| {' | '.join(line)} |" for line in lines)]
        refused = [f"* {line}" for line in self._refusals()]
        return "\n".join([told_context(self.context), "", *table, *(["", *refused] if refused else []), ""])


_LEFT = 3


def told_context(context: dict[str, Any]) -> str:
    """Say in a sentence what a benchmark ran on.

    Args:
        context: Of a record.
    """
    machine, versions = context["machine"], context["versions"]
    where = machine.get("gpu") if context["device"] != "cpu" else machine["cpu"]
    threads = context["threads"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    repeats = f"{context['repeats']} repeats in turn" if context["repeats"] > 1 else "1 repeat"
    stopped = "Interrupted, so not everything was measured. " if context.get("interrupted") else ""
    return (
        f"{stopped}{where}, {context['dtype']}, {threads} CPU thread{'' if threads == 1 else 's'} of "
        f"{machine['cores']} cores, load {machine['load']} before; {packages}. {repeats} after {context['warmup']} to "
        f"warm up, {context['new_tokens']} tokens decoded in each. Text: {context['tokens']}. x base: tokens a second "
        "over those of transformers' eager experts in the same cell, of the last model where there are none. "
        "GFLOP: of a pass (a step of decoding), with the experts and novices that these tokens picked; the floor is "
        "the least time for them and for the bytes that must be read, by what the machine did in the same run. "
        "Weights: in the form in which a checkpoint holds them."
    )


def _times(rate: dict[str, float], base: dict[str, float]) -> str:
    return f"{rate['median'] / base['median']:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float], median: float) -> dict[str, float]:
    """Return median, smallest and largest.

    Args:
        values: Of all runs.
        median: Of them.
    """
    return {"median": median, "low": min(values), "high": max(values)}
