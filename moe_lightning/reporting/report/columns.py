"""The small table that comes first: a column for each moment of the model, a row for each number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_lightning.evaluation.intervals import Interval
from moe_lightning.evaluation.records import BEFORE, END, TEST, QualityMoment
from moe_lightning.reporting.report.blocks import Cell, Table
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.words import (
    NOTHING,
    change,
    data_size,
    number,
    percent,
    places_of,
    rate,
    share_with_interval,
    with_interval,
)

SAME_SUMS = 1e-3
"""Largest relative difference of the sums of a block for one and the same model on another machine."""

ROWS = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, ratio to before",
    "bits_per_byte": "bits per byte",
    "divergence": "KL from before [nats per token]",
    "agreement": "agrees with before on the next token",
    "tasks": "lm-eval tasks, mean",
    "parameters": "parameters",
    "bytes": "weights in memory",
    "bytes_on_disk": "weights on disk",
    "flops": "GFLOP per sequence, on this text",
    "prefill": "prefill [tokens/s]",
    "decode": "decode [tokens/s]",
}
"""What is told of a model, and how it is called."""


@dataclass(frozen=True)
class Column:
    """A model at a moment.

    Attributes:
        title: The moment.
        small: When that was.
        cells: Numbers that are known, by their keys in :data:`ROWS`.
        values: The same as plain numbers.
        ratio: Perplexity in units of that before, with its interval; None where it is not known in pairs.
    """

    title: str
    small: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    ratio: Interval | None = None


def main_text(run: Run) -> str:
    """Return the name of the text that quality is told of first; empty where none was measured.

    Args:
        run: The run.
    """
    texts = next((list(moment.texts) for moment in run.moments if moment.texts), [])
    return texts[0] if texts else ""


def columns_of(run: Run) -> list[Column]:
    """Return before, after compression, and the end of a run, as far as they are known.

    Args:
        run: The run.

    Returns:
        Of several compressions the last one. Empty where nothing was measured and nothing compressed.
    """
    if run.moments:
        return _of_quality(run)
    if run.offline is not None:
        return _of_rows(run.offline)
    return _of_compressions(run)


def columns_of_the_run(run: Run, columns: list[Column]) -> list[Column]:
    """Return the columns of models that the run went through: a test counts only where there is no other.

    Args:
        run: The run.
        columns: Its columns.
    """
    return [column for column in columns if not run.moments or column.title != TEST] or columns


def final_column(run: Run) -> Column:
    """Return what is known of the model that a run gives back.

    Args:
        run: The run.

    Returns:
        Each number at the last moment at which it is known, that before compression left out where others are, and
        tests, which may be of any model.
    """
    columns = columns_of_the_run(run, columns_of(run))
    later = [column for column in columns if column.title != BEFORE] or columns
    merged = Column(later[-1].title if later else "-")
    ratio: Interval | None = None
    for column in later:
        merged.cells.update(column.cells)
        merged.values.update(column.values)
        ratio = column.ratio or ratio
    return Column(merged.title, "", merged.cells, merged.values, ratio)


def summary_table(columns: list[Column]) -> Table:
    """Return the table.

    Args:
        columns: The columns.
    """
    rows = []
    for key, label in ROWS.items():
        if any(key in column.cells for column in columns):
            rows.append([Cell(label), *(column.cells.get(key, NOTHING) for column in columns)])
    head = [Cell(""), *(Cell(column.title, column.small) for column in columns)]
    return Table(head, rows, "l" + "r" * len(columns))


def missing_rows(columns: list[Column]) -> list[str]:
    """Return the numbers that no column has.

    Args:
        columns: The columns.
    """
    return [label for key, label in ROWS.items() if not any(key in column.cells for column in columns)]


def shown_moments(run: Run) -> list[QualityMoment]:
    """Return the moments that come first: before, the last compression, the end, and a test where there is one.

    Args:
        run: The run.
    """
    compressed = [moment for moment in run.moments if moment.name.startswith("compressed")]
    return [
        moment
        for moment in run.moments
        if moment.name in (BEFORE, END) or moment is run.moments[-1] or moment in compressed[-1:]
    ]


def title_of(run: Run, moment: QualityMoment) -> str:
    """Return what a moment is called.

    Args:
        run: The run.
        moment: The moment.
    """
    count = sum(other.name.startswith("compressed") for other in run.moments)
    if moment.name.startswith("compressed") and count > 1:
        return f"compressed, {moment.name.removeprefix('compressed').lstrip('-') or 1} of {count}"
    return moment.name


def tested_model(run: Run, moment: QualityMoment) -> QualityMoment | None:
    """Return the moment of the run at which the model was the one that a test was given; None where it is another one.

    Args:
        run: The run.
        moment: The test.

    Returns:
        The last moment at which the sizes, and the sums of every block that both saw, are the same. Where no block is
        the same in both, the step decides instead.
    """
    others = [other for other in run.moments if other.name != TEST]
    return next((other for other in reversed(others) if _is_same(moment, other)), None)


def _is_same(one: QualityMoment, other: QualityMoment) -> bool:
    if (one.parameters, one.bytes_on_disk) != (other.parameters, other.bytes_on_disk):
        return False
    pairs = [(text.scores, other.texts[name].scores) for name, text in one.texts.items() if name in other.texts]
    pairs = [(mine, theirs) for mine, theirs in pairs if torch.equal(mine.tokens, theirs.tokens)]
    if not pairs:
        return one.step == other.step
    return all(torch.allclose(mine.nats, theirs.nats, rtol=SAME_SUMS, equal_nan=True) for mine, theirs in pairs)


def _when(run: Run, moment: QualityMoment) -> str:
    if moment.name != TEST or all(other.name == TEST for other in run.moments):
        return f"step {moment.step:,}"
    same = tested_model(run, moment)
    if same is None:
        return f"step {moment.step:,}, another model"
    # A folder knows no step.
    return f"step {same.step:,}, same model as {title_of(run, same)}"


def _of_quality(run: Run) -> list[Column]:
    text, first = main_text(run), run.first
    columns = []
    for moment in shown_moments(run):
        column = Column(title_of(run, moment), _when(run, moment))
        if text in moment.texts:
            column = _with_text(column, run.intervals(moment, text))
        sizes = {name: getattr(moment, name) for name in ("parameters", "bytes", "bytes_on_disk", "flops")}
        theirs = {name: getattr(first, name) for name in sizes} if first is not None and first is not moment else {}
        _add_sizes(column, sizes, theirs, is_bound(run, moment))
        for name in ("prefill", "decode"):
            if name in moment.speed:
                column.cells[name], column.values[name] = rate(moment.speed[name]), moment.speed[name].median
        _add_tasks(column, run, moment.name)
        columns.append(column)
    return columns


def _with_text(column: Column, known: dict[str, Interval]) -> Column:
    places = places_of([known["perplexity"].value])
    column.cells["perplexity"] = with_interval(known["perplexity"], places)
    for name, digits in (("perplexity_ratio", 4), ("bits_per_byte", 4), ("divergence", 4)):
        if name in known:
            column.cells[name] = with_interval(known[name], digits)
    if "agreement" in known:
        column.cells["agreement"] = share_with_interval(known["agreement"])
    column.values.update({name: interval.value for name, interval in known.items()})
    return Column(column.title, column.small, column.cells, column.values, known.get("perplexity_ratio"))


UPPER_BOUND = "upper bound"
"""Beside floating-point operations that were counted as if every token picked real experts."""


def is_bound(run: Run, moment: QualityMoment) -> bool:
    """Say whether the operations of a moment are an upper bound: no picks of novices were counted.

    Args:
        run: The run.
        moment: The moment.

    Returns:
        Also True where the routing was measured and not used, as earlier releases did: then models whose novices get
        other shares need the same number of operations.
    """
    if moment is run.first:
        return False
    if moment.routing is None:
        return bool(run.compressions)
    if not any(moment.routing.novices):
        return False
    same = [
        other
        for other in run.moments
        if other.routing is not None
        and (other.parameters, other.routing.novices) == (moment.parameters, moment.routing.novices)
    ]
    return (
        len({str(other.routing and other.routing.load) for other in same}) > len({other.flops for other in same}) == 1
    )


def flops_cell(value: float, before: float | None, bound: bool) -> Cell:
    """Return a cell of floating-point operations.

    Args:
        value: The number.
        before: That of the model before.
        bound: Whether it is an upper bound.
    """
    small = [change(value, before), UPPER_BOUND if bound else ""]
    return Cell(number(value / 1e9), ", ".join(words for words in small if words))


def _add_sizes(column: Column, sizes: dict[str, float], before: dict[str, float], bound: bool = False) -> None:
    for name, value in sizes.items():
        words = f"{value:,}" if name == "parameters" else data_size(value)
        cell = Cell(words, change(value, before.get(name)))
        column.cells[name] = flops_cell(value, before.get(name), bound) if name == "flops" else cell
        column.values[name] = float(value)


def _add_tasks(column: Column, run: Run, name: str) -> None:
    found = [moment for moment in run.task_moments if moment["name"] == name and moment.get("mean") is not None]
    if found:
        column.values["tasks"] = float(found[-1]["mean"])
        count = len(found[-1]["tasks"])
        column.cells["tasks"] = Cell(percent(found[-1]["mean"], 2), f"{count} task{'s' * (count != 1)}")


def _of_rows(offline: dict[str, Any]) -> list[Column]:
    """Return what ``moe-lightning compress`` measured: no sums of blocks, so no intervals."""
    columns = []
    first = offline["before"]
    for name in ("before", "after"):
        row = offline[name]
        column = Column(name)
        column.values.update({key: float(row[key]) for key in ("perplexity", "bits_per_byte") if row.get(key)})
        column.cells["perplexity"] = Cell(number(row["perplexity"]))
        if row.get("bits_per_byte") is not None and not math.isnan(row["bits_per_byte"]):
            column.cells["bits_per_byte"] = Cell(number(row["bits_per_byte"]))
        if name == "after":
            ratio = row["perplexity"] / first["perplexity"]
            column.cells["perplexity_ratio"] = Cell(f"{ratio:.4f}")
            column.values["perplexity_ratio"] = ratio
        sizes = {key: row[key] for key in ("parameters", "bytes", "bytes_on_disk", "flops") if key in row}
        _add_sizes(column, sizes, first if name == "after" else {}, name == "after")
        column.cells["prefill"] = Cell(number(row["tokens_per_second"], 3))
        column.values["prefill"] = float(row["tokens_per_second"])
        columns.append(column)
    return columns


def _of_compressions(run: Run) -> list[Column]:
    """Return the sizes that compressions noted, and what the test step logged."""
    columns = []
    if run.compressions:
        first, last = run.compressions[0], run.compressions[-1]
        before, after = _sizes(first, "before"), _sizes(last, "after")
        count = len(run.compressions)
        for title, step, sizes, theirs in (
            ("before", first.step, before, {}),
            ("compressed" if count == 1 else f"compressed, {count} of {count}", last.step, after, before),
        ):
            column = Column(title, "" if step is None else f"step {step:,}")
            _add_sizes(column, sizes, theirs, bool(theirs))
            columns.append(column)
    logged = run.tested or run.validated
    if logged:
        kind = "test" if run.tested else "val"
        column = Column("test" if run.tested else "validation")
        for name in ("perplexity", "bits_per_byte"):
            if f"{kind}/{name}" in logged:
                column.cells[name] = Cell(number(logged[f"{kind}/{name}"]))
                column.values[name] = logged[f"{kind}/{name}"]
        columns.append(column)
    return columns


def _sizes(record: Any, when: str) -> dict[str, float]:
    """Return sizes of a compression before or after: those that were counted, or those that its shapes say."""
    counted = record.summary.get(when)
    if isinstance(counted, dict) and "parameters" in counted:
        return {key: counted[key] for key in ("parameters", "bytes", "bytes_on_disk", "flops") if key in counted}
    shape = record.shape_before if when == "before" else record.shape_after
    found = {"parameters": record.summary.get(f"parameters_{when}"), "bytes": record.summary.get(f"bytes_{when}")}
    if shape is not None:
        found = {"parameters": shape.parameters, **{k: v for k, v in found.items() if v}, "bytes_on_disk": shape.bytes}
    return {key: value for key, value in found.items() if value is not None}
