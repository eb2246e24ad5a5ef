"""Size, speed, and where the time went."""

from __future__ import annotations

from typing import Any

from moe_lightning.evaluation.records import Rate
from moe_lightning.reporting.report.blocks import Block, Cell, Part, Section, Text, table
from moe_lightning.reporting.report.columns import UPPER_BOUND, columns_of, flops_cell, is_bound, title_of
from moe_lightning.reporting.report.compressions import compression_seconds, seconds_of, title_of_compression
from moe_lightning.reporting.report.quality import missing
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.speeds import NO_DIFFERENCE, overlap
from moe_lightning.reporting.report.words import NOTHING, change, data_size, duration, number, percent, rate

HOW_BENCHMARK = (
    "moe-lightning benchmark --model NEW --against OLD --output RUN/results/benchmark.json measures models side by "
    "side, with peak memory and floors"
)


def size_section(run: Run) -> Section:
    """Return the sizes of the model at every moment.

    Args:
        run: The run.
    """
    title = "Size"
    heads = ["moment", "parameters", "in memory", "on disk", "GFLOP per sequence, on this text"]
    caption = (
        "Small: in percent of the model before compression. Zeros take memory like other weights, on disk not. GFLOP: "
        "with the picks of the tokens of the first text, where novices cost next to nothing; upper bound: as if every "
        "token picked real experts."
    )
    if run.moments:
        first = run.first or run.moments[0]
        rows = [
            [
                Cell(title_of(run, moment), f"step {moment.step:,}"),
                Cell(f"{moment.parameters:,}", change(moment.parameters, first.parameters)),
                Cell(data_size(moment.bytes), change(moment.bytes, first.bytes)),
                Cell(data_size(moment.bytes_on_disk), change(moment.bytes_on_disk, first.bytes_on_disk)),
                flops_cell(moment.flops, first.flops, is_bound(run, moment)),
            ]
            for moment in run.moments
        ]
        return Section(title, [table(heads, rows, "lr", caption)])
    columns = [column for column in columns_of(run) if "parameters" in column.values]
    if not columns:
        return Section(title, missing(run, "Sizes were not measured", "Compress and QualityEvaluation note them"))
    keys = ("parameters", "bytes", "bytes_on_disk", "flops")
    cells = [
        [Cell(column.title, column.small), *(column.cells.get(key, NOTHING) for key in keys)] for column in columns
    ]
    return Section(title, [table(heads, cells, "lr", caption)])


def speed_section(run: Run) -> Section:
    """Return the speeds of the run's moments and the rows of benchmarks.

    Args:
        run: The run.
    """
    blocks: list[Block] = []
    timed = [moment for moment in run.moments if moment.speed]
    if timed:
        heads = ["moment", "phase", "batch", "context", "tokens/s", "of before"]
        before = run.first.speed if run.first is not None else {}
        rows: list[list[Cell | str]] = [
            [
                Cell(title_of(run, moment), f"step {moment.step:,}"),
                name,
                f"{speed.batch}",
                f"{speed.context}",
                rate(speed),
                _of_before(speed, before.get(name)) if moment is not run.first else NOTHING,
            ]
            for moment in timed
            for name, speed in moment.speed.items()
        ]
        caption = (
            "Median of three runs right after one another; small: the slowest and the fastest. Each model was timed at "
            "its own moment: what else the machine did then is in it. To compare, use moe-lightning benchmark, which "
            "times models in turn."
        )
        blocks.append(table(heads, rows, "llrr", caption))
    elif run.offline is not None:
        rows = [[name, number(run.offline[name]["tokens_per_second"], 3)] for name in ("before", "after")]
        caption = "Median of a few passes of one batch, each model at its own time; compare by moe-lightning benchmark."
        blocks.append(table(["model", "prefill [tokens/s]"], rows, "lr", caption))
    else:
        how = "leave speed of QualityEvaluation on" if run.moments else "add QualityEvaluation to trainer.callbacks"
        blocks += missing(run, "Speed was not measured in the run", how, file="quality.json")
    for name, benchmark in run.benchmarks.items():
        inside = _benchmark(benchmark)
        blocks += [Part(name, inside)]
    if not run.benchmarks:
        blocks += missing(run, "No benchmark", HOW_BENCHMARK, file="benchmark*.json")
    return Section("Speed", blocks)


def _of_before(now: Rate, before: Rate | None) -> Cell:
    if before is None:
        return NOTHING
    return Cell(
        change(now.median, before.median) or "-", f"ranges overlap: {NO_DIFFERENCE}" if overlap(now, before) else ""
    )


