"""``moe-lightning fit --dry_run``: the course of a run, on tensors without memory, and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks import Compress, Export, RecoveredShare, RecoveryStage
from moe_lightning.callbacks.at_step import AtStep, language_model
from moe_lightning.callbacks.course import course_of, in_words
from moe_lightning.callbacks.gradual import Act
from moe_lightning.callbacks.recovery.stage import stages_of
from moe_lightning.cli.dry_options import Asked
from moe_lightning.cli.prepared import blocks_by_options
from moe_lightning.compression import calibration_bytes, made_bytes, trial_edits
from moe_lightning.compression.layerwise import need_batches
from moe_lightning.data import TextDataModule
from moe_lightning.modules import MixtralModule
from moe_lightning.plan import ModelShape
from moe_lightning.recovery.logit_cache import CacheHeader
from moe_lightning.sizes import data_size, measure
from moe_lightning.surgery import apply_plan, open_stacks, plan_of

GIB = 2**30
TOP_WORDS = 64
"""Words that ``cache-logits`` keeps unless it is told otherwise."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a change of structure, a stretch of training.

    Attributes:
        step: Optimizer step before which it happens; infinity for the end of the run.
        what: In words.
        parameters: Of the model when it is done.
        memory: Bytes of weights, gradients, moments and what is made or measured; activations not counted.
        trained: Parameters that train; None where nothing does.
        steps: Optimizer steps; None where that depends on the text, or where nothing trains.
        rate: Learning rate in words.
    """

    step: float
    what: str
    parameters: int
    memory: int
    trained: int | None = None
    steps: int | None = None
    rate: str = ""


def print_dry_run(trainer: Trainer, module: MixtralModule, data: TextDataModule, asked: Asked) -> None:
    """Try the course of a run out, and print what happens when and what it takes.

    Args:
        trainer: A trainer that computes nothing, with the callbacks of the run.
        module: The module, whose model is not made yet.
        data: Its text.
        asked: What the options say about the real trainer, and whether there are weights and text.

    Raises:
        ValueError: What a run would find before its first step: what does not fit.
        FileNotFoundError: The text is not there, and is needed.
    """
    asked.check_strategy(trainer)
    if not asked.only_sizes:
        data.prepare()
    total = _total_steps(asked, data)
    # The length of the run, without its text: callbacks ask the trainer for it.
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = -1 if total is None else total
    data.trainer, module.trainer = trainer, trainer
    if asked.only_sizes:
        _make(module, asked.dtype)  # with no tokenizer to compare it with
        trainer.datamodule = data  # type: ignore[attr-defined]
    else:
        trainer.datamodule = data  # type: ignore[attr-defined]
        _make(module, asked.dtype)
    _check(trainer, module, data, asked)
    model = language_model(module)
    before = measure(model, data.block_size)
    tokens = data.batch_size * data.block_size * asked.processes * trainer.accumulate_grad_batches
    rows = list(_rows(trainer, module, data, asked, total))
    kind = str(asked.dtype).removeprefix("torch.")
    print(f"model    {asked.model}: {before.parameters:,} parameters, {data_size(before.bytes)} in {kind}")
    length = f"{asked.epochs} epochs" if total is None else f"{total:,} steps"
    print(f"run      {length} on {asked.where}, {tokens:,} tokens a step: {asked.step_in_words(data, trainer)}")
    _print_table(rows, tokens)
    for line in _teachers(trainer, model, data, before.bytes, tokens):
        print(line)
    print("         memory is that of weights, gradients, the optimizer's moments, and what is made and measured; the")
    print("         activations of a batch, and a teacher that is a model, come on top")
    if asked.only_sizes:
        print(f"note     {asked.model} holds no weights: only sizes were looked at, neither weights, text nor teacher")
    print("dry run: nothing was trained, nothing was written")


def _total_steps(asked: Asked, data: TextDataModule) -> int | None:
    """Return the optimizer steps of the run; None where they depend on a text that is not looked at."""
    steps = math.inf if asked.max_steps < 1 else asked.max_steps
    if asked.epochs is not None and asked.only_sizes:
        return None if math.isinf(steps) else int(steps)
    if asked.epochs is not None:
        batches = len(data.train_dataloader()) // asked.processes
        steps = min(steps, asked.epochs * math.ceil(batches / asked.accumulate))
    return None if math.isinf(steps) else int(steps)


def _make(module: MixtralModule, dtype: torch.dtype) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            module.configure_model()
            open_stacks(module.model)  # as a folder is loaded
    finally:
        torch.set_default_dtype(default)


# ------------------------------------------------------------ what a run would find


@contextmanager
def _without_teacher(stage: RecoveryStage) -> Iterator[None]:
    source, stage.source = stage.source, None
    try:
        yield
    finally:
        stage.source = source


def _check(trainer: Trainer, module: MixtralModule, data: TextDataModule, asked: Asked) -> None:
    """Let callbacks look for what cannot work, as they do before the first step of a run."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Compress) and asked.only_sizes:
            if need_batches(callback.methods):
                blocks_by_options(data, "calibration", callback.calibration_batches)
        elif isinstance(callback, RecoveryStage) and asked.only_sizes:
            with _without_teacher(callback):
                callback.on_fit_start(trainer, module)
        elif isinstance(callback, AtStep):
            callback.on_fit_start(trainer, module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RecoveryStage):
            # Of its children's, one looks at the optimizer, which is the module's own here.
            RecoveryStage.on_train_start(callback, trainer, module)
        elif isinstance(callback, Compress | Export) or (isinstance(callback, RecoveredShare) and not asked.only_sizes):
            callback.on_train_start(trainer, module)


