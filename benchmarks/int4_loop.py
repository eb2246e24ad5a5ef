"""The opponent in int4: a loop over experts with torch's own int4 product, on a GPU or a CPU."""

from collections.abc import Callable

import torch
from gpu_layers import EXPERTS, TOP_K, Weights
from moe_kernels.packing import unpack_int4
from timing import Unavailable, first_line
from torch import Tensor
from torch.nn.functional import linear, silu

_INNER_TILES = 8
"""Tiles of inputs that lie together in the GPU's layout: loads of 16 bytes."""


class TorchInt4:
    """One matrix in the layout of torch's product, with the same codes, scales and zeros as ours.

    torch has ``w = (code - 8) * scale + shift``, ours is ``(code - zero) * scale``, so ``shift = (8 - zero) * scale``.
    That is exact in bf16 for the zeros drawn here, 6 to 9; the product then rounds every weight to bf16.
    """

    def __init__(self, stored: tuple[Tensor, Tensor, Tensor], inputs: int, dtype: torch.dtype) -> None:
        """Convert; raises `Unavailable` where torch has no such product, or refuses the size."""
        words, scale, zero = stored
        codes, groups = unpack_int4(words, inputs), scale.shape[-1]
        shift = (8 - unpack_int4(zero, groups).float()) * scale.float()
        # The CPU's product wants scales in the type of the rows, the GPU's in bf16 like everything.
        pairs = torch.stack([scale.float(), shift], -1).to(dtype if codes.device.type == "cpu" else torch.bfloat16)
        self.scales, self.group = pairs.transpose(0, 1).contiguous(), inputs // groups
        try:
            if codes.device.type == "cpu":
                self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
                self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
            else:
                pairs_of_codes = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
                self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs_of_codes, _INNER_TILES)
                self.product = torch.ops.aten._weight_int4pack_mm
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            raise Unavailable(f"torch's int4 product: {first_line(error)}") from error

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``rows @ weight.T``."""
        try:
            return self.product(rows, self.packed, self.group, self.scales)
        except RuntimeError as error:
            raise Unavailable(f"torch's int4 product: {first_line(error)}") from error


def int4_loop(weights: Weights) -> Callable[[Tensor], Tensor]:
    """Return a layer that multiplies expert by expert, with one wait for the GPU: for how many rows each one has."""
    sizes = (weights.sizes.hidden, weights.sizes.inner)
    matrices = [
        [
            TorchInt4((words[expert], scale[expert], zero[expert]), inputs, weights.sizes.dtype)
            for (words, scale, zero), inputs in zip(weights.stored, sizes, strict=True)
        ]
        for expert in range(EXPERTS)
    ]

    def layer(hidden: Tensor) -> Tensor:
        weight, index = linear(hidden, weights.router).float().softmax(-1).topk(TOP_K)
        weight = weight / weight.sum(-1, keepdim=True)
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        tokens = order // TOP_K
        counts = chosen.bincount(minlength=EXPERTS).tolist()
        outputs = []
        for (gate_up, down), rows in zip(matrices, hidden[tokens].split(counts), strict=True):
            if rows.shape[0]:
                gate, up = gate_up(rows).chunk(2, -1)
                outputs.append(down(silu(gate) * up))
        weighted = torch.cat(outputs).float() * weight.flatten()[order, None]
        return torch.zeros_like(hidden, dtype=torch.float32).index_add_(0, tokens, weighted).to(hidden.dtype)

    return layer
