"""Quality by text, tasks, what came back, and what the models write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lightning.evaluation.records import QualityMoment
from moe_lightning.evaluation.task_names import is_accuracy
from moe_lightning.reporting.report.blocks import Block, Cell, Code, Details, Section, Text, table
from moe_lightning.reporting.report.columns import shown_moments, title_of
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.report.summary import HOW_OFFLINE, HOW_QUALITY
from moe_lightning.reporting.report.words import (
    NOTHING,
    decimals,
    number,
    percent,
    places_of,
    share_with_interval,
    with_interval,
)

PROMPT_LINES, PROMPT_LETTERS = 6, 300
"""As much of a prompt stands beside its continuations, from its end."""


def missing(run: Run, what: str, in_a_run: str, offline: str = "", file: str = "") -> list[Block]:
    """Return the line that says how to get what is not there.

    Args:
        run: The run.
        what: What is not there, e.g. ``lm-eval tasks were not measured``.
        in_a_run: How a run gets it.
        offline: The same for a folder of ``moe-lightning compress``, where that differs.
        file: Pattern of the file that it would stand in, where there is one: it may be damaged.
    """
    damaged = [path for path in run.damaged if file and Path(path).match(file)]
    if damaged:
        return [Text(f"Not known: {', '.join(damaged)} is damaged, see the summary.", "warning")]
    how = offline if run.offline is not None and offline else in_a_run
    return [Text(f"{what}: {how}.", "note")]


def quality_section(run: Run) -> Section:
    """Return the quality of every moment on every text.

    Args:
        run: The run.
    """
    title = "Quality by text"
    if not any(moment.texts for moment in run.moments):
        return Section(
            title, missing(run, "Quality was not measured by text", HOW_QUALITY, HOW_OFFLINE, file="quality.json")
        )
    places = places_of(
        [
            float((text.scores.nats.sum() / text.scores.tokens.sum()).exp())
            for moment in run.moments
            for text in moment.texts.values()
        ]
    )
    names = list(dict.fromkeys(name for moment in run.moments for name in moment.texts))
    rows: list[list[Cell]] = []
    unpaired = False
    for name in names:
        for moment in run.moments:
            if name in moment.texts:
                rows.append(_text_row(run, moment, name, places))
                theirs = run.first.texts.get(name) if run.first is not None else None
                unpaired |= theirs is None or theirs.fingerprint != moment.texts[name].fingerprint
    head = ["text", "calibrated", "moment", "perplexity", "ratio to before", "bits/byte", "KL [nats]", "agreement"]
    caption = (
        "Calibrated: calibration saw text of that source. Ratio: perplexity in units of that before compression, in "
        "pairs on the same blocks. KL and agreement: against the predictions of the model before compression."
    )
    blocks: list[Block] = [table([*head, "tokens", "blocks"], rows, "lllr", caption)]
    if all(text.calibrated for moment in run.moments for text in moment.texts.values()):
        blocks.append(
            Text(
                "Every text was calibrated on: name others in the option domains of QualityEvaluation, since damage "
                "there is usually larger.",
                "note",
            )
        )
    if unpaired:
        blocks.append(
            Text("Where there is no ratio, the model before was not measured on the same blocks of that text.", "note")
        )
    blocks += _layer_errors(run)
    for command, logged in (("test", run.tested), ("validate", run.validated)):
        if logged:
            told = ", ".join(f"{name} {number(value, 5)}" for name, value in logged.items())
            blocks.append(Text(f"What the command {command} logged last: {told}.", "note"))
    for name in run.stale:
        command = name.removesuffix(".json")
        blocks.append(
            Text(f"results/{name} is left out: it is older than what the last fit wrote; {command} again.", "note")
        )
    return Section(title, blocks)


def _text_row(run: Run, moment: QualityMoment, name: str, places: int) -> list[Cell]:
    text, known = moment.texts[name], run.intervals(moment, name)
    return [
        Cell(name),
        NOTHING if text.calibrated is None else Cell("yes" if text.calibrated else "no"),
        Cell(title_of(run, moment), f"step {moment.step:,}"),
        with_interval(known["perplexity"], places),
        with_interval(known.get("perplexity_ratio"), 4),
        with_interval(known.get("bits_per_byte"), 4),
        with_interval(known.get("divergence"), 4),
        share_with_interval(known.get("agreement")),
        Cell(f"{int(text.scores.tokens.sum()):,}"),
        Cell(f"{len(text.scores.tokens):,}"),
    ]


def _layer_errors(run: Run) -> list[Block]:
    measured = [moment for moment in shown_moments(run) if moment.layer_errors]
    if not measured:
        return []
    layers = sorted({layer for moment in measured for layer in moment.layer_errors})
    rows = [[f"{layer}", *(percent(moment.layer_errors.get(layer), 3) for moment in measured)] for layer in layers]
    last = measured[-1].layer_errors
    worst = max(last, key=lambda layer: last[layer])
    summary = (
        f"Error of what leaves each block: {len(layers)} blocks, at most {percent(last[worst], 2)} "
        f"(block {worst}, {title_of(run, measured[-1])})"
    )
    caption = "Squared error of what leaves each block, in units of its squares before compression."
    heads = ["block", *(title_of(run, moment) for moment in measured)]
    return [Details(summary, [table(heads, rows, "lr", caption)])]


def tasks_section(run: Run) -> Section:
    """Return the results of lm-eval's tasks.

    Args:
        run: The run.
    """
    title = "Tasks"
    moments = run.task_moments
    if not moments:
        return Section(
            title,
            missing(
                run,
                "lm-eval tasks were not measured",
                "add LMEval to trainer.callbacks (see configs/evaluate)",
                "run lm_eval on the folder, or compress in a run with LMEval among the callbacks",
                file="lm_eval.json",
            ),
        )
    names = list(dict.fromkeys(name for moment in moments for name in moment["tasks"]))
    rows: list[list[Cell | str]] = []
    for name in names:
        found = [moment["tasks"].get(name) for moment in moments]
        known = next(task for task in found if task is not None)
        rows.append([name, str(known["metric"]), _shots(known), _samples(known), *map(_task, found)])
    if any(moment.get("mean") is not None for moment in moments):
        rows.append(["mean", "", "", "", *(Cell(percent(moment.get("mean"), 2)) for moment in moments)])
    heads: list[Cell | str] = [
        "task",
        "metric",
        "few-shot",
        "samples",
        *(Cell(item["name"], f"step {item['step']:,}") for item in moments),
    ]
    harness = (run.tasks or {}).get("harness")
    limits = sorted({moment["limit"] for moment in moments if moment.get("limit") is not None})
    caption = f"lm-eval{f' {harness}' if harness else ''}; small: the standard error that it states."
    blocks: list[Block] = [table(heads, rows, "llrr", caption)]
    if limits:
        told = ", ".join(f"{limit:g}" for limit in limits)
        blocks.append(Text(f"Only the first samples of each task were measured (limit {told}).", "warning"))
    return Section(title, blocks)


def _shots(task: dict[str, Any]) -> str:
    return "-" if task.get("num_fewshot") is None else f"{task['num_fewshot']}"


def _samples(task: dict[str, Any]) -> str:
    return "-" if task.get("samples") is None else f"{task['samples']:,}"


def _task(task: dict[str, Any] | None) -> Cell:
    if task is None:
        return NOTHING
    value, error = task["value"], task.get("stderr")
    if value is None:
        return Cell("no number")
    # Shares are told in percent; perplexities and the like as they are.
    if is_accuracy(str(task["metric"])) and 0 <= value <= 1:
        return Cell(percent(value, 2), "" if error is None else f"+- {100 * error:.2f}")
    return Cell(number(value), "" if error is None else f"+- {number(error, 3)}")


def recovery_section(run: Run) -> Section:
    """Return how much of what compressions cost came back.

    Args:
        run: The run.
    """
    title = "Recovery"
    if run.recovery is None:
        return Section(
            title,
            missing(
                run,
                "What came back was not measured",
                "give the data a validation split (--data.validation), and RecoveredShare measures on it in every fit "
                "that compresses",
                "moe-lightning compress trains nothing; moe-lightning fit -c recover/... with --model.checkpoint does",
                file="recovery.json",
            ),
        )
    found = run.recovery
    blocks: list[Block] = []
    lost, ends = found.get("lost"), found.get("lost_interval")
    if lost is not None:
        interval = f" [{decimals(ends[0], 4)}, {decimals(ends[1], 4)}]" if ends else ""
        told = f"Compressions cost {decimals(lost, 4)}{interval} nats per token on the validation batches"
        share = found["boundaries"][-1].get("recovered_share") if found["boundaries"] else None
        told += f"; {percent(share)} of that has come back." if share is not None else "; no share of it can be told."
        blocks.append(Text(told))
    rows = [
        [
            f"{item['step']:,}",
            str(item["event"]),
            decimals(item["loss"], 4),
            decimals(item.get("added"), 4),
            percent(item.get("recovered_share")),
            "-" if item.get("tokens") is None else f"{item['tokens']:,}",
        ]
        for item in found["boundaries"]
    ]
    heads = ["step", "what ended there", "loss [nats/token]", "added by it", "recovered share", "tokens"]
    before = found.get("before")
    caption = f"Before any compression the loss was {decimals(before, 4)}." if before is not None else ""
    blocks.append(table(heads, rows, "rlr", caption))
    return Section(title, blocks)


def samples_section(run: Run) -> Section:
    """Return continuations of prompts, side by side.

    Args:
        run: The run.
    """
    title = "What it writes"
    moments = [moment for moment in shown_moments(run) if moment.samples]
    if not moments:
        return Section(
            title,
            missing(
                run,
                "No continuations of prompts were kept",
                "add QualityEvaluation to trainer.callbacks, whose option prompts names them",
                "run moe-lightning predict on both folders",
                file="quality.json",
            ),
        )
    prompts = list(dict.fromkeys(sample.prompt for moment in moments for sample in moment.samples))
    rows = []
    for prompt in prompts:
        said = [
            next((sample.continuation for sample in moment.samples if sample.prompt == prompt), "")
            for moment in moments
        ]
        rows.append([_end_of(prompt), *said])
    heads = ["prompt", *(title_of(run, moment) for moment in moments)]
    caption = "Greedy continuations: the most likely token each time."
    blocks: list[Block] = [table(heads, rows, "t", caption)]
    cut = [prompt for prompt in prompts if _end_of(prompt) != prompt]
    if cut:
        blocks.append(Details(f"Whole prompts: {len(cut)} of {len(prompts)} were cut", [Code(text) for text in cut]))
    return Section(title, blocks)


def _end_of(prompt: str) -> str:
    """Return the end of a prompt, which what follows goes on from."""
    lines = prompt.splitlines(keepends=True)
    end = "".join(lines[-PROMPT_LINES:])[-PROMPT_LETTERS:]
    return prompt if end == prompt else f"[...] {end}"
