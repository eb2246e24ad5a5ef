"""What calibration measures: one streaming pass, mergeable, in float64; and what needs passes of its own."""

from moe_lightning.statistics.channels import ChannelStatistics
from moe_lightning.statistics.collect import collect
from moe_lightning.statistics.groups import DEFAULT_GROUPS, GROUPS, statistics_bytes
from moe_lightning.statistics.low_rank import LowRankFit, collect_low_rank, collect_low_rank_error
from moe_lightning.statistics.metrics import merge_moments
from moe_lightning.statistics.observer import ExpertObserver, PairOutputs, RoutedOutputs
from moe_lightning.statistics.outputs import OutputStatistics, PairStatistics
from moe_lightning.statistics.registry import (
    CRITERIA,
    FAMILIES,
    Criterion,
    Family,
    criterion_named,
    register_criterion,
    register_family,
)
from moe_lightning.statistics.routing import RoutingStatistics
from moe_lightning.statistics.similarity import BlockSimilarity, HiddenSimilarity, LayerSimilarity
from moe_lightning.statistics.statistics import Statistics, merge_statistics

__all__ = [
    "CRITERIA",
    "DEFAULT_GROUPS",
    "FAMILIES",
    "GROUPS",
    "BlockSimilarity",
    "ChannelStatistics",
    "Criterion",
    "ExpertObserver",
    "Family",
    "HiddenSimilarity",
    "LayerSimilarity",
    "LowRankFit",
    "OutputStatistics",
    "PairOutputs",
    "PairStatistics",
    "RoutedOutputs",
    "RoutingStatistics",
    "Statistics",
    "collect",
    "collect_low_rank",
    "collect_low_rank_error",
    "criterion_named",
    "merge_moments",
    "merge_statistics",
    "register_criterion",
    "register_family",
    "statistics_bytes",
]
