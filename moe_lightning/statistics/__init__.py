"""What calibration measures: one streaming pass, mergeable, in float64."""

from moe_lightning.statistics.collect import collect
from moe_lightning.statistics.metrics import OutputStatistics, RoutingStatistics, merge_moments
from moe_lightning.statistics.observer import ExpertObserver, RoutedOutputs
from moe_lightning.statistics.registry import CRITERIA, Criterion, criterion_named, register_criterion
from moe_lightning.statistics.statistics import GROUPS, Statistics, merge_statistics

__all__ = [
    "CRITERIA",
    "GROUPS",
    "Criterion",
    "ExpertObserver",
    "OutputStatistics",
    "RoutedOutputs",
    "RoutingStatistics",
    "Statistics",
    "collect",
    "criterion_named",
    "merge_moments",
    "merge_statistics",
    "register_criterion",
]
