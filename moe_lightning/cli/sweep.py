"""``moe-lightning sweep``: a grid of methods on one model, measured on the same text at equal budget."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_lightning import __version__
from moe_lightning.checkpoints import from_pretrained
from moe_lightning.cli.commands import (
    WorkFailed,
    begun,
    check_vocabulary,
    device_named,
    dtype_named,
    inspected,
    run_command,
)
from moe_lightning.cli.prepared import check_zeros
from moe_lightning.compression.layerwise import measures
from moe_lightning.data import TextDataModule
from moe_lightning.evaluation.comparison import predictions_bytes
from moe_lightning.files import check_writable, write_atomically
from moe_lightning.plan import ModelShape
from moe_lightning.slimming.policy import SlimmingPolicy, Starved
from moe_lightning.statistics import Statistics
from moe_lightning.statistics.groups import statistics_bytes
from moe_lightning.statistics.second_moments import MAX_BYTES, second_moment_bytes
from moe_lightning.sweep.bench import Bench, Job, low_rank_of
from moe_lightning.sweep.figures import write_figures
from moe_lightning.sweep.grid import Cell, Grid, cells_of
from moe_lightning.sweep.notes import named, own_passes
from moe_lightning.sweep.results import Baseline, csv_text, markdown_text, rows_of
from moe_lightning.sweep.run import results_of, run_cells, shared_fits, shared_needs, shared_statistics
from moe_lightning.sweep.store import ORIGINAL, SweepFolder, folder_fingerprint


@dataclass
class Prepared:
    """Everything that was checked before the work begins."""

    model: str
    shape: ModelShape
    cells: list[Cell]
    folder: SweepFolder
    data: TextDataModule
    calibration: list[Any]
    held_out: list[Any]
    intervention_batches: int | None
    sensitivity_batches: int | None
    policy: SlimmingPolicy
    workers: int
    teacher_bytes: int
    device: torch.device
    dtype: torch.dtype


def sweep_model(
    model: str,
    output: str,
    data: TextDataModule,
    grids: list[Grid],
    baseline: Baseline | None = None,
    calibration_batches: int | None = None,
    intervention_batches: int | None = None,
    sensitivity_batches: int | None = None,
    workers: int = 1,
    teacher_cache_mib: int = 2048,
    level: float = 0.95,
    resamples: int = 2000,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    dry_run: bool = False,
    min_tokens: int = SlimmingPolicy.min_tokens,
    starved: Starved = SlimmingPolicy.starved,
    max_fallback: float = SlimmingPolicy.max_fallback,
) -> None:
    """Measure a grid of methods on one model: criterion x operator x scope x ratio, at equal numbers of parameters.

    One pass over the calibration text serves all cells. Every cell is measured on the same held-out text. Finished
    cells are kept: a second run does the rest.

    Args:
        model: Hugging Face folder of an uncompressed Mixtral.
        output: Folder for the results: results.csv, results.md, figures, and a file for each finished cell.
        data: Text for calibration and test. Its tokenizer is the model folder's unless one is given.
        grids: Groups of cells, see configs/sweeps/quickstart.yaml.
        baseline: Cell that the others are compared with at each ratio; MoNE as released when not given.
        calibration_batches: Batches of the calibration split; all of them when not given.
        intervention_batches: Those of them for the criteria interventional, which makes a pass for every expert, and
            naee_dense, which runs every set of a layer's experts.
        sensitivity_batches: Those of them for scope sensitivity, which makes a pass for every layer of every cell.
        workers: Processes that measure cells, each with a model and its share of the cores.
        teacher_cache_mib: Predictions of the uncompressed model to keep in memory, in MiB, for each process.
        level: Confidence of the intervals.
        resamples: Draws of blocks for the intervals.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: Type of the weights; auto keeps the one they were saved in.
        dry_run: Say what would be done, and do nothing.
        min_tokens: For cells of methods that measure the inputs of experts' matrices: an expert that fewer calibration
            tokens reach is starved.
        starved: What becomes of it. warn: it is made from what there is, and the results say how many there are.
            top_up: further batches of the calibration split, behind calibration_batches, are drawn that reach it.
            fallback: as if no token reached it (rounding to nearest, magnitudes). error: the cell fails.
        max_fallback: Largest share of a method's matrices that may be made without measurement, from 0 to 1; a cell
            with more fails.

    Raises:
        ValueError: Something does not fit; found before the calibration pass.
        FileNotFoundError: The model or the text is not there.
        FileExistsError: The output folder holds something else.
    """
    for name, value in (("workers", workers), ("teacher_cache_mib", teacher_cache_mib), ("resamples", resamples)):
        if value < (0 if name == "teacher_cache_mib" else 1):
            raise ValueError(f"--{name} {value}: it must be at least {0 if name == 'teacher_cache_mib' else 1}")
    for name, few in (("intervention_batches", intervention_batches), ("sensitivity_batches", sensitivity_batches)):
        if few is not None and few < 1:
            raise ValueError(f"--{name} {few}: it must be at least 1")
    if not 0 < level < 1:
        raise ValueError(f"--level {level}: it must lie in (0, 1), 0.95 is usual")
    # Whether there are further batches is known when there are data.
    policy = SlimmingPolicy(min_tokens, starved, (), max_fallback)
    where = device_named(device)
    shape, plan = inspected(model)
    if plan:
        raise ValueError(
            f"--model {model} is compressed already: a sweep compares ways to compress, so give the model before that"
        )
    cells = cells_of(grids, shape)
    for cell in cells:
        try:
            check_zeros(shape, cell.methods)
        except ValueError as error:
            raise ValueError(f"--grids: {cell.name}: {error}") from None
    _check_baseline(baseline, cells)
    check_writable(Path(output) / "sweep.json")
    check_vocabulary(data, shape, model)
    if starved == "top_up" and any(measures(method) for cell in cells for method in cell.methods):
        try:
            further = list(data.further_batches(calibration_batches))
        except ValueError as error:
            raise ValueError(f"--starved top_up: {error}") from None
        policy = dataclasses.replace(policy, top_up=further)
    prepared = Prepared(
        model=model,
        shape=shape,
        cells=cells,
        folder=SweepFolder(output),
        data=data,
        calibration=list(data.calibration_batches(calibration_batches)),
        held_out=list(data.test_dataloader()),
        intervention_batches=intervention_batches,
        sensitivity_batches=sensitivity_batches,
        policy=policy,
        workers=workers,
        teacher_bytes=teacher_cache_mib << 20,
        device=where,
        dtype=dtype_named(dtype, model),
    )
    if sum(len(batch["input_ids"]) for batch in prepared.held_out) < 2:
        raise ValueError("the test split has less than 2 blocks, too few for an interval: raise --data.test")
    fingerprint = _fingerprint(prepared)
    prepared.folder.check(fingerprint)
    results = results_of(prepared.folder, cells)
    todo = [cell for cell in cells if cell.key not in results]
    _print_plan(prepared, todo)
    if dry_run:
        print("dry run: nothing was measured, nothing was written")
        return
    with begun():
        prepared.folder.begin(fingerprint, {"model": model, "data": data.describe(), "cells": len(cells)})
        try:
            failures = _work(prepared, todo)
        except KeyboardInterrupt:
            told = "interrupted; the finished cells are kept, and the same command does the rest"
            raise KeyboardInterrupt(told) from None
        _report(prepared, baseline or Baseline(), level, resamples)
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(failures.items())[:3])
        raise WorkFailed(f"{len(failures)} of {len(cells)} cells failed and are left out of the results: {told}")


def _check_baseline(baseline: Baseline | None, cells: Sequence[Cell]) -> None:
    """Refuse a baseline that is no cell, and say so where the usual one is none."""
    if any((baseline or Baseline()).names(cell) for cell in cells):
        return
    if baseline is not None:
        raise ValueError(f"--baseline {baseline} is no cell of the grids: add it to them, or name another")
    print(
        f"note     {Baseline()} (MoNE as released) is no cell of the grids: losses are not told as shares of its loss"
    )


def _fingerprint(prepared: Prepared) -> dict[str, Any]:
    """Return everything besides a cell's settings that its result depends on."""

    def blocks(batches: Sequence[Any]) -> int:
        return sum(len(batch["input_ids"]) for batch in batches)

    return {
        "model": folder_fingerprint(prepared.model),
        "data": prepared.data.describe()["fingerprint"],
        "held-out blocks": blocks(prepared.held_out),
        "calibration blocks": blocks(prepared.calibration),
        "calibration blocks for interventions": blocks(prepared.calibration[: prepared.intervention_batches]),
        "calibration blocks for sensitivity": blocks(prepared.calibration[: prepared.sensitivity_batches]),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        **prepared.policy.describe(),
        "version": __version__,
    }


