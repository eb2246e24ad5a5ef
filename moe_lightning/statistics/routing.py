"""Sums over tokens of what the router decides.

Legend: L MoE layers, E experts of the original model (columns), N tokens without padding, R router rows, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.statistics.metrics import SumMetric


def routing_table(index_NK: Tensor, weight_NK: Tensor, num_rows: int) -> Tensor:
    """Return the routing weights by router row, zero where not chosen, ``[N, R]`` float64.

    Args:
        index_NK: Router rows chosen, distinct for each token.
        weight_NK: Their weights.
        num_rows: R.
    """
    table_NR = torch.zeros(index_NK.shape[0], num_rows, dtype=torch.float64, device=index_NK.device)
    return table_NR.scatter_(1, index_NK, weight_NK.double())


class RoutingStatistics(SumMetric):
    """Sums over tokens of what the router decides.

    States: ``tokens [L]``; ``count`` (tokens that picked the expert), ``gate_sum``, ``gate_square_sum``,
    ``probability_sum`` (full softmax), ``topk_probability_sum`` (full softmax of the tokens that picked the expert)
    ``[L, E]``; ``coactivation`` (tokens that picked both), ``logit_gram`` (``sum l_i l_j`` of the logits)
    ``[L, E, E]``.
    """

    tokens: Tensor
    count: Tensor
    gate_sum: Tensor
    gate_square_sum: Tensor
    probability_sum: Tensor
    topk_probability_sum: Tensor
    coactivation: Tensor
    logit_gram: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
            num_experts: E.
        """
        super().__init__()
        self.add_zeros("tokens", num_layers)
        for name in ("count", "gate_sum", "gate_square_sum", "probability_sum", "topk_probability_sum"):
            self.add_zeros(name, num_layers, num_experts)
        for name in ("coactivation", "logit_gram"):
            self.add_zeros(name, num_layers, num_experts, num_experts)

    def update(self, row: int, columns_R: Tensor, logits_NR: Tensor, weight_NK: Tensor, index_NK: Tensor) -> None:
        """Add the tokens of one layer's call.

        Args:
            row: Row of the layer.
            columns_R: Original number of each router row.
            logits_NR: Router logits.
            weight_NK: Effective routing weights.
            index_NK: Router rows chosen.
        """
        gate_NR = routing_table(index_NK, weight_NK, logits_NR.shape[1])
        chosen_NR = torch.zeros_like(gate_NR).scatter_(1, index_NK, 1.0)
        # The softmax in fp32, as the router computes it (float64 where the model is float64).
        wide = torch.promote_types(logits_NR.dtype, torch.float32)
        probability_NR = logits_NR.to(wide).softmax(-1).double()
        wide_NR = logits_NR.double()
        self.tokens[row] += logits_NR.shape[0]
        self.count[row, columns_R] += chosen_NR.sum(0)
        self.gate_sum[row, columns_R] += gate_NR.sum(0)
        self.gate_square_sum[row, columns_R] += gate_NR.square().sum(0)
        self.probability_sum[row, columns_R] += probability_NR.sum(0)
        self.topk_probability_sum[row, columns_R] += (probability_NR * chosen_NR).sum(0)
        both = (row, columns_R[:, None], columns_R[None, :])
        self.coactivation[both] += chosen_NR.T @ chosen_NR
        self.logit_gram[both] += wide_NR.T @ wide_NR
