"""Evaluation: likelihood of text, how sure its comparisons are, and speed."""

from moe_lightning.evaluation.intervals import (
    Interval,
    lost_share_interval,
    mean_interval,
    perplexity_interval,
    perplexity_ratio_interval,
)
from moe_lightning.evaluation.likelihood import (
    BlockSums,
    Likelihood,
    LikelihoodResult,
    block_sums,
    evaluate,
    summarise,
)
from moe_lightning.evaluation.speed import decoded_tokens_per_second, tokens_per_second

__all__ = [
    "BlockSums",
    "Interval",
    "Likelihood",
    "LikelihoodResult",
    "block_sums",
    "decoded_tokens_per_second",
    "evaluate",
    "lost_share_interval",
    "mean_interval",
    "perplexity_interval",
    "perplexity_ratio_interval",
    "summarise",
    "tokens_per_second",
]
