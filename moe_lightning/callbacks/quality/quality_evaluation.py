"""The callback that measures quality, size and speed around compressions."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule, Trainer

from moe_lightning import __version__
from moe_lightning.callbacks.at_step import AtTheEnd, language_model, say
from moe_lightning.callbacks.checkpointing import steps_behind
from moe_lightning.callbacks.compress import compressions_of, has_compressed
from moe_lightning.callbacks.quality.measuring import Wanted, measure_moment
from moe_lightning.callbacks.quality.reference import REFERENCE, RunReference
from moe_lightning.callbacks.quality.telling import tell_moment
from moe_lightning.callbacks.quality.texts import Split, find_texts
from moe_lightning.callbacks.random_state import same_random_states
from moe_lightning.callbacks.strategies import check_whole
from moe_lightning.callbacks.tensorboard_pages import QUALITY, add_pages
from moe_lightning.evaluation.quality import Text
from moe_lightning.evaluation.records import BEFORE, END, TEST, QualityMoment, QualityRecord
from moe_lightning.evaluation.reference_file import ReferenceFile, ReferenceWriter
from moe_lightning.evaluation.samples import default_prompts, prompt_ids
from moe_lightning.statistics.batches import size_in_words
from moe_lightning.surgery import plan_of

COMPRESSED = "compressed"


class QualityEvaluation(AtTheEnd):
    """Measure what a compression cost and what it bought: quality, size and speed of the same model, moment by moment.

    The moments are ``before`` (the first compression), ``compressed``, ``compressed-2``, ... (after each; of a schedule
    after its last act), ``end`` (when training has ended) and, in the same file, ``test`` (``moe-lightning test``). At
    each of them:

    * likelihood of the held-out split, of what each of several sources has in it, and of further domains,
    * divergence from the model before compression and top-1 agreement with it, on the first tokens of each text,
    * errors of what leaves each block, against the same block before compression,
    * where the tokens go: load and routing weight of the experts,
    * parameters, bytes in memory and on disk, operations; speed of prefill and decoding,
    * continuations of prompts.

    Every moment is a line on the console and scalars ``quality/...`` (``before`` ``quality_before/...``); the
    continuations of all moments stand together on TensorBoard's text page. All numbers, block by block, are in
    ``RUN/results/quality.json``. What the model before compression predicts is kept in
    ``RUN/quality/reference.safetensors``, so that no second model is needed; a run that is resumed goes on with it.
    Intervals are those of 95 %, by a bootstrap over blocks, in pairs.

    The model is measured in eval mode and in the trainer's precision, and no random number is drawn from the training's
    sequence: training is the same with and without it.

    Args:
        split: Which split is measured on first, ``test`` or ``validation``.
        num_batches: Batches of it; None takes all.
        divergence_tokens: Tokens of each text, from its beginning, that are compared with the predictions of the model
            before compression, in whole blocks; 0 compares none.
        domains: Further texts by name, each with its source or sources as in the data; for text that the model was not
            calibrated on.
        domain_blocks: Blocks of each further text.
        prompts: Texts to continue; by default pieces of the split.
        new_tokens: Tokens that continue a prompt, at most; 0 for no continuations.
        speed: Whether prefill and decoding are timed.
        layer_tokens: Tokens of the first text whose hidden states are compared, in whole blocks; 0 compares none.
        max_reference_bytes: Largest size of the file of predictions, in bytes.
        every_act: Whether a schedule that compresses more and more is measured after each of its acts, and not only
            after the last.
        batches: Batches in the place of the split, the same in all processes (from Python only).

    Raises:
        ValueError: An option out of its range; before the run: there is no such split, a text is too small or cannot be
            opened, a prompt is empty, or the predictions take more than ``max_reference_bytes``.
    """

    def __init__(
        self,
        split: Split = "test",
        num_batches: int | None = None,
        divergence_tokens: int = 8192,
        domains: dict[str, str | list[str]] | None = None,
        domain_blocks: int = 32,
        prompts: list[str] | None = None,
        new_tokens: int = 48,
        speed: bool = True,
        layer_tokens: int = 1024,
        max_reference_bytes: int = 2 * 2**30,
        every_act: bool = False,
        batches: Any = None,
    ) -> None:
        super().__init__()
        if split not in ("test", "validation"):
            raise ValueError(f"QualityEvaluation: split must be 'test' or 'validation', got {split!r}")
        for name, value, least in (
            ("num_batches", num_batches, 1),
            ("divergence_tokens", divergence_tokens, 0),
            ("domain_blocks", domain_blocks, 1),
            ("new_tokens", new_tokens, 0),
            ("layer_tokens", layer_tokens, 0),
            ("max_reference_bytes", max_reference_bytes, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"QualityEvaluation: {name} must be {least} or more, got {value}")
        self.split, self.num_batches = split, num_batches
        self.domains, self.domain_blocks = dict(domains or {}), domain_blocks
        self.prompts, self.new_tokens, self.speed = prompts, new_tokens, speed
        self.every_act = every_act
        self.reference = RunReference(divergence_tokens, layer_tokens, max_reference_bytes)
        self.batches: Iterable[Mapping[str, Any]] | None = batches
        self.moments: list[QualityMoment] = []
        """What was measured in this run, in order."""
        self.texts: list[Text] = []
        """What is measured on."""
        self._wanted: Wanted | None = None
        self._unchanged = False  # since the last moment, but for training
        self._stages: list[str] = []  # that ended since then
        self._closing = False
        self._results: dict[int, Any] = {}
        self._context_of_fit: dict[str, Any] = {}

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, and which reference it was compared with."""
        return {"moments": [moment.to_dict() for moment in self.moments], "weights": self.reference.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was measured."""
        self.moments = [QualityMoment.from_dict(values) for values in state_dict["moments"]]
        self.reference.weights = state_dict["weights"]

    @property
    def before(self) -> QualityMoment | None:
        """The moment before the first compression; None where there is none yet."""
        return next((moment for moment in self.moments if moment.name == BEFORE), None)

    def path(self, trainer: Trainer) -> Path:
        """Return the file of the results."""
        return Path(trainer.default_root_dir) / "results" / "quality.json"

    # ------------------------------------------------------------ before the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; see :class:`~moe_lightning.callbacks.at_step.AtTheEnd`."""
        super().setup(trainer, pl_module, stage)
        self._closing = False
        self._unchanged = False
        self._stages = []
        self.reference.file = None
        if stage == "fit" and not trainer.global_step:
            self.moments, self.reference.weights = [], None

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        language_model(module)
        with same_random_states():  # a loader draws numbers when it begins
            self.texts = find_texts(
                trainer, self.split, self.num_batches, self.domains, self.domain_blocks, self.batches
            )
            self._wanted = self._what_is_wanted(trainer)

    def _what_is_wanted(self, trainer: Trainer) -> Wanted:
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        prompts: list[str] = []
        if self.new_tokens and self.prompts is not None:
            if tokenizer is None:
                raise ValueError(
                    "QualityEvaluation: prompts need a datamodule with a tokenizer: train with a TextDataModule, or "
                    "leave them out"
                )
            try:
                prompt_ids(tokenizer, self.prompts)
            except ValueError as error:
                raise ValueError(f"QualityEvaluation: {error}") from None
            prompts = self.prompts
        elif self.new_tokens and tokenizer is not None:
            prompts = default_prompts(self.texts[0].batches, tokenizer)
        return Wanted(max(self.reference.divergence_tokens, 1), self.speed, prompts, self.new_tokens, tokenizer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that each process has the whole model.

        Raises:
            ValueError: The strategy shards it.
        """
        check_whole(trainer, "QualityEvaluation")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open all texts, and find the reference of a run that is resumed behind its first compression.

        Raises:
            ValueError: A text cannot be opened, or what the model predicts would take too much room.
        """
        add_pages(trainer, QUALITY)
        # Not before: the trainer knows its own validation batches only now.
        self._prepare(trainer, pl_module)
        of_texts = ", ".join(f"{text.name} ({text.num_blocks} blocks)" for text in self.texts)
        kept = ""
        if self.before is not None:
            self._go_on(trainer, self.before)
        elif has_compressed(trainer):
            warnings.warn(
                f"QualityEvaluation: the model was compressed before step {trainer.global_step}, from which the run "
                "goes on, and was not measured before that: there will be no moment before, so no ratio, divergence "
                "and agreement. To have them start anew, or from a checkpoint of before the first compression, with "
                "QualityEvaluation among the callbacks",
                stacklevel=2,
            )
        elif any(not callback.done for callback in compressions_of(trainer)):
            model = language_model(pl_module)
            self.reference.check(self.texts, model, trainer.default_root_dir)
            size = size_in_words(self.reference.bytes(self.texts, model))
            kept = f"; what the model predicts before compression takes {size} on disk"
        say(trainer, f"quality is measured on {of_texts}{kept}")

    def _go_on(self, trainer: Trainer, before: QualityMoment) -> None:
        changed = [
            text.name
            for text in self.texts
            if text.name not in before.texts or before.texts[text.name].fingerprint != text.fingerprint
        ]
        if changed:
            warnings.warn(
                f"QualityEvaluation: {', '.join(changed)}: the model was not measured on these blocks before its "
                "compression, so there will be no ratio to it: use the same data options (--data.seed, --data.test, "
                "...), num_batches and domains to have it",
                stacklevel=2,
            )
        if trainer.is_global_zero:
            self.reference.open(self.texts, trainer.default_root_dir)

    # ------------------------------------------------------------ moments of training

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the model before its first compression, and keep what it predicts."""
        self._results = {id(callback): callback.result for callback in compressions_of(trainer)}
        # A checkpoint from before this callback was there knows of compressions that lie behind it.
        if self.before is not None or has_compressed(trainer):
            return
        folder, model = trainer.default_root_dir, language_model(module)
        writer = self.reference.writer(self.texts, model, folder)
        what = self._since(trainer)
        if plan_of(model):
            what += "; the model had been compressed before this run"
        self._measure(trainer, module, BEFORE, what, writer if trainer.is_global_zero else None)
        if trainer.is_global_zero and self.reference.path(folder).is_file():
            self.reference.open(self.texts, folder)

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what is left."""
        acting = [item for item in compressions_of(trainer) if item.result is not self._results.get(id(item))]
        if not self.every_act and any(item.more_to_come(module) for item in acting):
            self._unchanged = False
            return
        methods = [str(method) for item in acting[:1] for method in item.acts[item.acts_done].methods]
        methods += [f"act {item.acts_done + 1} of {len(item.acts)}" for item in acting[:1] if len(item.acts) > 1]
        number = sum(moment.name.startswith(COMPRESSED) for moment in self.moments) + 1
        name = COMPRESSED if number == 1 else f"{COMPRESSED}-{number}"
        self._measure(trainer, module, name, ", ".join(methods) or "compression", self.reference.file)
        if self._closing and not any(item.waits_for_end and item not in acting for item in compressions_of(trainer)):
            self._end(trainer, module)

    def after_stage(self, trainer: Trainer, module: LightningModule, stage: Any) -> None:
        """Take note that the end of a stage may have changed the model."""
        self._unchanged = False
        self._stages.append(type(stage).__name__)

    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether the end of an ended run was not measured."""
        return not any(moment.name == END and moment.step == trainer.global_step for moment in self.moments)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, unless only the time was up; behind what compresses there, wherever that stands."""
        self._closing = self.has_ended(trainer, pl_module)
        if self._closing and not any(item.waits_for_end for item in compressions_of(trainer)):
            self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        last = self.moments[-1] if self.moments else None
        if last is not None and last.name == END and last.step == trainer.global_step:
            return
        if last is not None and self._unchanged and last.step == trainer.global_step:
            # The same model, at the same step: measuring again would give the same.
            self._add(trainer, dataclasses.replace(last, name=END, what=f"nothing since {last.name}"))
        else:
            self._measure(trainer, module, END, self._since(trainer), self.reference.file)

    def _since(self, trainer: Trainer) -> str:
        """Say what was done since the last moment."""
        kept = [moment for moment in self.moments if moment.name not in (END, TEST)]
        steps = trainer.global_step - (kept[-1].step if kept else 0)
        stages = f" ({', '.join(self._stages)})" if self._stages else ""
        return f"{steps} steps of training{stages}"

    def _measure(
        self,
        trainer: Trainer,
        module: LightningModule,
        name: str,
        what: str,
        reference: ReferenceFile | ReferenceWriter | None,
    ) -> None:
        assert self._wanted is not None
        moment = measure_moment(trainer, module, self.texts, reference, self._wanted, name, trainer.global_step, what)
        self._unchanged, self._stages = True, []
        self._add(trainer, moment)

    def _add(self, trainer: Trainer, moment: QualityMoment) -> None:
        # What was the end is none where the run has gone on.
        self.moments = [item for item in self.moments if item.name not in (END, TEST)] + [moment]
        tell_moment(trainer, self.moments)
        if trainer.is_global_zero:
            QualityRecord(self.moments, self._context(trainer)).save(self.path(trainer))

    def _context(self, trainer: Trainer) -> dict[str, Any]:
        datamodule: Any = getattr(trainer, "datamodule", None)
        model = language_model(trainer.lightning_module)
        weights = self.reference.weights
        return {
            "data": datamodule.describe() if hasattr(datamodule, "describe") else None,
            "device": str(next(model.parameters()).device),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "versions": {
                "moe_lightning": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "reference": None if weights is None else {"file": str(REFERENCE), "weights": weights},
        }

    # ------------------------------------------------------------ test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open all texts, and what the run in the same folder has measured.

        Raises:
            ValueError: A text cannot be opened, the file of the results cannot be read, or the strategy shards the
                model.
        """
        check_whole(trainer, "QualityEvaluation")
        self._prepare(trainer, pl_module)
        path = self.path(trainer)
        record = QualityRecord.load(path) if path.is_file() else QualityRecord([], {})
        self.moments = [moment for moment in record.moments if moment.name != TEST]
        self._context_of_fit = record.context
        self.reference.weights = (record.context.get("reference") or {}).get("weights")
        before = self.before
        if before is not None:
            self._go_on(trainer, before)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the model that was tested."""
        assert self._wanted is not None
        step = steps_behind(trainer)
        what = f"test of {trainer.ckpt_path}" if trainer.ckpt_path else "test"
        moment = measure_moment(trainer, pl_module, self.texts, self.reference.file, self._wanted, TEST, step, what)
        self.moments = [*self.moments, moment]
        tell_moment(trainer, self.moments)
        if trainer.is_global_zero:
            own, fit = self._context(trainer), self._context_of_fit
            # Of the same data, mostly, on the same machine: what is said once is not said again.
            other = {name: value for name, value in own.items() if value != fit.get(name)}
            context = {**fit, TEST: other} if fit else own
            QualityRecord(self.moments, context).save(self.path(trainer))
