"""How the weights of the real experts of a layer are held.

Legend: S real experts (slots), I intermediate, H hidden, P routed pairs.
"""

from __future__ import annotations

import torch
from moe_kernels import RoutedPairs, expert_outputs
from moe_kernels.experts import Activation
from torch import Tensor, nn


class Dense(nn.Module):
    """Fused floating-point weights, laid out as in transformers.

    I may be smaller than the config's: see :class:`Channels`.

    Attributes:
        gate_up_proj: Gate rows, then up rows, ``[experts, 2 * intermediate, hidden]``.
        down_proj: ``[experts, hidden, intermediate]``.
        bias: None: whole experts have none.
    """

    bias: nn.Parameter | None

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter) -> None:
        """Hold two stacks of weights.

        Args:
            gate_up_proj: ``[experts, 2 * intermediate, hidden]``.
            down_proj: ``[experts, hidden, intermediate]``.

        Raises:
            ValueError: The stacks do not fit each other.
        """
        super().__init__()
        slots, double, hidden = gate_up_proj.shape
        if tuple(down_proj.shape) != (slots, hidden, double // 2) or double % 2:
            raise ValueError(
                f"gate_up_proj {tuple(gate_up_proj.shape)} and down_proj {tuple(down_proj.shape)} do not fit"
            )
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.register_parameter("bias", None)

    @classmethod
    def empty(
        cls,
        num_slots: int,
        intermediate_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Dense:
        """Make a storage of a given shape without values."""
        gate_up = torch.empty(num_slots, 2 * intermediate_size, hidden_size, dtype=dtype, device=device)
        down = torch.empty(num_slots, hidden_size, intermediate_size, dtype=dtype, device=device)
        return cls(nn.Parameter(gate_up), nn.Parameter(down))

    @property
    def num_slots(self) -> int:
        """Real experts held."""
        return self.gate_up_proj.shape[0]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return ``gate_up [S, 2I, H]`` and ``down [S, H, I]`` as floating-point tensors."""
        return self.gate_up_proj, self.down_proj

    def forward(self, hidden_NH: Tensor, pairs: RoutedPairs, activation: Activation) -> Tensor:
        """Compute the experts' outputs for the routed pairs, before the routing weight: ``[P, H]``."""
        return expert_outputs(hidden_NH, pairs, self.gate_up_proj, self.down_proj, activation, self.bias)

    def extra_repr(self) -> str:
        """Say how many experts of what size are held."""
        slots, double, hidden = self.gate_up_proj.shape
        return f"num_slots={slots}, hidden_size={hidden}, intermediate_size={double // 2}"


class Channels(Dense):
    """Experts of which only some channels are left, the same number in each, with a bias for those that went.

    ``E(x) = down (act(gate x) * up x) + bias`` (2312.11983, FLAP, for the experts of a layer).

    Attributes:
        gate_up_proj: Rows of the channels that are left, ``[experts, 2 * width, hidden]``.
        down_proj: ``[experts, hidden, width]``.
        bias: ``[experts, hidden]``.
    """

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, bias: nn.Parameter) -> None:
        """Hold two stacks of weights and a bias.

        Args:
            gate_up_proj: ``[experts, 2 * width, hidden]``.
            down_proj: ``[experts, hidden, width]``.
            bias: ``[experts, hidden]``.

        Raises:
            ValueError: They do not fit each other.
        """
        super().__init__(gate_up_proj, down_proj)
        if tuple(bias.shape) != tuple(down_proj.shape[:2]):
            raise ValueError(f"bias {tuple(bias.shape)} and down_proj {tuple(down_proj.shape)} do not fit")
        self.bias = bias
