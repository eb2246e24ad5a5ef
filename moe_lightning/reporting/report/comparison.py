"""Several runs side by side."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_lightning.evaluation.intervals import paired_differences
from moe_lightning.evaluation.records import QualityMoment
from moe_lightning.files import distinct_names
from moe_lightning.reporting.report.blocks import Block, Cell, Page, Section, Table, Text, table, transposed
from moe_lightning.reporting.report.columns import (
    ROWS,
    Column,
    columns_of,
    columns_of_the_run,
    final_column,
    main_text,
)
from moe_lightning.reporting.report.compressions import methods_with_options
from moe_lightning.reporting.report.figures import drawn_comparison
from moe_lightning.reporting.report.page import FOOTER
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.settings import circumstances
from moe_lightning.reporting.report.summary import damage_of, text_table
from moe_lightning.reporting.report.texts import ON_A_TEXT, differ, marked, texts_of, told_texts
from moe_lightning.reporting.report.words import NOTHING, share_with_interval, with_interval
from moe_lightning.reporting.report.write import write_page
from moe_lightning.reporting.run_comparison import last_moment

MOST_PAIRED = 5
"""Runs of which all pairs are compared; of more, each is compared with the first."""

MOST_COLUMNS = 5
"""Runs that stand in columns; more stand in rows."""

IS_THERE = "yes"
"""In the place of the value of an option that is an object."""

_OF_A_RUN = ("run_dir", "ckpt_path", "overwrite", "trainer.default_root_dir")
"""Options that say where, not what."""


def write_comparison(runs: Sequence[Run], path: str | os.PathLike[str]) -> Path:
    """Write several runs side by side.

    Args:
        runs: The runs.
        path: The HTML file; the Markdown has the same name with the ending ``.md``.

    Returns:
        The HTML file.
    """
    return write_page(comparison_page(runs), path)


def comparison_page(runs: Sequence[Run]) -> Page:
    """Return several runs side by side.

    Args:
        runs: The runs.
    """
    names = distinct_names([run.folder for run in runs])
    named = dict(zip(names, runs, strict=True))
    sections = [
        Section("The runs", _runs(named)),
        Section("What was done", [_done(named)]),
        Section("Differences in pairs", _pairs(named)),
        Section("Figures", _figures(named)),
        Section("Settings that differ", _settings(named)),
    ]
    return Page(f"{len(runs)} runs side by side", ", ".join(names), sections, FOOTER)


def comparison_text(runs: Sequence[Run]) -> str:
    """Return the table of the runs for a console.

    Args:
        runs: The runs.
    """
    named = dict(zip(distinct_names([run.folder for run in runs]), runs, strict=True))
    texts = texts_of(named)
    told = [f"WARNING: {words}" for words in [*_unfinished(named), *([told_texts(texts)] if differ(texts) else [])]]
    return "\n".join([*told, text_table(transposed(_overview(named)))])


def methods_of(run: Run) -> str:
    """Return the methods of a run with their options.

    Args:
        run: The run.
    """
    names = [f"{name}({options})" for record in run.compressions for name, options in methods_with_options(record)]
    counted = Counter(names)
    told = (name if count == 1 else f"{name} ({count} times)" for name, count in counted.items())
    return "; ".join(told) or "nothing compressed"


def _overview(named: dict[str, Run]) -> Table:
    finals = {name: final_column(run) for name, run in named.items()}
    keys = [key for key in ROWS if any(key in column.cells for column in finals.values())]
    first = {name: _right_after(run) for name, run in named.items()}
    shown = any(first.values())
    texts = texts_of(named)
    apart = differ(texts)
    rows = []
    for name, run in named.items():
        after = first[name]
        cells = {key: finals[name].cells.get(key, NOTHING) for key in keys}
        right_after = after.cells["perplexity_ratio"] if after is not None else NOTHING
        if apart and name in texts:
            letter, _ = texts[name]
            cells |= {key: marked(cells[key], letter) for key in keys if key in ON_A_TEXT}
            right_after = marked(right_after, letter)
        rows.append([Cell(name), Cell(_short(run)), *([right_after] if shown else []), *cells.values()])
    heads = ["run", "methods", *(["ratio right after compressing"] if shown else []), *(ROWS[key] for key in keys)]
    return table(heads, rows, "llr")


def _short(run: Run) -> str:
    """Return the names of a run's methods alone."""
    names = (method.partition("(")[0] for record in run.compressions for method in record.methods)
    return ", ".join(dict.fromkeys(names)) or "none"


