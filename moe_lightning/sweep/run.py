"""A sweep from its first pass to its last cell."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_lightning.criteria import collect
from moe_lightning.evaluation.comparison import Batch
from moe_lightning.reporting.statistics_figures import FIGURE_NEEDS
from moe_lightning.statistics import Statistics
from moe_lightning.statistics.low_rank import LowRankFit, collect_low_rank
from moe_lightning.sweep.bench import Bench, Job, low_rank_of, measure_here, start_process
from moe_lightning.sweep.grid import Cell
from moe_lightning.sweep.store import ORIGINAL, CellResult, SweepFolder


def shared_needs(cells: Iterable[Cell]) -> frozenset[str]:
    """Return the groups of statistics that the first methods of all cells read, and the figures.

    Args:
        cells: The cells.
    """
    return FIGURE_NEEDS.union(*(cell.methods[0].needs for cell in cells)) - {"sensitivity"}


def shared_statistics(
    model: PreTrainedModel,
    calibration: Sequence[Batch],
    needs: frozenset[str],
    folder: SweepFolder,
    intervention_batches: int | None = None,
    progress: bool = True,
) -> Statistics:
    """Measure once what all cells decide by, or read it where an earlier run of the sweep did.

    Args:
        model: The uncompressed model.
        calibration: Calibration batches.
        needs: Groups.
        folder: Of the sweep.
        intervention_batches: Batches for ``interventions`` and ``subsets``, which run the model, or its layers, many
            times over; None takes all.
        progress: Show progress bars.
    """
    path = folder.statistics_path
    if path.is_file():
        try:
            before = Statistics.load(path)
        except ValueError:
            before = None
        if before is not None and needs <= before.groups:
            return before
    # One pass for all that can share it; the rest of `needs` makes passes of its own inside.
    dear = needs & {"interventions", "subsets"}
    statistics = collect(model, calibration, needs - dear, progress=progress)
    if dear:
        few = collect(model, calibration[:intervention_batches], dear, progress=progress)
        statistics.tensors.update(few.tensors)
    folder.path.mkdir(parents=True, exist_ok=True)
    statistics.save(path)
    return statistics


def shared_fits(
    model: PreTrainedModel, calibration: Sequence[Batch], statistics: Statistics, cells: Sequence[Cell], progress: bool
) -> dict[int, dict[tuple[int, int], LowRankFit]]:
    """Fit low-rank maps for all experts once for each rank that a cell puts in the place of some.

    Args:
        model: The uncompressed model.
        calibration: Calibration batches.
        statistics: For the shape.
        cells: Cells that are not done yet.
        progress: Show progress bars.
    """
    fits = {}
    for rank in sorted({low_rank_of(cell) for cell in cells} - {0}):
        wants = {layout.layer: [(expert, rank) for expert in layout.real] for layout in statistics.shape.layouts}
        fits[rank] = collect_low_rank(model, calibration, wants, progress=progress)
    return fits


def run_cells(
    job: Job,
    cells: Sequence[Cell],
    folder: SweepFolder,
    *,
    total: int,
    workers: int = 1,
    progress: bool = True,
    bench: Bench | None = None,
) -> dict[str, str]:
    """Measure cells and write each as soon as it is done.

    Args:
        job: What to work with.
        cells: Cells that are not done yet.
        folder: Where they go.
        total: Number of all cells, for the progress bar.
        workers: Processes; 1 works in this one.
        progress: Show a progress bar with the time left; lines where there is no terminal.
        bench: One that is there already, for workers = 1.

    Returns:
        What went wrong, by the name of the cell. The others are done.

    Raises:
        RuntimeError: A process died.
    """
    failures: dict[str, str] = {}
    terminal = sys.stderr.isatty()
    start, done = time.monotonic(), 0
    outcomes = _in_this_process(bench or Bench(job), cells) if workers == 1 else _in_processes(job, cells, workers)
    with tqdm(
        total=total, initial=total - len(cells), desc="cells", unit="cell", disable=not (progress and terminal)
    ) as bar:
        for cell, outcome in outcomes:
            done += 1
            if isinstance(outcome, CellResult):
                folder.write(cell.key, outcome)
                note = f", {outcome.measured}" if str(outcome.measured) else ""
                told = f"perplexity {outcome.scores.likelihood.perplexity:.3f}{note}"
            else:
                failures[cell.name] = str(outcome)
                told = f"failed: {outcome}"
            bar.update()
            bar.set_postfix_str(f"{cell.name}: {told}", refresh=False)
            if progress and not terminal:
                left = (time.monotonic() - start) / done * (len(cells) - done)
                place = total - len(cells) + done
                print(f"[{place}/{total}] {cell.name}: {told} ({_clock(left)} left)", flush=True)
    return failures


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def _in_this_process(bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[Cell, CellResult | Exception]]:
    for cell in cells:
        yield cell, _outcome(lambda cell=cell: bench.measure(cell))  # type: ignore[misc]


def _outcome(work: Callable[[], CellResult]) -> CellResult | Exception:
    try:
        return work()
    except BrokenProcessPool:
        raise
    except (ValueError, RuntimeError) as error:
        return error


def _in_processes(job: Job, cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, CellResult | Exception]]:
    # Spawned and not forked: a forked copy of a process that has used several threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(cells)), mp_context=context, initializer=_start, initargs=(pickle.dumps(job),)
    ) as pool:
        futures = {pool.submit(measure_here, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], _outcome(future.result)
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {workers} processes died, perhaps for want of memory: the finished cells are kept; run it "
                "again with --workers 1, or with less --teacher_cache_mib"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(job: bytes) -> None:
    # An interrupt reaches the whole group: the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_process(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.raise_signal(signal.SIGTERM)


def results_of(folder: SweepFolder, cells: Sequence[Cell]) -> dict[str, CellResult]:
    """Return what is done, by the cells' keys; the uncompressed model is among them where it was measured.

    Args:
        folder: Of the sweep.
        cells: The cells to look for.
    """
    found = {key: folder.read(key) for key in (ORIGINAL, *(cell.key for cell in cells))}
    return {key: result for key, result in found.items() if result is not None}
