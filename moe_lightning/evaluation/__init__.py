"""Evaluation: likelihood of text, and speed."""

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
    "Likelihood",
    "LikelihoodResult",
    "block_sums",
    "decoded_tokens_per_second",
    "evaluate",
    "summarise",
    "tokens_per_second",
]
