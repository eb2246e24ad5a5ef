"""Linear layers, such as attention's q, k, v and o, whose weights are packed or have low-rank terms beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_lightning.experts.lora import LoraStack, adapted_linear
from moe_lightning.experts.stacks import WeightStack


class PackedLinear(nn.Module):
    """A linear layer without bias whose weights are packed, as attention's q, k, v and o.

    Attributes:
        stack: The weights, a stack of one matrix.
        lora: A low-rank term beside it, a stack of one, or None.
        in_features: Inputs.
        out_features: Outputs.
    """

    lora: LoraStack | None

    def __init__(self, stack: WeightStack) -> None:
        """Hold a stack of one matrix."""
        super().__init__()
        if stack.slots != 1:
            raise ValueError(f"a linear layer has one matrix, this stack has {stack.slots}")
        self.stack = stack
        self.register_module("lora", None)
        self.in_features, self.out_features = stack.inputs, stack.outputs

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T``, ``[..., outputs]``; under autocast in its type, as of a plain linear layer."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(kind))
        rows_PI = input.reshape(input.shape[:-1].numel(), self.in_features)
        offsets = torch.full((1,), rows_PI.shape[0], dtype=torch.int32, device=rows_PI.device)
        return adapted_linear(rows_PI, offsets, self.stack, self.lora).reshape(*input.shape[:-1], self.out_features)


class LoraLinear(nn.Module):
    """A linear layer without bias, with a low-rank term beside it. The weight keeps its name.

    Attributes:
        weight: ``[outputs, inputs]``.
        lora: The term, a stack of one.
        in_features: Inputs.
        out_features: Outputs.
    """

    def __init__(self, weight: nn.Parameter, lora: LoraStack) -> None:
        """Hold a weight and a term.

        Raises:
            ValueError: They do not fit each other.
        """
        super().__init__()
        if lora.lora_A.shape[2] != weight.shape[1] or lora.lora_B.shape[1] != weight.shape[0] or len(lora.lora_A) != 1:
            raise ValueError(f"the term ({lora.extra_repr()}) does not fit a weight {tuple(weight.shape)}")
        self.weight = weight
        self.lora = lora
        self.out_features, self.in_features = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T`` and the term, ``[..., outputs]``."""
        read = functional.linear(input, self.lora.lora_A[0]) * self.lora.scale
        return functional.linear(input, self.weight) + functional.linear(read, self.lora.lora_B[0])

    def extra_repr(self) -> str:
        """Say the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
