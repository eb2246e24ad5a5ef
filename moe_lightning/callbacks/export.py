"""Writing Hugging Face folders in the course of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import AtStep, Moment, language_model, say
from moe_lightning.callbacks.course import course_of, shape_at
from moe_lightning.callbacks.spending import spending
from moe_lightning.checkpoints import Format, check_format, may_be_uneven, save_pretrained


class Export(AtStep):
    """Write the model to ``RUN/models/NAME`` at a step.

    Before a ``Compress`` of the same step when it stands before it in the list of callbacks, after it when it stands
    behind.

    Args:
        name: Name of the folder.
        at_step: Optimizer step, or ``end``.
        format: ``auto``, ``native`` or ``transformers``; see :func:`moe_lightning.save_pretrained`.

    Raises:
        ValueError: A name that is no plain folder name.
    """

    def __init__(self, name: str, at_step: Moment = "end", format: Format = "auto") -> None:
        super().__init__(at_step)
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"Export: name must be a plain folder name like 'compressed', got {name!r}")
        self.name = name
        self.format = format
        self._written = False  # as the checkpoint says, whether or not it is to be written again

    @property
    def state_key(self) -> str:
        """Tell several instances apart."""
        return f"Export[name={self.name}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over whether it has written; not of the end: a run that goes on with more steps has another one."""
        super().load_state_dict(state_dict)
        if self.at_step == "end":
            self._written, self.done = self.done, False

    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether an ended run lacks the folder; see :class:`AtStep`."""
        return super().outstanding(trainer) and not self._written

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder that is written."""
        return Path(trainer.default_root_dir) / "models" / self.name

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the format holds the model that there will be, before anything is trained.

        Raises:
            ValueError: It does not, after what ``Compress`` does before this step.
        """
        if self.done:
            return
        model = language_model(pl_module)
        mine = float("inf") if self.at_step == "end" else self.at_step, trainer.callbacks.index(self)  # type: ignore[attr-defined]
        where = f"Export {self.name!r} at {'the end' if self.at_step == 'end' else f'step {self.at_step}'}"
        shape = architecture_of(model).shape(model)
        try:
            check_format(shape, self.format)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if self.format != "transformers":
            return
        shape = shape_at(trainer, shape, mine)
        try:
            check_format(shape, self.format)
        except ValueError as error:
            raise ValueError(f"{where}: after what comes before it {error}") from None
        methods = [method for moment, _, act in course_of(trainer) if moment < mine for method in act.methods]
        uneven = [type(method).__name__ for method in methods if may_be_uneven(method)]
        if uneven:
            raise ValueError(
                f"{where}: format=transformers needs the same number of experts in every layer, which "
                f"{', '.join(uneven)} with another scope than layer does not promise: use scope=layer or format=auto"
            )

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the folder; one that a killed run left is replaced."""
        if not trainer.is_global_zero:
            return
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        with spending(trainer, "exporting"):
            model = language_model(module)
            folder = save_pretrained(model, self.folder(trainer), tokenizer, self.format, overwrite=True)
        say(trainer, f"step {trainer.global_step}: wrote {folder}")
