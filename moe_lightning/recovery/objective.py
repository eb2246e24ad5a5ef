"""What a training step minimises while a model recovers.

Legend: B blocks, S tokens of a block, V vocabulary, H hidden, N tokens that count, K words that a prediction was cut
to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe_lightning.recovery.losses import hidden_error, kl_to_teacher, kl_to_top_words, next_token_loss


@dataclass(frozen=True)
class TopWords:
    """A teacher's predictions, cut to its likeliest words.

    Attributes:
        log_probability: Of those words, softened by the temperature that was asked for, ``[B, S, K]``.
        words: Their numbers, int64 ``[B, S, K]``.
        rest: Log-probability of all others together, ``[B, S]``.
    """

    log_probability: Tensor
    words: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Targets:
    """What a teacher says of a batch.

    Attributes:
        predictions: Logits ``[B, S, V]``, or the likeliest words.
        hidden: What enters decoder layers, ``[B, S, H]``, by the layer's number in the original model, and what leaves
            the last norm, by the number of layers of the original model; empty where nobody asked for them.
    """

    predictions: Tensor | TopWords
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """Whoever knows what should be predicted."""

    @property
    def gives_hidden(self) -> bool:
        """Whether it knows hidden states, too."""

    def targets(self, batch: Mapping[str, Tensor], temperature: float, hidden: bool) -> Targets:
        """Say what should be predicted in a batch, on its device and without gradients.

        Args:
            batch: ``input_ids`` ``[B, S]`` and perhaps ``attention_mask``.
            temperature: By which predictions that are cut to some words are softened.
            hidden: Give hidden states as well.
        """


@dataclass(frozen=True)
class Student:
    """What the model that learns says of a batch.

    Attributes:
        logits: ``[B, S, V]``.
        hidden: As in :class:`Targets`, of the layers that the model has.
    """

    logits: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """``(1 - alpha) CE + alpha tau^2 KL(teacher || student) + beta hidden error + gamma balance``.

    Attributes:
        teacher: Who teaches; None for the text alone.
        alpha: Share of the teacher, from 0 to 1.
        temperature: tau.
        hidden_weight: beta: weight of the squared error of hidden states in units of the teacher's squares, the mean
            over what enters the layers that both have, but for layer 0, and what leaves the last norm.
        load_balancing_coefficient: gamma: weight of the load-balancing loss; None for the module's own.

    Raises:
        ValueError: An option out of its range, or one that a teacher is missing for.

    Source: 1503.02531; alpha 0.5 and tau 2 are those of 2507.00390's distillation.
    """

    teacher: Teacher | None = None
    alpha: float = 0.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    load_balancing_coefficient: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (the text alone) and 1 (the teacher alone), got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight must not be negative, got {self.hidden_weight}")
        if self.teacher is None and (self.alpha > 0 or self.hidden_weight > 0):
            raise ValueError("alpha and hidden_weight need a teacher: name one, or set both to 0")
        if self.hidden_weight > 0 and self.teacher is not None and not self.teacher.gives_hidden:
            raise ValueError("hidden_weight needs a teacher that is a model: cached predictions hold no hidden states")

    @property
    def wants_hidden(self) -> bool:
        """Whether hidden states are compared."""
        return self.hidden_weight > 0

    def __call__(self, student: Student, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, without the balancing loss.

        Args:
            student: What the model says.
            batch: ``input_ids``, ``labels`` (not shifted, -100 where a token does not count) and perhaps
                ``attention_mask``.

        Returns:
            The loss, and its parts by name: ``loss`` (cross-entropy, nats), ``kl``, ``hidden_error``; those that count.
        """
        # Without the graph of a loss that does not count: it would hold the logits of all tokens once more.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1):
            entropy = next_token_loss(student.logits, batch["labels"])
        parts = {"loss": entropy.detach()}
        if self.teacher is None:
            return entropy, parts
        total = (1 - self.alpha) * entropy if self.alpha < 1 else torch.zeros_like(parts["loss"])
        targets = self.teacher.targets(batch, self.temperature, self.wants_hidden)
        if self.alpha > 0:
            counts_BS = batch["labels"][:, 1:] != -100
            kl = self._kl(student.logits[:, :-1][counts_BS], targets.predictions, counts_BS)
            parts["kl"] = kl.detach()
            total = total + self.alpha * kl
        if self.wants_hidden:
            total, parts["hidden_error"] = self._add_hidden(total, student, targets, batch)
        return total, parts

    def _kl(self, logits_NV: Tensor, predictions: Tensor | TopWords, counts_BS: Tensor) -> Tensor:
        if isinstance(predictions, Tensor):
            return kl_to_teacher(logits_NV, predictions[:, :-1][counts_BS], self.temperature)
        cut = predictions.log_probability, predictions.words, predictions.rest
        teacher_NK, words_NK, rest_N = (part[:, :-1][counts_BS] for part in cut)
        return kl_to_top_words(logits_NV, teacher_NK, words_NK, rest_N, self.temperature)

    def _add_hidden(
        self, total: Tensor, student: Student, targets: Targets, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        mask = batch.get("attention_mask")
        known = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
        # Of layers that were dropped nothing is known. What enters layer 0 is the embedding of the words, which no
        # layer made: its error is mostly zero and would only thin out the mean.
        layers = sorted((student.hidden.keys() & targets.hidden.keys()) - {0})
        error = hidden_error(
            [student.hidden[layer][known] for layer in layers], [targets.hidden[layer][known] for layer in layers]
        )
        return total + self.hidden_weight * error, error.detach()


def hidden_by_layer(hidden_states: Sequence[Tensor], blocks: Sequence[int], num_layers: int) -> dict[int, Tensor]:
    """Sort the hidden states that transformers returns by the layers that read them.

    Args:
        hidden_states: What enters each decoder layer that the model has, and what leaves its last norm.
        blocks: Numbers of those layers in the original model.
        num_layers: Layers of the original model.
    """
    return dict(zip((*blocks, num_layers), hidden_states, strict=True))
