"""The stages that train parts of a compressed model as they are: routers, novices, everything."""

from __future__ import annotations

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
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own. 0 here: it would pull
            the routers, which alone move, away from the teacher's choice.

    Raises:
        ValueError: An option out of its range.

    Source: 1503.02531, eq. 1 to 3, on the routers alone.
    """

    selection = Routers()
    remedy = ": the model has no MoE layer left"

    def __init__(
        self,
        at_step: int,
        *,
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
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            teacher=teacher,
            alpha=alpha,
            temperature=temperature,
            hidden_weight=hidden_weight,
            load_balancing_coefficient=load_balancing_coefficient,
        )


class NoviceTuning(RecoveryStage):
    """From a step on, train the novices, vectors and low-rank maps, and nothing else.

    Put it behind the ``Compress`` that makes the novices; both may have the same step.

    Args:
        at_step: Optimizer step from which only novices train.
        steps: Optimizer steps that it lasts; None up to the next stage, or to the end of the run.
        learning_rate: Peak learning rate of the novices, from there a cosine to a tenth; None keeps the module's
            schedule.
        warmup_steps: Optimizer steps over which the learning rate rises linearly from 0.
        teacher: Who is imitated: ``before`` for the model as it was before the first compression of this run, a Hugging
            Face folder, or a folder of predictions that ``moe-lightning cache-logits`` wrote. None for the text alone.
        alpha: Share of the teacher in the loss, from 0 (the text alone) to 1 (the teacher alone).
        temperature: By which predictions are softened.
        hidden_weight: Weight of the squared error of hidden states, in units of the teacher's squares.
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own, so that without other
            options the loss is that of the training before; routers stand still, and it moves little.

    Raises:
        ValueError: An option out of its range.

    Source: 2507.00390 makes novices and leaves them; tuning them is ours.
    """

    selection = Novices()
    remedy = ": put a Compress with Novices before it"

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
        load_balancing_coefficient: float | None = None,
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
        load_balancing_coefficient: Weight of the load-balancing loss; None for the module's own: routers and experts
            move together here, as when the model was trained.

    Raises:
        ValueError: An option out of its range.

    Source: 1503.02531; alpha 0.5 and temperature 2 are those of 2507.00390's distillation.
    """

    selection = Everything()
    trains_frozen = False

    def __init__(
        self,
        at_step: int,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
        warmup_steps: int = 0,
        teacher: str | None = "before",
        alpha: float = 0.5,
        temperature: float = 2.0,
        hidden_weight: float = 0.0,
        load_balancing_coefficient: float | None = None,
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
