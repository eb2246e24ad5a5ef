"""What stands for every expert of a compressed model, by hand, for emulating it on an untouched one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.experts import CompressedExperts, PackedLinear, WeightStack
from tests.reference import channels_by_hand


def stand_ins(model: Any, shape: ml.ModelShape) -> dict[tuple[int, int], Callable[[Tensor], Tensor]]:
    """Return what every expert that the router knows computes for one token, by hand from the parameters."""
    found: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}
    for layout in shape.layouts:
        experts = model.model.layers[shape.blocks.index(layout.layer)].mlp.experts
        if not isinstance(experts, CompressedExperts):
            continue  # nothing was done to this layer
        owners = {**{expert: expert for expert in layout.real}, **dict(layout.merged)}
        start = 0
        for number, (expert, rank) in enumerate(zip(layout.novices, layout.novice_ranks, strict=True)):
            rows = slice(start, start + rank)
            start += rank
            if rank:
                reads, gives = experts.novice_in[rows].detach(), experts.novice_out[rows].detach()
            else:
                reads = gives = torch.zeros(0, 32, dtype=torch.float64)
            vector = experts.novices[number].detach()
            found[layout.layer, expert] = partial(affine, vector, reads, gives)
        for expert, owner in owners.items():
            slot = layout.real.index(owner)
            storage = experts.storage
            bias = torch.zeros(32, dtype=torch.float64) if storage.bias is None else storage.bias[slot].detach()
            gate_up, down = unpacked(storage.gate_up_proj)[slot], unpacked(storage.down_proj)[slot]
            found[layout.layer, expert] = partial(swiglu, gate_up, down, bias)
        for expert in layout.absent:
            found[layout.layer, expert] = torch.zeros_like
    return found


def affine(vector: Tensor, reads: Tensor, gives: Tensor, hidden: Tensor) -> Tensor:
    return vector + gives.T @ (reads @ hidden)


def swiglu(gate_up: Tensor, down: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    return down @ channels_by_hand(hidden, gate_up) + bias


def unpacked(weight: Any) -> Tensor:
    """Return a stack of matrices in floating point, decoded by hand from what a checkpoint would hold."""
    if not isinstance(weight, WeightStack):
        return weight.detach()
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in _state(weight).items()}
    slots, outputs, inputs = weight.slots, weight.outputs, weight.inputs
    dense = np.zeros((slots, outputs, inputs))
    if "scale" in state:
        scale = np.repeat(state["scale"].numpy(), inputs // state["scale"].shape[-1], axis=-1)
        if "codes" in state:
            codes, zero = state["codes"].numpy(), state["zero"].numpy() if "zero" in state else None
            middle = 128.0
        else:
            codes = _nibbles(state["words"].numpy().view(np.uint8), inputs)
            zero = _nibbles(state["zero"].numpy(), state["scale"].shape[-1]) if "zero" in state else None
            middle = 8.0
        spread = middle if zero is None else np.repeat(zero.astype(float), inputs // zero.shape[-1], axis=-1)
        return torch.from_numpy((codes.astype(float) - spread) * scale)
    if "metadata" in state:
        places = _nibbles(state["metadata"].numpy(), inputs // 4)
        values = state["values"].numpy().reshape(slots, outputs, -1, 2)
        for index in np.ndindex(places.shape):
            for value, place in zip(values[index], (places[index] & 3, places[index] >> 2), strict=True):
                dense[(*index[:2], 4 * index[2] + place)] = value
        return torch.from_numpy(dense)
    kept = np.unpackbits(state["bits"].numpy(), axis=-1, bitorder="little")[..., :inputs].astype(bool)
    dense[kept] = state["values"].numpy().reshape(-1)
    return torch.from_numpy(dense)


def _state(stack: WeightStack) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in stack.state_dict().items()}


def _nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Return numbers of 4 bits, the first of a byte in its lower half."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)[..., :count]


def take_over_the_rest(original: Any, model: Any, shape: ml.ModelShape) -> None:
    """Put packed attention, and norms and routers that were rescaled, into the untouched model that emulates."""
    layouts = {layout.layer: layout for layout in shape.layouts}
    with torch.no_grad():
        for place, block in enumerate(shape.blocks):
            ours, theirs = model.model.layers[place], original.model.layers[block]
            theirs.input_layernorm.weight.copy_(ours.input_layernorm.weight)
            for name, linear in ours.self_attn.named_children():
                if isinstance(linear, PackedLinear):
                    getattr(theirs.self_attn, name).weight.copy_(unpacked(linear.stack)[0])
            if block in layouts:
                theirs.post_attention_layernorm.weight.copy_(ours.post_attention_layernorm.weight)
                theirs.mlp.gate.weight[list(layouts[block].router)] = ours.mlp.gate.weight
