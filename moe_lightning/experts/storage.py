"""How the weights of the real experts of a layer are held.

Legend: S real experts (slots), I intermediate, H hidden, P routed pairs.
"""

from __future__ import annotations

import torch
from moe_kernels import RoutedPairs, add_bias
from moe_kernels.experts import Activation
from torch import Tensor, nn

from moe_lightning.experts.lora import LoraStack, adapted_linear
from moe_lightning.experts.stacks import WeightStack
from moe_lightning.plan import WeightFormat


class Storage(nn.Module):
    """The two stacks of matrices of the real experts of a layer, with what may stand beside them.

    Attributes:
        gate_up_proj: Gate rows, then up rows: ``[experts, 2 * intermediate, hidden]``.
        down_proj: ``[experts, hidden, intermediate]``.
        bias: ``[experts, hidden]``, or None.
        gate_up_lora: Low-rank terms beside ``gate_up_proj``, or None.
        down_lora: Low-rank terms beside ``down_proj``, or None.
    """

    gate_up_proj: nn.Parameter | WeightStack
    down_proj: nn.Parameter | WeightStack
    bias: nn.Parameter | None
    gate_up_lora: LoraStack | None
    down_lora: LoraStack | None

    def __init__(self) -> None:
        """Start without low-rank terms; children hold the weights."""
        super().__init__()
        self.register_module("gate_up_lora", None)
        self.register_module("down_lora", None)

    @property
    def num_lora(self) -> int:
        """Parameters of the low-rank terms."""
        stacks = (stack for stack in (self.gate_up_lora, self.down_lora) if stack is not None)
        return sum(parameter.numel() for stack in stacks for parameter in stack.parameters())

    def channels(self, hidden_NH: Tensor, pairs: RoutedPairs, activation: Activation) -> Tensor:
        """Compute the inner activations of the routed pairs, ``[P, I]``; see `moe_kernels.expert_channels`."""
        rows_PH = hidden_NH[pairs.tokens]
        gate_PI, up_PI = adapted_linear(rows_PH, pairs.offsets, self.gate_up_proj, self.gate_up_lora).chunk(2, dim=-1)
        return activation(gate_PI) * up_PI

    def project(self, channels_PI: Tensor, pairs: RoutedPairs) -> Tensor:
        """Compute the outputs of routed pairs from their inner activations, ``[P, H]``."""
        outputs_PH = adapted_linear(channels_PI, pairs.offsets, self.down_proj, self.down_lora)
        return add_bias(outputs_PH, pairs, self.bias)

    def forward(self, hidden_NH: Tensor, pairs: RoutedPairs, activation: Activation) -> Tensor:
        """Compute the experts' outputs for the routed pairs, before the routing weight: ``[P, H]``."""
        return self.project(self.channels(hidden_NH, pairs, activation), pairs)


class Dense(Storage):
    """Fused floating-point weights, laid out as in transformers.

    I may be smaller than the config's: see :class:`Channels`.

    Attributes:
        gate_up_proj: Gate rows, then up rows, ``[experts, 2 * intermediate, hidden]``.
        down_proj: ``[experts, hidden, intermediate]``.
        bias: None: whole experts have none.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

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

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up_proj.shape[2]

    @property
    def num_weights(self) -> int:
        """Weights of all experts, without biases."""
        return self.gate_up_proj.numel() + self.down_proj.numel()

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


class Packed(Storage):
    """Experts whose matrices are stored packed: integers with scales, or what is left after pruning.

    Attributes:
        gate_up_proj: Gate rows, then up rows: a stack of ``[2 * intermediate, hidden]``.
        down_proj: A stack of ``[hidden, intermediate]``.
        bias: ``[experts, hidden]``, or None.
    """

    gate_up_proj: WeightStack
    down_proj: WeightStack

    def __init__(self, gate_up_proj: WeightStack, down_proj: WeightStack, bias: nn.Parameter | None = None) -> None:
        """Hold two stacks, and a bias.

        Args:
            gate_up_proj: Stack of ``[2 * intermediate, hidden]``.
            down_proj: Stack of ``[hidden, intermediate]``.
            bias: ``[experts, hidden]``, or None.

        Raises:
            ValueError: They do not fit each other.
        """
        super().__init__()
        fits = gate_up_proj.slots == down_proj.slots and gate_up_proj.outputs == 2 * down_proj.inputs
        if not fits or gate_up_proj.inputs != down_proj.outputs:
            raise ValueError(f"the stacks do not fit: gate_up_proj ({gate_up_proj}) and down_proj ({down_proj})")
        if bias is not None and tuple(bias.shape) != (down_proj.slots, down_proj.outputs):
            raise ValueError(f"bias {tuple(bias.shape)} does not fit down_proj ({down_proj})")
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.register_parameter("bias", bias)

    @property
    def num_slots(self) -> int:
        """Real experts held."""
        return self.gate_up_proj.slots

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up_proj.inputs

    @property
    def num_weights(self) -> int:
        """Weights of all experts, zeros included, without biases."""
        return self.gate_up_proj.num_weights + self.down_proj.num_weights

    @property
    def format(self) -> WeightFormat:
        """How the weights are stored."""
        return self.gate_up_proj.format

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return ``gate_up [S, 2I, H]`` and ``down [S, H, I]`` as floating-point tensors, made for the occasion."""
        return self.gate_up_proj.dense(), self.down_proj.dense()
