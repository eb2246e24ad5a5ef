"""What happened, in a sentence and a small table."""

from __future__ import annotations

from moe_lightning.evaluation.records import END
from moe_lightning.reporting.report.blocks import Block, Cell, Facts, Section, Table, Text
from moe_lightning.reporting.report.columns import Column, columns_of, main_text, missing_rows, summary_table
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.words import between, data_size, number, percent

HOW_QUALITY = (
    "add QualityEvaluation to trainer.callbacks: it measures the model before and after each compression and at the "
    "end, with intervals, sizes, speed, routing and continuations of prompts"
)
HOW_OFFLINE = (
    "moe-lightning compress measures the perplexity on the test split and the speed of prefill, before and after, and "
    "keeps no sums of blocks: for intervals, KL, agreement and domains compress in a run, by Compress with "
    "QualityEvaluation among the callbacks"
)


def summary_section(run: Run) -> Section:
    """Return the section that is read first.

    Args:
        run: The run.
    """
    columns = columns_of(run)
    blocks: list[Block] = [Text(sentence(run, columns))]
    facts = _facts(columns)
    if facts:
        blocks.append(Facts(facts))
    if columns:
        blocks.append(summary_table(columns))
        blocks.append(Text(_note(run, columns), "note"))
    elif run.offline is None:
        blocks.append(Text(f"Nothing was measured: {HOW_QUALITY}.", "note"))
    return Section("Summary", blocks)


def sentence(run: Run, columns: list[Column]) -> str:
    """Say what happened in a sentence or two.

    Args:
        run: The run.
        columns: Its columns.
    """
    if not run.compressions:
        told = "Nothing was compressed."
        last = columns[-1] if columns else None
        if last is not None and "perplexity" in last.values:
            told += f" Perplexity {_where(run)}is {last.cells['perplexity'].text}."
        return told
    methods = [name for record in run.compressions for name in record.methods] or ["a plan"]
    named = list(dict.fromkeys(method.partition("(")[0] for method in methods))
    steps = [record.step for record in run.compressions]
    when = ""
    if steps[0] is not None:
        when = f" at step {steps[0]:,}" if len(steps) == 1 else f" in {len(steps)} compressions"
    told = f"{', then '.join(named)}{when}"
    before, after = _first_and_compressed(columns)
    if before is not None and after is not None and {"parameters"} <= before.values.keys() & after.values.keys():
        told += (
            f" took the model from {before.values['parameters']:,.0f} to {after.values['parameters']:,.0f} parameters"
        )
        if before.values.get("bytes_on_disk") and after.values.get("bytes_on_disk"):
            disk = before.values["bytes_on_disk"], after.values["bytes_on_disk"]
            told += f" and from {data_size(disk[0])} to {data_size(disk[1])} on disk ({percent(disk[1] / disk[0])})"
    told += "."
    measured = [column for column in columns if "perplexity_ratio" in column.values]
    # A test of the model of the end says the same once more.
    ended = any(column.title == END for column in measured)
    said = [_ratio_in_words(run, column) for column in measured if column.title != "test" or not ended]
    return " ".join([told, *said])


def _where(run: Run) -> str:
    text = main_text(run)
    return f"on {text!r} " if text else ""


def _first_and_compressed(columns: list[Column]) -> tuple[Column | None, Column | None]:
    before = next((column for column in columns if column.title == "before"), None)
    after = next((column for column in columns if column.title.startswith(("compressed", "after"))), None)
    return before, after


def _ratio_in_words(run: Run, column: Column) -> str:
    when = {END: "At the end", "test": "In the test"}.get(column.title, "Right after compressing")
    if column.ratio is None:
        ratio = column.values["perplexity_ratio"]
        return f"{when} perplexity {_where(run)}is {ratio:.4f} times that before (no interval)."
    known, ends = column.ratio, between(column.ratio, 4)
    told = f"{when} perplexity {_where(run)}is {known.value:.4f} {ends} times that before".replace("  ", " ")
    if not ends:
        return f"{told}."
    if known.low > 1:
        doubt = "worse beyond the doubt of the text"
    elif known.high < 1:
        doubt = "better beyond the doubt of the text"
    else:
        doubt = "the interval holds 1: no difference is shown"
    return f"{told}: {doubt}."


def _facts(columns: list[Column]) -> list[tuple[str, Cell]]:
    """Return what the last column is in units of the first."""
    before, after = _first_and_compressed(columns)
    last = columns[-1] if columns else None
    if before is None or last is None or last is before:
        return []
    facts = []
    source = last if "perplexity_ratio" in last.values else after
    if source is not None and "perplexity_ratio" in source.values:
        ends = between(source.ratio, 3) if source.ratio is not None else ""
        facts.append(("perplexity", Cell(f"x {source.values['perplexity_ratio']:.3f}", ends or "no interval")))
    smaller = last if "parameters" in last.values else after
    for key, name in (("parameters", "parameters"), ("bytes", "in memory"), ("bytes_on_disk", "on disk")):
        if smaller is not None and before.values.get(key) and key in smaller.values:
            small = f"{before.cells[key].text} before"
            facts.append((name, Cell(percent(smaller.values[key] / before.values[key]), small)))
    for key in ("prefill", "decode"):
        if smaller is not None and before.values.get(key) and key in smaller.values:
            facts.append((key, Cell(f"x {number(smaller.values[key] / before.values[key], 3)}", "tokens per second")))
    return facts


def _note(run: Run, columns: list[Column]) -> str:
    """Say how the table is to be read, and how to get what it lacks."""
    told = []
    if run.moments:
        levels = sorted({column.ratio.level for column in columns if column.ratio is not None})
        level = percent(levels[0] if levels else 0.95, 0)
        told.append(
            f"In brackets: {level} intervals by bootstrap over blocks of text; ratios are in pairs, on the same "
            "blocks. Behind speeds: the slowest and the fastest run."
        )
        text = main_text(run)
        scores = next((moment.texts[text].scores for moment in run.moments if text in moment.texts), None)
        if scores is not None:
            tokens, blocks = int(scores.tokens.sum()), len(scores.tokens)
            told.append(f"Quality on {text!r}: {tokens:,} predicted tokens in {blocks:,} blocks.")
        if run.first is not None and len({moment.step for moment in run.moments}) > 1:
            told.append(
                "What stands at the end holds all training since the compression, which the model before did not have."
            )
    elif run.offline is not None:
        told.append(HOW_OFFLINE[0].upper() + HOW_OFFLINE[1:] + ".")
    else:
        told.append(f"For quality before and after: {HOW_QUALITY}.")
    lacking = [name for name in missing_rows(columns) if not name.startswith("lm-eval")]
    if run.moments and lacking:
        told.append(f"Not measured: {', '.join(lacking)}.")
    elif lacking and run.offline is None:
        told.append(f"Not known: {', '.join(lacking)}.")
    return " ".join(told)


def summary_text(run: Run) -> str:
    """Return the sentence and the table for a console.

    Args:
        run: The run.
    """
    columns = columns_of(run)
    if not columns:
        return sentence(run, columns)
    return "\n".join([sentence(run, columns), text_table(summary_table(columns))])


def text_table(shown: Table) -> str:
    """Return a table for a console.

    Args:
        shown: The table.
    """
    cells = [[f"{cell.text} {cell.small}".strip() for cell in row] for row in (shown.head, *shown.rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(shown.head))]
    lines = []
    for row in cells:
        words = (
            word.rjust(width) if align == "r" else word.ljust(width)
            for word, width, align in zip(row, widths, shown.align, strict=True)
        )
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)
