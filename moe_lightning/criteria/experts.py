"""Scores of experts: small pure functions of the statistics, each with its source.

All return ``[layers, experts]`` in float64, larger = keep. T is the number of calibration tokens, N of those routed to
the expert, g the effective routing weight, E the expert's output before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.statistics import Statistics, register_criterion


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, and give zero where nothing was counted."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _tokens(statistics: Statistics) -> Tensor:
    return statistics["tokens"].unsqueeze(-1)


@register_criterion("random", set(), "control")
def random(statistics: Statistics, seed: int) -> Tensor:
    """Draw uniform numbers: the control that every criterion must beat."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (len(statistics.shape.layouts), statistics.shape.num_experts)
    return torch.rand(size, dtype=torch.float64, generator=generator, device="cpu")


@register_criterion("frequency", {"routing"}, "2507.00390 ablation; common")
def frequency(statistics: Statistics, seed: int) -> Tensor:
    """``N / T``: the share of tokens that pick the expert."""
    return _ratio(statistics["count"], _tokens(statistics))


@register_criterion("soft_routing", {"routing"}, "2406.02500, Expert Drop")
def soft_routing(statistics: Statistics, seed: int) -> Tensor:
    """Mean full-softmax routing probability over tokens."""
    return _ratio(statistics["probability_sum"], _tokens(statistics))


def _deviation(statistics: Statistics) -> Tensor:
    """``||sqrt(var(E))||_2`` with the unbiased variance of each dimension; zero below two tokens."""
    freedom = (statistics["output_count"] - 1).clamp(min=0)
    return _ratio(statistics["output_m2"].sum(-1), freedom).clamp(min=0).sqrt()


@register_criterion("mone", {"routing", "outputs"}, "2507.00390, released code")
def mone(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_2 * sum(g) / T``: deviation of the output times routing mass."""
    return _deviation(statistics) * _ratio(statistics["gate_sum"], _tokens(statistics))


@register_criterion("mone_paper", {"routing", "outputs"}, "2507.00390, as the text defines frequency")
def mone_paper(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_2 * sum(g) / N``: deviation of the output times the mean weight when selected."""
    return _deviation(statistics) * _ratio(statistics["gate_sum"], statistics["count"])


@register_criterion("residual", {"routing", "outputs"}, "ours: cost of the best constant in the place of the expert")
def residual(statistics: Statistics, seed: int) -> Tensor:
    """``R = (sum g^2 ||E||^2 - ||sum g^2 E||^2 / sum g^2) / T``: squared error left by the best constant."""
    explained = _ratio(statistics["gate2_output_sum"].square().sum(-1), statistics["gate_square_sum"])
    return _ratio((statistics["gate2_norm_square_sum"] - explained).clamp(min=0), _tokens(statistics))


@register_criterion("reap", {"routing", "outputs"}, "REAP, router-weighted expert activation pruning")
def reap(statistics: Statistics, seed: int) -> Tensor:
    """``sum(g ||E||) / N``: mean weighted norm of the output when selected."""
    return _ratio(statistics["gate_norm_sum"], statistics["output_count"])
