"""How sure a comparison of models is: paired bootstrap over held-out blocks.

Blocks of text differ far more from each other than two models differ on the same block. So the blocks are drawn anew,
with replacement, and every model is read on the same draw; what remains is the doubt about the difference.

    draw        w ~ multinomial(B; 1/B, ..., 1/B): how often each of the B blocks is in the draw
    perplexity  exp(sum w nats / sum w tokens)
    tail        a = Phi(-sqrt(B / (B - 1)) t), t the (1 + level) / 2 quantile of Student's t, B - 1 degrees of freedom
    interval    the a and 1 - a quantiles over the draws

R draws, B blocks, Phi the normal distribution.

Draws of few blocks differ too little: by the factor sqrt((B - 1) / B), and as if their spread were known. With
a = (1 - level) / 2, the plain percentile interval, of 16 blocks holds too little. The wider tail mends both: at 95 % it
is 1.4 % for 16 blocks, 2.2 % for 64, 2.5 % for very many.

A block is taken as it is, and neighbouring blocks of one document are alike: the interval is that of other blocks of
these documents. For other documents it is wider: of 1,169 blocks from few long files, drawn in pieces of 32 neighbours,
2.6 times for a ratio and 3.9 times for a perplexity. Few blocks of which one is far from all others are too little for
any such interval.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals); Hesterberg,
What Teachers Should Know About the Bootstrap, The American Statistician 69 (2015) (expanded percentile interval);
paired over test items as in Koehn, Statistical significance tests for machine translation evaluation (2004).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.evaluation.likelihood import LikelihoodResult
from moe_lightning.evaluation.records import TextScores

DEFAULT_RESAMPLES = 2000
_CHUNK_ELEMENTS = 1 << 24  # of the matrix of draws that exist at a time


@dataclass(frozen=True)
class Interval:
    """A number and where it lies with the confidence of `level`.

    Args:
        value: The number on the blocks as they are.
        low: Lower end.
        high: Upper end.
        level: Confidence, in (0, 1).
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def finite(self) -> bool:
        """Whether the number is one. A model that gives NaN or infinity on one block has none on the whole text."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if not self.finite:
            return "not finite"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def tail_probability(num_blocks: int, level: float) -> float:
    """Return the share of the draws that lies beyond each end of an interval.

    Args:
        num_blocks: B, at least 2.
        level: Confidence, in (0, 1).

    Returns:
        `Phi(-sqrt(B / (B - 1)) t)`, below `(1 - level) / 2` and near it for many blocks.

    Source:
        Hesterberg, What Teachers Should Know About the Bootstrap (2015): expanded percentile interval.
    """
    quantile = stdtrit(num_blocks - 1, (1 + level) / 2)
    return float(ndtr(-math.sqrt(num_blocks / (num_blocks - 1)) * quantile))


def _draws(num_blocks: int, count: int, generator: torch.Generator) -> Tensor:
    """Return how often each block is in each of some draws, `[count, num_blocks]`."""
    drawn = torch.randint(num_blocks, (count, num_blocks), generator=generator, device="cpu")
    weight = torch.zeros(count, num_blocks, dtype=torch.float64, device="cpu")
    return weight.scatter_add_(1, drawn, torch.ones_like(weight))


@functools.lru_cache(maxsize=1)
def _usual_draws(num_blocks: int, resamples: int, seed: int) -> Tensor:
    """Return the same draws again: a table of many models reads all of them on the same ones."""
    return _draws(num_blocks, resamples, torch.Generator("cpu").manual_seed(seed))


def bootstrap(
    sums_SB: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return a number of block sums with its percentile interval, expanded for few blocks.

    Args:
        sums_SB: S sums for each block, `[S, B]`, all of the same blocks in the same order.
        function: From totals `[S, R]` to numbers `[R]`.
        level: Confidence, in (0, 1).
        resamples: R, draws of blocks. The ends of the interval are quantiles of so many numbers.
        seed: Seed of the draws; equal seeds draw the same blocks.

    Returns:
        The interval. Draws in which the number is not defined (NaN) are left out. Where a sum is not finite all
        three numbers are NaN: draws that miss that block say nothing about the model.

    Raises:
        ValueError: Fewer than two blocks, or options out of range.

    Cost:
        `2 * S * R * B` operations.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie in (0, 1), got {level}: 0.95 is usual")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    sums = sums_SB.to("cpu", torch.float64)
    if not bool(sums.isfinite().all()):
        return Interval(math.nan, math.nan, math.nan, level)
    num_blocks = sums.shape[1]
    if num_blocks < 2:
        raise ValueError(f"an interval needs at least 2 blocks of held-out text, there is {num_blocks}: use more text")
    if num_blocks * resamples <= _CHUNK_ELEMENTS:
        totals = sums @ _usual_draws(num_blocks, resamples, seed).T
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = max(1, _CHUNK_ELEMENTS // num_blocks)
        chunks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        totals = torch.cat([sums @ _draws(num_blocks, count, generator).T for count in chunks], dim=1)
    numbers = function(totals)
    value = float(function(sums.sum(1, keepdim=True))[0])
    numbers = numbers[~numbers.isnan()]
    if not numbers.numel():
        return Interval(value, math.nan, math.nan, level)
    tail = tail_probability(num_blocks, level)
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    low, high = torch.quantile(numbers, ends).tolist()
    return Interval(value, low, high, level)


def _check_paired(*results: LikelihoodResult) -> None:
    first = results[0].tokens
    for other in results[1:]:
        if other.tokens.shape != first.shape or not torch.equal(other.tokens, first):
            raise ValueError(
                f"the models were not evaluated on the same blocks ({len(first)} and {len(other.tokens)} blocks, "
                f"{int(first.sum())} and {int(other.tokens.sum())} tokens): evaluate both on the same batches"
            )


def perplexity_interval(
    result: LikelihoodResult, *, level: float = 0.95, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the perplexity of a model with its interval.

    Args:
        result: What `evaluate` returned.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks.
        seed: Seed of the draws.
    """
    sums = torch.stack([result.nats, result.tokens.double()])
    return bootstrap(sums, lambda total: (total[0] / total[1]).exp(), level=level, resamples=resamples, seed=seed)


