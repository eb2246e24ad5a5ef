"""What happened, in a sentence and a small table."""

from __future__ import annotations

import math

from moe_lightning.evaluation.intervals import Interval
from moe_lightning.evaluation.records import END
from moe_lightning.reporting.report.blocks import Block, Cell, Facts, Section, Table, Text
from moe_lightning.reporting.report.columns import (
    TEST,
    Column,
    columns_of,
    columns_of_the_run,
    final_column,
    main_text,
    missing_rows,
    shown_moments,
    summary_table,
    tested_model,
    title_of,
)
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.speeds import speed_changes
from moe_lightning.reporting.report.words import NOT_FINITE, between, data_size, percent
from moe_lightning.reporting.run_comparison import last_moment

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
    blocks: list[Block] = [Text(told, "warning") for told in [*damage_of(run), *warnings_of(run)]]
    blocks.append(Text(sentence(run, columns)))
    facts = _facts(run, columns)
    if facts:
        blocks.append(Facts(facts))
    if columns:
        blocks.append(summary_table(columns))
        blocks.append(Text(_note(run, columns), "note"))
    elif run.offline is None and not run.damaged:
        blocks.append(Text(f"Nothing was measured: {HOW_QUALITY}.", "note"))
    return Section("Summary", blocks)


def sentence(run: Run, columns: list[Column]) -> str:
    """Say what happened in a sentence or two.

    Args:
        run: The run.
        columns: Its columns.
    """
    if not run.compressions:
        told = "What was compressed is not known." if run.compressions_damaged else "Nothing was compressed."
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
    measured = [column for column in columns_of_the_run(run, columns) if "perplexity_ratio" in column.values]
    told = " ".join([told, *(_ratio_in_words(run, column) for column in measured)])
    worst = worst_text(run)
    if worst is not None:
        name, ratio = worst
        told += (
            f" Of the texts it is worst on {_with_calibration(run, name)}: {ratio.value:.4f} {between(ratio, 4)}"
        ).rstrip() + " times that before."
    return told


def worst_text(run: Run) -> tuple[str, Interval] | None:
    """Return the text on which perplexity rose most in the model that the run ended with, and its ratio to before.

    Args:
        run: The run.

    Returns:
        None where fewer than two texts were measured before and at the end.
    """
    end = last_moment(run.quality)
    if end is None or end is run.first:
        return None
    ratios = {name: run.intervals(end, name).get("perplexity_ratio") for name in end.texts}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None and ratio.finite}
    if len(known) < 2:
        return None
    name = max(known, key=lambda name: known[name].value)
    return name, known[name]


def _with_calibration(run: Run, name: str) -> str:
    end = last_moment(run.quality)
    seen = None if end is None else end.texts[name].calibrated
    return repr(name) + {None: "", True: " (calibrated on)", False: " (not calibrated on)"}[seen]


def damage_of(run: Run) -> list[str]:
    """Return which files could not be read.

    Args:
        run: The run.
    """
    return [f"{path} is damaged ({why}): what it holds is left out." for path, why in run.damaged.items()]


def warnings_of(run: Run) -> list[str]:
    """Return what must not be overlooked: a run that was stopped, models that give no numbers, tests of other models.

    Args:
        run: The run.
    """
    told = [f"This run is not finished: {run.stopped}."] if run.stopped else []
    for moment in shown_moments(run):
        for name, text in moment.texts.items():
            broken = int((~text.scores.finite).sum())
            if broken:
                told.append(
                    f"The model is broken ({title_of(run, moment)}, step {moment.step:,}): it gives NaN or infinity in "
                    f"{broken:,} of {len(text.scores.tokens):,} blocks of {name!r}, so that nothing measured on that "
                    "text is a number. Look at what was done to it before, and at the precision that it computes in."
                )
        ended = last_moment(run.quality)
        if moment.name == TEST and ended is not moment and tested_model(run, moment) is not ended:
            told.append(
                f"The test ({moment.what}) was not of the model that the run ended with; what is said of the run is "
                "not taken from it."
            )
    return told


def _where(run: Run) -> str:
    text = main_text(run)
    return f"on {text!r} " if text else ""


def _first_and_compressed(columns: list[Column]) -> tuple[Column | None, Column | None]:
    before = next((column for column in columns if column.title == "before"), None)
    after = next((column for column in columns if column.title.startswith(("compressed", "after"))), None)
    return before, after


