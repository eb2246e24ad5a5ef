"""Scores of experts: small pure functions of the statistics, each with its source.

All return ``[layers, experts]`` in float64, larger = keep. T is the number of calibration tokens, N of those routed to
the expert, g the effective routing weight, E the expert's output before it. An expert that no token reached has score
zero wherever the score is a mean over its own tokens.
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


@register_criterion("routing_score", {"routing"}, "RS, the baseline of 2507.00390")
def routing_score(statistics: Statistics, seed: int) -> Tensor:
    """``sum(g)``: routing weight that the expert received in all."""
    return statistics["gate_sum"]


@register_criterion("soft_routing", {"routing"}, "2406.02500, Expert Drop")
def soft_routing(statistics: Statistics, seed: int) -> Tensor:
    """Mean full-softmax routing probability over tokens."""
    return _ratio(statistics["probability_sum"], _tokens(statistics))


@register_criterion("topk_mass", {"routing"}, "2406.02500, Expert Drop, of the chosen experts only")
def topk_mass(statistics: Statistics, seed: int) -> Tensor:
    """Mean over tokens of the full-softmax probability where the expert is among the top-k, zero elsewhere."""
    return _ratio(statistics["topk_probability_sum"], _tokens(statistics))


def _deviations(statistics: Statistics) -> Tensor:
    """``sqrt(var(E))`` of each dimension, ``[L, E, H]``, unbiased; zero below two tokens."""
    freedom = (statistics["output_count"] - 1).clamp(min=0).unsqueeze(-1)
    return _ratio(statistics["output_m2"].clamp(min=0), freedom).sqrt()


@register_criterion("variance", {"outputs"}, "2507.00390, ablation")
def variance(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_2`` with the unbiased variance of each dimension; zero below two tokens."""
    return _deviations(statistics).square().sum(-1).sqrt()


@register_criterion("variance_l1", {"outputs"}, "2507.00390, ablation, L1 norm")
def variance_l1(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_1``: sum of the standard deviations of all dimensions."""
    return _deviations(statistics).sum(-1)


def _mass(statistics: Statistics) -> Tensor:
    """``sum(g) / T``, the frequency of the released code."""
    return _ratio(statistics["gate_sum"], _tokens(statistics))


def _mean_gate(statistics: Statistics) -> Tensor:
    """``sum(g) / N``, the frequency of the paper's text."""
    return _ratio(statistics["gate_sum"], statistics["count"])


@register_criterion("mone", {"routing", "outputs"}, "2507.00390, released code")
def mone(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_2 * sum(g) / T``: deviation of the output times routing mass."""
    return variance(statistics, seed) * _mass(statistics)


@register_criterion("mone_l1", {"routing", "outputs"}, "2507.00390, released code, L1 norm of the ablation")
def mone_l1(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_1 * sum(g) / T``."""
    return variance_l1(statistics, seed) * _mass(statistics)


@register_criterion("mone_paper", {"routing", "outputs"}, "2507.00390, as the text defines frequency")
def mone_paper(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_2 * sum(g) / N``: deviation of the output times the mean weight when selected."""
    return variance(statistics, seed) * _mean_gate(statistics)


@register_criterion("mone_paper_l1", {"routing", "outputs"}, "2507.00390, text, L1 norm of the ablation")
def mone_paper_l1(statistics: Statistics, seed: int) -> Tensor:
    """``||sqrt(var(E))||_1 * sum(g) / N``."""
    return variance_l1(statistics, seed) * _mean_gate(statistics)


@register_criterion("residual", {"routing", "outputs"}, "ours: cost of the best constant in the place of the expert")
def residual(statistics: Statistics, seed: int) -> Tensor:
    """``R = (sum g^2 ||E||^2 - ||sum g^2 E||^2 / sum g^2) / T``: squared error left by the best constant."""
    explained = _ratio(statistics["gate2_output_sum"].square().sum(-1), statistics["gate_square_sum"])
    return _ratio((statistics["gate2_norm_square_sum"] - explained).clamp(min=0), _tokens(statistics))


@register_criterion("ean", {"outputs"}, "EAN, expert activation norm: a baseline of REAP, 2510.13999")
def ean(statistics: Statistics, seed: int) -> Tensor:
    """``sum(||E||)``: norm of the output, summed over the tokens that pick the expert."""
    return statistics["norm_sum"]


@register_criterion("man", {"outputs"}, "MAN, mean activation norm, 2606.15716")
def man(statistics: Statistics, seed: int) -> Tensor:
    """``sum(||E||) / N``: mean norm of the output when selected."""
    return _ratio(statistics["norm_sum"], statistics["output_count"])


@register_criterion("msan", {"outputs"}, "MSAN, mean squared activation norm, 2606.15716")
def msan(statistics: Statistics, seed: int) -> Tensor:
    """``sum(||E||^2) / N``: mean squared norm of the output when selected."""
    return _ratio(statistics["norm_square_sum"], statistics["output_count"])


@register_criterion("reap", {"outputs"}, "REAP, router-weighted expert activation pruning, 2510.13999")
def reap(statistics: Statistics, seed: int) -> Tensor:
    """``sum(g ||E||) / N``: mean weighted norm of the output when selected."""
    return _ratio(statistics["gate_norm_sum"], statistics["output_count"])


@register_criterion("interventional", {"interventions"}, "ours: what the model loses without the expert")
def interventional(statistics: Statistics, seed: int) -> Tensor:
    """KL of the intact model to the one whose router masks this one expert, nats per token."""
    return statistics["expert_divergence"]