# ------------------------------------------------------------ the table


def _rows(
    trainer: Trainer, module: MixtralModule, data: TextDataModule, asked: Asked, total: int | None
) -> Iterator[Row]:
    """Go through the run, changing the structure as it would."""
    end = math.inf if total is None else float(total)
    model, places = language_model(module), trainer.callbacks  # type: ignore[attr-defined]
    events: list[tuple[float, float, int, Any]] = [(*when, 0, (owner, act)) for when, owner, act in course_of(trainer)]
    events += [(float(stage.first_step), places.index(stage), 1, stage) for stage in stages_of(trainer)]
    # Where no stage is at work, behind all that happens at its first step.
    events += [(float(step), math.inf, 1, last) for step, last in _gaps(trainer, end)]
    for step, _, _, event in sorted(events, key=lambda item: item[:3]):
        if isinstance(event, RecoveryStage):
            yield _stage_row(trainer, module, event, end)
        elif isinstance(event, tuple):
            row = _change_row(model, data, asked, step, *event)
            if row is not None:
                yield row
        else:
            trained = sum(parameter.numel() for parameter in model.parameters())
            memory = _training_bytes(model, trained, asked.dtype)
            steps = None if math.isinf(event) else int(event - step)
            rate = f"{module.learning_rate:g}, the model's"
            yield Row(step, "no stage: everything trains", _parameters(model), memory, trained, steps, rate)


def _gaps(trainer: Trainer, end: float) -> list[tuple[float, float]]:
    """Return first step and end of each stretch in which no stage is at work."""
    stretches, step = [], 0.0
    for stage in sorted(stages_of(trainer), key=lambda stage: stage.first_step):
        stretches.append((step, float(stage.first_step)))
        step = min(stage.planned_end(trainer), end)
    return [(first, last) for first, last in [*stretches, (step, end)] if first < last]


def _parameters(model: Any) -> int:
    return architecture_of(model).shape(model).parameters


def _training_bytes(model: Any, trained: int, dtype: torch.dtype) -> int:
    """Return the bytes of all weights, and for those that train of a gradient and AdamW's two moments."""
    return measure(model).bytes + 3 * trained * dtype.itemsize


