"""Operations of a compressed mixture-of-experts block, on tensors only.

Every operation has a twin in plain torch that says what it computes in a few lines; the twin is the path for CPUs and
the oracle of the tests. This package imports nothing of ``moe_lightning``.
"""

from moe_kernels.cpu_kernels.lanes import LaneMatrices, from_lanes, to_lanes
from moe_kernels.cpu_layout import CpuMatrices, from_cpu_layout, to_cpu_layout
from moe_kernels.experts import (
    ABSENT,
    NoviceMaps,
    RoutedPairs,
    add_bias,
    add_novices,
    combine_pairs,
    combine_with_novices,
    expert_channels,
    expert_outputs,
    grouped_linear,
    mix_experts,
    mix_experts_by_loop,
    novice_weights,
    project_channels,
    sort_pairs,
)
from moe_kernels.int4 import Int4Matrices, WordMatrices, dequantize_int4, grouped_product, int4_grouped_linear
from moe_kernels.lora import GroupedLora, lora_term
from moe_kernels.sparse24 import sparse24_grouped_linear, sparse24_twin

__all__ = [
    "ABSENT",
    "CpuMatrices",
    "GroupedLora",
    "Int4Matrices",
    "LaneMatrices",
    "NoviceMaps",
    "RoutedPairs",
    "WordMatrices",
    "add_bias",
    "add_novices",
    "combine_pairs",
    "combine_with_novices",
    "dequantize_int4",
    "expert_channels",
    "expert_outputs",
    "from_cpu_layout",
    "from_lanes",
    "grouped_linear",
    "grouped_product",
    "int4_grouped_linear",
    "lora_term",
    "mix_experts",
    "mix_experts_by_loop",
    "novice_weights",
    "project_channels",
    "sort_pairs",
    "sparse24_grouped_linear",
    "sparse24_twin",
    "to_cpu_layout",
    "to_lanes",
]
