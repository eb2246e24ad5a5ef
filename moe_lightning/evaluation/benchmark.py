"""Models timed against each other: prefill and decoding at several batch sizes and contexts, with memory and floors.

For each batch size and context every model is first compared with a slow computation of what its weights say, on the
tokens that are timed afterwards; a model that computes something else is a row that says so, and no time. Then the
models take turns in every repeat, so that what else the machine does, and how warm it is, hits all of them.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.benchmark_check import PHASES, CheckedModel, Mismatch, Phase, checked
from moe_lightning.evaluation.benchmark_floors import (
    Ceilings,
    copy_speed,
    floor_seconds,
    pass_flops,
    product_speed,
    routed_shares,
    tensor_bytes,
)
from moe_lightning.evaluation.benchmark_machine import device_in_words, machine, versions
from moe_lightning.evaluation.benchmark_rows import Settings, TimedRow, spread
from moe_lightning.evaluation.speed import Prefill, Work, rate_of, seconds_of
from moe_lightning.experts import implementation as kernels_implementation
from moe_lightning.experts.kernel_path import current_use
from moe_lightning.sizes import measure
from moe_lightning.surgery import plan_of

OURS = "moe_lightning"
THEIRS = ("eager", "grouped_mm", "batched_mm")
IMPLEMENTATIONS = (OURS, *THEIRS)
"""Ours, and transformers': only models that nothing was done to have those."""

BATCHED_TOKENS = {"cuda": 16, "cpu": 4}
"""Tokens of a pass up to which batched_mm is timed: it copies the weights of every token's experts."""

OUT_OF_MEMORY = "out of memory"
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Entrant:
    """A model with an implementation of its experts.

    Attributes:
        label: Name of the model in tables.
        model: The model; several entrants may share it.
        implementation: One of ``IMPLEMENTATIONS``.
    """

    label: str
    model: Any
    implementation: str

    def activate(self) -> None:
        """Let the model compute its experts so.

        A compressed model goes its own ways; its untouched layers, if there are any, keep what they have.
        """
        if not plan_of(self.model):
            ours = self.implementation == OURS
            self.model.set_experts_implementation(kernels_implementation.NAME if ours else self.implementation)


def entrants_of(label: str, model: Any, implementations: Sequence[str] = IMPLEMENTATIONS) -> list[Entrant]:
    """Return a model with all implementations that it has among those wanted; a compressed one has only ours.

    Args:
        label: Name of the model in tables.
        model: The model.
        implementations: Of ``IMPLEMENTATIONS``.
    """
    return [Entrant(label, model, name) for name in ([OURS] if plan_of(model) else implementations)]


