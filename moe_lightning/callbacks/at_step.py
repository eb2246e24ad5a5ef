"""The base of callbacks that act once, at a step."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.ended_runs import finish_ended_runs, trained_nothing
from moe_lightning.plan import CompressionPlan

Moment = int | Literal["end"]


def language_model(module: LightningModule) -> PreTrainedModel:
    """Return the transformers model that a LightningModule trains: its attribute ``model``.

    Raises:
        ValueError: There is none of a supported family.
    """
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(module).__name__} has no transformers model in its attribute 'model': use MixtralModule, or "
            "put the Mixtral there"
        )
    architecture_of(model)
    return model


def say(trainer: Trainer, text: str) -> None:
    """Print a line from one process only, without tearing a progress bar apart."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.print(text)
    else:
        print(text, flush=True)


def tell(trainer: Trainer, hook: str, module: LightningModule, *more: Any) -> None:
    """Call a hook that Lightning does not know, of all callbacks that have it, in the order of the list.

    Hooks are ``before_compression(trainer, module)`` and ``after_compression(trainer, module)`` around each act of a
    ``Compress``, ``before_stage(trainer, module, stage)`` and ``after_stage(trainer, module, stage)`` around a stage of
    recovery, ``training_over(trainer, module, stopped)`` before anything that happens at the end.

    Args:
        trainer: The trainer.
        hook: Name of the hook.
        module: Its module.
        *more: Further arguments of the hook.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        function = getattr(callback, hook, None)
        if function is not None:
            function(trainer, module, *more)


def total_steps(trainer: Trainer) -> float:
    """Return the optimizer steps after which the run ends, whichever of steps and epochs ends it; infinite for no end.

    Not before ``on_train_start``: Lightning may make the training loader to answer, and a resumed run would lose its
    place in the data.
    """
    return trainer.estimated_stepping_batches


def remember_plan(module: LightningModule, plan: CompressionPlan) -> None:
    """Let a module know the plan whose structure its model has now, where it takes it, for its checkpoints."""
    set_plan: Any = getattr(module, "set_plan", None)
    if set_plan is not None:
        set_plan(plan)


def warn_of_no_plan(module: LightningModule, when: str, of_what: str) -> None:
    """Warn where a module takes no plan.

    Args:
        module: The module.
        when: Which of its checkpoints will be lacking.
        of_what: What those will not know.
    """
    if not hasattr(module, "set_plan"):
        warnings.warn(
            f"{type(module).__name__} has no set_plan: a checkpoint saved {when} will not know {of_what}, so a run "
            "cannot be resumed from it. MixtralModule can",
            stacklevel=3,
        )


def time_was_up(trainer: Trainer) -> bool:
    """Say whether training ended only because a Timer (``--trainer.max_time``) ran out: it can go on where it is.

    Clocks of several processes differ: the first one decides.
    """
    if trainer.global_step >= total_steps(trainer):
        return False
    left = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return bool(trainer.strategy.broadcast(any(time is not None and time <= 0 for time in left)))


class AtTheEnd(Callback):
    """Base of callbacks that do something when training ends: once it really has, also where a run was killed before.

    The end is that of training, after the last step or because a callback such as EarlyStopping ended it; not where
    only the time was up (``max_time``) and the run is to go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopped: bool | None = None  # at the end: whether only the time was up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget how an earlier run ended, should that have failed, and see to it that an ended one is finished."""
        self._stopped = None
        if stage == "fit":
            finish_ended_runs(trainer)

    @abstractmethod
    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether a run that has trained all its steps lacks what this does at the end.

        Args:
            trainer: The trainer, with the states of a checkpoint loaded.
        """

    def training_over(self, trainer: Trainer, module: LightningModule, stopped: bool) -> None:
        """Take note that training is over; called once, of all, before anything at the end acts.

        Args:
            trainer: The trainer.
            module: Its module.
            stopped: Only the time was up.
        """
        self._stopped = stopped

    def has_ended(self, trainer: Trainer, module: LightningModule) -> bool:
        """Say, once in ``on_train_end``, whether training has ended; False where only the time was up.

        Args:
            trainer: The trainer.
            module: Its module.
        """
        if self._stopped is None:
            note_training_over(trainer, module)
        stopped, self._stopped = bool(self._stopped), None
        return not stopped


class AtStep(AtTheEnd):
    """Act once, before the first batch after ``at_step`` optimizer steps, or when training ends.

    Never inside gradient accumulation: the first batch after a step is the first of the next one. A resumed run does
    not act again on what a checkpoint already holds. The end is that of training, after the last step or because a
    callback such as EarlyStopping ended it; not where only the time was up (``max_time``) and the run is to go on.

    Args:
        at_step: Optimizer step, 0 or more, or ``end``.

    Raises:
        ValueError: Another value.
    """

    def __init__(self, at_step: Moment) -> None:
        super().__init__()
        if at_step != "end" and (isinstance(at_step, bool) or not isinstance(at_step, int) or at_step < 0):
            raise ValueError(f"{type(self).__name__}: at_step must be a step number >= 0 or 'end', got {at_step!r}")
        self.at_step = at_step
        self.done = False
        self.takes_end = True
        """Whether ``at_step`` could be ``end``, for a message."""

    @property
    def state_key(self) -> str:
        """Tell several instances apart."""
        return f"{type(self).__qualname__}[at_step={self.at_step}]"

    def state_dict(self) -> dict[str, Any]:
        """Return whether it has acted."""
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over whether it has acted."""
        self.done = bool(state_dict["done"])

    @abstractmethod
    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Do what is to be done."""

    @property
    def next_step(self) -> Moment:
        """When it acts next, for callbacks that act more than once."""
        return self.at_step

    @property
    def last_step(self) -> Moment:
        """When it acts for the last time."""
        return self.at_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a step that never comes, before the first batch.

        Raises:
            ValueError: A step lies beyond the end of the run, or behind the step that it is resumed from.
        """
        if self.at_step == "end" or self.done:
            return
        total = total_steps(trainer)
        first, last = cast(int, self.next_step), cast(int, self.last_step)
        if last >= total and getattr(trainer, "fast_dev_run", False):
            say(trainer, f"{type(self).__name__}: step {last} does not come in a fast_dev_run")
            return
        if first >= total:
            or_end = " or 'end'" if self.takes_end else ""
            raise ValueError(
                f"{type(self).__name__}: at_step={self.at_step} lies beyond the run, which has {total:.0f} steps: "
                f"choose a smaller step{or_end}, or give the run more"
            )
        if last >= total:
            raise ValueError(
                f"{type(self).__name__}: at_step={self.at_step} begins a schedule that ends at step {last}, beyond the "
                f"run, which has {total:.0f} steps: choose a smaller step, fewer steps in the schedule, or a longer run"
            )
        if trainer.global_step > first:
            raise ValueError(
                f"{type(self).__name__}: at_step={self.at_step} has passed: the run goes on at step "
                f"{trainer.global_step} and its checkpoint knows nothing of it: choose a later step"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Act when the step has come."""
        if not self.done and self.at_step != "end" and trainer.global_step >= cast(int, self.next_step):
            self._act_once(trainer, pl_module)

    @property
    def waits_for_end(self) -> bool:
        """Whether there is something that it will do when training ends."""
        return self.at_step == "end" and not self.done

    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether it still waits; see :meth:`AtTheEnd.outstanding`."""
        return self.waits_for_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act at the end; where only the time was up, leave everything as it is, to go on with."""
        if self.has_ended(trainer, pl_module) and self.waits_for_end:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: Trainer, module: LightningModule) -> None:
        self.act(trainer, module)
        self.done = True


def note_training_over(trainer: Trainer, module: LightningModule) -> None:
    """Tell all callbacks that training is over, by ``training_over``, and the user what waits for its end.

    The first of the list that acts at the end calls it, for all of them: what acts then wants the stages over, wherever
    they stand, and takes time itself.

    Args:
        trainer: The trainer.
        module: Its module.
    """
    stopped = time_was_up(trainer)
    steps = [callback for callback in trainer.callbacks if isinstance(callback, AtStep)]  # type: ignore[attr-defined]
    names = ", ".join(type(callback).__name__ for callback in steps if callback.waits_for_end)
    if names and stopped:
        say(
            trainer,
            f"step {trainer.global_step}: the time was up before training ended: what waits for the end did not happen "
            f"({names}); go on with --ckpt_path last and more --trainer.max_time",
        )
    elif names and trained_nothing(trainer):
        say(trainer, f"step {trainer.global_step}: training had ended; what waited for its end happens now ({names})")
    tell(trainer, "training_over", module, stopped)
