"""How much of what compressions cost came back."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from moe_lightning.callbacks.at_step import AtTheEnd, language_model, say
from moe_lightning.callbacks.processes import of_all_processes
from moe_lightning.callbacks.random_state import same_random_states
from moe_lightning.callbacks.spending import undisturbed
from moe_lightning.callbacks.tensorboard_pages import RECOVERY, add_pages
from moe_lightning.evaluation import evaluate
from moe_lightning.evaluation.intervals import Interval, mean_interval
from moe_lightning.files import write_atomically

Batch = Mapping[str, Any]

MIXED = "several"
"""In the place of a fingerprint: what was lost was not measured on the same blocks throughout."""


class RecoveredShare(AtTheEnd):
    """Measure the next-token loss around compressions and stages, and say which share of what was lost came back.

    It measures on the same batches of the validation split before the first compression, before and after each one,
    around each stage of recovery, at each validation and at the end, and logs::

        recovery/loss             nats per token now
        recovery/recovered_share  (compressed - now) / (compressed - before)

    ``before`` is the loss before the first compression. ``compressed`` is that plus what each compression added at its
    moment: with one compression the loss right after it. Training that goes on may recover more than was lost. Every
    compression, the end of each stage and that of the run are a line on the console and an entry of
    ``RUN/results/recovery.json``.

    There is no share where too little was lost for these blocks to tell: where the interval of what was lost (95 %,
    bootstrap over blocks) reaches 0. Nor is there one in a run that is resumed with another validation split, which is
    known by a fingerprint of its tokens. Where a compression lowered the loss it says so: in the sum that counts
    against what others lost.

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
        self.tokens = 0
        """Predicted tokens that are measured on, on all devices."""
        self._start = torch.zeros(0)
        self._known: tuple[int, Tensor] | None = None
        self._kept: Sequence[Batch] | None = None
        self._lost_B: Tensor | None = None  # in nats, of each block; None where an earlier release measured
        self._tokens_B: Tensor | None = None
        self._fingerprint: str | None = None  # of the blocks that what was lost was measured on
        self._other_blocks = False  # than those
        self._closing = False

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {
            "before": self.before,
            "lost": self.lost,
            "boundaries": [dict(item) for item in self.boundaries],
            "lost_of_blocks": self._lost_B,
            "tokens_of_blocks": self._tokens_B,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was measured."""
        self.before, self.lost = state_dict["before"], state_dict["lost"]
        self.boundaries = list(state_dict["boundaries"])
        self._lost_B, self._tokens_B = state_dict.get("lost_of_blocks"), state_dict.get("tokens_of_blocks")
        self._fingerprint = state_dict.get("fingerprint")

    # ------------------------------------------------------------ numbers

    @property
    def compressed(self) -> float | None:
        """The loss that there would be with all that compressions cost and nothing recovered; None before them."""
        return None if self.before is None else self.before + self.lost

    def share(self, loss: float) -> float | None:
        """Return which share of the lost loss came back; None where too little was lost, or on other blocks."""
        if self.before is None or self._why_no_share():
            return None
        return (self.before + self.lost - loss) / self.lost

    @property
    def lost_interval(self) -> Interval | None:
        """What all compressions added, in nats per token, with its interval; None where it is not known by blocks."""
        if self._lost_B is None or self._tokens_B is None or len(self._lost_B) < 2:
            return None
        return mean_interval(self._lost_B, self._tokens_B)

    def _why_no_share(self) -> str:
        if self._other_blocks:
            return "measured on other blocks than before, so there is no share"
        if self.lost <= 0:
            return "nothing was lost"
        interval = self.lost_interval
        return "too little was lost to give a share" if interval is not None and interval.low <= 0 else ""

    def _measure(self, trainer: Trainer, module: LightningModule) -> float:
        """Return the loss now, in nats per token, over all processes."""
        return float(self._measure_blocks(trainer, module).sum() / self.tokens)

    def _measure_blocks(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Return the nats of each block now, of all processes, `[B]`."""
        if self._known is not None and self._known[0] == trainer.global_step:
            return self._known[1]
        with undisturbed(trainer), trainer.precision_plugin.forward_context():
            result = evaluate(language_model(module), self._batches(trainer), progress=False)
        gathered = of_all_processes(trainer, (result.nats, result.tokens))
        nats_B, tokens_B = (torch.cat([pair[place] for pair in gathered]) for place in (0, 1))
        self.tokens = int(tokens_B.sum())
        if not self._other_blocks:
            self._tokens_B = tokens_B
            self._fingerprint = self._fingerprint or self._fingerprint_now(trainer)
        self._known = trainer.global_step, nats_B
        return nats_B

    def _fingerprint_now(self, trainer: Trainer) -> str:
        digest = hashlib.sha256()
        with same_random_states():  # a loader draws numbers when it begins
            for batch in self._batches(trainer):
                digest.update(batch["input_ids"].long().numpy().tobytes())
        return hashlib.sha256("".join(of_all_processes(trainer, digest.hexdigest())).encode()).hexdigest()

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; see :class:`~moe_lightning.callbacks.at_step.AtTheEnd`."""
        super().setup(trainer, pl_module, stage)
        self._closing = False

    def outstanding(self, trainer: Trainer) -> bool:
        """Say whether the end of an ended run was not measured."""
        return self.before is not None and self.boundaries[-1]["step"] != trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that there are batches to measure on, and know whether they are those of before.

        Raises:
            ValueError: There is no validation split.
        """
        language_model(pl_module)
        if self._source(trainer) is None:
            raise ValueError(
                "RecoveredShare measures on validation batches, and there are none: give the data a validation split "
                "(--data.validation), pass batches=..., or leave it out"
            )
        add_pages(trainer, RECOVERY)
        then = self._fingerprint
        self._other_blocks = then is not None and then != self._fingerprint_now(trainer)
        if self._other_blocks:
            warnings.warn(
                "RecoveredShare: the validation blocks are not those on which the lost loss was measured before the "
                "run was resumed: the loss is measured on these, and there will be no share of what was recovered. "
                "Resume with the same data options (--data.seed, --data.validation, --data.batch_size, ...) and "
                "num_batches to have it",
                stacklevel=2,
            )

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what there is to lose."""
        self._start = self._measure_blocks(trainer, module)
        if self.before is None:
            self.before = self._measure(trainer, module)

    def after_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure what was lost."""
        self._known = None
        added_B = self._measure_blocks(trainer, module) - self._start
        added = float(added_B.sum() / self.tokens)
        if self._other_blocks:
            self._fingerprint = MIXED
        else:
            first = not any(item["event"] == "compressed" for item in self.boundaries)
            self._lost_B = added_B if first else None if self._lost_B is None else self._lost_B + added_B
            self.lost += added
        self._boundary(trainer, module, "compressed", added)

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
        """Measure the end, unless it was measured at the same step, or only the time was up."""
        self._closing = self.has_ended(trainer, pl_module)
        if self._closing and self.before is not None and self.boundaries[-1]["step"] != trainer.global_step:
            self._boundary(trainer, pl_module, "end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up where the last that happened was a compression."""
        if not self._closing or self.before is None or self.compressed is None:
            return
        last = self.boundaries[-1]
        if last["event"] != "compressed" or last["step"] != trainer.global_step:
            return
        if self._other_blocks:
            numbers = f"loss {last['loss']:.4f} nats per token now"
        else:
            numbers = (
                f"loss {self.before:.4f} nats per token before any compression, {self.compressed:.4f} with all that "
                f"compressions cost, {last['loss']:.4f} now"
            )
        say(trainer, f"in all: {numbers}: {self._in_words(last['recovered_share'])} ({self.tokens:,} tokens)")

    # ------------------------------------------------------------ telling

    def _log(self, trainer: Trainer, loss: float) -> None:
        share = self.share(loss)
        numbers = {"recovery/loss": loss} | ({} if share is None else {"recovery/recovered_share": share})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def _in_words(self, share: float | None) -> str:
        return self._why_no_share() if share is None else f"{share:.1%} of the lost loss recovered"

    def _boundary(self, trainer: Trainer, module: LightningModule, event: str, added: float | None = None) -> None:
        loss = self._measure(trainer, module)
        share, step = self.share(loss), trainer.global_step
        self._log(trainer, loss)
        entry = {"step": step, "event": event, "loss": loss, "recovered_share": share, "tokens": self.tokens}
        self.boundaries.append(entry if added is None else {**entry, "added": added})
        said = self._in_words(share)
        if added is not None:
            said = f"{loss - added:.4f} before"
            if added < 0:
                said += f": it lowered the loss by {-added:.4f}, which counts against what other compressions lost"
        where = {"compressed": "after compressing", "end": "at the end"}.get(event, f"after {event}")
        original = "" if added is not None or self._other_blocks else f", {self.before:.4f} before any compression"
        measured = f"loss {loss:.4f} nats per token ({self.tokens:,} tokens)"
        say(trainer, f"step {step}: {measured} {where}, {said}{original}")
        if trainer.is_global_zero:
            interval = self.lost_interval
            numbers = {
                "before": self.before,
                "compressed": self.compressed,
                "lost": self.lost,
                "lost_interval": None if interval is None else [interval.low, interval.high],
                "tokens": self.tokens,
                "boundaries": self.boundaries,
            }
            path = Path(trainer.default_root_dir) / "results" / "recovery.json"
            write_atomically(path, json.dumps(numbers, indent=2) + "\n")