@dataclass
class _Turn:
    """An entrant in one cell of the table, as long as nothing goes wrong with it."""

    entrant: Entrant
    ceilings: Ceilings
    weight_bytes: int
    checked: CheckedModel | None = None
    refused: str | None = None
    failed: bool = False
    seconds: list[float] = field(default_factory=list)
    flops: float | None = None
    floor: float | None = None
    peak: int | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something of this entrant; what goes wrong is its own."""
        try:
            action()
        except Mismatch as error:
            self.refuse(f"it does not compute what its weights say: {error}")
        except (RuntimeError, MemoryError, ValueError, NotImplementedError) as error:
            self.refuse(_told(error))
        if self.refused and self.failed:
            # Not while the error is there: what it went through holds the memory.
            self.free()

    def refuse(self, reason: str, failed: bool = True) -> None:
        """Note why this entrant is not timed any more in this cell."""
        self.refused, self.failed = reason, failed

    def free(self) -> None:
        """Let go of what the runs keep."""
        for work in self.checked.works.values() if self.checked else ():
            work.forget()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def run_benchmark(
    entrants: Sequence[Entrant],
    ids: Tensor,
    settings: Settings,
    ceilings: dict[str, Ceilings] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    rows: list[TimedRow] | None = None,
) -> list[TimedRow]:
    """Compare and time models.

    Args:
        entrants: Models with their implementations, all on one device.
        ids: Token ids [batch, tokens]: at least the largest batch and ``settings.length`` tokens. A cell takes the
            first of both.
        settings: What is timed.
        ceilings: What the machine allows, by label; measured where None.
        progress: Called with what comes next, :func:`num_steps` times.
        rows: Where rows go as soon as they are there: after Ctrl-C it holds what was done. A new list where None.

    Returns:
        The rows: one for each entrant, phase, batch size and context.

    Raises:
        ValueError: Too few tokens, or a model of another family.
    """
    if ids.shape[0] < max(settings.batch_sizes) or ids.shape[1] < settings.length:
        raise ValueError(
            f"{list(ids.shape)} token ids are too few for {max(settings.batch_sizes)} sequences of {settings.length}"
        )
    ceilings = ceilings_of(entrants) if ceilings is None else ceilings
    rows = [] if rows is None else rows
    for context in settings.contexts:
        for batch in settings.batch_sizes:
            tokens = ids[:batch, : context + settings.new_tokens]
            turns = []
            for entrant in entrants:
                progress(f"comparing {entrant.label}, {entrant.implementation}, {batch} x {context}")
                turn = _Turn(entrant, ceilings[entrant.label], _weight_bytes(entrant.model))
                turn.attempt(lambda turn=turn, tokens=tokens: _check(turn, tokens, settings))  # type: ignore[misc]
                turns.append(turn)
            for phase in settings.phases:
                progress(f"timing {phase}, {batch} x {context}")
                rows += _timed(turns, phase, batch, context, settings)
            for turn in turns:
                turn.free()
    return rows


def num_steps(entrants: Sequence[Entrant], settings: Settings) -> int:
    """Say how often :func:`run_benchmark` calls ``progress``.

    Args:
        entrants: Its entrants.
        settings: Its settings.
    """
    return len(settings.contexts) * len(settings.batch_sizes) * (len(entrants) + len(settings.phases))


def ceilings_of(entrants: Sequence[Entrant]) -> dict[str, Ceilings]:
    """Measure what the machine allows, for each model.

    Args:
        entrants: The models.
    """
    found: dict[str, Ceilings] = {}
    products: dict[tuple[torch.device, torch.dtype], float] = {}
    for entrant in entrants:
        if entrant.label not in found:
            weight = next(entrant.model.parameters())
            place = (weight.device, weight.dtype)
            if place not in products:
                products[place] = product_speed(*place)
            found[entrant.label] = Ceilings(products[place], copy_speed(weight.device, tensor_bytes(entrant.model)))
    return found


def _check(turn: _Turn, ids: Tensor, settings: Settings) -> None:
    """Compare an entrant on the tokens of a cell."""
    turn.entrant.activate()
    phases, prompt_tokens = PHASES, None
    if turn.entrant.implementation == "batched_mm":
        prompt_tokens = BATCHED_TOKENS[next(turn.entrant.model.parameters()).device.type]
        batch, context = ids.shape[0], ids.shape[1] - settings.new_tokens
        if batch > prompt_tokens:
            turn.refuse(_too_many(prompt_tokens), failed=False)
            return
        if batch * context > prompt_tokens:
            phases = ("decode",)
    turn.checked = checked(turn.entrant.model, ids, settings.new_tokens, settings.tolerance, phases, prompt_tokens)


def _too_many(limit: int) -> str:
    return f"batched_mm copies the weights of each token's experts: timed up to {limit} tokens a pass"


def _timed(turns: Sequence[_Turn], phase: Phase, batch: int, context: int, settings: Settings) -> list[TimedRow]:
    """Time a phase of a cell, entrants in turn, and return the rows."""
    timed: list[tuple[_Turn, CheckedModel]] = []
    for turn in turns:
        turn.seconds, turn.flops, turn.floor, turn.peak = [], None, None, None
        if turn.checked is not None and not turn.refused and phase in turn.checked.works:
            turn.attempt(lambda turn=turn: _prepare(turn, phase))  # type: ignore[misc]
            timed.append((turn, turn.checked))
    for repeat in range(settings.warmup + settings.repeats):
        for turn, model in timed:
            if not turn.refused:
                turn.attempt(lambda turn=turn, model=model: turn.seconds.append(_seconds(model, phase)))  # type: ignore[misc]
        if repeat == settings.warmup - 1:
            for turn, _ in timed:
                turn.seconds.clear()
    rows = [_row(turn, phase, batch, context) for turn in turns]
    for turn, model in timed:
        model.works[phase].forget()
        if turn.refused:
            # What ran out of memory in one phase may have enough in the other.
            turn.refused, turn.failed = None, False
    return rows


def _seconds(model: CheckedModel, phase: Phase) -> float:
    """Time one run of a model that was compared."""
    if not isinstance(model, CheckedModel):
        raise TypeError(f"{type(model).__name__} was not compared: only what checked(...) returns is timed")
    model.activate()
    with evaluation_mode(model.model):
        return seconds_of(model.works[phase])


def _prepare(turn: _Turn, phase: Phase) -> None:
    """Count what a pass must do, and measure its memory on a GPU."""
    model = turn.checked
    assert model is not None
    work = model.works[phase]
    model.activate()
    shares = routed_shares(model.model, work)
    turn.flops = pass_flops(model.model, phase, work, shares)
    turn.floor = floor_seconds(model.model, phase, work, shares, turn.ceilings)
    work.forget()
    if work.device.type == "cuda":
        turn.peak = _peak_bytes(model.model, work)


def _peak_bytes(model: Any, work: Work) -> int:
    """Measure the memory of a run: the model's weights, what is kept (the cache), and what exists for a moment.

    What other models hold meanwhile is taken off. The prompt goes in before the measurement begins.
    """
    with torch.cuda.device(work.device), evaluation_mode(model):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        work.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    work.forget()
    return peak + tensor_bytes(model)


def _row(turn: _Turn, phase: Phase, batch: int, context: int) -> TimedRow:
    entrant = turn.entrant
    names = (entrant.label, entrant.implementation, phase, batch, context, turn.weight_bytes)
    comparison = turn.checked.comparisons.get(phase) if turn.checked else None
    error = None if comparison is None else comparison.relative_error
    agreement = None if comparison is None else comparison.agreement
    refused, failed = turn.refused, turn.failed
    if turn.checked is not None and phase not in turn.checked.works:
        refused, failed = _too_many(BATCHED_TOKENS[next(entrant.model.parameters()).device.type]), False
    if refused or turn.checked is None:
        return TimedRow(*names, relative_error=error, agreement=agreement, refused=refused, failed=failed)
    work = turn.checked.works[phase]
    rate = rate_of(work, turn.seconds)
    passes = [1e3 * seconds / work.steps for seconds in turn.seconds]
    return TimedRow(
        *names,
        tokens_per_second={"median": rate.median, "low": rate.low, "high": rate.high},
        milliseconds=spread(passes, statistics.median(passes)),
        flops=turn.flops,
        floor_milliseconds=None if turn.floor is None else 1e3 * turn.floor,
        peak_bytes=turn.peak,
        relative_error=error,
        agreement=agreement,
    )


def _told(error: BaseException) -> str:
    """Say in a line what went wrong."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text}"


