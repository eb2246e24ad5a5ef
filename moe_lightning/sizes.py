"""Parameters, bytes and FLOPs of a model, counted in its real tensors. One function, so that every number agrees.

(The public name is ``moe_lightning.measure``; a module of that name would shadow it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moe_lightning.architectures import architecture_of
from moe_lightning.experts import WeightStack, is_lora


@dataclass(frozen=True)
class ModelSize:
    """Size and cost of a model.

    Attributes:
        parameters: Parameters, shared ones once. A weight of 4 bits is one, and so is one that was set to zero.
        bytes: Bytes of all parameters and persistent buffers in memory, shared ones once, packed ones as they are.
        flops: Floating-point operations of one forward pass over one sequence, 2 for each multiply-add.
    """

    parameters: int
    bytes: int
    flops: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.bytes / 2**20:,.1f} MiB, {self.flops / 1e9:,.2f} GFLOP a sequence"
        )


def data_size(count: float) -> str:
    """Write a number of bytes in the unit that suits it.

    Args:
        count: Bytes.
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _held_bytes(model: nn.Module) -> int:
    """Count what is in memory: parameters and the buffers that a checkpoint holds, packed or not."""
    seen: dict[int, int] = {}
    for module in model.modules():
        # While it works, a packed matrix may hold its weights in a form that a checkpoint does not.
        passing = set() if isinstance(module, WeightStack) else module._non_persistent_buffers_set
        buffers = (buffer for name, buffer in module._buffers.items() if name not in passing)
        for tensor in (*module._parameters.values(), *buffers):
            if tensor is not None:
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model; of packed matrices each weight that they stand for, zeros included."""
    packed = [module for module in model.modules() if isinstance(module, WeightStack)]
    inside = {id(parameter) for stack in packed for parameter in stack.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return others + sum(stack.num_weights for stack in packed)


def count_trainable(model: nn.Module) -> int:
    """Count the parameters of a model that an optimizer may change: no integers, and no zeros of pruned matrices."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for stack in model.modules():
        if isinstance(stack, WeightStack):
            held = sum(parameter.numel() for parameter in stack.parameters() if parameter.requires_grad)
            count -= max(0, held - stack.slots * stack.format.kept(stack.outputs, stack.inputs))
    return count


def _shares(routed_share: float | Sequence[float] | None, num_layers: int) -> list[float]:
    if routed_share is None:
        return [0.0] * num_layers
    shares = (
        [float(routed_share)] * num_layers
        if isinstance(routed_share, int | float)
        else [float(s) for s in routed_share]
    )
    if len(shares) != num_layers:
        raise ValueError(
            f"routed_share has {len(shares)} entries, the model has {num_layers} MoE layers: give one for each"
        )
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"routed_share must lie in [0, 1], got {shares}")
    return shares


def _beside(linear: nn.Module) -> list[nn.Parameter]:
    """Return the low-rank terms beside a linear layer."""
    return [parameter for name, parameter in linear.named_parameters() if is_lora(name)]


def measure(
    model: nn.Module, sequence_length: int = 2048, routed_share: float | Sequence[float] | None = None
) -> ModelSize:
    """Count parameters, bytes and FLOPs of a model, on any device, ``meta`` included.

    FLOPs are those of the q, k, v, o products, non-causal attention ``4 * S^2 * heads * head_dim``, routers, experts,
    novice products and the language head, for one sequence. Embedding and norms are not counted. Integers and zeros
    save bytes, and no FLOPs.

    Args:
        model: A Mixtral with its language head, compressed or not.
        sequence_length: S, tokens.
        routed_share: Share of the routed (token, expert) pairs that novices get, for all layers or one number for each
            MoE layer. None gives the upper bound: every token picks real experts.

    Returns:
        The size.

    Raises:
        ValueError: Not a supported model, or ``routed_share`` out of range.

    Source: 2406.02500, Table 3: what is counted reproduces its TFLOP figures.
    """
    architecture = architecture_of(model)
    layers = architecture.moe_layers(model)
    shape = architecture.shape(model)
    tokens = sequence_length
    attention = sum(
        module.in_features * module.out_features + sum(term.numel() for term in _beside(module))
        for layer in architecture.decoder_layers(model)
        for module in architecture.attention_linears(layer).values()
    )
    products = attention + model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    scores = 4 * tokens * tokens * shape.num_attention_heads * shape.head_dim * len(architecture.decoder_layers(model))
    experts = 0.0
    for layer, share in zip(layers, _shares(routed_share, len(layers)), strict=True):
        opened = architecture.open_experts(layer)
        real = opened.num_slots
        products += layer.router.weight.numel()
        if opened.novices is not None:
            products += opened.novices.numel()
        if opened.maps is not None:
            products += opened.maps.in_RH.numel() + opened.maps.out_RH.numel()
        if real:
            one = (opened.num_weights + opened.storage.num_lora) // real
            # Merged experts share weights, and a token that picks two of them is computed twice.
            reachable = int(sum(place >= 0 for place in shape.layout(layer.index).slot_map))
            picks = min(shape.top_k, reachable) if routed_share is None else min(shape.top_k * (1.0 - share), reachable)
            experts += picks * one
    flops = 2 * tokens * products + scores + round(2 * tokens * experts)
    return ModelSize(count_parameters(model), _held_bytes(model), flops)