def _benchmark(benchmark: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    models, described = benchmark["models"], dict(benchmark["context"])
    if described.pop("interrupted", False):
        planned = f" of {described['measurements']:,}" if described.get("measurements") else ""
        told = f"Interrupted: {len(benchmark['rows']):,}{planned} measurements were done, the others are missing here."
        blocks.append(Text(told, "warning"))
    if models:
        heads = ["model", "folder", "parameters", "in memory", "on disk", "GFLOP per sequence"]
        rows = [
            [
                label,
                str(values.get("folder", "")),
                "-" if values.get("parameters") is None else f"{values['parameters']:,}",
                data_size(values.get("bytes")),
                data_size(values.get("bytes_on_disk")),
                _gflop(values),
            ]
            for label, values in models.items()
        ]
        length = next((values["sequence_length"] for values in models.values() if values.get("sequence_length")), None)
        caption = (
            f"GFLOP: of one sequence{f' of {length:,} tokens' if length else ''}, with the picks of its tokens, where "
            "novices cost next to nothing; upper bound: as if every token picked real experts."
        )
        blocks.append(table(heads, rows, "llr", caption))
    heads = ["model", "computed by", "phase", "batch", "context", "tokens/s", "one pass or step [ms]", "floor [ms]"]
    heads += ["peak memory", "weights", "relative error", "refused"]
    caption = (
        "Median; small: the slowest and the fastest repeat. Floor: the time that the operations and the bytes take at "
        "least on this machine, and its share of the measured time. Relative error: of the outputs, against the plain "
        "computation, compared before anything was timed; what differs is refused, not timed."
    )
    blocks.append(table(heads, [_row(row) for row in benchmark["rows"]], "lllrrrrrrrrl", caption))
    context = ", ".join(f"{name} {_plain(value)}" for name, value in described.items() if value is not None)
    if context:
        blocks.append(Text(f"Measured with: {context}.", "note"))
    refused = [row for row in benchmark["rows"] if row.get("refused") is not None]
    if refused:
        blocks.append(Text(f"{len(refused)} of {len(benchmark['rows'])} rows were refused; the reason stands last."))
    return blocks


def _gflop(model: dict[str, Any]) -> Cell:
    """Return the operations of a sequence by the picks of its tokens; the upper bound below, or alone."""
    bound, routed = (None if model.get(name) is None else model[name] / 1e9 for name in ("flops", "routed_flops"))
    if routed is None:
        return NOTHING if bound is None else Cell(number(bound), UPPER_BOUND)
    same = bound is None or number(bound) == number(routed)
    return Cell(number(routed), "" if same else f"{UPPER_BOUND} {number(bound)}")


def _row(row: dict[str, Any]) -> list[Cell]:
    start = [Cell(str(row[name])) for name in ("model", "implementation", "phase", "batch", "context")]
    times = row.get("milliseconds") or {}
    floor = row.get("floor_milliseconds")
    share = percent(floor / times["median"]) if floor is not None and times.get("median") else ""
    error = row.get("relative_error")
    refused = row.get("refused")
    return [
        *start,
        _spread(row.get("tokens_per_second")),
        _spread(times),
        Cell(number(floor, 3), share),
        Cell(data_size(row.get("peak_bytes"))),
        Cell(data_size(row.get("weight_bytes"))),
        Cell("-" if error is None else f"{error:.1e}"),
        Cell("" if refused is None else str(refused)),
    ]


def _spread(values: dict[str, float] | None) -> Cell:
    if not values or values.get("median") is None:
        return NOTHING
    low, high = values.get("low"), values.get("high")
    ends = "" if low is None or high is None else f"{number(low, 3)} to {number(high, 3)}"
    return Cell(number(values["median"], 3), ends)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def time_section(run: Run) -> Section:
    """Return where the time of the run and of each compression went.

    Args:
        run: The run.
    """
    blocks: list[Block] = []
    if run.time is not None:
        total = run.time["total_seconds"]
        rows = [
            [name, duration(seconds), percent(seconds / total if total else None)]
            for name, seconds in sorted(run.time["parts"].items(), key=lambda item: -item[1])
        ]
        rows.append(["in all", duration(total), ""])
        blocks.append(table(["part", "time", "share"], rows, "lrr", "The run, with all its resumed parts."))
    elif run.offline is None:
        blocks += missing(
            run,
            "Where the time of the run went was not measured",
            "add TimeSpent to trainer.callbacks",
            file="time.json",
        )
    timed = [record for record in run.compressions if seconds_of(record)]
    names = list(dict.fromkeys(name for record in timed for name, _ in seconds_of(record)))
    if timed:
        rows = [
            [
                title_of_compression(record),
                *(duration(dict(seconds_of(record)).get(name)) for name in names),
                compression_seconds(record),
            ]
            for record in timed
        ]
        blocks.append(table(["compression", *names, "in all"], rows, "lr", "Each compression."))
    elif run.offline is not None:
        took = ", ".join(compression_seconds(record) for record in run.compressions)
        blocks.append(Text(f"The compression took {took}."))
    elif run.compressions:
        blocks += missing(run, "How long the compressions took was not written down", "this release does")
    return Section("Where the time went", blocks)
