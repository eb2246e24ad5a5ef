"""How well a model predicts text: sums of nats, tokens and bytes; perplexity and bits per byte.

    perplexity    = exp(sum of nats / number of tokens)
    bits_per_byte = sum of nats / ln 2 / number of UTF-8 bytes

The sums are float64 and over tokens, so they do not depend on how the data were split into batches. Bits per byte
compare models with different tokenizers: the end-of-text tokens cost nats but stand for no byte.

B blocks, S tokens per block, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor
from tqdm import tqdm

from moe_lightning.architectures.modes import evaluation_mode

NOT_IN_LOSS = -100

# Elements of logits that are converted to float32 at a time (64 MiB).
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class BlockSums:
    """Sums over the predicted tokens of each block.

    Args:
        nats: Negative log-likelihood [B], float64, in nats.
        tokens: Predicted tokens [B], int64.
        bytes: UTF-8 bytes of the predicted tokens [B], int64.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor


def block_sums(logits: Tensor, labels: Tensor, token_bytes: Tensor | None = None) -> BlockSums:
    """Sum the negative log-likelihood of every block: position s predicts token s + 1.

    Args:
        logits: [B, S, V], any float type; turned into float32 a chunk at a time.
        labels: Token ids [B, S], not shifted; -100 = not in the sums.
        token_bytes: UTF-8 bytes that each token stands for [B, S]; `None` counts no bytes.

    Returns:
        The sums.

    Raises:
        ValueError: When the shapes do not fit.
    """
    if logits.shape[:-1] != labels.shape or (token_bytes is not None and token_bytes.shape != labels.shape):
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        if token_bytes is not None:
            shapes += f", token_bytes {tuple(token_bytes.shape)}"
        raise ValueError(f"expected logits [B, S, V], labels [B, S] and token_bytes [B, S], got {shapes}")
    num_blocks, num_tokens = labels.shape
    num_predictions = num_tokens - 1
    targets = labels[:, 1:]
    in_loss = targets != NOT_IN_LOSS
    nats = torch.zeros(num_blocks, num_predictions, dtype=torch.float64, device=logits.device)
    width = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for block in range(num_blocks):
        for start in range(0, num_predictions, width):
            stop = min(start + width, num_predictions)
            nats[block, start:stop] = F.cross_entropy(
                logits[block, start:stop].float(),
                targets[block, start:stop],
                ignore_index=NOT_IN_LOSS,
                reduction="none",
            ).double()
    counted = torch.zeros_like(in_loss, dtype=torch.int64) if token_bytes is None else token_bytes[:, 1:] * in_loss
    return BlockSums(nats.sum(dim=1), in_loss.sum(dim=1), counted.sum(dim=1))


def summarise(nats: float, tokens: float, num_bytes: float) -> dict[str, float]:
    """Turn sums into the numbers that people compare.

    Args:
        nats: Sum of negative log-likelihoods.
        tokens: Number of predicted tokens.
        num_bytes: Number of their bytes.

    Returns:
        `perplexity`, `bits_per_byte`, `nats_per_token` and `tokens`. Without tokens (or bytes) the ratios are NaN; a
        perplexity beyond float64 is infinite.
    """
    nats_per_token = nats / tokens if tokens else math.nan
    return {
        "perplexity": math.exp(nats_per_token) if not nats_per_token > 709 else math.inf,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
        "nats_per_token": nats_per_token,
        "tokens": tokens,
    }


