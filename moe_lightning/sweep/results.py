"""The outcome of a sweep as tables: one row a cell in CSV, and Markdown that people read."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lightning.evaluation.intervals import (
    DEFAULT_RESAMPLES,
    Interval,
    lost_share_interval,
    mean_interval,
    perplexity_interval,
    perplexity_ratio_interval,
)
from moe_lightning.plan import ModelShape
from moe_lightning.sweep.grid import RANDOM, Cell
from moe_lightning.sweep.notes import MOST_NAMED, named, own_passes
from moe_lightning.sweep.store import ORIGINAL, CellResult


@dataclass
class Baseline:
    """The cell that the others are compared with, at each ratio.

    Args:
        criterion: Its criterion.
        operator: Its operator.
        scope: Its scope.
    """

    criterion: str = "mone"
    operator: str = "mean"
    scope: str = "layer"

    def names(self, cell: Cell) -> bool:
        """Say whether a cell is this one."""
        return (cell.criterion, cell.operator, cell.scope) == (self.criterion, self.operator, self.scope)

    def __str__(self) -> str:
        return f"{self.criterion} {self.operator} {self.scope}"


@dataclass(frozen=True)
class Row:
    """A cell with its numbers.

    Attributes:
        cell: The cell; None for the uncompressed model.
        result: What came out.
        experts: Experts with weights of their own that are left.
        stored_bytes: Bytes of the weights as they are written to disk.
        perplexity: On the held-out text.
        to_original: Perplexity divided by the uncompressed model's.
        divergence: KL of the uncompressed model to this one, nats per token.
        to_best: Perplexity divided by that of the best cell of the same ratio; None where there is no such cell.
        lost_share: Loss as a share of what the baseline of the same ratio loses; None where there is no such cell.
    """

    cell: Cell | None
    result: CellResult
    experts: int
    stored_bytes: int
    perplexity: Interval
    to_original: Interval
    divergence: Interval
    to_best: Interval | None = None
    lost_share: Interval | None = None

    @property
    def agreement(self) -> float:
        """Share of the tokens for which this and the uncompressed model find the same token the most likely."""
        scores = self.result.scores
        return float(scores.agreement.sum() / scores.tokens.sum())


def rows_of(
    cells: Sequence[Cell],
    results: Mapping[str, CellResult],
    shapes: Mapping[str, ModelShape],
    baseline: Baseline,
    *,
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
) -> list[Row]:
    """Compute all numbers of a sweep.

    Args:
        cells: The cells, those that are not done left out of the rows.
        results: What is done, by key, the uncompressed model among them.
        shapes: Shapes of the models, by key.
        baseline: The cell to compare with.
        level: Confidence of the intervals.
        resamples: Draws of blocks.

    Returns:
        The uncompressed model, then the cells in their order.
    """
    options = {"level": level, "resamples": resamples}
    original = results[ORIGINAL]
    base = original.scores.likelihood
    done = [cell for cell in cells if cell.key in results]
    rows = []
    for cell in [None, *done]:
        key = ORIGINAL if cell is None else cell.key
        result = results[key]
        scores, likelihood = result.scores, result.scores.likelihood
        rivals = [other for other in done if cell is not None and other.ratio == cell.ratio is not None]
        best = min(rivals, key=lambda other: float(results[other.key].scores.nats.sum()), default=None)
        reference = next((other for other in rivals if baseline.names(other)), None)
        rows.append(
            Row(
                cell,
                result,
                sum(len(layout.real) for layout in shapes[key].layouts),
                shapes[key].bytes,
                perplexity_interval(likelihood, **options),  # type: ignore[arg-type]
                perplexity_ratio_interval(likelihood, base, **options),  # type: ignore[arg-type]
                mean_interval(scores.divergence, scores.tokens, **options),  # type: ignore[arg-type]
                None
                if best is None
                else perplexity_ratio_interval(likelihood, results[best.key].scores.likelihood, **options),  # type: ignore[arg-type]
                None
                if reference is None
                else lost_share_interval(
                    likelihood,
                    results[reference.key].scores.likelihood,
                    base,
                    **options,  # type: ignore[arg-type]
                ),
            )
        )
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """Return one line for each row, with all digits.

    Args:
        rows: What :func:`rows_of` returned.
    """
    original = rows[0].result.size.parameters
    table = []
    for row in rows:
        cell, size, likelihood = row.cell, row.result.size, row.result.scores.likelihood
        values: dict[str, object] = {
            "criterion": cell.criterion if cell else "",
            "operator": cell.operator if cell else "uncompressed",
            "scope": cell.scope if cell else "",
            "ratio": cell.ratio if cell and cell.ratio is not None else "",
            "seed": cell.seed if cell and cell.criterion == RANDOM else "",
            "experts": row.experts,
            "parameters": size.parameters,
            "parameters_share": size.parameters / original,
            "parameter_budget": cell.parameters if cell and cell.parameters is not None else "",
            "bytes": size.bytes,
            "bytes_on_disk": row.stored_bytes,
            "flops_per_sequence": size.flops,
            "tokens": likelihood.num_tokens,
            "bits_per_byte": likelihood.bits_per_byte,
        }
        for name, interval in (
            ("perplexity", row.perplexity),
            ("perplexity_to_uncompressed", row.to_original),
            ("kl_nats_per_token", row.divergence),
            ("perplexity_to_best", row.to_best),
            ("share_of_baseline_loss", row.lost_share),
        ):
            values[name] = "" if interval is None else interval.value
            values[f"{name}_low"] = "" if interval is None else interval.low
            values[f"{name}_high"] = "" if interval is None else interval.high
        values["top1_agreement"] = row.agreement
        values["own_passes"] = "yes" if cell and own_passes(cell.methods) else ""
        values["starved_experts"] = row.result.measured.starved
        values["fallback_matrices"] = row.result.measured.fallbacks
        values["seconds"] = round(row.result.seconds, 3)
        values["cell"] = cell.key if cell else ORIGINAL
        table.append(values)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


@dataclass(frozen=True)
class Summary:
    """What cells have in common that differ in their seed alone.

    Attributes:
        rows: The cells, one for each seed.
    """

    rows: tuple[Row, ...]

    @property
    def cell(self) -> Cell:
        """The first of the cells."""
        cell = self.rows[0].cell
        assert cell is not None
        return cell

    @property
    def perplexity(self) -> float:
        """Geometric mean over the seeds: the exponential of their mean loss."""
        return math.exp(sum(math.log(row.perplexity.value) for row in self.rows) / len(self.rows))

    @property
    def ends(self) -> tuple[float, float]:
        """The interval of one cell; of several seeds the smallest and the largest perplexity."""
        return self._ends([row.perplexity for row in self.rows])

    @property
    def to_original(self) -> float:
        """Perplexity divided by the uncompressed model's, geometric mean over the seeds."""
        return math.exp(sum(math.log(row.to_original.value) for row in self.rows) / len(self.rows))

    @property
    def ends_to_original(self) -> tuple[float, float]:
        """The interval of that; of several seeds the smallest and the largest."""
        return self._ends([row.to_original for row in self.rows])

    @staticmethod
    def _ends(intervals: Sequence[Interval]) -> tuple[float, float]:
        if len(intervals) == 1:
            return intervals[0].low, intervals[0].high
        values = [interval.value for interval in intervals]
        return min(values), max(values)

    @property
    def parameters(self) -> float:
        """Mean number of parameters."""
        return sum(row.result.size.parameters for row in self.rows) / len(self.rows)


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Gather the rows of cells that differ in their seed alone, in their order.

    Args:
        rows: What :func:`rows_of` returned.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.cell is not None:
            groups.setdefault(row.cell.label, []).append(row)
    return [Summary(tuple(group)) for group in groups.values()]