def _print_plan(prepared: Prepared, todo: Sequence[Cell]) -> None:
    shape, cells = prepared.shape, prepared.cells
    held_out = sum(batch["input_ids"].numel() for batch in prepared.held_out)
    calibration = sum(batch["input_ids"].numel() for batch in prepared.calibration)
    largest = max(batch["input_ids"].numel() for batch in prepared.calibration)
    needs = shared_needs(cells)
    weights = shape.parameters * prepared.dtype.itemsize
    teacher = min(prepared.teacher_bytes, predictions_bytes(held_out, shape.vocab_size))
    copies = 2 if teacher == prepared.teacher_bytes else 1  # predictions that are not kept take a second model
    each = weights * copies + teacher + predictions_bytes(largest, shape.vocab_size) * 2
    statistics = statistics_bytes(shape, needs, largest)
    low_rank = any(low_rank_of(cell) for cell in todo)
    fitted = sum(len(layout.real) for layout in shape.layouts) if low_rank else 0
    moments = min(MAX_BYTES, second_moment_bytes(shape.hidden_size, fitted))
    print(f"model    {prepared.model} on {prepared.device}, {str(prepared.dtype).removeprefix('torch.')}")
    print(f"data     {calibration:,} tokens for calibration, {held_out:,} held out")
    print(f"measured {', '.join(sorted(needs))}: once, for all cells")
    if alone := [cell.name for cell in cells if own_passes(cell.methods)]:
        print(f"         {len(alone)} of them make passes of their own as well: {named(alone)}")
    print(
        f"memory   about {(prepared.workers * each + statistics + moments) / 2**20:,.0f} MiB: statistics "
        f"{statistics / 2**20:,.1f}, second moments {moments / 2**20:,.1f}, each of {prepared.workers} processes "
        f"{each / 2**20:,.0f}, and what Python and torch take themselves"
    )
    print(f"output   {prepared.folder.path}")
    print(f"cells    {len(cells) - len(todo)} of {len(cells)} are done, {len(todo)} to do", flush=True)


