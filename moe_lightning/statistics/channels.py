"""Moments of the experts' inner activations.

Legend: L MoE layers, E experts of the original model (columns), I channels, Q pairs of real experts, X pairs of one
slot, S slots.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moe_lightning.statistics.metrics import SumMetric
from moe_lightning.statistics.observer import RoutedOutputs

# Channels whose activations are float64 at a time: what is worked on stays in the cache.
_CHUNK = 256
# Rows of a weight matrix, for the same reason.
_ROWS = 64


class ChannelStatistics(SumMetric):
    """Moments over routed tokens of ``h = act(gate x) * up x`` of every real expert, channel by channel.

    States: ``channel_count [L, E]``; ``channel_mean``, ``channel_m2`` ``[L, E, I]``. Experts that share weights are
    one: its numbers stand in the column of the owner.
    """

    moments = ("channel_count", "channel_mean", "channel_m2")
    channel_count: Tensor
    channel_mean: Tensor
    channel_m2: Tensor

    def __init__(self, num_layers: int, num_experts: int, num_channels: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
            num_experts: E.
            num_channels: I, of the widest expert.
        """
        super().__init__()
        self.add_zeros("channel_count", num_layers, num_experts)
        for name in ("channel_mean", "channel_m2"):
            self.add_zeros(name, num_layers, num_experts, num_channels)

    def update(self, row: int, owners: tuple[int, ...], routed: RoutedOutputs) -> None:
        """Add the pairs of one layer's call.

        Args:
            row: Row of the layer.
            owners: Original number of the expert in each slot.
            routed: Activations of every pair of tokens that are not padding.
        """
        channels_QI = routed.pairs.channels_QI
        assert channels_QI is not None
        slots = routed.experts.slot_map.tolist()
        starts: dict[int, int] = {}
        for router_row, start, _ in routed.pairs.segments:
            if slots[router_row] >= 0:
                starts.setdefault(slots[router_row], start)
        ends = pairwise([*starts.values(), channels_QI.shape[0]])
        for slot, (start, end) in zip(starts, ends, strict=True):
            self._add_slot((row, owners[slot]), channels_QI[start:end])

    def _add_slot(self, at: tuple[int, int], channels_XI: Tensor) -> None:
        count, width = channels_XI.shape
        means, squares = [], []
        for part in channels_XI.split(_CHUNK, dim=1):
            part_XI = part.double()
            means.append(part_XI.mean(0))
            squares.append((part_XI - means[-1]).square_().sum(0))
        # A layer that is narrower than the widest leaves the rest at zero.
        mean_I, m2_I = self.channel_mean.new_zeros(2, self.channel_mean.shape[-1])
        mean_I[:width], m2_I[:width] = torch.cat(means), torch.cat(squares)
        self.add_sample(at, count, mean_I, m2_I)


def channel_weight_square(down_SHI: Tensor) -> Tensor:
    """Return ``|W_down[:, j]|^2`` of every channel in float64, slot by slot: ``[S, I]``."""
    squares_SI = torch.zeros(down_SHI.shape[0], down_SHI.shape[2], dtype=torch.float64, device=down_SHI.device)
    for square_I, down_HI in zip(squares_SI, down_SHI.detach(), strict=True):
        for part in down_HI.split(_ROWS):
            square_I += part.double().square().sum(0)
    return squares_SI
