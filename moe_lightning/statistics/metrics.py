"""Streaming, mergeable sums as torchmetrics, all in float64.

They stand outside the module that is trained: ``bf16-true`` would cast their states.

Legend: L MoE layers, E experts of the original model (columns), N tokens without padding, R router rows, K top-k, P
    routed
pairs, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_lightning.statistics.observer import RoutedOutputs

ROUTING_SUMS = ("tokens", "count", "gate_sum", "gate_square_sum", "probability_sum", "coactivation")
MOMENTS = ("output_count", "output_mean", "output_m2")
OUTPUT_SUMS = (
    *MOMENTS,
    "gate_output_sum",
    "gate2_output_sum",
    "norm_sum",
    "norm_square_sum",
    "gate_norm_sum",
    "gate2_norm_square_sum",
    "output_max_abs",
    "output_gram",
    "layer_output_square_sum",
)


def merge_moments(
    count: Tensor, mean: Tensor, m2: Tensor, other_count: Tensor, other_mean: Tensor, other_m2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge counts, means and sums of squared deviations of two samples.

    Args:
        count: ``[...]``.
        mean: ``[..., H]``.
        m2: ``[..., H]``.
        other_count: ``[...]``.
        other_mean: ``[..., H]``.
        other_m2: ``[..., H]``.

    Returns:
        The same three of both samples together; zeros where both are empty.

    Source: Chan, Golub and LeVeque (1979), the pairwise update; symmetric, unlike the recurrence in the code of
    2507.00390.
    """
    total = count + other_count
    share = torch.where(total > 0, other_count / total.clamp(min=1), torch.zeros_like(total)).unsqueeze(-1)
    delta = other_mean - mean
    merged_mean = mean + delta * share
    merged_m2 = m2 + other_m2 + delta.square() * (count.unsqueeze(-1) * share)
    return total, merged_mean, merged_m2


class _ExpertMetric(Metric):
    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def _zeros(self, name: str, *shape: int, reduce: str | None = "sum") -> None:
        self.add_state(name, torch.zeros(*shape, dtype=torch.float64, device="cpu"), dist_reduce_fx=reduce)
        self._shapes = {**getattr(self, "_shapes", {}), name: shape}

    def sums(self) -> dict[str, Tensor]:
        """Return :meth:`compute` with every sum in its full shape: torchmetrics squeezes what holds one number."""
        return {name: tensor.reshape(self._shapes[name]) for name, tensor in self.compute().items()}