def _right_after(run: Run) -> Column | None:
    """Return the column of the last compression where another one follows: what recovery or training made of it."""
    columns = [column for column in columns_of_the_run(run, columns_of(run)) if "perplexity_ratio" in column.cells]
    found = [column for column in columns if column.title.startswith("compressed")]
    return found[-1] if found and found[-1] is not columns[-1] else None


def _runs(named: dict[str, Run]) -> list[Block]:
    overview = _overview(named)
    measured = texts_of(named)
    blocks: list[Block] = [Text(told, "warning") for told in _unfinished(named)]
    blocks += [Text(told, "warning") for run in named.values() for told in damage_of(run)]
    blocks += [Text(told_texts(measured), "warning")] if differ(measured) else []
    blocks.append(transposed(overview) if len(named) <= MOST_COLUMNS else overview)
    texts = {name: main_text(run) for name, run in named.items() if main_text(run)}
    told = "Each model is the one that its run gives back: at its end, or after its last compression."
    if texts:
        words = {f"{text!r}" for text in texts.values()}
        told += f" Quality on {' and '.join(sorted(words))}; small: intervals, and percent of the model before."
    blocks.append(Text(told, "note"))
    without = [name for name in named if name not in texts]
    if without:
        blocks.append(
            Text(
                f"Without intervals: {', '.join(without)}, where QualityEvaluation was not among the callbacks.", "note"
            )
        )
    return blocks


def _unfinished(named: dict[str, Run]) -> list[str]:
    return [f"{name} is not finished: {run.stopped}." for name, run in named.items() if run.stopped]


def _done(named: dict[str, Run]) -> Block:
    rows = [[name, methods_of(run), str(run.folder.resolve())] for name, run in named.items()]
    return table(["run", "methods", "folder"], rows, "lll")


def _pairs(named: dict[str, Run]) -> list[Block]:
    moments = {name: moment for name, run in named.items() if (moment := last_moment(run.quality)) is not None}
    names = list(moments)
    if len(names) < 2:
        how = "add QualityEvaluation to trainer.callbacks of each run, with the same data options"
        return [Text(f"Runs are compared in pairs where quality was measured on the same blocks: {how}.", "note")]
    few = len(names) <= MOST_PAIRED
    chosen = list(itertools.combinations(names, 2)) if few else [(names[0], name) for name in names[1:]]
    rows: list[list[Cell]] = []
    apart: list[str] = []
    for one, other in chosen:
        found = _pair_rows(one, moments[one], other, moments[other])
        rows += found
        if not found:
            apart.append(f"{one} and {other}")
    blocks: list[Block] = []
    if rows:
        heads = ["text", "run", "compared with", "ratio of perplexities", "difference in KL [nats]"]
        caption = (
            "On the same blocks of text, in pairs. Ratio: perplexity of the run divided by that of the other; an "
            "interval that holds 1 (of a difference: 0) shows no difference. Intervals are over the blocks of these "
            "documents; other documents move the numbers by more."
        )
        heads += ["difference in agreement", "better on these documents"]
        blocks.append(table(heads, rows, "lllrrrl", caption))
    if not few:
        blocks.append(Text(f"Each run is compared with {names[0]} only.", "note"))
    if apart:
        blocks.append(
            Text(
                f"Measured on different blocks, so not compared: {'; '.join(apart)}. Runs with the same data options "
                "(sources, seed, block_size, test) and the same tokenizer have the same blocks.",
                "note",
            )
        )
    return blocks