class Likelihood(torchmetrics.Metric):
    """Sums of nats, tokens and bytes over batches and ranks, in float64 whatever the precision of the module.

    `compute()` returns `perplexity`, `bits_per_byte`, `nats_per_token` and `tokens`, as float64 scalars.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, exclude_state: Any = "") -> "Likelihood":
        # `Trainer(precision="bf16-true")` casts every float tensor of the module; sums in bfloat16 would be worthless
        metric = super()._apply(fn, exclude_state)
        for name, default in self._defaults.items():
            self._defaults[name] = cast(Tensor, default).double()
            setattr(self, name, getattr(self, name).double())
        return cast("Likelihood", metric)

    def update(self, logits: Tensor, labels: Tensor, token_bytes: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: [B, S, V].
            labels: [B, S], not shifted; -100 = not counted.
            token_bytes: [B, S].
        """
        self.add(block_sums(logits.detach(), labels, token_bytes))

    def add(self, sums: BlockSums) -> None:
        """Add sums that were computed already.

        Args:
            sums: What `block_sums` returned.
        """
        self.nats = self.nats + sums.nats.sum()
        self.tokens = self.tokens + sums.tokens.sum()
        self.bytes = self.bytes + sums.bytes.sum()
        self._computed = None

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers of everything that was added."""
        numbers = summarise(float(self.nats), float(self.tokens), float(self.bytes))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


@dataclass(frozen=True)
class LikelihoodResult:
    """What a model makes of a text, block by block (for paired comparisons of two models on the same blocks).

    Args:
        nats: Negative log-likelihood of each block [blocks], float64.
        tokens: Predicted tokens of each block [blocks], int64.
        bytes: UTF-8 bytes of the predicted tokens of each block [blocks], int64.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    @property
    def num_tokens(self) -> int:
        """Predicted tokens in all."""
        return int(self.tokens.sum())

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return self.to_dict()["nats_per_token"]

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood."""
        return self.to_dict()["perplexity"]

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; NaN when the batches did not say how many bytes their tokens stand for."""
        return self.to_dict()["bits_per_byte"]

    def to_dict(self) -> dict[str, float]:
        """Return `perplexity`, `bits_per_byte`, `nats_per_token`, `tokens`."""
        return summarise(float(self.nats.sum()), float(self.tokens.sum()), float(self.bytes.sum()))


def logits_of(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of a batch [B, S, V].

    Args:
        model: A causal language model, in eval mode.
        batch: ``input_ids`` [B, S] and, where there is padding, ``attention_mask`` [B, S].
    """
    device = next(model.parameters()).device
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask.to(device)
    return model(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False).logits


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch [B, S], not shifted; without any, its token ids, and -100 for padding.

    Args:
        batch: ``input_ids`` [B, S] and, if there are any, ``attention_mask``, ``labels``.
    """
    labels = batch.get("labels")
    if labels is not None:
        return labels
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, NOT_IN_LOSS)


def evaluate(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]], progress: bool = True) -> LikelihoodResult:
    """Measure how well a model predicts batches.

    Args:
        model: A causal language model as transformers makes them. It runs in evaluation mode, without gradients, and
            is left in the mode that it was in.
        batches: Dicts with `input_ids` [B, S] and, if there are any, `attention_mask`, `labels`, `token_bytes`. Without
            labels every token that is not padding counts.
        progress: Whether to show a progress bar (on a terminal).

    Returns:
        The sums of every block that has a predicted token.

    Raises:
        ValueError: When no token was predicted.

    Cost:
        One forward pass.
    """
    found: list[BlockSums] = []
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None if progress else True, leave=False):
            logits = logits_of(model, batch)
            token_bytes = batch.get("token_bytes")
            token_bytes = None if token_bytes is None else token_bytes.to(logits.device)
            found.append(block_sums(logits, labels_of(batch).to(logits.device), token_bytes))
    if not found:
        raise ValueError("there is no batch to evaluate")
    tokens = torch.cat([sums.tokens for sums in found]).cpu()
    used = tokens > 0
    if not used.any():
        raise ValueError("no token of the batches is predicted: all labels are -100")
    return LikelihoodResult(
        nats=torch.cat([sums.nats for sums in found]).cpu()[used],
        tokens=tokens[used],
        bytes=torch.cat([sums.bytes for sums in found]).cpu()[used],
    )