class RoutingStatistics(_ExpertMetric):
    """Sums over tokens of what the router decides.

    States: ``tokens [L]``; ``count`` (tokens that picked the expert), ``gate_sum``, ``gate_square_sum``,
    ``probability_sum`` (full softmax) ``[L, E]``; ``coactivation [L, E, E]`` (tokens that picked both).
    """

    tokens: Tensor
    count: Tensor
    gate_sum: Tensor
    gate_square_sum: Tensor
    probability_sum: Tensor
    coactivation: Tensor

    def __init__(self, num_layers: int, num_experts: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
            num_experts: E.
        """
        super().__init__()
        self._zeros("tokens", num_layers)
        for name in ("count", "gate_sum", "gate_square_sum", "probability_sum"):
            self._zeros(name, num_layers, num_experts)
        self._zeros("coactivation", num_layers, num_experts, num_experts)

    def update(self, row: int, columns_R: Tensor, logits_NR: Tensor, weight_NK: Tensor, index_NK: Tensor) -> None:
        """Add the tokens of one layer's call.

        Args:
            row: Row of the layer.
            columns_R: Original number of each router row.
            logits_NR: Router logits.
            weight_NK: Effective routing weights.
            index_NK: Router rows chosen.
        """
        gate_NR = torch.zeros(logits_NR.shape, dtype=torch.float64, device=logits_NR.device)
        gate_NR.scatter_(1, index_NK, weight_NK.double())
        chosen_NR = torch.zeros_like(gate_NR).scatter_(1, index_NK, 1.0)
        self.tokens[row] += logits_NR.shape[0]
        self.count[row, columns_R] += chosen_NR.sum(0)
        self.gate_sum[row, columns_R] += gate_NR.sum(0)
        self.gate_square_sum[row, columns_R] += gate_NR.square().sum(0)
        # The softmax in fp32, as the router computes it (float64 where the model is float64).
        wide = torch.promote_types(logits_NR.dtype, torch.float32)
        self.probability_sum[row, columns_R] += logits_NR.to(wide).softmax(-1).double().sum(0)
        self.coactivation[row, columns_R[:, None], columns_R[None, :]] += chosen_NR.T @ chosen_NR

    def compute(self) -> dict[str, Tensor]:
        """Return the states by name."""
        return {name: getattr(self, name).clone() for name in ROUTING_SUMS}


class OutputStatistics(_ExpertMetric):
    """Moments of the experts' outputs ``E_i(x)``, before the routing weight ``g_i(x)``.

    States: ``output_count [L, E]``; ``output_mean``, ``output_m2`` (sum of squared deviations), ``gate_output_sum``,
    ``gate2_output_sum`` ``[L, E, H]``; ``norm_sum``, ``norm_square_sum``, ``gate_norm_sum``, ``gate2_norm_square_sum``,
    ``output_max_abs`` ``[L, E]``; ``output_gram [L, E, E]`` (``sum g_i g_j <E_i, E_j>``); ``layer_output_square_sum
    [L]`` (``sum ||y||^2`` of the block).
    """

    output_count: Tensor
    output_mean: Tensor
    output_m2: Tensor
    gate_output_sum: Tensor
    gate2_output_sum: Tensor
    norm_sum: Tensor
    norm_square_sum: Tensor
    gate_norm_sum: Tensor
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
        # Means and deviations of ranks are not summed but merged, so the ranks' own are gathered and merged in compute.
        self._zeros("output_count", num_layers, num_experts, reduce=None)
        for name in ("output_mean", "output_m2"):
            self._zeros(name, num_layers, num_experts, hidden_size, reduce=None)
        for name in ("gate_output_sum", "gate2_output_sum"):
            self._zeros(name, num_layers, num_experts, hidden_size)
        for name in ("norm_sum", "norm_square_sum", "gate_norm_sum", "gate2_norm_square_sum"):
            self._zeros(name, num_layers, num_experts)
        self._zeros("output_max_abs", num_layers, num_experts, reduce="max")
        self._zeros("output_gram", num_layers, num_experts, num_experts)
        self._zeros("layer_output_square_sum", num_layers)

    def update(self, row: int, columns_R: Tensor, routed: RoutedOutputs) -> None:
        """Add the pairs of one layer's call.

        Args:
            row: Row of the layer.
            columns_R: Original number of each router row.
            routed: Outputs and weights of every pair of tokens that are not padding.
        """
        expert_P = routed.index_NK.reshape(-1)
        order_P = torch.argsort(expert_P, stable=True)
        ends = torch.bincount(expert_P, minlength=columns_R.shape[0]).cumsum(0).tolist()
        outputs_PH = routed.outputs_NKH.flatten(0, 1)
        gate_P = routed.weight_NK.reshape(-1)
        start = 0
        for column, end in zip(columns_R.tolist(), ends, strict=True):
            if end > start:
                members = order_P[start:end]
                self._add_expert(row, column, outputs_PH[members].double(), gate_P[members].double())
            start = end
        self._add_gram(row, columns_R, routed)

    def _add_expert(self, row: int, column: int, outputs_SH: Tensor, gate_S: Tensor) -> None:
        count = torch.tensor(float(outputs_SH.shape[0]), dtype=torch.float64, device=outputs_SH.device)
        mean_H = outputs_SH.mean(0)
        m2_H = (outputs_SH - mean_H).square().sum(0)
        at = (row, column)
        merged = merge_moments(self.output_count[at], self.output_mean[at], self.output_m2[at], count, mean_H, m2_H)
        self.output_count[at], self.output_mean[at], self.output_m2[at] = merged
        square_S = outputs_SH.square().sum(1)
        norm_S = square_S.sqrt()
        self.gate_output_sum[at] += gate_S @ outputs_SH
        self.gate2_output_sum[at] += gate_S.square() @ outputs_SH
        self.norm_sum[at] += norm_S.sum()
        self.norm_square_sum[at] += square_S.sum()
        self.gate_norm_sum[at] += gate_S @ norm_S
        self.gate2_norm_square_sum[at] += gate_S.square() @ square_S
        self.output_max_abs[at] = torch.maximum(self.output_max_abs[at], outputs_SH.abs().max())

    def _add_gram(self, row: int, columns_R: Tensor, routed: RoutedOutputs) -> None:
        weighted_NKH = routed.outputs_NKH.double() * routed.weight_NK.double().unsqueeze(-1)
        inner_NKK = weighted_NKH @ weighted_NKH.transpose(1, 2)
        num_rows = columns_R.shape[0]
        pair_NKK = routed.index_NK.unsqueeze(2) * num_rows + routed.index_NK.unsqueeze(1)
        flat = torch.bincount(pair_NKK.reshape(-1), weights=inner_NKK.reshape(-1), minlength=num_rows * num_rows)
        self.output_gram[row, columns_R[:, None], columns_R[None, :]] += flat.view(num_rows, num_rows)
        self.layer_output_square_sum[row] += weighted_NKH.sum(1).square().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the states by name, ranks merged."""
        count, mean, m2 = self.output_count, self.output_mean, self.output_m2
        if count.ndim == 3:  # gathered from several ranks: [ranks, L, E]
            merged = (count[0], mean[0], m2[0])
            for rank in range(1, count.shape[0]):
                merged = merge_moments(*merged, count[rank], mean[rank], m2[rank])
            count, mean, m2 = merged
        values = {name: getattr(self, name).clone() for name in OUTPUT_SUMS if name not in MOMENTS}
        values |= {"output_count": count.clone(), "output_mean": mean.clone(), "output_m2": m2.clone()}
        return values
