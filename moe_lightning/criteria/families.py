"""Criteria whose names carry numbers: ``power:ALPHA,BETA,B`` and ``residual:RANK``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lightning.statistics import Criterion, Statistics
from moe_lightning.statistics.registry import register_family

POWER_SUMS: dict[tuple[int, int], str] = {
    (0, 0): "count",
    (1, 0): "gate_sum",
    (2, 0): "gate_square_sum",
    (0, 1): "norm_sum",
    (1, 1): "gate_norm_sum",
    (2, 1): "gate2_norm_sum",
    (0, 2): "norm_square_sum",
    (1, 2): "gate_norm_square_sum",
    (2, 2): "gate2_norm_square_sum",
}
"""Name of ``sum g^alpha ||E||^beta`` among the statistics, by (alpha, beta)."""


@register_family("power", "power:ALPHA,BETA,B")
def power(arguments: str) -> Criterion:
    """Make the criterion ``N^-B * sum(g^ALPHA * ||E||^BETA)`` over the tokens that pick the expert.

    ``power:0,0,0`` is the count, ``power:1,0,0`` the routing score, ``power:0,1,0`` EAN, ``power:1,1,1`` REAP. An
    expert that no token reached scores zero.

    Args:
        arguments: ``ALPHA,BETA,B``: 0, 1 or 2 each, and any finite number.

    Raises:
        ValueError: Not three numbers, or exponents whose sum is not among the statistics.

    Source: 2606.15716, the formulation that unifies the criteria before it.
    """
    name = f"power:{arguments}"
    parts = [part.strip() for part in arguments.split(",")]
    try:
        alpha, beta, over = int(parts[0]), int(parts[1]), float(parts[2])
        known = len(parts) == 3 and (alpha, beta) in POWER_SUMS and math.isfinite(over)
    except (ValueError, IndexError):
        known = False
    if not known:
        raise ValueError(
            f"criterion {name!r} is none of power:ALPHA,BETA,B: N^-B * sum(g^ALPHA * ||E||^BETA) is possible for ALPHA "
            "and BETA in 0, 1, 2 and any number B, e.g. power:1,1,1"
        )
    total, group = POWER_SUMS[alpha, beta], "outputs" if beta else "routing"
    counted = "output_count" if beta else "count"

    def score(statistics: Statistics, seed: int) -> Tensor:
        count = statistics[counted]
        return torch.where(count > 0, statistics[total] * count.clamp(min=1).pow(-over), 0.0)

    source = f"N^-{over:g} * sum(g^{alpha} * ||E||^{beta}), 2606.15716"
    return Criterion(name, frozenset({group}), score, source)


@register_family("residual", "residual:RANK")
def residual_of_rank(arguments: str) -> Criterion:
    """Make the criterion ``residual`` of the affine map of a rank instead of the constant.

    The score is the mean over all tokens of ``g^2 ||E - map(x)||^2``, measured on held-out calibration tokens.

    Args:
        arguments: The rank, 0 for the constant.

    Raises:
        ValueError: Not a whole number, or negative.

    Source: ours; in trials no better than the residual of the constant.
    """
    name = f"residual:{arguments}"
    text = arguments.strip()
    if not text.isdecimal():
        raise ValueError(
            f"criterion {name!r} is none of residual:RANK: RANK is a whole number from 0, e.g. residual:16"
        )
    rank = int(text)

    def score(statistics: Statistics, seed: int) -> Tensor:
        error = statistics["low_rank_error"]
        largest = error.shape[-1] - 1
        if rank > largest:
            raise ValueError(
                f"criterion {name!r}: errors are measured up to rank {largest}: use residual:{largest} or less"
            )
        return error[..., rank]

    source = f"ours: held-out cost of the best affine map of rank {rank} in the place of the expert"
    return Criterion(name, frozenset({"low_rank"}), score, source)
