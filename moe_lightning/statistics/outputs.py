"""Sums over routed pairs of what the experts give.

Legend: L MoE layers, E experts of the original model (columns), N tokens without padding, R router rows, K top-k, S
pairs of one expert, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lightning.statistics.metrics import SumMetric
from moe_lightning.statistics.observer import RoutedOutputs
from moe_lightning.statistics.routing import routing_table

# Tokens whose pairs are float64 at a time: what is worked on stays in the cache.
_CHUNK = 128


class OutputStatistics(SumMetric):
    """Moments of the experts' outputs ``E_i(x)``, before the routing weight ``g_i(x)``.

    States: ``output_count [L, E]``; ``output_mean``, ``output_m2`` (sum of squared deviations), ``gate_output_sum``,
    ``gate2_output_sum`` ``[L, E, H]``; ``norm_sum``, ``norm_square_sum``, ``gate_norm_sum``, ``gate_norm_square_sum``,
    ``gate2_norm_sum``, ``gate2_norm_square_sum``, ``output_max_abs`` ``[L, E]``; ``output_gram [L, E, E]``
    (``sum g_i g_j <E_i, E_j>``); ``layer_output_square_sum [L]`` (``sum ||y||^2`` of the block).
    """

    moments = ("output_count", "output_mean", "output_m2")
    output_count: Tensor
    output_mean: Tensor
    output_m2: Tensor
    gate_output_sum: Tensor
    gate2_output_sum: Tensor
    norm_sum: Tensor
    norm_square_sum: Tensor
    gate_norm_sum: Tensor
    gate_norm_square_sum: Tensor
    gate2_norm_sum: Tensor
    gate2_norm_square_sum: Tensor
    output_max_abs: Tensor
    output_gram: Tensor
    layer_output_square_sum: Tensor

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
            num_experts: E.
            hidden_size: H.
        """
        super().__init__()
        self.add_zeros("output_count", num_layers, num_experts)
        for name in ("output_mean", "output_m2", "gate_output_sum", "gate2_output_sum"):
            self.add_zeros(name, num_layers, num_experts, hidden_size)
        for name in ("norm_sum", "gate_norm_sum", "gate2_norm_sum"):
            self.add_zeros(name, num_layers, num_experts)
        for name in ("norm_square_sum", "gate_norm_square_sum", "gate2_norm_square_sum"):
            self.add_zeros(name, num_layers, num_experts)
        self.add_zeros("output_max_abs", num_layers, num_experts, reduce="max")
        self.add_zeros("output_gram", num_layers, num_experts, num_experts)
        self.add_zeros("layer_output_square_sum", num_layers)

    def update(self, row: int, columns_R: Tensor, routed: RoutedOutputs) -> None:
        """Add the pairs of one layer's call.

        Args:
            row: Row of the layer.
            columns_R: Original number of each router row.
            routed: Outputs and weights of every pair of tokens that are not padding.
        """
        columns = columns_R.tolist()
        for router_row, start, end in routed.pairs.segments:
            self._add_expert(row, columns[router_row], routed.pairs.outputs_PH[start:end], routed.gate_P[start:end])
        self._add_gram(row, columns_R, routed)

    def _add_expert(self, row: int, column: int, outputs_SH: Tensor, gate_S: Tensor) -> None:
        at = (row, column)
        self.output_max_abs[at] = torch.maximum(self.output_max_abs[at], torch.stack(outputs_SH.aminmax()).abs().max())
        outputs_SH = outputs_SH.double()
        count = outputs_SH.shape[0]
        weights_3S = torch.stack([torch.ones_like(gate_S), gate_S, gate_S.square()])
        sum_H, gate_sum_H, gate2_sum_H = weights_3S @ outputs_SH
        mean_H = sum_H / count
        self.add_sample(at, count, mean_H, (outputs_SH - mean_H).square_().sum(0))
        self.gate_output_sum[at] += gate_sum_H
        self.gate2_output_sum[at] += gate2_sum_H
        norm_S = torch.linalg.vector_norm(outputs_SH, dim=1)
        (norm, square), (gate_norm, gate_square), (gate2_norm, gate2_square) = weights_3S @ torch.stack(
            [norm_S, norm_S.square()], dim=1
        )
        self.norm_sum[at] += norm
        self.norm_square_sum[at] += square
        self.gate_norm_sum[at] += gate_norm
        self.gate_norm_square_sum[at] += gate_square
        self.gate2_norm_sum[at] += gate2_norm
        self.gate2_norm_square_sum[at] += gate2_square

    def _add_gram(self, row: int, columns_R: Tensor, routed: RoutedOutputs) -> None:
        parts = [routed.weight_NK.new_zeros((0, *(2 * [routed.weight_NK.shape[1]])), dtype=torch.float64)]
        for start in range(0, routed.weight_NK.shape[0], _CHUNK):
            gate_NK = routed.weight_NK[start : start + _CHUNK].double()
            weighted_NKH = routed.outputs_NKH[start : start + _CHUNK].double() * gate_NK.unsqueeze(-1)
            parts.append(weighted_NKH @ weighted_NKH.transpose(1, 2))
        inner_NKK = torch.cat(parts)
        num_rows = columns_R.shape[0]
        pair_NKK = routed.index_NK.unsqueeze(2) * num_rows + routed.index_NK.unsqueeze(1)
        flat = torch.bincount(pair_NKK.reshape(-1), weights=inner_NKK.reshape(-1), minlength=num_rows * num_rows)
        self.output_gram[row, columns_R[:, None], columns_R[None, :]] += flat.view(num_rows, num_rows)
        # ||y||^2 is the sum over all pairs of weighted outputs of a token.
        self.layer_output_square_sum[row] += inner_NKK.sum()


class PairStatistics(SumMetric):
    """Sums over tokens of products of two experts' weights.

    States: ``gate_product_sum [L, E, E]`` (``sum g_i g_j``), ``pair_output_sum [L, E, E, H]`` (``sum g_i g_j E_i``):
    with ``output_gram`` they give the exact error of any set of experts replaced by constants.
    """

    gate_product_sum: Tensor
    pair_output_sum: Tensor

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
            num_experts: E.
            hidden_size: H.
        """
        super().__init__()
        self.add_zeros("gate_product_sum", num_layers, num_experts, num_experts)
        self.add_zeros("pair_output_sum", num_layers, num_experts, num_experts, hidden_size)

    def update(self, row: int, columns_R: Tensor, routed: RoutedOutputs) -> None:
        """Add the tokens of one layer's call; arguments as in :meth:`OutputStatistics.update`."""
        gate_NR = routing_table(routed.index_NK, routed.weight_NK, len(columns_R))
        self.gate_product_sum[row, columns_R[:, None], columns_R[None, :]] += gate_NR.T @ gate_NR
        columns, token_P = columns_R.tolist(), routed.token_P
        for router_row, start, end in routed.pairs.segments:
            product_SR = gate_NR[token_P[start:end]] * routed.gate_P[start:end, None]
            sum_RH = product_SR.T @ routed.pairs.outputs_PH[start:end].double()
            self.pair_output_sum[row, columns[router_row], columns_R] += sum_RH
