"""A linear layer whose weights are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lightning.experts.stacks.base import WeightStack


class PackedLinear(nn.Module):
    """A linear layer without bias whose weights are packed, as attention's q, k, v and o.

    Attributes:
        stack: The weights, a stack of one matrix.
        in_features: Inputs.
        out_features: Outputs.
    """

    def __init__(self, stack: WeightStack) -> None:
        """Hold a stack of one matrix."""
        super().__init__()
        if stack.slots != 1:
            raise ValueError(f"a linear layer has one matrix, this stack has {stack.slots}")
        self.stack = stack
        self.in_features, self.out_features = stack.inputs, stack.outputs

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T``, ``[..., outputs]``; under autocast in its type, as of a plain linear layer."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(kind))
        rows_PI = input.reshape(input.shape[:-1].numel(), self.in_features)
        offsets = torch.full((1,), rows_PI.shape[0], dtype=torch.int32, device=rows_PI.device)
        return self.stack.linear(rows_PI, offsets).reshape(*input.shape[:-1], self.out_features)
