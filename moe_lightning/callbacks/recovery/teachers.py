"""Where a stage's teacher comes from: the model as it was before, a folder, or predictions that were written down."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from moe_lightning.callbacks.at_step import language_model
from moe_lightning.checkpoints import from_pretrained
from moe_lightning.recovery.objective import Objective, Teacher
from moe_lightning.recovery.teachers import ModelTeacher

BEFORE = "before"
"""Name of the teacher that is the model as it was before the first compression of the run."""


class _ModelToCome:
    """Stands for a teacher that is a model while options are checked."""

    gives_hidden = True

    def targets(self, *_: Any) -> Any:
        raise NotImplementedError


class TeacherSource:
    """Finds, checks and opens a stage's teacher.

    Args:
        name: ``before``, a Hugging Face folder, or a folder of cached predictions.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def check_options(
        self,
        alpha: float,
        temperature: float,
        hidden_weight: float,
        load_balancing_coefficient: float | None,
    ) -> None:
        """Raise ValueError where the options of an objective do not fit each other or this kind of teacher."""
        Objective(_ModelToCome(), alpha, temperature, hidden_weight, load_balancing_coefficient)

    def state_dict(self) -> dict[str, Any]:
        """Return by what the teacher is found again."""
        return {"name": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take that over."""

    def check(self, trainer: Trainer, module: LightningModule, stage: Any) -> None:
        """Raise ValueError where the teacher will not be there or does not fit; before the run."""

    def open(self, trainer: Trainer, module: LightningModule) -> Teacher:
        """Return the teacher, on the module's device."""
        student = language_model(module)
        dtype = next(parameter.dtype for parameter in student.parameters() if parameter.is_floating_point())
        model = from_pretrained(self.name, dtype, torch.device(module.device))
        return ModelTeacher(model)

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the model as it is, where this is the teacher asked for."""
