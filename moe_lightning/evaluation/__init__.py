"""Evaluation: likelihood of text, how sure its comparisons are, and speed."""

from moe_lightning.evaluation.intervals import (
    Interval,
    lost_share_interval,
    mean_interval,
    paired_differences,
    paired_intervals,
    perplexity_interval,
    perplexity_ratio_interval,
    text_intervals,
)
from moe_lightning.evaluation.likelihood import (
    BlockSums,
    Likelihood,
    LikelihoodResult,
    block_sums,
    evaluate,
    summarise,
)
from moe_lightning.evaluation.samples import continuations, default_prompts
from moe_lightning.evaluation.speed import decode_rate, decoded_tokens_per_second, prefill_rate, tokens_per_second

__all__ = [
    "BlockSums",
    "Interval",
    "Likelihood",
    "LikelihoodResult",
    "block_sums",
    "continuations",
    "decode_rate",
    "decoded_tokens_per_second",
    "default_prompts",
    "evaluate",
    "lost_share_interval",
    "mean_interval",
    "paired_differences",
    "paired_intervals",
    "perplexity_interval",
    "perplexity_ratio_interval",
    "prefill_rate",
    "summarise",
    "text_intervals",
    "tokens_per_second",
]