def _ratio_in_words(run: Run, column: Column) -> str:
    when = {END: "At the end", TEST: "In the test"}.get(column.title, "Right after compressing")
    if column.ratio is None:
        ratio = column.values["perplexity_ratio"]
        return f"{when} perplexity {_where(run)}is {ratio:.4f} times that before (no interval)."
    known, ends = column.ratio, between(column.ratio, 4)
    if not known.finite:
        return f"{when} perplexity {_where(run)}is {NOT_FINITE}."
    told = f"{when} perplexity {_where(run)}is {known.value:.4f} {ends} times that before".replace("  ", " ")
    if not ends:
        return f"{told}."
    if known.low > 1:
        doubt = "worse on these documents"
    elif known.high < 1:
        doubt = "better on these documents"
    else:
        doubt = "the interval holds 1: no difference is shown, which is not to say that they are equal"
    return f"{told}: {doubt}."


def _facts(run: Run, columns: list[Column]) -> list[tuple[str, Cell]]:
    """Return what the model that the run ended with is in units of the one before."""
    before, _ = _first_and_compressed(columns)
    final = final_column(run)
    if before is None or final.title == before.title:
        return []
    facts = []
    if "perplexity_ratio" in final.values:
        value = final.values["perplexity_ratio"]
        ends = between(final.ratio, 3) if final.ratio is not None else "no interval"
        facts.append(("perplexity", Cell(f"x {value:.3f}", ends) if math.isfinite(value) else Cell(NOT_FINITE)))
    worst = worst_text(run)
    if worst is not None:
        text, ratio = worst
        small = " ".join([_with_calibration(run, text), between(ratio, 3)])
        facts.append(("perplexity, worst text", Cell(f"x {ratio.value:.3f}", small)))
    if "agreement" in final.cells:
        facts.append(("same next token as before", final.cells["agreement"]))
    for key, name in (("parameters", "parameters"), ("bytes", "in memory"), ("bytes_on_disk", "on disk")):
        if before.values.get(key) and key in final.values:
            small = f"{before.cells[key].text} before"
            facts.append((name, Cell(percent(final.values[key] / before.values[key]), small)))
    changes = speed_changes(run, last_moment(run.quality))
    # Three runs right after one another, minutes before or after those of the other model, are no headline.
    return [*facts, *((phase, changed.cell) for phase, changed in changes.items() if changed.in_turn)]


def _note(run: Run, columns: list[Column]) -> str:
    """Say how the table is to be read, and how to get what it lacks."""
    told = []
    if run.moments:
        levels = sorted({column.ratio.level for column in columns if column.ratio is not None})
        level = percent(levels[0] if levels else 0.95, 0)
        told.append(
            f"In brackets: {level} intervals by bootstrap over the blocks of these documents; neighbouring blocks are "
            "alike, so that other documents move the numbers by more (docs/evaluation.md). Ratios are in pairs, on the "
            "same blocks. Behind speeds: the slowest and the fastest run."
        )
        changes = speed_changes(run, last_moment(run.quality))
        in_turn = {
            f"{changed.in_turn} (batch {changed.now.batch}, context {changed.now.context})"
            for changed in changes.values()
            if changed.in_turn
        }
        if in_turn:
            told.append(f"In turn: both models were timed by {', '.join(sorted(in_turn))}, not at their moments.")
        if changes and not all(changed.in_turn for changed in changes.values()):
            told.append(
                "Speeds are of three runs right after one another, at different times for each model: do not compare "
                "them, use moe-lightning benchmark, which times models in turn."
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
    elif not run.damaged:
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
    told = " ".join([sentence(run, columns), *(f"WARNING: {words}" for words in warnings_of(run))])
    return "\n".join([told, text_table(summary_table(columns))]) if columns else told


def text_table(shown: Table) -> str:
    """Return a table for a console.

    Args:
        shown: The table.
    """
    cells = [[_in_one_line(cell) for cell in row] for row in (shown.head, *shown.rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(shown.head))]
    lines = []
    for row in cells:
        words = (
            word.rjust(width) if align == "r" else word.ljust(width)
            for word, width, align in zip(row, widths, shown.align, strict=True)
        )
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def _in_one_line(cell: Cell) -> str:
    """Return a cell for a console; small words in parentheses where they are no interval."""
    small = cell.small if cell.small.startswith("[") or not cell.text else cell.small and f"({cell.small})"
    return f"{cell.text} {small}".strip()
