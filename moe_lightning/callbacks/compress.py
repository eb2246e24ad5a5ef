"""Compressing in the middle of training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import (
    AtStep,
    Moment,
    language_model,
    remember_plan,
    tell,
    total_steps,
    warn_of_no_plan,
)
from moe_lightning.callbacks.compression_log import log_compression
from moe_lightning.callbacks.course import Change, in_words, shape_at
from moe_lightning.callbacks.gradual import Act, acts_of
from moe_lightning.callbacks.spending import spending
from moe_lightning.callbacks.strategies import check_strategy, wrap_again
from moe_lightning.compression import CompressionResult, as_methods, compress, trial_edits
from moe_lightning.compression.layerwise import measures, need_batches
from moe_lightning.method import Method
from moe_lightning.slimming.policy import SlimmingPolicy, Starved
from moe_lightning.surgery import plan_of


class Compress(AtStep):
    """Compress the model at a step and go on training what is left.

    Its life::

        match       global_step has reached at_step, and no checkpoint says that it was done
        announce    before_compression of all callbacks that have it: a teacher is kept, a loss measured
        observe     calibration batches of the datamodule, without gradients, in eval mode
        synchronise the statistics' sums over ranks
        propose     each method decides, from the statistics of the model as the method before left it
        check       the edits against the shape; touched parameters against claimed ones
        fill        the values of novices, the codes and masks of matrices
        carry over  the optimizer, in place: sliced moments for sliced experts
        re-wrap     DistributedDataParallel
        extend      the module's plan, which travels in its checkpoints
        log         plan, sizes, statuses of matrices and pictures to TensorBoard; all numbers to the run directory
        tell        after_compression of all callbacks that have it: a stage freezes what is new
        free        what the model was before

    A method whose sparsity or ratio is a schedule acts again every so many steps and takes more; weights that are zero
    stay zero, and experts that are gone do not come back. The other methods of the list act once, at ``at_step``.
    Whatever was pruned stays so while the model trains on, and what is stored as integers stays as it is.

    Args:
        methods: Methods, in the order in which they are applied.
        at_step: Optimizer step before which it happens (with a schedule: begins), or ``end``.
        calibration_batches: Batches of the datamodule's calibration split; None takes all of them.
        batches: Calibration batches where the trainer has no TextDataModule (from Python only).
        min_tokens: For methods that measure the inputs of experts' matrices: an expert that fewer calibration tokens
            reach is starved.
        starved: What becomes of it. warn: it is made from what there is. top_up: further batches of the calibration
            split, behind calibration_batches, are drawn that reach it. fallback: as if no token reached it (rounding to
            nearest, magnitudes). error: the run fails.
        top_up: Further batches where the trainer has no TextDataModule (from Python only).
        max_fallback: Largest share of a method's matrices that may be made without measurement, from 0 to 1.
        max_moment_bytes: Memory for the moments of inputs that are measured at a time, in bytes.

    Raises:
        ValueError: Something cannot work; found before the first training step.
    """

    def __init__(
        self,
        methods: list[Method],
        at_step: Moment,
        calibration_batches: int | None = None,
        batches: Any = None,
        min_tokens: int = SlimmingPolicy.min_tokens,
        starved: Starved = SlimmingPolicy.starved,
        top_up: Any = None,
        max_fallback: float = SlimmingPolicy.max_fallback,
        max_moment_bytes: int = SlimmingPolicy.max_moment_bytes,
    ) -> None:
        super().__init__(at_step)
        self.methods = as_methods(methods)
        self.acts = acts_of(self.methods)
        self.takes_end = len(self.acts) == 1
        if at_step == "end" and len(self.acts) > 1:
            raise ValueError(
                "Compress: a schedule needs training between its steps: give at_step a step number, or the method a "
                "number"
            )
        if calibration_batches is not None and calibration_batches < 1:
            raise ValueError(f"Compress: calibration_batches must be 1 or more, got {calibration_batches}")
        self.calibration_batches = calibration_batches
        self.batches: Iterable[Mapping[str, Any]] | None = batches
        try:
            # Whether there are further batches is known when there are data.
            SlimmingPolicy(min_tokens, starved, top_up or (), max_fallback, max_moment_bytes)
        except ValueError as error:
            raise ValueError(f"Compress: {error}") from None
        self.min_tokens, self.starved, self.top_up = min_tokens, starved, top_up
        self.max_fallback, self.max_moment_bytes = max_fallback, max_moment_bytes
        self.acts_done = 0
        """How many of the acts are behind."""
        self.changed = False
        """Whether one of them changed the model: a share of it may have been no whole expert."""
        self.result: CompressionResult | None = None
        """What the last act did; None before it, and in a run that was resumed after it."""
        self._applied: list[str] | None = None  # methods in words, by another process perhaps

    # ------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        """Tell several instances apart."""
        names = ",".join(type(method).__name__ for method in self.methods)
        return f"Compress[at_step={self.at_step},methods={names}]"

    def state_dict(self) -> dict[str, Any]:
        """Return whether, how often and to what effect it has acted, and the methods in words."""
        methods = self._applied or list(map(repr, self.methods))
        return {**super().state_dict(), "acts": self.acts_done, "methods": methods, "changed": self.changed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how often it has acted, and warn where that was something else than what is asked for now.

        Raises:
            ValueError: It has acted along a part of another schedule.
        """
        super().load_state_dict(state_dict)
        self.acts_done = int(state_dict.get("acts", len(self.acts) if self.done else 0))
        self.changed = bool(state_dict.get("changed", self.acts_done))
        self._applied = state_dict.get("methods") if self.acts_done else None
        now = list(map(repr, self.methods))
        if self._applied in (None, now):
            return
        if not self.done:
            raise ValueError(
                f"Compress {in_words(self.at_step)}: the checkpoint lies in the middle of "
                f"{', '.join(self._applied or ())}: go on with the same methods, and not with {', '.join(now)}, or "
                "start from an earlier checkpoint"
            )
        warnings.warn(
            f"Compress {in_words(self.at_step)}: the checkpoint holds a model that was compressed by "
            f"{', '.join(self._applied or ())}, and stays as it is: {', '.join(now)} is not applied. Start from an "
            "earlier checkpoint, or anew, to apply it",
            stacklevel=2,
        )

    # ------------------------------------------------------------ steps

    def step_of(self, act: Act) -> float:
        """Return the optimizer step before which an act happens; infinity for the end of the run."""
        return float("inf") if self.at_step == "end" else self.at_step + act.after_steps

    @property
    def next_step(self) -> Moment:
        """When it acts next; when it acted last, once all acts are behind."""
        act = self.acts[min(self.acts_done, len(self.acts) - 1)]
        return "end" if self.at_step == "end" else self.at_step + act.after_steps

    @property
    def last_step(self) -> Moment:
        """When it acts for the last time."""
        return "end" if self.at_step == "end" else self.at_step + self.acts[-1].after_steps

    def more_to_come(self, module: LightningModule) -> bool:
        """Say, in ``after_compression``, whether a later act of this schedule will change the model.

        Args:
            module: The module, as the present act has left it.
        """
        shape = architecture_of(language_model(module)).shape(language_model(module))
        later = self.acts[self.acts_done + 1 :]
        return any(act.share is None or trial_edits(shape, act.methods)[0] for act in later)

    @property
    def ends_the_run(self) -> bool:
        """Whether it has changed the model at the end of the run, behind which there is no more training."""
        return self.at_step == "end" and self.done and self.changed

    # ------------------------------------------------------------ before the run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the methods out on the model's shape, and the calibration data, before anything is trained.

        Raises:
            ValueError: The methods do not fit the model, the calibration split is too small, or the strategy shards.
        """
        if self.done:
            return
        check_strategy(trainer, "Compress")
        model = language_model(pl_module)
        # All changes of the run up to the last of this instance, in the order in which they come.
        last = self.step_of(self.acts[-1]), trainer.callbacks.index(self)  # type: ignore[attr-defined]
        shape_at(trainer, architecture_of(model).shape(model), last, included=True)
        self._calibration(trainer)
        self._top_up(trainer)
        warn_of_no_plan(pl_module, "after the compression", "its plan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a step that never comes, and a run that would train on behind its end, before the first batch.

        Raises:
            ValueError: A step lies beyond the run; or this acted at the end of a run that now has more steps.
        """
        super().on_train_start(trainer, pl_module)
        if self.ends_the_run and trainer.global_step < total_steps(trainer):
            raise ValueError(
                f"Compress at the end: the run had ended, at step {trainer.global_step}, and its model was compressed "
                f"by {', '.join(self._applied or map(repr, self.methods))}, which would not happen again after more "
                "steps: start a new run from the folder that was exported at the end (--model.checkpoint "
                "RUN/models/NAME --model.model null, with another --run_dir), or resume, with --ckpt_path FILE, from "
                "a checkpoint of before the end"
            )

    def changes(self, trainer: Trainer) -> list[Change]:
        """Return the acts that are to come; see :class:`~moe_lightning.callbacks.course.ChangesStructure`."""
        to_come = () if self.done else self.acts[self.acts_done :]
        return [Change(self.step_of(act), act) for act in to_come]

    def _calibration(self, trainer: Trainer) -> Iterable[Mapping[str, Any]] | None:
        if self.batches is not None:
            return self.batches
        if not need_batches(self.methods):
            return None
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "calibration_batches"):
            raise ValueError(
                "Compress needs calibration data: train with a TextDataModule, or with a datamodule that has the "
                "method calibration_batches(n), which returns n batches (n None: all), or pass batches=..."
            )
        return datamodule.calibration_batches(self.calibration_batches)

    def _top_up(self, trainer: Trainer) -> Iterable[Mapping[str, Any]] | None:
        if self.starved != "top_up" or self.top_up is not None:
            return self.top_up
        if not any(measures(method) for method in self.methods):
            return ()  # nothing is counted
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.batches is not None or not hasattr(datamodule, "further_batches"):
            raise ValueError(
                "Compress: starved='top_up' draws further calibration batches: train with a TextDataModule, pass "
                "top_up=..., or choose starved='warn'"
            )
        try:
            return datamodule.further_batches(self.calibration_batches)
        except ValueError as error:
            raise ValueError(f"Compress: starved='top_up', but {error}") from None

    # ------------------------------------------------------------ the work

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Do what is next; see the class."""
        act = self.acts[self.acts_done]
        model = language_model(module)
        if act.share is not None and not trial_edits(architecture_of(model).shape(model), act.methods)[0]:
            return  # rounded to whole experts, nothing more goes
        with spending(trainer, "compression"):
            self._compress(trainer, module, model, act)

    def _compress(self, trainer: Trainer, module: LightningModule, model: Any, act: Act) -> None:
        tell(trainer, "before_compression", module)
        edits_before = plan_of(model).edits
        datamodule: Any = getattr(trainer, "datamodule", None)
        batches = self._calibration(trainer)
        # What reports draw of the model as it was, in the same pass.
        drawn = [getattr(callback, "figure_needs", ()) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        also = frozenset[str]().union(*drawn) if batches is not None and self.acts_done == 0 else ()
        origin = {"step": trainer.global_step, "calibration_batches": self.calibration_batches}
        if hasattr(datamodule, "describe"):
            origin["data"] = datamodule.describe()
        with trainer.precision_plugin.forward_context():
            result = compress(
                model,
                batches,
                act.methods,
                origin=origin,
                optimizers=trainer.optimizers,
                progress=trainer.is_global_zero,
                min_tokens=self.min_tokens,
                starved=self.starved,
                top_up=self._top_up(trainer),
                max_fallback=self.max_fallback,
                max_moment_bytes=self.max_moment_bytes,
                also=also,
            )
        wrap_again(trainer, module)
        remember_plan(module, result.plan)
        note = ""
        if len(self.acts) > 1:
            taken = "" if act.share is None else f", {act.share:.1%} {act.taken}"
            note = f"{self.acts_done + 1} of {len(self.acts)}{taken}"
        log_compression(trainer, result, act, f"compression-{self.next_step}{self._number(trainer)}", note)
        self.result = result
        self.changed = self.changed or result.plan.edits != edits_before
        tell(trainer, "after_compression", module)

    def _act_once(self, trainer: Trainer, module: LightningModule) -> None:
        self.act(trainer, module)
        self.acts_done += 1
        self.done = self.acts_done == len(self.acts)

    def _number(self, trainer: Trainer) -> str:
        """Return "" for the first instance of this callback that acts at a step, "-2" for the second."""
        step = self.step_of(self.acts[self.acts_done])
        same = [item for item in compressions_of(trainer) if any(item.step_of(act) == step for act in item.acts)]
        return f"-{same.index(self) + 1}" if same[0] is not self else ""


def compressions_of(trainer: Trainer) -> list[Compress]:
    """Return the compressions of a run, in the order of the list of callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Compress)]  # type: ignore[attr-defined]


def has_compressed(trainer: Trainer) -> bool:
    """Say whether a compression of this run has changed the model, in an earlier part of it perhaps."""
    return any(item.changed for item in compressions_of(trainer))
