"""The stages that train parts of a compressed model as they are: routers, novices, everything."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from moe_lightning.callbacks.recovery.stage import RecoveryStage
from moe_lightning.recovery.selections import Everything, Novices, Routers


class RouterDistillation(RecoveryStage):
    """From a step on, train the routers and nothing else, after a teacher: the cheapest way of recovery.

    Experts that went leave the routers with probabilities that were meant for a larger choice; a few steps adapt them.

    Args:
        at_step: Optimizer step before which the stage begins.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        learning_rate: Peak learning rate, from there a cosine to a tenth; None keeps the module's schedule.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None (with alpha 0) for
            the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own.

    Raises:
        ValueError: An option out of its range.

    Source: 1503.02531, eq. 1 to 3, on the routers alone.
    """

    selection = Routers()
    remedy = ": the model has no MoE layer left"

    def __init__(
        self,
        at_step: int,
        steps: int | None = None,
        learning_rate: float | None = 1e-3,
        warmup_steps: int = 0,
        teacher: str | None = "before",
        alpha: float = 1.0,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = 0.0,
    ) -> None:
        super().__init__(
            at_step,
            steps,
            learning_rate,
            warmup_steps,
            teacher,
            alpha,
            temperature,
            hidden_weight,
            load_balancing_coefficient,
        )


class NoviceTuning(RecoveryStage):
    """From a step on, train the novices, vectors and low-rank maps, and nothing else.

    Put it behind the ``Compress`` that makes the novices; both may have the same step.

    Args:
        at_step: Optimizer step from which only novices train.
        learning_rate: Peak learning rate of the novices, from there a cosine to a tenth; None keeps the module's
            schedule.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None for the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own.

    Raises:
        ValueError: An option out of its range.

    Source: 2507.00390 makes novices and leaves them; tuning them is ours.
    """

    selection = Novices()
    remedy = ": put a Compress with Novices before it"

    def __init__(
        self,
        at_step: int,
        learning_rate: float | None = None,
        steps: int | None = None,
        warmup_steps: int = 0,
        teacher: str | None = None,
        alpha: float = 0.0,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = None,
    ) -> None:
        super().__init__(
            at_step,
            steps,
            learning_rate,
            warmup_steps,
            teacher,
            alpha,
            temperature,
            hidden_weight,
            load_balancing_coefficient,
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


class FullFineTuning(RecoveryStage):
    """From a step on, train everything that can move, on the text and after a teacher.

    Integers stay as they are, and so do the zeros of pruned matrices. What was frozen before stays frozen.

    Args:
        at_step: Optimizer step before which the stage begins.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        learning_rate: Peak learning rate, from there a cosine to a tenth; None keeps the module's schedule.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None (with alpha 0) for
            the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own.

    Raises:
        ValueError: An option out of its range.

    Source: 1503.02531; alpha 0.5 is that of 2507.00390's distillation.
    """

    selection = Everything()
    trains_frozen = False

    def __init__(
        self,
        at_step: int,
        steps: int | None = None,
        learning_rate: float | None = None,
        warmup_steps: int = 0,
        teacher: str | None = "before",
        alpha: float = 0.5,
        temperature: float = 1.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = None,
    ) -> None:
        super().__init__(
            at_step,
            steps,
            learning_rate,
            warmup_steps,
            teacher,
            alpha,
            temperature,
            hidden_weight,
            load_balancing_coefficient,
        )