def _work(prepared: Prepared, todo: Sequence[Cell]) -> dict[str, str]:
    """Measure what is not done yet; return what failed."""
    folder = prepared.folder
    needs = shared_needs(prepared.cells)
    known = _read_statistics(folder)
    original = folder.read(ORIGINAL)
    if not todo and original is not None and known is not None and needs <= known.groups:
        return {}
    start = time.monotonic()
    print(f"measuring {', '.join(sorted(needs))} and low-rank fits, once for all cells ...", flush=True)
    model = from_pretrained(prepared.model, prepared.dtype, prepared.device)
    statistics = shared_statistics(model, prepared.calibration, needs, folder, prepared.intervention_batches)
    fits = shared_fits(model, prepared.calibration, statistics, todo, progress=True)
    print(f"measured {time.monotonic() - start:.0f} s for the statistics and the fits that all cells share", flush=True)
    threads = max(1, torch.get_num_threads() // prepared.workers) if prepared.workers > 1 else None
    job = Job(
        folder=prepared.model,
        dtype=prepared.dtype,
        device=str(prepared.device),
        held_out=prepared.held_out,
        calibration=prepared.calibration,
        sensitivity_batches=prepared.sensitivity_batches,
        statistics=statistics,
        fits=fits,
        sequence_length=prepared.data.block_size,
        teacher_bytes=prepared.teacher_bytes,
        threads=threads,
        policy=prepared.policy,
        origin={"data": prepared.data.describe(), "base_model": prepared.model},
    )
    del model
    bench = None
    if original is None or prepared.workers == 1:
        bench = Bench(job)
    if original is None:
        assert bench is not None
        folder.write(ORIGINAL, bench.original())
    if prepared.workers > 1:
        bench = None  # its memory is better spent in the processes
    return run_cells(job, todo, folder, total=len(prepared.cells), workers=prepared.workers, bench=bench)


def _read_statistics(folder: SweepFolder) -> Statistics | None:
    try:
        return Statistics.load(folder.statistics_path)
    except (FileNotFoundError, ValueError):
        return None


def _report(prepared: Prepared, baseline: Baseline, level: float, resamples: int) -> None:
    folder, cells = prepared.folder, prepared.cells
    results = results_of(folder, cells)
    before = dataclasses.replace(prepared.shape, weight_bytes=prepared.dtype.itemsize)
    shapes = {key: result.plan.check(before) for key, result in results.items()}
    rows = rows_of(cells, results, shapes, baseline, level=level, resamples=resamples)
    calibration = sum(batch["input_ids"].numel() for batch in prepared.calibration)
    facts = {
        "Model": f"`{prepared.model}`, {str(prepared.dtype).removeprefix('torch.')}",
        "Calibration": f"{calibration:,} tokens, one pass for all cells"
        + ("; some make passes of their own, see the notes" if any(own_passes(cell.methods) for cell in cells) else ""),
        "Software": f"moe-lightning {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    write_atomically(folder.path / "results.csv", csv_text(rows))
    write_atomically(folder.path / "results.md", markdown_text(rows, baseline, facts))
    statistics = Statistics.load(folder.statistics_path)
    figures = write_figures(rows, statistics, Path(folder.path) / "figures")
    best: dict[float, Any] = {}
    for row in rows[1:]:
        assert row.cell is not None
        ratio = row.cell.ratio
        if ratio is not None and (ratio not in best or row.perplexity.value < best[ratio].perplexity.value):
            best[ratio] = row
    print(f"uncompressed: perplexity {rows[0].perplexity}")
    for ratio, row in sorted(best.items()):
        print(f"best at {ratio:.0%}: {row.cell.name}: perplexity {row.perplexity}")
    print(f"wrote {folder.path}/results.csv, results.md and {len(figures)} figures")


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0; 1 where cells failed; 2 where the options do not fit.
    """
    return run_command("sweep", sweep_model, arguments, flags=("--dry_run",), lists=("--grids",))
