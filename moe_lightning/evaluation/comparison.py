"""A model against another one on the same tokens: likelihood, divergence, agreement, block by block.

B blocks, S tokens per block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.likelihood import NOT_IN_LOSS, LikelihoodResult, block_sums, labels_of, logits_of

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockScores:
    """Sums over the predicted tokens of each block that has any.

    Attributes:
        nats: Negative log-likelihood [B], float64; not finite where the model is not.
        tokens: Predicted tokens [B], int64.
        bytes: UTF-8 bytes of them [B], int64.
        divergence: KL of the uncompressed model to this one [B], float64, in nats; NaN in blocks that were not compared
            with it, and not finite where one of the two is not.
        agreement: Tokens for which both models find the same token the most likely [B], float64; NaN in blocks that
            were not compared.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    divergence: Tensor
    agreement: Tensor

    @property
    def likelihood(self) -> LikelihoodResult:
        """The part that `evaluate` returns."""
        return LikelihoodResult(self.nats, self.tokens, self.bytes)

    @property
    def finite(self) -> Tensor:
        """Where the model gives finite numbers [B]; elsewhere it is broken, whatever the other sums say."""
        return self.nats.isfinite()

    @property
    def compared(self) -> Tensor:
        """Which blocks were compared with the uncompressed model [B]: one of the two sums is there."""
        return ~(self.divergence.isnan() & self.agreement.isnan())

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain types that JSON can hold."""
        return {item.name: getattr(self, item.name).tolist() for item in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, list[float]]) -> BlockScores:
        """Read what :meth:`to_dict` wrote."""
        kinds = {"tokens": torch.int64, "bytes": torch.int64}
        return cls(
            **{
                item.name: torch.tensor(values[item.name], dtype=kinds.get(item.name, torch.float64))
                for item in fields(cls)
            }
        )


class Prediction(NamedTuple):
    """What a model says of a batch, or of one of its blocks.

    Attributes:
        log_probability: Of every next token [B, S, V] or [S, V], in fp32 or wider.
        likeliest: The token that it finds the most likely [B, S] or [S].
    """

    log_probability: Tensor
    likeliest: Tensor


def prediction_of(logits: Tensor) -> Prediction:
    """Return what logits [..., S, V] say."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return Prediction(wide.log_softmax(-1), logits.argmax(-1))


def score_logits(
    logits: Tensor, batch: Batch, reference: Callable[[int], Prediction | None] | None = None
) -> BlockScores:
    """Sum up what a model makes of a batch, and how far it is from another model.

    Args:
        logits: Of the model [B, S, V].
        batch: ``input_ids`` [B, S] and, if there are any, ``attention_mask``, ``labels``, ``token_bytes``. Without
            labels every token that is not padding counts.
        reference: Returns what the uncompressed model says of a block [S, V], or None where that is not known; it is
            called for one block after the other. None: it is known of no block.

    Returns:
        The sums of every block on the CPU, also of those without a predicted token.

    Cost:
        About ``10 * V`` operations a token for the divergence.
    """
    labels = labels_of(batch).to(logits.device)
    token_bytes = batch.get("token_bytes")
    sums = block_sums(logits, labels, None if token_bytes is None else token_bytes.to(logits.device))
    divergence, agreement = (torch.full_like(sums.nats, math.nan) for _ in range(2))
    for block in range(len(labels)):
        known = None if reference is None else reference(block)
        if known is None:
            continue
        counted = labels[block, 1:] != NOT_IN_LOSS
        likeliest = logits[block, :-1].argmax(-1)
        agreement[block] = (likeliest == known.likeliest[:-1].to(logits.device))[counted].sum()
        log_reference = known.log_probability[:-1].to(logits.device)
        divergence[block] = _divergence(log_reference, logits[block, :-1])[counted].sum()
    found = (sums.nats, sums.tokens, sums.bytes, divergence, agreement)
    return BlockScores(*(values.cpu() for values in found))


