"""The stage that trains low-rank terms beside the matrices, and folds them into the weights."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks.at_step import language_model, remember_plan, say, warn_of_no_plan
from moe_lightning.callbacks.compression_log import log_compression
from moe_lightning.callbacks.course import Change
from moe_lightning.callbacks.gradual import Act
from moe_lightning.callbacks.recovery.stage import RecoveryStage
from moe_lightning.compression import CompressionResult, compress
from moe_lightning.method import Method
from moe_lightning.recovery.lora import LoRA, MergeLoRA, Targets
from moe_lightning.recovery.selections import Adapters
from moe_lightning.statistics import Statistics


class LoRARecovery(RecoveryStage):
    """From a step on, train a low-rank term beside each matrix and nothing else; in the end fold them into the weights.

    The matrices may be dense, pruned, or integers: they stay as they are while the terms train. Terms of the same rank
    and alpha that are there already beside its targets train on, and are folded in with the others; terms beside other
    matrices stay as they are.

    Args:
        at_step: Optimizer step before which the terms are added.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        rank: Rank of each term.
        lora_alpha: Numerator of the factor of the terms, ``lora_alpha / rank``; twice the rank where None.
        targets: The matrices of the experts (a term for each expert), those of attention, or both.
        merge: Fold the terms into the weights when the stage is over; otherwise they stay beside them.
        requantize: What becomes of integers when terms are folded in: ``rtn`` rounds to nearest again, with the loss
            that is told; None leaves floating-point numbers, for a ``Compress`` with GPTQ or AWQ behind, say.
        learning_rate: Peak learning rate, from there a cosine to a tenth; None keeps the module's schedule.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None for the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own. 0 here: routers stand
            still, and terms that even out their choice by way of hidden states would not serve the text.

    Raises:
        ValueError: An option out of its range.

    Source: 2106.09685, with a term for each expert.
    """

    def __init__(
        self,
        at_step: int,
        *,
        steps: int | None = None,
        rank: int = 16,
        lora_alpha: float | None = None,
        targets: Targets = "experts+attention",
        merge: bool = True,
        requantize: Literal["rtn"] | None = "rtn",
        learning_rate: float | None = 1e-3,
        warmup_steps: int = 0,
        teacher: str | None = None,
        alpha: float = 0.0,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = 0.0,
    ) -> None:
        super().__init__(
            at_step,
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            teacher=teacher,
            alpha=alpha,
            temperature=temperature,
            hidden_weight=hidden_weight,
            load_balancing_coefficient=load_balancing_coefficient,
        )
        if requantize not in ("rtn", None):
            raise ValueError(f"LoRARecovery: requantize must be 'rtn' or None, got {requantize!r}")
        try:
            self.terms = LoRA(rank=rank, alpha=lora_alpha, targets=targets, existing="keep")
        except ValueError as error:
            said = str(error).removeprefix("LoRA: ")
            raise ValueError(f"LoRARecovery: {'lora_' if said.startswith('alpha') else ''}{said}") from None
        self.selection = Adapters(targets)
        self.merge = merge
        self.requantize = requantize
        self._begun_with: dict[str, Any] | None = None  # options of another process perhaps

    @property
    def _merging(self) -> MergeLoRA:
        return MergeLoRA(dequantize=self.requantize is None, targets=self.terms.targets)

    # ------------------------------------------------------------ state

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "rank": self.terms.rank,
            "lora_alpha": self.terms.numerator,
            "targets": self.terms.targets,
            "merge": self.merge,
            "requantize": self.requantize,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come, and by which terms."""
        return {**super().state_dict(), "options": self._begun_with or self._options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how far it has come, and warn where that was with other terms than are asked for now.

        Raises:
            ValueError: The stage has begun with others, and is not over.
        """
        super().load_state_dict(state_dict)
        then, now = state_dict.get("options"), self._options
        if then is None or then == now or not self.entered:
            return
        other = {name: value for name, value in now.items() if then.get(name) != value}
        words = [", ".join(f"{name}={options.get(name)}" for name in other) for options in (then, now)]
        if not self.left:
            raise ValueError(
                f"LoRARecovery at step {self.first_step}: the checkpoint lies in the middle of the stage with "
                f"{words[0]}: go on with the same options, and not with {words[1]}, or start from an earlier checkpoint"
            )
        self._begun_with = then
        warnings.warn(
            f"LoRARecovery at step {self.first_step}: the stage is over, with {words[0]}, and the model stays as it "
            f"is: {words[1]} is not applied. Start from an earlier checkpoint, or anew, to apply it",
            stacklevel=2,
        )

    # ------------------------------------------------------------ the course

    def changes(self, trainer: Trainer) -> list[Change]:
        """Return what it will add and fold; see :class:`~moe_lightning.callbacks.course.ChangesStructure`."""
        if self.left:
            return []
        found = [] if self.entered else [Change(self.first_step, Act(0, (self.terms,)))]
        if self.merge:
            end = self.planned_end(trainer)
            after = 0 if math.isinf(end) else int(end) - self.first_step
            found.append(Change(end, Act(after, (self._merging,)), first=True))
        return found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what cannot work, before anything is trained; see :class:`RecoveryStage`."""
        super().on_fit_start(trainer, pl_module)
        if not self.left:
            warn_of_no_plan(pl_module, "while LoRARecovery lasts", "of its terms")

    def change(self, trainer: Trainer, module: LightningModule) -> None:
        """Add the terms that are not there; they are zero."""
        model = language_model(module)
        shape = architecture_of(model).shape(model)
        there = self.selection.claimed(shape)
        if self.terms.propose(shape, Statistics.synthetic(shape)):
            self._compress(trainer, module, self.terms, "lora", "low-rank terms added")
        if there and not self._reopened:
            step = f"step {trainer.global_step}: LoRARecovery"
            say(trainer, f"{step} goes on with terms that are there already, {there:,} parameters")
        self._begun_with = None

    def change_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Fold the terms into the weights."""
        if not self.merge:
            return
        result = self._compress(trainer, module, self._merging, "merge", "low-rank terms folded in")
        losses = {
            f"{name}.{key}": loss for name, status in result.modules.items() for key, loss in status.losses.items()
        }
        rounded = {key: loss for key, loss in losses.items() if loss > 0}
        if rounded:
            worst = max(rounded, key=lambda key: rounded[key])
            say(
                trainer,
                f"step {trainer.global_step}: rounding took {sum(rounded.values()) / len(rounded):.1%} of the squared "
                f"terms on average, {rounded[worst]:.1%} at most ({worst})",
            )

    def _compress(
        self, trainer: Trainer, module: LightningModule, method: Method, name: str, note: str
    ) -> CompressionResult:
        step = trainer.global_step
        result = compress(
            language_model(module),
            None,
            [method],
            origin={"step": step},
            optimizers=trainer.optimizers,
            progress=False,
        )
        remember_plan(module, result.plan)
        log_compression(trainer, result, Act(0, (method,)), f"{name}-{step}", note)
        return result
