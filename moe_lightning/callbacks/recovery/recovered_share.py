"""How much of what compressions cost came back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moe_lightning.callbacks.at_step import language_model, say
from moe_lightning.callbacks.random_state import random_states, set_random_states
from moe_lightning.evaluation import evaluate
from moe_lightning.files import write_atomically

Batch = Mapping[str, Any]


class RecoveredShare(Callback):
    """Measure the next-token loss around compressions and stages, and say which share of what was lost came back.

    It measures on the same batches of the validation split before the first compression, before and after each one,
    around each stage of recovery, at each validation and at the end, and logs::

        recovery/loss             nats per token now
        recovery/recovered_share  (compressed - now) / (compressed - before)

    ``before`` is the loss before the first compression. ``compressed`` is that plus what each compression added at its
    moment: with one compression the loss right after it. Training that goes on may recover more than was lost. Every
    compression, the end of each stage and that of the run are a line on the console and an entry of
    ``RUN/results/recovery.json``.

    The model is measured in eval mode, and no random number is drawn from the training's sequence.

    Args:
        num_batches: Batches of the validation split, on each device.
        batches: Batches where there is no validation split (from Python only).

    Raises:
        ValueError: ``num_batches`` is not positive; before the run: there are no batches.
    """

    def __init__(self, num_batches: int = 8, batches: Any = None) -> None:
        super().__init__()
        if num_batches < 1:
            raise ValueError(f"RecoveredShare: num_batches must be 1 or more, got {num_batches}")
        self.num_batches = num_batches
        self.batches: Iterable[Batch] | None = batches
        self.before: float | None = None
        """Loss before the first compression, in nats per token."""
        self.lost = 0.0
        """What all compressions added together."""
        self.boundaries: list[dict[str, Any]] = []
        """Step, event, loss and recovered share of every compression, end of a stage and end of a run."""
        self._start = 0.0
        self._known: tuple[int, float] | None = None
        self._kept: Sequence[Batch] | None = None

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"before": self.before, "lost": self.lost, "boundaries": [dict(item) for item in self.boundaries]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was measured."""
        self.before, self.lost = state_dict["before"], state_dict["lost"]
        self.boundaries = list(state_dict["boundaries"])

    # ------------------------------------------------------------ numbers

    @property
    def compressed(self) -> float | None:
        """The loss that there would be with all that compressions cost and nothing recovered; None before them."""
        return None if self.before is None else self.before + self.lost

    def share(self, loss: float) -> float | None:
        """Return which share of the lost loss came back; None where nothing was lost."""
        return None if self.before is None or self.lost <= 0 else (self.before + self.lost - loss) / self.lost

    def _measure(self, trainer: Trainer, module: LightningModule) -> float:
        """Return the loss now, in nats per token, over all processes."""
        if self._known is not None and self._known[0] == trainer.global_step:
            return self._known[1]
        model = language_model(module)
        states = random_states()
        # A validation runs in inference mode, and tensors that are kept (packed weights, say) must not be of that kind.
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            result = evaluate(model, self._batches(trainer), progress=False)
        set_random_states(states)
        sums = torch.stack([result.nats.sum(), result.tokens.sum().double()]).to(module.device)
        added: Any = trainer.strategy.reduce(sums, reduce_op="sum")
        loss = float(added[0] / added[1])
        self._known = trainer.global_step, loss
        return loss

    def _batches(self, trainer: Trainer) -> Sequence[Batch]:
        if self._kept is None:
            source = self._source(trainer)
            assert source is not None
            # Copies on the CPU: a loader may give the same memory again.
            self._kept = [
                {name: value.detach().cpu().clone() for name, value in batch.items() if isinstance(value, Tensor)}
                for batch in islice(source, self.num_batches)
            ]
        return self._kept

    def _source(self, trainer: Trainer) -> Iterable[Batch] | None:
        if self.batches is not None:
            return self.batches
        loaders: Any = trainer.val_dataloaders
        if loaders is None:
            datamodule: Any = getattr(trainer, "datamodule", None)
            loaders = None if datamodule is None else datamodule.val_dataloader()
        if isinstance(loaders, list | tuple):
            loaders = loaders[0] if loaders else None
        return loaders

    # ------------------------------------------------------------ moments

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there are batches to measure on.

        Raises:
            ValueError: There is no validation split.
        """
        language_model(pl_module)
        if self._source(trainer) is None:
            raise ValueError(
                "RecoveredShare measures on validation batches, and there are none: give the data a validation split "
                "(--data.validation), pass batches=..., or leave it out"
            )

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what there is to lose."""
        self._start = self._measure(trainer, module)
        if self.before is None:
            self.before = self._start

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what was lost."""
        self._known = None
        self.lost += self._measure(trainer, module) - self._start
        self._boundary(trainer, module, "compressed")

    def before_stage(self, trainer: Trainer, module: LightningModule, stage: Any) -> None:
        """Measure where the stage begins."""
        if self.before is not None:
            self._log(trainer, self._measure(trainer, module))

    def after_stage(self, trainer: Trainer, module: LightningModule, stage: Any) -> None:
        """Measure what the stage brought."""
        if self.before is not None:
            self._known = None
            self._boundary(trainer, module, type(stage).__name__)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure along with a validation in training."""
        if self.before is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._log(trainer, self._measure(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end, unless something ended at the same step and was measured."""
        if self.before is not None and self.boundaries[-1]["step"] != trainer.global_step:
            self._boundary(trainer, pl_module, "end")

    # ------------------------------------------------------------ telling

    def _log(self, trainer: Trainer, loss: float) -> None:
        share = self.share(loss)
        numbers = {"recovery/loss": loss} | ({} if share is None else {"recovery/recovered_share": share})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def _boundary(self, trainer: Trainer, module: LightningModule, event: str) -> None:
        loss = self._measure(trainer, module)
        share, step = self.share(loss), trainer.global_step
        self._log(trainer, loss)
        self.boundaries.append({"step": step, "event": event, "loss": loss, "recovered_share": share})
        said = "nothing was lost" if share is None else f"{share:.1%} of the lost loss recovered"
        if event == "compressed":
            said = f"{self._start:.4f} before"
        where = {"compressed": "after compressing", "end": "at the end"}.get(event, f"after {event}")
        original = f", {self.before:.4f} before any compression" if event != "compressed" else ""
        say(trainer, f"step {step}: loss {loss:.4f} nats per token {where}, {said}{original}")
        if trainer.is_global_zero:
            numbers = {"before": self.before, "compressed": self.compressed, "boundaries": self.boundaries}
            path = Path(trainer.default_root_dir) / "results" / "recovery.json"
            write_atomically(path, json.dumps(numbers, indent=2) + "\n")