def _stage_row(trainer: Trainer, module: MixtralModule, stage: RecoveryStage, end: float) -> Row:
    model = language_model(module)
    found = stage.selection.parameters(model)
    trained = sum(parameter.numel() for parameter in found.values())
    claimed = stage.selection.claimed(architecture_of(model).shape(model))
    name = type(stage).__name__
    if trained != claimed:
        raise RuntimeError(f"{name}: {trained:,} parameters train, but the model's shape claims {claimed:,}")
    last = min(stage.planned_end(trainer), end)
    steps = None if math.isinf(last) else int(last - stage.first_step)
    rate = f"{module.learning_rate:g}, the model's" if stage.learning_rate is None else f"{stage.learning_rate:g}"
    warmup = module.warmup_steps if stage.learning_rate is None else stage.warmup_steps
    rate += f", warm-up {warmup}" if warmup else ""
    memory = _training_bytes(model, trained, model.dtype)
    what = f"{name}: the {stage.selection.words}"
    return Row(stage.first_step, what, _parameters(model), memory, trained, steps, rate)


def _change_row(model: Any, data: TextDataModule, asked: Asked, step: float, owner: str, act: Act) -> Row | None:
    shape: ModelShape = architecture_of(model).shape(model)
    try:
        edits, after = trial_edits(shape, act.methods)
    except ValueError as error:
        raise ValueError(f"{owner} {in_words(step)}: {error}") from None
    if not edits:
        return None  # rounded to whole experts, nothing more goes
    memory = measure(model).bytes + made_bytes(shape, act.methods)
    if owner == "Compress" and need_batches(act.methods):
        batch = data.eval_batch_size * data.block_size
        count = data.options.num_blocks("calibration") if asked.only_sizes else len(data.blocks("calibration"))
        memory += calibration_bytes(shape, act.methods, batch, count * data.block_size)
    apply_plan(model, plan_of(model).extended(edits))
    open_stacks(model)
    words = ", ".join(map(str, act.methods))
    return Row(step, f"{owner}: {words}", after.parameters, max(memory, measure(model).bytes))


def _print_table(rows: list[Row], tokens_a_step: int) -> None:
    unit, name = (GIB, "GiB") if max(row.memory for row in rows) > GIB else (2**20, "MiB")
    print(f"{'step':>7}  {'parameters':>15}  {'that train':>14}  {'steps':>6}  {'tokens':>14}  {name:>7}  what")
    for row in rows:
        step = "end" if math.isinf(row.step) else f"{row.step:,.0f}"
        trained = "" if row.trained is None else f"{row.trained:,}"
        steps = "" if row.trained is None else "?" if row.steps is None else f"{row.steps:,}"
        tokens = "" if row.trained is None else "?" if row.steps is None else f"{row.steps * tokens_a_step:,}"
        what = f"{row.what}, learning rate {row.rate}" if row.rate else row.what
        memory = f"{row.memory / unit:7,.1f}"
        print(f"{step:>7}  {row.parameters:15,}  {trained:>14}  {steps:>6}  {tokens:>14}  {memory}  {what}")


def _teachers(trainer: Trainer, model: Any, data: TextDataModule, model_bytes: int, tokens: int) -> Iterator[str]:
    """Say, for each teacher that is named, what it takes."""
    stages = [stage for stage in stages_of(trainer) if stage.source is not None]
    for name in dict.fromkeys(stage.source.name for stage in stages if stage.source is not None):
        theirs = [stage for stage in stages if stage.source is not None and stage.source.name == name]
        source = theirs[0].source
        assert source is not None
        if source.kind == "before":
            yield f"teacher  {name}: {data_size(model_bytes)}, kept on disk; memory-mapped on a CPU, held on a GPU"
        elif Path(name).exists():
            yield f"teacher  {name}: {'cached predictions' if source.kind == 'cache' else 'a folder'}"
        else:
            first, last = min(stage.first_step for stage in theirs), max(map(_end_of(trainer), theirs))
            needed = ""
            if not math.isinf(last):
                blocks = int(last - first) * tokens // data.block_size
                header = CacheHeader(architecture_of(model).shape(model).vocab_size, data.block_size, TOP_WORDS, 1.0)
                size = data_size(blocks * header.bytes_per_block)
                needed = f"; {TOP_WORDS} words for each token of {blocks:,} blocks take {size} on disk"
            yield f"teacher  {name}: not there yet{needed} (moe-lightning cache-logits)"


def _end_of(trainer: Trainer) -> Callable[[RecoveryStage], float]:
    total = trainer.max_steps if trainer.max_steps > 0 else math.inf
    return lambda stage: min(stage.planned_end(trainer), total)
