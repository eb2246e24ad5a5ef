"""One process's share of the work: a loaded model on which cells are tried one after the other."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_lightning.checkpoints import from_pretrained
from moe_lightning.compression import compress
from moe_lightning.evaluation.comparison import Batch, ReferencePredictions
from moe_lightning.plan import CompressionPlan
from moe_lightning.sizes import measure
from moe_lightning.slimming.policy import SlimmingPolicy
from moe_lightning.statistics import Statistics
from moe_lightning.surgery import plan_of
from moe_lightning.sweep.grid import Cell
from moe_lightning.sweep.notes import measured
from moe_lightning.sweep.store import CellResult
from moe_lightning.trimming import Novices


@dataclass(frozen=True)
class Job:
    """What a process needs to try cells.

    Attributes:
        folder: Of the uncompressed model.
        dtype: Of its weights.
        device: Where it goes.
        held_out: Batches that every cell is measured on.
        calibration: Batches for what the shared statistics cannot hold: later methods, weights of layers.
        sensitivity_batches: How many of them measure the weights of layers under scope=sensitivity.
        statistics: Of the uncompressed model, shared by all cells.
        fits: Low-rank maps of all experts, by rank; shared by all cells.
        sequence_length: For FLOPs, tokens.
        teacher_bytes: The uncompressed model's logits to keep at most.
        threads: Threads of torch; None leaves them.
        policy: What holds for methods that measure the inputs of matrices.
        origin: Where the calibration data comes from, for the plans.
    """

    folder: str
    dtype: torch.dtype
    device: str
    held_out: Sequence[Batch]
    calibration: Sequence[Batch]
    sensitivity_batches: int | None
    statistics: Statistics
    fits: Mapping[int, Mapping[tuple[int, int], Any]]
    sequence_length: int
    teacher_bytes: int
    threads: int | None
    policy: SlimmingPolicy = field(default_factory=SlimmingPolicy)
    origin: Mapping[str, Any] = field(default_factory=dict)


def low_rank_of(cell: Cell) -> int:
    """Return the rank of the maps that a cell's first method puts in the place of experts; 0 for none.

    Only the first method's can be shared: later ones see another model.
    """
    method = cell.methods[0]
    return int(method.rank or 0) if isinstance(method, Novices) and method.novice == "low_rank" else 0


class Bench:
    """A model, its teacher and the shared statistics.

    Args:
        job: What to work with.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.model = self._load()
        self.teacher = ReferencePredictions(self.model, job.held_out, job.teacher_bytes, self._load)

    def _load(self) -> PreTrainedModel:
        return from_pretrained(self.job.folder, self.job.dtype, self.job.device)

    def original(self) -> CellResult:
        """Measure the uncompressed model."""
        start = time.perf_counter()
        scores = self.teacher.score(self.model)
        size = measure(self.model, self.job.sequence_length)
        return CellResult({"methods": []}, CompressionPlan(), size, scores, {}, time.perf_counter() - start)

    def measure(self, cell: Cell) -> CellResult:
        """Compress the model as a cell says, measure it, and put everything back.

        Args:
            cell: The cell.

        Returns:
            What came out.

        Raises:
            ValueError: The budget cannot be met with what was measured.
        """
        start = time.perf_counter()
        job = self.job
        shared = Statistics(job.statistics.shape, dict(job.statistics.tensors), dict(job.statistics.info))
        shared.fits = dict(job.fits.get(low_rank_of(cell), {}))
        batches = job.calibration
        if len(cell.methods) == 1 and cell.methods[0].measures_sensitivity:
            batches = batches[: job.sensitivity_batches]
        with warnings.catch_warnings():
            # Experts that few tokens reached: of the shared pass said once, of the cell's own passes in its result.
            warnings.simplefilter("ignore", UserWarning)
            result = compress(
                self.model,
                batches,
                list(cell.methods),
                statistics=shared,
                origin=job.origin,
                reversible=True,
                progress=False,
                **{item.name: getattr(job.policy, item.name) for item in fields(job.policy)},
            )
        try:
            scores = self.teacher.score(self.model)
            size = measure(self.model, job.sequence_length)
            plan = plan_of(self.model)
        finally:
            result.undo()
        statuses = {name: module.status for name, module in result.modules.items()}
        counted = measured(cell.methods, result.modules, job.policy.min_tokens)
        return CellResult(cell.settings, plan, size, scores, statuses, time.perf_counter() - start, counted)


_bench: Bench | None = None


def start_process(job: bytes) -> None:
    """Prepare a process of its own for :func:`measure_here`.

    Args:
        job: A pickled :class:`Job`. As bytes: tensors that are handed over as such need shared memory.
    """
    global _bench
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _bench = Bench(pickle.loads(job))


def measure_here(cell: Cell) -> CellResult:
    """Measure a cell on this process's bench."""
    assert _bench is not None
    return _bench.measure(cell)