def markdown_text(rows: Sequence[Row], baseline: Baseline, facts: Mapping[str, object]) -> str:
    """Return the tables that people read.

    Args:
        rows: What :func:`rows_of` returned.
        baseline: The cell that the others are compared with.
        facts: What else the head should say, by name.
    """
    original = rows[0]
    percent = f"{original.perplexity.level:.0%}"
    lines = ["# Sweep", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    scores = original.result.scores
    lines += [
        f"* Held-out text: {int(scores.tokens.sum()):,} tokens in {len(scores.tokens)} blocks. Uncompressed: "
        f"perplexity {_interval(original.perplexity)}, {original.result.size.parameters:,} parameters.",
        f"* In brackets: {percent} intervals, paired bootstrap over the blocks. Several seeds (random): mean over the "
        "seeds, in brackets the smallest and the largest.",
        "* Ratio sets the number of parameters that a model may have: that of Expert Drop at this ratio with a router "
        "row and a vector for each expert that goes. What stores more gives up more experts.",
        "* To uncompressed, to best: perplexity divided by that of the uncompressed model, or of the best cell of the "
        "ratio, on the same blocks.",
        "* The best cell of a ratio was found on the same text, so its distance to the next ones looks a little larger "
        "than it is.",
        "",
    ]
    everything = summaries(rows)
    for ratio in sorted({summary.cell.ratio for summary in everything if summary.cell.ratio is not None}):
        chosen = [summary for summary in everything if summary.cell.ratio == ratio]
        lines += [f"## {ratio:.0%} of the experts", ""]
        lines += _pivots(chosen)
        lines += _table(chosen, baseline)
    others = [summary for summary in everything if summary.cell.ratio is None]
    if others:
        lines += ["## Methods written out", "", *_table(others, baseline)]
    return "\n".join([*lines, *_notes(rows[1:])])


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what the tables do not show: which cells made passes of their own, and where tokens were few."""
    cells = [(row.cell, str(row.result.measured)) for row in rows if row.cell is not None]
    lines = []
    alone = [cell.name for cell, _ in cells if own_passes(cell.methods)]
    if alone:
        lines.append(
            f"* Measured on passes of their own over the calibration text, not on the shared one: {named(alone)}."
        )
    few = [f"{cell.name}: {note}" for cell, note in cells if note]
    lines += [f"* {note}." for note in few[:MOST_NAMED]]
    if len(few) > MOST_NAMED:
        lines.append(f"* And {len(few) - MOST_NAMED} more with few tokens: see results.csv.")
    return ["## Notes", "", *lines, ""] if lines else []


def _pivots(chosen: Sequence[Summary]) -> list[str]:
    """Return criterion x operator for each scope where there are several of both."""
    lines = []
    for scope in dict.fromkeys(summary.cell.scope for summary in chosen):
        cells = {
            (summary.cell.criterion, summary.cell.operator): summary.perplexity
            for summary in chosen
            if summary.cell.scope == scope and scope
        }
        criteria = list(dict.fromkeys(criterion for criterion, _ in cells))
        operators = list(dict.fromkeys(operator for _, operator in cells))
        complete = [name for name in criteria if sum((name, other) in cells for other in operators) > 1]
        if not complete:
            continue
        lines += [f"Perplexity, scope {scope}:", "", f"| criterion | {' | '.join(operators)} |"]
        lines.append(f"|---|{'--:|' * len(operators)}")
        for name in complete:
            numbers = [_number(cells[name, other]) if (name, other) in cells else "" for other in operators]
            lines.append(f"| {name} | {' | '.join(numbers)} |")
        lines.append("")
    return lines


def _table(chosen: Sequence[Summary], baseline: Baseline) -> list[str]:
    compared = any(summary.rows[0].lost_share is not None for summary in chosen)
    heads = [
        "criterion",
        "operator",
        "scope",
        "experts",
        "parameters",
        "MB on disk",
        "perplexity",
        "to uncompressed",
        "to best",
        "KL, nats/token",
        "top-1",
    ]
    heads += [f"share of the loss of {baseline}"] if compared else []
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'--:|' * (len(heads) - 3)}"]
    for summary in sorted(chosen, key=lambda summary: summary.perplexity):
        row, cell = summary.rows[0], summary.cell
        low, high = summary.ends_to_original
        alone = len(summary.rows) == 1
        parts = [
            cell.criterion or "-",
            cell.operator,
            cell.scope or "-",
            f"{_mean(row.experts for row in summary.rows):g}",
            f"{summary.parameters:,.0f}",
            f"{_mean(row.stored_bytes for row in summary.rows) / 1e6:,.4g}",
            _number(summary.perplexity),
            f"{_number(summary.to_original)} [{_number(low)}, {_number(high)}]",
            _interval(row.to_best) if alone else "",
            _interval(row.divergence) if alone else _number(_mean(row.divergence.value for row in summary.rows)),
            f"{_mean(row.agreement for row in summary.rows):.1%}",
        ]
        if compared:
            parts.append(_interval(row.lost_share) if alone else "")
        lines.append(f"| {' | '.join(parts)} |")
    return [*lines, ""]


def _mean(values: object) -> float:
    numbers = [float(value) for value in values]  # type: ignore[attr-defined]
    return sum(numbers) / len(numbers)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    if interval.low == interval.high == interval.value:
        return _number(interval.value)
    return f"{_number(interval.value)} [{_number(interval.low)}, {_number(interval.high)}]"