def perplexity_ratio_interval(
    result: LikelihoodResult,
    reference: LikelihoodResult,
    *,
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the perplexity of a model divided by that of a reference on the same blocks; above 1 it is worse.

    Args:
        result: Of the model.
        reference: Of the model to compare with.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks.
        seed: Seed of the draws.

    Raises:
        ValueError: The blocks are not the same.
    """
    _check_paired(result, reference)
    sums = torch.stack([result.nats - reference.nats, result.tokens.double()])
    return bootstrap(sums, lambda total: (total[0] / total[1]).exp(), level=level, resamples=resamples, seed=seed)


def lost_share_interval(
    result: LikelihoodResult,
    baseline: LikelihoodResult,
    original: LikelihoodResult,
    *,
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return what a compressed model loses as a share of what another compressed model loses, in nats per token.

        share = (nats - nats of the original) / (nats of the baseline - nats of the original)

    0.2 means a fifth of the baseline's loss; below 0 the model is better than the original. NaN where the baseline
    loses nothing.

    Args:
        result: Of the compressed model.
        baseline: Of the compressed model to compare with.
        original: Of the model before compression.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks.
        seed: Seed of the draws.

    Raises:
        ValueError: The blocks are not the same.
    """
    _check_paired(result, baseline, original)
    sums = torch.stack([result.nats - original.nats, baseline.nats - original.nats])

    def share(total: Tensor) -> Tensor:
        return torch.where(total[1] > 0, total[0] / total[1], math.nan)

    return bootstrap(sums, share, level=level, resamples=resamples, seed=seed)


def mean_interval(
    sums: Tensor, tokens: Tensor, *, level: float = 0.95, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean per token of something that was summed over each block, with its interval.

    Args:
        sums: Sum over the tokens of each block `[B]`, for example of the KL divergence in nats.
        tokens: Tokens of each block `[B]`.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks.
        seed: Seed of the draws.
    """
    both = torch.stack([sums.double(), tokens.double()])
    return bootstrap(both, lambda total: total[0] / total[1], level=level, resamples=resamples, seed=seed)


def text_intervals(
    scores: BlockScores,
    reference: BlockScores | None = None,
    level: float = 0.95,
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return what is known of a model on one text, each number with its interval.

    Args:
        scores: Of the model.
        reference: Of another model on the same blocks, mostly the one before compression.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks; all numbers of a text are read on the same draws of the blocks that they have.
        seed: Seed of the draws.

    Returns:
        - `perplexity`;
        - `bits_per_byte`, in bits; absent where no byte was counted;
        - `divergence`, in nats per token, and `agreement`, a share of the tokens: over the blocks that were compared;
          absent where there is none;
        - `perplexity_ratio`: perplexity of the model divided by that of the reference, in pairs; below 1 the model is
          the better one; absent without a reference.

        With a single block the ends are NaN. Where the model gives something that is not finite on any block, no number
        of the text is finite, those of other blocks included: it must not read as a good one.

    Raises:
        ValueError: The blocks are not the same, or there is none.
    """
    bootstrapped = functools.partial(_interval_of_blocks, level=level, resamples=resamples, seed=seed)
    tokens = scores.tokens.double()
    found = {"perplexity": bootstrapped([scores.nats, tokens], _perplexity)}
    if float(scores.bytes.sum()):
        # Bits per nat, times the nats of a byte. A draw of blocks that count no byte says nothing.
        found["bits_per_byte"] = bootstrapped([scores.nats / math.log(2), scores.bytes.double()], _mean)
    if reference is not None:
        _check_paired(scores.likelihood, reference.likelihood)
        found["perplexity_ratio"] = bootstrapped([scores.nats - reference.nats, tokens], _perplexity)
    compared = scores.compared
    for name in ("divergence", "agreement") if compared.any() else ():
        values = _with_nan(getattr(scores, name), scores)[compared]
        found[name] = bootstrapped([values, tokens[compared]], _mean)
    return found


def paired_intervals(text: TextScores, before: TextScores | None) -> dict[str, Interval]:
    """Return what is known of a model on a text, in pairs with another model where both saw the same blocks.

    Args:
        text: The model on the text.
        before: The model before compression on the text of that name, or None. Scores of other blocks are not compared,
            and those of this very moment neither.

    Returns:
        As :func:`text_intervals`.
    """
    paired = before is not None and before is not text and before.fingerprint == text.fingerprint
    return text_intervals(text.scores, before.scores if before is not None and paired else None)


def paired_differences(
    scores: BlockScores,
    other: BlockScores,
    level: float = 0.95,
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return how much two models differ on the same blocks: the first minus the second, in pairs.

    An interval that does not hold 0 (of the ratio: 1) says that the difference is more than the choice of the text.

    Args:
        scores: Of one model.
        other: Of the other one.
        level: Confidence, in (0, 1).
        resamples: Draws of blocks.
        seed: Seed of the draws.

    Returns:
        - `nats_per_token`: difference of the negative log-likelihoods, in nats; below 0 the first is the better one;
        - `perplexity_ratio`: its exponential, perplexity of the first divided by that of the second;
        - `divergence`: difference of the divergences from the uncompressed model, in nats per token, and `agreement`:
          difference of the shares of tokens on which each agrees with it; over the blocks in which both were compared,
          absent where there is none.

        With a single block the ends are NaN.

    Raises:
        ValueError: The blocks are not the same, or there is none.
    """
    _check_paired(scores.likelihood, other.likelihood)
    bootstrapped = functools.partial(_interval_of_blocks, level=level, resamples=resamples, seed=seed)
    tokens = scores.tokens.double()
    nats = scores.nats - other.nats
    found = {
        "nats_per_token": bootstrapped([nats, tokens], _mean),
        "perplexity_ratio": bootstrapped([nats, tokens], _perplexity),
    }
    compared = scores.compared & other.compared
    for name in ("divergence", "agreement") if compared.any() else ():
        values = (_with_nan(getattr(scores, name), scores) - _with_nan(getattr(other, name), other))[compared]
        found[name] = bootstrapped([values, tokens[compared]], _mean)
    return found


def _with_nan(values: Tensor, scores: BlockScores) -> Tensor:
    """Return sums of blocks; of a model that is not finite on one of the blocks, none is a number."""
    return values if bool(scores.finite.all()) else torch.full_like(values, math.nan)


def _mean(total: Tensor) -> Tensor:
    return torch.where(total[1] > 0, total[0] / total[1], math.nan)


def _perplexity(total: Tensor) -> Tensor:
    return _mean(total).exp()


def _interval_of_blocks(
    sums: list[Tensor], function: Callable[[Tensor], Tensor], level: float, resamples: int, seed: int
) -> Interval:
    """Bootstrap; of one block return the number alone, since a table of many texts must not fail for a short one."""
    stacked = torch.stack([values.to("cpu", torch.float64) for values in sums])
    if stacked.shape[1] == 1 and bool(stacked.isfinite().all()):
        return Interval(float(function(stacked)[0]), math.nan, math.nan, level)
    return bootstrap(stacked, function, level=level, resamples=resamples, seed=seed)
