"""What stands for every expert of a compressed model, by hand, for emulating it on an untouched one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.experts import CompressedExperts
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
            found[layout.layer, expert] = partial(
                swiglu, storage.gate_up_proj[slot].detach(), storage.down_proj[slot].detach(), bias
            )
        for expert in layout.absent:
            found[layout.layer, expert] = torch.zeros_like
    return found


def affine(vector: Tensor, reads: Tensor, gives: Tensor, hidden: Tensor) -> Tensor:
    return vector + gives.T @ (reads @ hidden)


def swiglu(gate_up: Tensor, down: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    return down @ channels_by_hand(hidden, gate_up) + bias
