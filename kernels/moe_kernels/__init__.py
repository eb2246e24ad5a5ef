"""Operations of a compressed mixture-of-experts block, on tensors only.

Every operation has a twin in plain torch that says what it computes in a few lines; the twin is the path for CPUs and
the oracle of the tests. This package imports nothing of ``moe_lightning``.
"""

from moe_kernels.experts import (
    ABSENT,
    NoviceMaps,
    RoutedPairs,
    add_bias,
    add_novices,
    combine_pairs,
    expert_channels,
    expert_outputs,
    grouped_linear,
    mix_experts,
    mix_experts_by_loop,
    novice_weights,
    project_channels,
    sort_pairs,
)

__all__ = [
    "ABSENT",
    "NoviceMaps",
    "RoutedPairs",
    "add_bias",
    "add_novices",
    "combine_pairs",
    "expert_channels",
    "expert_outputs",
    "grouped_linear",
    "mix_experts",
    "mix_experts_by_loop",
    "novice_weights",
    "project_channels",
    "sort_pairs",
]
