"""How sure a comparison of models is: paired bootstrap over held-out blocks.

Blocks of text differ far more from each other than two models differ on the same block. So the blocks are drawn anew,
with replacement, and every model is read on the same draw; what remains is the doubt about the difference.

    draw        w ~ multinomial(B; 1/B, ..., 1/B): how often each of the B blocks is in the draw
    perplexity  exp(sum w nats / sum w tokens)
    interval    the (1 - level) / 2 and (1 + level) / 2 quantiles over the draws

R draws, B blocks.

A block is taken as it is: where neighbouring blocks come from one document the true interval is somewhat wider.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals); paired over
test items as in Koehn, Statistical significance tests for machine translation evaluation (2004).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.evaluation.likelihood import LikelihoodResult

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

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


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
    """Return a number of block sums with its percentile interval.

    Args:
        sums_SB: S sums for each block, `[S, B]`, all of the same blocks in the same order.
        function: From totals `[S, R]` to numbers `[R]`.
        level: Confidence, in (0, 1).
        resamples: R, draws of blocks. The ends of the interval are quantiles of so many numbers.
        seed: Seed of the draws; equal seeds draw the same blocks.

    Returns:
        The interval. Draws in which the number is not defined (NaN) are left out.

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
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")
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
