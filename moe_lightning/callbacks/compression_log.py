"""What a compression in mid-run leaves: lines on the console, TensorBoard's pages, files in the run directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from moe_lightning.callbacks.at_step import say
from moe_lightning.callbacks.gradual import Act
from moe_lightning.callbacks.tensorboard_pages import tensorboards
from moe_lightning.compression import CompressionResult
from moe_lightning.files import write_atomically
from moe_lightning.plan import CompressionPlan, plan_table
from moe_lightning.reporting import compression_figures, matrix_summary, matrix_table, slimming_figures
from moe_lightning.reporting.run_records import is_beginning, plan_files

ABANDONED = "abandoned"
"""Folder in ``RUN/results`` for the files of compressions that the model of the run did not go through."""


def log_compression(trainer: Trainer, result: CompressionResult, act: Act, name: str, note: str = "") -> None:
    """Say, log and write what was done.

    Args:
        trainer: The trainer.
        result: What was done.
        act: What was asked for.
        name: Of the files, in ``RUN/results``.
        note: Which of several acts it is, for the console.
    """
    step = trainer.global_step
    say(trainer, f"step {step}: {result}{f' ({note})' if note else ''}")
    matrices = matrix_summary(result.modules)
    if matrices:
        # Zeros take no bytes there, and weigh as much as other weights in memory.
        disk = (f"{shape.bytes / 2**20:,.1f}" for shape in (result.shape_before, result.shape_after))
        say(trainer, f"step {step}: {matrices}; {' -> '.join(disk)} MiB on disk")
    if not trainer.is_global_zero:
        return
    numbers = {
        "compression/parameters": float(result.size_after.parameters),
        "compression/bytes": float(result.size_after.bytes),
        "compression/bytes_on_disk": float(result.shape_after.bytes),
        "compression/touched_parameters": float(result.touched),
    }
    if act.share is not None:
        numbers["compression/sparsity" if act.taken == "zeros" else "compression/expert_ratio"] = act.share
    criterion, seed = _decided_by(act)
    boards = tensorboards(trainer)
    figures: dict[str, Figure] = {}
    if boards and result.statistics is not None:
        figures = compression_figures(result.statistics, criterion, result.shape_after, f"step {step}", seed)
    if boards:
        figures |= slimming_figures(result.modules, f"step {step}", result.shape_before.blocks)
    texts = {"plan": plan_table(result.plan, result.shape_after), "matrices": matrix_table(result.modules)}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=step)
    for logger in boards:
        for tag, text in texts.items():
            if text:
                logger.experiment.add_text(f"compression/{tag}", text, step)
        for tag, figure in figures.items():
            logger.experiment.add_figure(f"compression/{tag}", figure, step)
    folder = Path(trainer.default_root_dir) / "results"
    set_aside_other_branches(trainer, result.plan)
    if result.statistics is None:
        (folder / f"{name}.statistics.safetensors").unlink(missing_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(compression_record(result, act, step), indent=2) + "\n")
    write_atomically(folder / f"{name}.plan.json", result.plan.to_json())
    if result.statistics is not None:
        result.statistics.save(folder / f"{name}.statistics.safetensors")


def set_aside_other_branches(trainer: Trainer, plan: CompressionPlan) -> list[str]:
    """Move the files of compressions that are not in a plan's history into ``RUN/results/abandoned``.

    A run that is resumed from an earlier checkpoint may go on otherwise than before: what it did then is no part of the
    model any more, and must not stand in its report.

    Args:
        trainer: The trainer.
        plan: Of the model now.

    Returns:
        Names of the compressions.
    """
    results, moved = Path(trainer.default_root_dir) / "results", []
    for name, path in plan_files(results).items():
        try:
            known = CompressionPlan.from_json(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # the report names it
        if is_beginning(known, plan):
            continue
        (results / ABANDONED).mkdir(exist_ok=True)
        # The plan goes last: without it the others are no record.
        for ending in ("json", "statistics.safetensors", "plan.json"):
            file = results / f"{name}.{ending}"
            if file.is_file():
                file.replace(results / ABANDONED / file.name)
        moved.append(name)
    if moved:
        say(
            trainer,
            f"{', '.join(moved)}: not in the history of this model, since the run was resumed from before; moved to "
            f"{results / ABANDONED}",
        )
    return moved


def compression_record(result: CompressionResult, act: Act, step: int) -> dict[str, Any]:
    """Return everything that is known of a compression, as JSON has it.

    Args:
        result: What was done.
        act: What was asked for.
        step: When.

    Returns:
        Methods, criterion and seed of the first one, shapes and sizes before and after (in memory, and as the weights
        are written to disk), and of each module its status, tokens of its experts, statuses and relative errors of its
        matrices.
    """
    criterion, seed = _decided_by(act)
    shapes = {"before": result.shape_before, "after": result.shape_after}
    sizes = {"before": result.size_before, "after": result.size_after}
    return {
        "step": step,
        "methods": list(map(str, act.methods)),
        "criterion": criterion,
        "seed": seed,
        "sparsity": act.share if act.taken == "zeros" else None,
        "expert_ratio": act.share if act.taken != "zeros" else None,
        **{name: {**dataclasses.asdict(sizes[name]), "bytes_on_disk": shapes[name].bytes} for name in sizes},
        **{f"shape_{name}": shape.to_dict() for name, shape in shapes.items()},
        **result.summary(),
    }


def _decided_by(act: Act) -> tuple[str | None, int]:
    """Return criterion and seed of the first method: of several methods only that one saw the model as it was."""
    return getattr(act.methods[0], "criterion", None), getattr(act.methods[0], "seed", 0)
