"""Where a stage's teacher comes from: the model as it was before, a folder, or predictions that were written down."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoConfig, PreTrainedModel

from moe_lightning.architectures import architecture_named, architecture_of
from moe_lightning.callbacks.at_step import language_model, say
from moe_lightning.callbacks.compress import compressions_of, has_compressed
from moe_lightning.callbacks.recovery.blocks_to_come import blocks_to_come, command_for
from moe_lightning.callbacks.recovery.teacher_folders import held_bytes, is_floating, keep_model, opening
from moe_lightning.checkpoints import from_pretrained, read_config
from moe_lightning.recovery.logit_cache import LogitCache, is_cache
from moe_lightning.recovery.objective import Objective, Teacher
from moe_lightning.recovery.teachers import CachedTeacher, ModelTeacher
from moe_lightning.statistics.fingerprint import fingerprint, same_weights

BEFORE = "before"
"""Name of the teacher that is the model as it was before the first compression of the run."""

FOLDER = "teacher"
"""Where in its directory a run keeps that model."""

Kind = Literal["before", "model", "cache"]


class _Unopened:
    """Stands for a teacher while options are checked."""

    def __init__(self, gives_hidden: bool) -> None:
        self.gives_hidden = gives_hidden

    def targets(self, *_: Any) -> Any:
        raise AssertionError("no teacher is open")


class TeacherSource:
    """Finds, checks, opens and keeps a stage's teacher.

    The teacher's weights are in no state dict of the student. Stages that name the same teacher share it; it is freed
    when the last of them puts another objective into the module. On the CPU, weights that need no conversion are
    memory-mapped: measured with 458 MiB of weights, opening a folder with fused tensors took 55 MiB of memory that is
    not the file's, and one with a tensor for each expert 608 MiB. Where the student computes in bf16 by autocast,
    floating-point weights are held in bf16, to which each pass would cast them; not ``before`` on the CPU, which stays
    mapped.

    Args:
        name: ``before`` for the model as it was before the first compression of the run (kept in ``RUN/teacher``), a
            Hugging Face folder, or a folder of cached predictions.

    Raises:
        ValueError: No name.
    """

    def __init__(self, name: str) -> None:
        if not name.strip():
            raise ValueError("teacher must be 'before' or a folder, got nothing: leave it out for the text alone")
        self.name = name
        self._fingerprint: list[float] | None = None
        self._held: ModelTeacher | None = None
        self._temperature, self._wants_hidden = 1.0, False

    @property
    def kind(self) -> Kind:
        """What the name means."""
        if self.name == BEFORE:
            return "before"
        return "cache" if is_cache(self.name) else "model"

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return by what the teacher is recognised after a resume."""
        return {"name": self.name, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that over, unless another teacher is named now."""
        if state_dict.get("name") == self.name:
            self._fingerprint = state_dict.get("fingerprint")

    # ------------------------------------------------------------ before the run

    def check_options(
        self,
        alpha: float,
        temperature: float,
        hidden_weight: float,
        load_balancing_coefficient: float | None,
    ) -> None:
        """Check the options of an objective without opening the teacher.

        Args:
            alpha: As in :class:`Objective`.
            temperature: Likewise.
            hidden_weight: Likewise.
            load_balancing_coefficient: Likewise.

        Raises:
            ValueError: They do not fit each other or this kind of teacher.
        """
        stand_in = _Unopened(gives_hidden=self.kind != "cache")
        Objective(stand_in, alpha, temperature, hidden_weight, load_balancing_coefficient)
        if alpha == 0 and hidden_weight == 0:
            raise ValueError(
                f"teacher={self.name} would run and teach nothing: set alpha or hidden_weight, or leave the teacher out"
            )
        self._temperature, self._wants_hidden = temperature, hidden_weight > 0

    def check(self, trainer: Trainer, module: LightningModule, stage: Any) -> None:
        """Make sure, before the run, that the teacher will be there and fits; say what it takes.

        Args:
            trainer: The trainer.
            module: Its module.
            stage: The stage, which has ``first_step`` and ``planned_end``.

        Raises:
            ValueError: It will not, or does not.
        """
        student = language_model(module)
        who = type(stage).__name__
        try:
            if self.kind == "before":
                words = self._check_before(trainer, student, stage)
            elif self.kind == "cache":
                words = self._check_cache(trainer, student, stage)
            else:
                words = self._check_folder(trainer, student)
        except (OSError, ValueError) as error:
            raise ValueError(f"{who}: teacher={self.name}: {error}") from None
        say(trainer, f"{who}: teacher {self.name}: {words}")

    def _check_folder(self, trainer: Trainer, student: PreTrainedModel) -> str:
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.name) and not Path(self.name).exists():
            raise ValueError(
                "there is no such folder, and names of the Hugging Face hub are not taken: download it first ('hf "
                f"download {self.name} --local-dir FOLDER') and name the folder"
            )
        raw = read_config(self.name)
        takes = opening(Path(self.name), self._dtype(trainer, student), trainer.strategy.root_device)
        config = AutoConfig.from_pretrained(self.name)
        theirs = architecture_named(raw["model_type"]).shape_of_config(config)
        mine = architecture_of(student).shape(student)
        _check_vocabulary(theirs.vocab_size, mine.vocab_size)
        sizes = [(shape.hidden_size, shape.num_layers) for shape in (theirs, mine)]
        if self._wants_hidden and sizes[0] != sizes[1]:
            raise ValueError(
                f"its hidden states cannot be compared: hidden size and layers of the original are {sizes[0]}, the "
                f"student's {sizes[1]}: set hidden_weight to 0"
            )
        return str(takes)

    def _check_cache(self, trainer: Trainer, student: PreTrainedModel, stage: Any) -> str:
        cache = LogitCache(self.name)
        header = cache.header
        _check_vocabulary(header.vocab_size, student.config.vocab_size)
        if self._temperature != header.temperature:
            raise ValueError(
                f"its predictions are of temperature {header.temperature}, the stage's is {self._temperature}: set "
                "temperature to it, or write another cache"
            )
        self._recognise(header.teacher.get("fingerprint"))
        seen = missing = 0
        steps = stage.first_step, stage.planned_end(trainer)
        for input_ids in blocks_to_come(trainer, *steps):
            if input_ids.shape[1] != header.block_size:
                raise ValueError(
                    f"it holds blocks of {header.block_size} tokens, the data have {input_ids.shape[1]}: set "
                    f"--data.block_size {header.block_size}, or write another cache"
                )
            seen += len(input_ids)
            missing += int((~cache.holds(input_ids)).sum())
        if missing:
            raise ValueError(
                f"{missing:,} of the {seen:,} blocks that the stage sees are not among its {len(cache):,}: write them "
                f"with '{command_for(trainer, self.name, header, *steps)}', where CONFIG is the config of this run; "
                "add what you changed of its data options"
            )
        words = header.coverage or f"the {header.top_k} likeliest words of each prediction"
        return f"{len(cache):,} blocks, {words}"

    def _check_before(self, trainer: Trainer, student: PreTrainedModel, stage: Any) -> str:
        folder = self.folder(trainer)
        known = self._known(trainer)
        if known is not None:
            _check_kept(folder)
            takes = opening(folder, self._dtype(trainer, student), trainer.strategy.root_device)
            _check_same(from_pretrained(folder), known, f"{folder} does not hold the model that this run kept")
            return str(takes)
        if has_compressed(trainer):
            raise ValueError(
                "the checkpoint holds a compressed model, and no stage of its run asked for the model before: name a "
                "folder, start from an earlier checkpoint, or start anew"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        moments = [(item.step_of(item.acts[0]), callbacks.index(item)) for item in compressions_of(trainer)]
        mine = stage.first_step, callbacks.index(stage)
        if min(moments, default=(float("inf"), 0)) > mine:
            raise ValueError(
                f"nothing is compressed before step {stage.first_step}, where the stage begins: let a Compress act "
                "before (at the same step it must stand before the stage in the list of callbacks), or name a folder"
            )
        needed = held_bytes(student)
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(above).free
        if free < needed:
            raise ValueError(
                f"{folder} needs {needed:,} bytes on disk, and {free:,} are free: make room, or use --run_dir"
            )
        held = held_bytes(student, self._dtype(trainer, student)) / 2**20
        on_cpu = trainer.strategy.root_device.type == "cpu"
        where = "memory-mapped" if on_cpu else f"{held:,.1f} MiB held on the device beside the student"
        return f"{needed / 2**20:,.1f} MiB of weights, to be kept in {folder}, {where}"

    # ------------------------------------------------------------ the run

    def folder(self, trainer: Trainer) -> Path:
        """Return where the run keeps the model as it was before."""
        return Path(trainer.default_root_dir) / FOLDER

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the model as it is, where it is the teacher asked for and not kept yet.

        One process writes, the others wait.

        Args:
            trainer: The trainer.
            module: Its module, before it is compressed.
        """
        if self.kind != "before":
            return
        self._fingerprint = self._known(trainer)
        if self._fingerprint is not None:
            return
        model = language_model(module)
        numbers = fingerprint(model)
        folder = self.folder(trainer)
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                keep_model(model, folder)
            except (OSError, ValueError, RuntimeError) as raised:
                error = raised
        # The others wait here, and must not wait for a folder that does not come.
        problem = trainer.strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if problem is not None:
            raise RuntimeError(f"the first process could not keep the teacher in {folder}: {problem}")
        self._fingerprint = numbers
        say(trainer, f"step {trainer.global_step}: kept the model as it is in {folder}, as a teacher")

    def open(self, trainer: Trainer, module: LightningModule) -> Teacher:
        """Return the teacher: of the student's type, on its device, in eval mode and without gradients.

        Args:
            trainer: The trainer.
            module: Its module.

        Raises:
            ValueError: It is another one than before the run was interrupted, or not there.
        """
        if self.kind == "cache":
            cache = LogitCache(self.name)
            self._recognise(cache.header.teacher.get("fingerprint"))
            return CachedTeacher(cache)
        teacher, self._held = self._held, None
        if teacher is None:
            teacher = self._load(trainer, module)
        for callback, source in _sources(trainer):
            if source is not self and source.name == self.name and not (callback.entered or callback.left):
                source._held = teacher
        return teacher

    def _load(self, trainer: Trainer, module: LightningModule) -> ModelTeacher:
        before, student = self.kind == "before", language_model(module)
        folder = self.folder(trainer) if before else Path(self.name)
        if before:
            # Acts that found nothing to do did not ask to keep the model: it is still the one before.
            self.before_compression(trainer, module)
            _check_kept(folder)
        dtype = self._dtype(trainer, student)
        # One that was kept in another type is known by the numbers that it was kept with; they are mapped.
        as_kept = before and dtype != student.dtype
        try:
            if as_kept:
                self._recognise(fingerprint(from_pretrained(folder, student.dtype)))
            model = from_pretrained(folder, dtype, torch.device(module.device))
        except OSError as error:
            raise ValueError(f"teacher={self.name}: {error}") from None
        if not as_kept:
            self._recognise(fingerprint(model))
        implementation = getattr(module, "experts_implementation", None)
        if implementation is not None:
            model.set_experts_implementation(implementation)
        return ModelTeacher(model)

    def _dtype(self, trainer: Trainer, student: PreTrainedModel) -> torch.dtype:
        """Return the type in which the teacher is held: the student's, or that in which autocast lets it compute."""
        before = self.kind == "before"
        mixed = trainer.precision_plugin.precision == "bf16-mixed"
        if not mixed or (before and trainer.strategy.root_device.type == "cpu"):
            return student.dtype
        source = self.folder(trainer) if before else Path(self.name)
        kept = before and self._known(trainer) is None  # it is still the student
        return torch.bfloat16 if is_floating(student if kept else source) else student.dtype

    def _known(self, trainer: Trainer) -> list[float] | None:
        """Return the fingerprint of the model that the run has kept, if it has."""
        found = (source._fingerprint for _, source in _sources(trainer) if source.kind == "before")
        return next((numbers for numbers in found if numbers is not None), self._fingerprint)

    def _recognise(self, numbers: list[float] | None) -> None:
        if self._fingerprint is not None and not same_weights(self._fingerprint, numbers or ()):
            raise ValueError(
                f"teacher={self.name} is not the one that this run began with: put it back, or name the new one by "
                "another path"
            )
        self._fingerprint = numbers


def _sources(trainer: Trainer) -> Iterator[tuple[Any, TeacherSource]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        source = getattr(callback, "source", None)
        if isinstance(source, TeacherSource):
            yield callback, source


def _check_vocabulary(theirs: int, mine: int) -> None:
    if theirs != mine:
        raise ValueError(f"it knows {theirs:,} words, the student {mine:,}: name one with the same tokenizer")


def _check_same(model: PreTrainedModel, numbers: list[float], problem: str) -> None:
    if not same_weights(fingerprint(model), numbers):
        raise ValueError(f"{problem}: put the folder back, or start from a checkpoint before the compression")


def _check_kept(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}, in which this run kept its model, is gone: put it back, or start from a checkpoint before the "
            "compression"
        )
