"""Recovery by training the novices alone."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import AtStep, language_model, say, total_steps
from moe_lightning.callbacks.compress import Compress
from moe_lightning.callbacks.strategies import check_strategy, wrap_again
from moe_lightning.compression import trial_edits
from moe_lightning.plan import NoviceExperts
from moe_lightning.surgery import is_novice


class NoviceTuning(AtStep):
    """From a step on, train the novices and nothing else.

    Everything else is frozen until the run ends. Put it behind the ``Compress`` that makes the novices; both may have
    the same step.

    Args:
        at_step: Optimizer step from which only novices train.
        learning_rate: Peak learning rate of the novices, from here on a cosine to a tenth at the end of the run. None
            keeps the module's schedule.

    Raises:
        ValueError: ``at_step`` is ``end``, or the learning rate is not positive.

    Source: 2507.00390 makes novices and leaves them; tuning them is ours.
    """

    def __init__(self, at_step: int, learning_rate: float | None = None) -> None:
        super().__init__(at_step)
        if at_step == "end":
            raise ValueError("NoviceTuning: at_step must be a step number: nothing is trained after the end")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"NoviceTuning: learning_rate must be positive, got {learning_rate}")
        self.learning_rate = learning_rate
        self._active = False
        self._frozen_before: dict[str, nn.Parameter] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there will be novices, before anything is trained.

        Raises:
            ValueError: The model has none and no ``Compress`` before this step makes any.
        """
        check_strategy(trainer, "NoviceTuning")
        model = language_model(pl_module)
        if any(layout.novices for layout in architecture_of(model).shape(model).layouts):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        shape = architecture_of(model).shape(model)
        for place, callback in enumerate(callbacks):
            if isinstance(callback, Compress) and callback.at_step != "end":
                before = callback.at_step < self.at_step or (  # type: ignore[operator]
                    callback.at_step == self.at_step and place < callbacks.index(self)
                )
                methods = [method for act in callback.acts for method in act.methods]
                if before and any(isinstance(edit, NoviceExperts) for edit in trial_edits(shape, methods)[0]):
                    return
        raise ValueError(
            f"NoviceTuning at step {self.at_step}: there will be no novices to train: put a Compress with Novices "
            "before it"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find a step that never comes, and an optimizer whose novices have no learning rate of their own.

        Raises:
            ValueError: The step never comes, or ``learning_rate`` is given and no optimizer has a group for novices.
        """
        super().on_train_start(trainer, pl_module)
        groups = [group.get("name") for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self.learning_rate is not None and "novices" not in groups:
            raise ValueError(
                "NoviceTuning: learning_rate needs an optimizer with a group named 'novices': make its groups with "
                "moe_lightning.surgery.parameter_groups, as MixtralModule does, or leave learning_rate out"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze at the step, again after a resume, and set the learning rate."""
        if trainer.global_step < self.at_step:  # type: ignore[operator]
            return
        if not self._active:
            self.act(trainer, pl_module)
            self._active = self.done = True
        if self.learning_rate is not None:
            self._set_learning_rate(trainer, pl_module, self.learning_rate)

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Freeze everything but the novices.

        Raises:
            ValueError: The model has no novices, or no optimizer holds them.
        """
        model = language_model(module)
        novices = {name: parameter for name, parameter in model.named_parameters() if is_novice(name)}
        if not novices:
            raise ValueError(f"NoviceTuning at step {self.at_step}: the model has no novices to train")
        held = {
            id(item) for optimizer in trainer.optimizers for group in optimizer.param_groups for item in group["params"]
        }
        if not all(id(parameter) in held for parameter in novices.values()):
            raise ValueError(f"NoviceTuning at step {self.at_step}: the novices are in no optimizer")
        for name, parameter in module.named_parameters():
            if is_novice(name):
                continue
            if not parameter.requires_grad:
                self._frozen_before[name] = parameter
            parameter.requires_grad_(False)
            parameter.grad = None
        wrap_again(trainer, module)
        count = sum(parameter.numel() for parameter in novices.values())
        say(trainer, f"step {trainer.global_step}: only the novices train from here on ({count:,} parameters)")

    def _set_learning_rate(self, trainer: Trainer, module: LightningModule, peak: float) -> None:
        total = total_steps(trainer)
        progress = (trainer.global_step - self.at_step) / max(1, total - self.at_step)  # type: ignore[operator]
        rate = peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        module.log("train/novice_learning_rate", rate)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("name") == "novices":
                    group["lr"] = rate

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let train again what trained before."""
        if self._active:
            named = dict(pl_module.named_parameters())
            # A later compression may have numbered layers anew, and replaced some parameters under their old names.
            frozen = {id(parameter) for parameter in self._frozen_before.values()}
            there = {id(parameter) for parameter in named.values()}
            replaced = {name for name, parameter in self._frozen_before.items() if id(parameter) not in there}
            for name, parameter in named.items():
                if id(parameter) not in frozen and name not in replaced:
                    parameter.requires_grad_(True)
        self._frozen_before.clear()
        self._active = False
