"""The base of the stages in which a compressed model recovers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import AtStep, language_model, say, tell, total_steps
from moe_lightning.callbacks.course import shape_at
from moe_lightning.callbacks.recovery.holding import HeldParameters, HeldRate, forget_moments, parameters_of
from moe_lightning.callbacks.recovery.teachers import TeacherSource
from moe_lightning.callbacks.strategies import check_strategy, wrap_again
from moe_lightning.recovery import Objective
from moe_lightning.recovery.selections import Selection


class RecoveryStage(AtStep):
    """From a step on, train some parameters and nothing else, perhaps after a teacher, for a number of steps.

    Its life::

        check     before the run: stages do not overlap, the teacher is there, there will be something to train
        enter     at the first step: change the structure where it wants that, freeze all other parameters, forget
                  the optimizer's moments of what does not train, give the module its objective, re-wrap
                  DistributedDataParallel
        train     set the learning rate: linear warm-up, then a cosine to a tenth at the stage's end
        leave     after the last step, or when training ends: change the structure back, let everything train again

    The checkpoint that is written after the last step holds the model as the stage leaves it. A run that is resumed in
    a stage goes on in it; one that is resumed with more steps after it had ended in a stage goes on in that stage. Two
    stages may follow each other without a gap; between stages, and behind the last one, everything trains by the
    module's own schedule.

    Args:
        at_step: Optimizer step before which the stage begins.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        learning_rate: Peak learning rate; None keeps the module's schedule.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None for the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own.

    Raises:
        ValueError: An option out of its range.
    """

    selection: Selection
    """What trains."""
    remedy: ClassVar[str] = ""
    """What to do where there is nothing to train, for a message."""
    trains_frozen: ClassVar[bool] = True
    """Whether also those train that did not before the stage."""

    def __init__(
        self,
        at_step: int,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        warmup_steps: int = 0,
        teacher: str | None = None,
        alpha: float = 0.0,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = 0.0,
    ) -> None:
        super().__init__(at_step)
        name = type(self).__name__
        if at_step == "end":
            raise ValueError(f"{name}: at_step must be a step number: nothing is trained after the end")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"{name}: steps must be 1 or more, or None up to the next stage, got {steps!r}")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"{name}: learning_rate must be positive, got {learning_rate}")
        if warmup_steps < 0:
            raise ValueError(f"{name}: warmup_steps must not be negative, got {warmup_steps}")
        if steps is not None and warmup_steps >= steps:
            raise ValueError(f"{name}: warmup_steps={warmup_steps} leaves nothing of steps={steps}: lower it")
        if warmup_steps and learning_rate is None:
            raise ValueError(
                f"{name}: warmup_steps={warmup_steps} needs a learning_rate; None is the module's schedule"
            )
        self.first_step, self.takes_end = at_step, False
        self.steps = steps
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.source = None if teacher is None else TeacherSource(teacher)
        self._objective_options: dict[str, Any] = {
            "alpha": alpha,
            "temperature": temperature,
            "hidden_weight": hidden_weight,
            "load_balancing_coefficient": load_balancing_coefficient,
        }
        try:
            self._check_objective()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.entered = False
        """Whether it has begun, in this process or the one that saved the checkpoint."""
        self.left = False
        """Whether it is over."""
        self._left_at: int | None = None
        self._active = False
        self._reopened = False
        self._proved = False
        self._held = HeldParameters()
        self._rate = HeldRate()

    def _check_objective(self) -> None:
        """Raise ValueError where the options of the objective do not fit each other; the teacher is not looked for."""
        if self.source is None:
            Objective(**self._objective_options)
        else:
            self.source.check_options(**self._objective_options)

    # ------------------------------------------------------------ what children change

    def change(self, trainer: Trainer, module: LightningModule) -> None:
        """Change the structure when the stage begins."""

    def change_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Change the structure when the stage is over."""

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come, and how its teacher is found again."""
        state: dict[str, Any] = {
            "done": self.left,
            "entered": self.entered,
            "left": self.left,
            "left_at": self._left_at,
        }
        if self.source is not None:
            state["teacher"] = self.source.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how far it has come."""
        # Earlier releases knew only whether it had begun, and stages that last to the end of the run.
        self.entered = bool(state_dict.get("entered", state_dict.get("done")))
        self.left = self.done = bool(state_dict.get("left", False))
        self._left_at = state_dict.get("left_at")
        if self.source is not None and "teacher" in state_dict:
            self.source.load_state_dict(state_dict["teacher"])

    # ------------------------------------------------------------ when

    def planned_end(self, trainer: Trainer) -> float:
        """Return the step before which it is over, whatever the length of the run; infinity for the end of the run."""
        ends = [float(stage.first_step) for stage in stages_of(trainer) if stage.first_step > self.first_step]
        if self.steps is not None:
            ends.append(self.first_step + self.steps)
        return min(ends, default=math.inf)

    def last_step_of(self, trainer: Trainer) -> float:
        """Return the step before which the stage is over: its own, that of the next stage, or that of the run.

        Not before ``on_train_start``; see :func:`~moe_lightning.callbacks.at_step.total_steps`.
        """
        return min(self.planned_end(trainer), total_steps(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what cannot work, before anything is trained.

        Raises:
            ValueError: Stages overlap, the module has no place for an objective, there will be nothing to train, the
                teacher is not there or does not fit, or the strategy shards.
        """
        if self.left:
            return
        check_strategy(trainer, type(self).__name__)
        model = language_model(pl_module)
        self._check_overlap(trainer)
        if not self.entered:
            moment = self.first_step, trainer.callbacks.index(self)  # type: ignore[attr-defined]
            shape = shape_at(trainer, architecture_of(model).shape(model), moment, included=True)
            if not self.selection.claimed(shape):
                raise ValueError(
                    f"{type(self).__name__} at step {self.first_step}: there will be no {self.selection.words} to train"
                    f"{self.remedy}"
                )
        self._check_teacher(trainer, pl_module)

    def _check_teacher(self, trainer: Trainer, module: LightningModule) -> None:
        if self.source is None:
            return
        if not hasattr(module, "objective"):
            raise ValueError(
                f"{type(self).__name__}: {type(module).__name__} has no attribute 'objective' that its training_step "
                "minimises: train a MixtralModule, or leave the teacher out"
            )
        self.source.check(trainer, module, self)

    def _check_overlap(self, trainer: Trainer) -> None:
        for other in stages_of(trainer):
            if other is self:
                continue
            if other.first_step == self.first_step:
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} both begin at step {self.first_step}: give one "
                    "of them a later at_step"
                )
            if self.steps is not None and self.first_step < other.first_step < self.first_step + self.steps:
                raise ValueError(
                    f"{type(other).__name__} begins at step {other.first_step}, in the middle of "
                    f"{type(self).__name__} (steps {self.first_step} to {self.first_step + self.steps}): let it begin "
                    "later, or give the first one fewer steps"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a step that never comes, before the first batch; see :class:`AtStep`."""
        if self.left and self._left_at == trainer.global_step < self.last_step_of(trainer):
            # The run had ended in it, and is longer now.
            self._reopened = True
            self.entered = self.left = self.done = False
            self._check_teacher(trainer, pl_module)
        if self.left:
            return
        if not self.entered and not self._reopened:
            super().on_train_start(trainer, pl_module)
        end = self.first_step + (self.steps or 0)
        if end > total_steps(trainer) and not getattr(trainer, "fast_dev_run", False):
            raise ValueError(
                f"{type(self).__name__}: it lasts from step {self.first_step} to {end}, beyond the run, which has "
                f"{total_steps(trainer):.0f} steps: give it fewer steps, or none for 'up to the end'"
            )
        if self.warmup_steps >= self.last_step_of(trainer) - self.first_step and self.warmup_steps:
            raise ValueError(
                f"{type(self).__name__}: warmup_steps={self.warmup_steps} leaves nothing of the stage, from step "
                f"{self.first_step} to {self.last_step_of(trainer):.0f}: lower it"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter or go on."""
        if self.left or trainer.global_step < self.first_step:
            return
        if trainer.global_step >= self.last_step_of(trainer):
            self.leave(trainer, pl_module)
            return
        if not self._active:
            self.act(trainer, pl_module)
        if self.learning_rate is not None:
            rate = self.learning_rate_at(trainer.global_step, self.last_step_of(trainer))
            self._rate.set(trainer.optimizers, rate)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Make sure, once, that gradients reach what the stage claims to train, and nothing else."""
        if not self._active or self._proved:
            return
        chosen = self._chosen(pl_module)
        reached = {name for name, item in language_model(pl_module).named_parameters() if item.grad is not None}
        if reached != chosen.keys():
            name = min(reached ^ chosen.keys())
            wrong = "trains though it should not" if name in reached else "gets no gradient"
            raise RuntimeError(f"{type(self).__name__}: {name} {wrong}")
        self._proved = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave after the last step, before a checkpoint of it is written."""
        if self._active and trainer.global_step >= self.last_step_of(trainer):
            self.leave(trainer, pl_module)

    @property
    def waits_for_end(self) -> bool:
        """Whether it will be left when training ends."""
        return self.entered and not self.left

    def training_over(self, trainer: Trainer, module: LightningModule, stopped: bool) -> None:
        """Leave when training ends, unless it is only that its time is up: then it can go on where it is."""
        super().training_over(trainer, module, stopped)
        # Not in work where the run had ended when it was resumed, in the middle of what the stage was to last.
        if self.waits_for_end and not stopped:
            self.leave(trainer, module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let train again what trained before."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let train again what trained before."""
        self._release(pl_module)

    # ------------------------------------------------------------ the work

    def _chosen(self, module: LightningModule) -> dict[str, nn.Parameter]:
        found = self.selection.parameters(language_model(module))
        if self.trains_frozen:
            return found
        frozen = self._held.frozen_before
        return {name: parameter for name, parameter in found.items() if id(parameter) not in frozen}

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin, or go on after a resume."""
        first_time = not self.entered
        if first_time:
            tell(trainer, "before_stage", module, self)
            self.change(trainer, module)
        counted = self._hold(trainer, module)
        if first_time:
            forget_moments(trainer.optimizers, list(self._chosen(module).values()))
        if hasattr(module, "objective"):
            teacher = None if self.source is None else self.source.open(trainer, module)
            module.objective = Objective(teacher=teacher, **self._objective_options)  # type: ignore[assignment]
        wrap_again(trainer, module)
        self.entered = self._active = True
        model = language_model(module)
        total = architecture_of(model).shape(model).parameters
        verb = "trains" if first_time and not self._reopened else "goes on training"
        say(
            trainer,
            f"step {trainer.global_step}: {type(self).__name__} {verb} the {self.selection.words}: {counted:,} of "
            f"{total:,} parameters, up to step {self.last_step_of(trainer):.0f}",
        )

    def _hold(self, trainer: Trainer, module: LightningModule) -> int:
        """Freeze everything else, and return how many parameters train."""
        where = f"{type(self).__name__} at step {trainer.global_step}"
        model = language_model(module)
        self._held.remember(module)
        chosen = self._chosen(module)
        counted = sum(parameter.numel() for parameter in chosen.values())
        if not counted:
            raise ValueError(f"{where}: the model has no {self.selection.words} to train{self.remedy}")
        claimed = self.selection.claimed(architecture_of(model).shape(model))
        # Beside those that train what was frozen before, where the stage leaves that alone.
        there = sum(parameter.numel() for parameter in self.selection.parameters(model).values())
        if there != claimed:
            raise RuntimeError(f"{where}: there are {there:,} parameters, but the model's shape claims {claimed:,}")
        self._held.hold(module, list(chosen.values()))
        held = parameters_of(trainer.optimizers)
        missing = [name for name, parameter in chosen.items() if id(parameter) not in held]
        if missing:
            raise ValueError(
                f"{where}: {missing[0]} is in no optimizer: make the optimizer with "
                "moe_lightning.surgery.parameter_groups, as MixtralModule does"
            )
        self._proved = False
        return counted

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the teacher where the model is that as it is now."""
        if self.source is not None and not self.left:
            self.source.before_compression(trainer, module)

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Freeze what a compression in mid-stage made."""
        if self._active:
            self._hold(trainer, module)
            wrap_again(trainer, module)

    def leave(self, trainer: Trainer, module: LightningModule) -> None:
        """End the stage."""
        lasts = self.waits_for_end
        if lasts:
            self._release(module)
            self.change_back(trainer, module)
            wrap_again(trainer, module)
        self.left = self.done = True
        if lasts:
            self._left_at = trainer.global_step
            say(trainer, f"step {trainer.global_step}: {type(self).__name__} is over")
            tell(trainer, "after_stage", module, self)

    def _release(self, module: LightningModule) -> None:
        if not self._active:
            return
        self._held.release(module)
        self._rate.release()
        if hasattr(module, "objective"):
            module.objective = Objective()  # type: ignore[assignment]
        self._active = False

    def learning_rate_at(self, step: int, end: float) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine to a tenth.

        Args:
            step: Optimizer step.
            end: Step before which the stage is over.
        """
        assert self.learning_rate is not None
        done = step - self.first_step
        if done < self.warmup_steps:
            return self.learning_rate * (done + 1) / self.warmup_steps
        progress = min(1.0, (done - self.warmup_steps) / max(1.0, end - self.first_step - self.warmup_steps))
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def stages_of(trainer: Trainer) -> list[RecoveryStage]:
    """Return the stages of a run, in the order of the list of callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RecoveryStage)]  # type: ignore[attr-defined]
