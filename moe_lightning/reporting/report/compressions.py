"""What was done to the model, and what became of every module, matrix and expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_lightning.plan import formats_of, plan_table
from moe_lightning.reporting.decisions import roles
from moe_lightning.reporting.matrices import kind_rows, matrix_rows, matrix_summary
from moe_lightning.reporting.report.blocks import Block, Cell, Details, Part, Section, Table, Text, table
from moe_lightning.reporting.report.quality import missing
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.words import NOTHING, duration, percent
from moe_lightning.reporting.run_records import CompressionRecord

MOST_OPEN = 6
"""Compressions whose plans are shown at once; those of a longer schedule but the last are folded."""

MOST_LAYERS = 16
"""Layers of a plan that is shown at once."""

_NO_OPTION = ("method", "model", "calibration", "versions", "edits")


def done_section(run: Run) -> Section:
    """Return methods, plan, and what was claimed and touched, of each compression.

    Args:
        run: The run.
    """
    title = "What was done"
    if not run.compressions and run.compressions_damaged:
        return Section(title, [Text("Files of compressions are damaged: see the summary.", "warning")])
    if not run.compressions:
        return Section(
            title, missing(run, "Nothing was compressed", "add Compress with methods and a step to trainer.callbacks")
        )
    blocks: list[Block] = []
    if run.left_out:
        blocks.append(
            Text(
                f"Left out: {', '.join(run.left_out)}. Their files are in the folder, but they are not in the history "
                "of this model: the run was resumed from a checkpoint of before them.",
                "note",
            )
        )
    if len(run.compressions) > 1:
        blocks.append(_overview(run.compressions))
    for record in run.compressions:
        inside = _one(record)
        if len(run.compressions) == 1:
            blocks += inside
        elif len(run.compressions) <= MOST_OPEN or record is run.compressions[-1]:
            blocks.append(Part(title_of_compression(record), inside))
        else:
            blocks.append(Details(title_of_compression(record), inside))
    return Section(title, blocks)


def title_of_compression(record: CompressionRecord) -> str:
    """Return what a compression is called.

    Args:
        record: The compression.
    """
    return record.name if record.step is None else f"{record.name} (step {record.step:,})"


def _overview(records: Sequence[CompressionRecord]) -> Table:
    rows = []
    for record in records:
        claimed, touched = (record.summary.get(f"{word}_parameters") for word in ("claimed", "touched"))
        after = record.summary.get("parameters_after")
        rows.append(
            [
                title_of_compression(record),
                "; ".join(record.methods),
                *("-" if value is None else f"{value:,}" for value in (after, claimed, touched)),
                "-" if claimed is None else "yes" if claimed == touched else "NO",
            ]
        )
    return table(["compression", "methods", "parameters after", "claimed", "touched", "equal"], rows, "llrrrl")


def _one(record: CompressionRecord) -> list[Block]:
    blocks: list[Block] = []
    methods = record.methods
    if methods:
        rows = [[f"{place}", name, words] for place, (name, words) in enumerate(methods_with_options(record), start=1)]
        blocks.append(
            table(["", "method", "options"], rows, "lll", "Methods, in the order in which they were applied.")
        )
    blocks.append(_claimed(record))
    calibration = _calibration(record)
    if calibration:
        blocks.append(Text(calibration))
    after = record.shape_after
    if after is not None:
        blocks += [Text(f"Weights: {words}.") for words in formats_of(after)]
        blocks += _plan(plan_table(record.plan, after))
    else:
        blocks.append(
            Text(f"The plan has {len(record.plan.edits)} edits; the sizes of the model were not kept with it.", "note")
        )
    return blocks


def methods_with_options(record: CompressionRecord) -> list[tuple[str, str]]:
    """Return name and options of each method: as it was written, or as the plan's history has it.

    Args:
        record: The compression.
    """
    history = record.history[-len(record.methods) :]
    found = []
    for place, words in enumerate(record.methods):
        name, _, options = words.partition("(")
        if not options and len(history) == len(record.methods):
            step = history[place]
            named = {key: value for key, value in step.items() if key not in _NO_OPTION and value is not None}
            options = ", ".join(f"{key}={value!r}" for key, value in named.items())
        found.append((name, options.removesuffix(")")))
    return found


def _claimed(record: CompressionRecord) -> Text:
    claimed, touched = (record.summary.get(f"{word}_parameters") for word in ("claimed", "touched"))
    if claimed is None or touched is None:
        return Text("How many parameters the plan claims and how many were touched was not written down.", "note")
    told = f"The plan claims that {claimed:,} parameters go or come; {touched:,} were counted in the tensors"
    if claimed != touched:
        return Text(f"{told}. These must be equal: do not trust this compression.", "warning")
    return Text(f"{told}: claimed = touched.")


def _calibration(record: CompressionRecord) -> str:
    known: dict[str, Any] = (record.history or [{}])[-1].get("calibration") or {}
    data = known.get("data") or {}
    told = []
    if known.get("calibration_batches") is not None:
        told.append(f"{known['calibration_batches']} batches")
    elif known.get("batches") is not None:
        told.append(f"{known['batches']} batches")
    if data.get("sources"):
        told.append(f"of {', '.join(map(str, data['sources']))}")
    if data.get("block_size"):
        told.append(f"in blocks of {data['block_size']} tokens")
    if data.get("seed") is not None:
        told.append(f"(seed {data['seed']})")
    split = (data.get("splits") or {}).get("calibration") or {}
    if split.get("fingerprint"):
        told.append(f"- fingerprint of the calibration split {split['fingerprint']}")
    return f"Calibrated on {' '.join(told)}." if told else ""


def _plan(text: str) -> list[Block]:
    """Turn the plan's Markdown into blocks."""
    lines = text.splitlines()
    told = [line for line in lines if line and not line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    caption = f"The plan: {'. '.join(told)}. Experts have the numbers of the original model."
    if len(cells) <= 2:
        return [Text(caption)]
    made = table(cells[0], cells[2:], "llll", caption)
    layers = len(made.rows)
    return [made] if layers <= MOST_LAYERS else [Details(f"The plan: {layers:,} layers, {'. '.join(told)}", [made])]


def matrices_section(run: Run) -> Section:
    """Return the status of every module and every matrix.

    Args:
        run: The run.
    """
    title = "Status of every module and matrix"
    if not any(record.modules for record in run.compressions):
        note = missing(
            run,
            "No compression left the status of its modules",
            "Compress writes it to results/compression-STEP.json" if run.compressions else "nothing was compressed",
        )
        return Section(title, note)
    blocks: list[Block] = []
    for record in run.compressions:
        if not record.modules:
            continue
        inside: list[Block] = []
        modules = [[name, module.status] for name, module in record.modules.items()]
        inside.append(Details(f"{len(modules):,} modules changed", [table(["module", "status"], modules, "ll")]))
        summary = matrix_summary(record.modules)
        if summary:
            inside.append(_kinds(record))
            inside.append(Details(summary, [_matrices(record)]))
        else:
            inside.append(Text("No matrix was made smaller by itself: modules went, or changed as a whole.", "note"))
        blocks += inside if len(run.compressions) == 1 else [Part(title_of_compression(record), inside)]
    return Section(title, blocks)


def _kinds(record: CompressionRecord) -> Block:
    rows = kind_rows(record.modules)
    cells = [[row.module, f"{row.matrices:,}", row.made_by, percent(row.largest_error, 3)] for row in rows]
    made = table(["module", "matrices", "made by", "largest relative error"], cells, "lrlr")
    errors = [row.largest_error for row in rows if row.largest_error is not None]
    worst = f", relative error at most {percent(max(errors), 2)}" if errors else ""
    return Details(f"By module: {len(rows):,} rows{worst}", [made])


def _matrices(record: CompressionRecord) -> Table:
    rows = matrix_rows(record.modules)
    has_losses = any(row.loss is not None for row in rows)
    heads = ["module", "matrix", "tokens", "status", "relative error", *(["lost of the term"] if has_losses else [])]
    cells = [
        [
            row.module,
            row.matrix,
            "-" if row.tokens is None else f"{row.tokens:,}",
            row.status,
            percent(row.error, 3),
            *([percent(row.loss, 3)] if has_losses else []),
        ]
        for row in rows
    ]
    caption = "Error: squared error of the outputs in units of their squares, on the calibration tokens."
    return table(heads, cells, "llrlrr"[: len(heads)], caption)


def tokens_section(run: Run) -> Section:
    """Return how many calibration tokens reached each expert.

    Args:
        run: The run.
    """
    blocks: list[Block] = []
    for record in run.compressions:
        tables = [found for found in (_counted(record), _reached(record)) if found is not None]
        if tables and len(run.compressions) > 1:
            blocks.append(Part(title_of_compression(record), list(tables)))
        else:
            blocks += tables
    if not blocks:
        how = "methods that measure count them" if run.compressions else "nothing was compressed"
        blocks = missing(run, "No calibration tokens were counted", how)
    return Section("Tokens per expert", blocks)


def _counted(record: CompressionRecord) -> Block | None:
    """Return the tokens that the routing statistics counted, with what became of each expert."""
    statistics = record.statistics
    if statistics is None or "routing" not in statistics.groups:
        return None
    counts = statistics["count"]
    known = statistics.known
    marks: dict[tuple[int, int], str] = {}
    after = record.shape_after
    if after is not None:
        for name, mask in roles(statistics.shape, after).items():
            if name != "stays":
                marks |= {(int(row), int(column)): name for row, column in zip(*mask.nonzero(), strict=True)}
    rows: list[list[Cell | str]] = []
    for row, layer in enumerate(statistics.shape.moe_layers):
        cells = [
            Cell(f"{int(counts[row, expert]):,}", marks.get((row, expert), "")) if known[row, expert] else NOTHING
            for expert in range(counts.shape[1])
        ]
        rows.append([f"{layer}", *cells])
    numbers = counts[known & ~torch.isnan(counts)]
    places = [(row, column) for row, column in known.nonzero().tolist()]
    summary = _counts_in_words("Picked in calibration", [int(counts[place]) for place in places], len(rows))
    caption = "Tokens that picked each expert before this compression; below: what became of it."
    heads = ["layer", *(f"expert {expert}" for expert in range(counts.shape[1]))]
    assert numbers.numel() == len(places)
    return Details(summary, [table(heads, rows, "lr", caption)])


def _reached(record: CompressionRecord) -> Block | None:
    """Return the tokens on which methods measured the inputs of experts' matrices."""
    counted = {name: module.tokens for name, module in record.modules.items() if module.tokens}
    if not counted:
        return None
    experts = sorted({expert for tokens in counted.values() for expert in tokens})
    rows = [
        [name, *(f"{tokens[expert]:,}" if expert in tokens else "-" for expert in experts)]
        for name, tokens in counted.items()
    ]
    everyone = [count for tokens in counted.values() for count in tokens.values()]
    summary = _counts_in_words("Measured on", everyone, len(rows))
    caption = "Tokens that reached each expert when its matrices were measured."
    return Details(summary, [table(["module", *(f"expert {expert}" for expert in experts)], rows, "lr", caption)])


def _counts_in_words(what: str, counts: Sequence[int], layers: int) -> str:
    starved = sum(count == 0 for count in counts)
    none = f"; {starved:,} saw no token" if starved else "; every one saw tokens"
    median = sorted(counts)[len(counts) // 2] if counts else 0
    return (
        f"{what}: {len(counts):,} experts in {layers:,} layers, {min(counts, default=0):,} to "
        f"{max(counts, default=0):,} tokens, median {median:,}{none}"
    )


def seconds_of(record: CompressionRecord) -> list[tuple[str, float]]:
    """Return where the time of a compression went.

    Args:
        record: The compression.
    """
    found = record.summary.get("seconds") or {}
    return [(str(name), float(value)) for name, value in found.items() if isinstance(value, int | float)]


def compression_seconds(record: CompressionRecord) -> str:
    """Say how long a compression took.

    Args:
        record: The compression.
    """
    given = record.summary.get("compression_seconds")
    if isinstance(given, int | float):
        return duration(float(given))
    parts = seconds_of(record)
    return duration(sum(value for _, value in parts)) if parts else "-"