def join_scores(parts: Sequence[BlockScores]) -> BlockScores:
    """Put the sums of batches together.

    Args:
        parts: Of each batch.

    Returns:
        The sums of every block that has a predicted token.

    Raises:
        ValueError: No token is predicted.
    """
    if not parts:
        raise ValueError("there is no held-out batch")
    joined = {item.name: torch.cat([getattr(part, item.name) for part in parts]) for item in fields(BlockScores)}
    used = joined["tokens"] > 0
    if not used.any():
        raise ValueError("no token of the held-out batches is predicted: all labels are -100")
    return BlockScores(**{name: values[used] for name, values in joined.items()})


class ReferencePredictions:
    """The uncompressed model's predictions on the held-out batches, kept as far as memory allows.

    Args:
        model: The uncompressed model, as long as nothing has changed it.
        batches: Held-out batches.
        max_bytes: Predictions to keep at most; those of further batches are computed anew each time.
        again: Returns the uncompressed model once more; called when predictions must be computed anew, and once only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        max_bytes: int,
        again: Callable[[], PreTrainedModel],
    ) -> None:
        self.batches = batches
        self._again = again
        self._model: PreTrainedModel | None = None
        self._kept: list[Prediction] = []
        head = model.get_output_embeddings().weight
        wide = torch.promote_types(head.dtype, torch.float32)
        sizes = [batch["input_ids"].shape for batch in batches]
        kept = 0
        while kept < len(sizes) and predictions_bytes(_tokens(sizes[: kept + 1]), len(head)) <= max_bytes:
            kept += 1
        # In one piece: many pieces between the activations of the passes would leave as much memory unusable.
        values = torch.empty(_tokens(sizes[:kept]), len(head), dtype=wide, device=head.device)
        start = 0
        with evaluation_mode(model):
            for batch, size in zip(batches[:kept], sizes, strict=False):
                prediction = prediction_of(logits_of(model, batch))
                part = values[start : start + size.numel()].view(*size, -1)
                part.copy_(prediction.log_probability)
                self._kept.append(Prediction(part, prediction.likeliest))
                start += size.numel()

    def prediction(self, number: int) -> Prediction:
        """Return what the uncompressed model says of a batch.

        Args:
            number: Place of the batch.
        """
        if number < len(self._kept):
            return self._kept[number]
        if self._model is None:
            self._model = self._again()
        with evaluation_mode(self._model):
            return prediction_of(logits_of(self._model, self.batches[number]))

    def score(self, model: PreTrainedModel) -> BlockScores:
        """Measure a model on all batches.

        Args:
            model: A causal language model, compressed or not.

        Returns:
            The sums of every block that has a predicted token.

        Raises:
            ValueError: No token is predicted.

        Cost:
            One forward pass, and the divergence: about ``10 * V`` operations a token.
        """
        found: list[BlockScores] = []
        with evaluation_mode(model):
            for number, batch in enumerate(self.batches):
                of_block = partial(_block, self.prediction(number))
                found.append(score_logits(logits_of(model, batch), batch, of_block))
        return join_scores(found)


def _block(known: Prediction, block: int) -> Prediction:
    return Prediction(known.log_probability[block], known.likeliest[block])


def _tokens(sizes: Sequence[torch.Size]) -> int:
    return sum(size.numel() for size in sizes)


def _divergence(log_reference: Tensor, logits: Tensor) -> Tensor:
    """Compute what ``moe_lightning.divergence.kl_divergence`` does, in fp32 where that is what the logits are.

    The float64 there takes as long as the whole model does on a small one; here errors of 1e-6 nats a token are far
    below the intervals.
    """
    log_student = logits.to(log_reference.dtype).log_softmax(-1)
    return (log_reference.exp() * (log_reference - log_student)).sum(-1, dtype=torch.float64)


def predictions_bytes(tokens: int, vocab_size: int) -> int:
    """Say how much memory the predictions for some tokens take.

    Args:
        tokens: Held-out tokens.
        vocab_size: Of the model.
    """
    return tokens * (4 * vocab_size + 8)