def _pair_rows(one: str, mine: QualityMoment, other: str, theirs: QualityMoment) -> list[list[Cell]]:
    rows = []
    for text, scores in mine.texts.items():
        against = theirs.texts.get(text)
        if against is None or against.fingerprint != scores.fingerprint:
            continue
        known = paired_differences(scores.scores, against.scores)
        ratio = known["perplexity_ratio"]
        better = one if ratio.high < 1 else other if ratio.low > 1 else "no difference shown"
        if not ratio.finite:
            better = "not finite"
        rows.append(
            [
                Cell(text),
                Cell(one),
                Cell(other),
                with_interval(ratio, 4),
                with_interval(known.get("divergence"), 4),
                share_with_interval(known.get("agreement")),
                Cell(better),
            ]
        )
    return rows


def _figures(named: dict[str, Run]) -> list[Block]:
    how = "add QualityEvaluation to trainer.callbacks of each run"
    nothing = f"Quality against size and speed takes two runs in which both were measured: {how}."
    drawn = drawn_comparison(named)
    without = [name for name, run in named.items() if not run.moments]
    if drawn and without:
        drawn = [
            *drawn,
            Text(f"Not in figures of quality: {', '.join(without)}, where it was not measured: {how}.", "note"),
        ]
    return drawn or [Text(nothing, "note")]


def _settings(named: dict[str, Run]) -> list[Block]:
    known = {name: circumstances(run) for name, run in named.items()}
    options = {name: options_of(run) for name, run in named.items()}
    rows = [[key, *(values.get(key, "-") for values in known.values())] for key in _differing(known)]
    with_options = {name: values for name, values in options.items() if values}
    rows += [[key, *(values.get(key, "-") for values in options.values())] for key in _differing(with_options)]
    blocks: list[Block] = []
    if rows:
        caption = "Data, versions, machine and options in which runs differ; - where a run does not have it."
        blocks.append(table(["", *named], rows, "l", caption))
    else:
        blocks.append(Text("All settings that were kept are equal."))
    # Damaged files are named at the top.
    without = [name for name, run in named.items() if name not in with_options and not run.options_damaged]
    if without:
        blocks.append(Text(f"No options were kept with {', '.join(without)}.", "note"))
    return blocks


def _differing(known: dict[str, dict[str, str]]) -> list[str]:
    """Return the keys whose values differ among the runs that have them, and objects that not all runs have.

    Options of objects that not all runs have say nothing more.
    """
    keys = list(dict.fromkeys(key for values in known.values() for key in values))
    partly = [key for key in keys if any(values.get(key) == IS_THERE for values in known.values())]
    partly = [key for key in partly if any(key not in values for values in known.values())]
    found = []
    for key in keys:
        inside = any(key.startswith(f"{whole}.") for whole in partly)
        values = {values[key] for values in known.values() if key in values}
        if not inside and (len(values) > 1 or key in partly):
            found.append(key)
    return found


def options_of(run: Run) -> dict[str, str]:
    """Return the options of a run, flat: ``trainer.callbacks.Compress.methods.Novices.ratio``.

    Args:
        run: The run.
    """
    command = "fit" if "fit" in run.configs else next(iter(run.configs), None)
    if command is None:
        return {}
    try:
        values = yaml.safe_load(run.configs[command])
    except (ValueError, yaml.YAMLError):
        return {}  # it stands among the damaged files of the run
    if not isinstance(values, dict):
        return {}  # likewise, or empty
    found: dict[str, str] = {}
    _flatten("", values, found)
    return {name: value for name, value in found.items() if name not in _OF_A_RUN}


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    """Put the leaves of nested options under their names; objects of a list are called by their classes."""
    if isinstance(value, dict):
        if "class_path" in value:
            value = value.get("init_args") or {}
        for key, item in value.items():
            _flatten(f"{name}.{key}" if name else str(key), item, found)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        seen: Counter[str] = Counter()
        for place, item in enumerate(value):
            kind = str(item.get("class_path", place)).rpartition(".")[2] if isinstance(item, dict) else str(place)
            seen[kind] += 1
            inside = f"{name}.{kind}" + (f" {seen[kind]}" if seen[kind] > 1 else "")
            found[inside] = IS_THERE
            _flatten(inside, item, found)
    else:
        found[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