def described_model(
    model: Any, folder: str, settings: Settings, ceilings: Ceilings, ids: Tensor | None = None
) -> dict[str, Any]:
    """Return what a record says of a model.

    Args:
        model: The model.
        folder: Where it comes from.
        settings: Of the benchmark.
        ceilings: What the machine allows for it.
        ids: Token ids [batch, tokens] of the benchmark; the first sequence of the longest context goes through the
            model once, not timed, to count which experts its tokens pick. Nothing is counted where None.

    Returns:
        Folder, parameters, bytes in memory and of the weights on disk (None where there is no folder), FLOPs of one
        sequence of the longest context, type of the weights, ceilings. Of the FLOPs there are two: ``flops`` is the
        upper bound where every token picks real experts, ``routed_flops`` counts the picks of these tokens (None where
        that failed, or without tokens).
    """
    length = max(settings.contexts)
    size = measure(model, length)
    return {
        "folder": folder,
        "parameters": size.parameters,
        "bytes": _weight_bytes(model),
        "bytes_on_disk": None,
        "flops": size.flops,
        "routed_flops": None if ids is None else _routed_flops(model, ids[:1, :length]),
        "sequence_length": length,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "flops_per_second": ceilings.flops_per_second,
        "bytes_per_second": ceilings.bytes_per_second,
    }


def _weight_bytes(model: Any) -> int:
    """Count the bytes of the weights in the form that a checkpoint holds, whatever form they work in just now."""
    return architecture_of(model).shape(model).bytes


def _routed_flops(model: Any, ids: Tensor) -> int | None:
    """Count the FLOPs of a pass by where its tokens are routed, None where the model cannot run it."""
    work = Prefill(model, ids)
    try:
        shares = routed_shares(model, work)
    except (RuntimeError, MemoryError, ValueError, NotImplementedError):
        return None  # the row of the same cell says why
    return measure(model, ids.shape[1], [1 - share for share in shares.real]).flops


def described_run(device: torch.device, dtypes: Sequence[str], tokens: str, settings: Settings) -> dict[str, Any]:
    """Return what a record says of where and how its figures were measured; before anything is timed.

    Args:
        device: Where the models are.
        dtypes: Types of their weights.
        tokens: Where the text is from.
        settings: Of the benchmark.
    """
    return {
        "device": device_in_words(device),
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(dict.fromkeys(dtypes)),
        "versions": versions(),
        "machine": machine(),
        "repeats": settings.repeats,
        "warmup": settings.warmup,
        "new_tokens": settings.new_tokens,
        "tokens": tokens,
        "kernels": current_use(),
    }
