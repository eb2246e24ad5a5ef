"""Random int4 matrices and routing tables, and what they mean, in numpy and float64."""

from dataclasses import dataclass

import numpy as np
import torch
from moe_kernels.packing import pack_int4
from moe_kernels.triton_kernels.int4_layout import Int4Tiles, to_tiles
from torch import Tensor

# Norm of the error over that of the result, by type of the activations: what they are rounded to on the way counts.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-3}
# Arithmetic in bf16 is wrong in triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@dataclass
class Int4Problem:
    """Matrices as they are stored, in the layout of the kernels and in float64."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    dense: np.ndarray

    @property
    def tiles(self) -> Int4Tiles:
        return to_tiles(self.words, self.scale, self.zero, self.dense.shape[-1])


def int4_problem(
    slots: int, outputs: int, inputs: int, group: int, symmetric: bool = False, seed: int = 0, device: str = "cpu"
) -> Int4Problem:
    draw = np.random.default_rng(seed)
    groups = inputs // group
    codes = draw.integers(0, 16, (slots, outputs, inputs)).astype(np.uint8)
    zero = np.full((slots, outputs, groups), 8, np.uint8)
    if not symmetric:
        zero = draw.integers(0, 16, zero.shape).astype(np.uint8)
    scale = torch.from_numpy(draw.uniform(0.01, 0.02, zero.shape)).bfloat16()
    wide = (codes.astype(np.float64) - zero.repeat(group, -1)) * scale.double().numpy().repeat(group, -1)
    return Int4Problem(
        pack_int4(torch.from_numpy(codes)).to(device),
        scale.to(device),
        None if symmetric else pack_int4(torch.from_numpy(zero), torch.uint8).to(device),
        wide,
    )


def routing_problem(
    tokens: int, experts: int, top_k: int, novices: tuple[int, ...] = (), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return experts ``[N, K]``, weights ``[N, K]`` and a slot map ``[E]``."""
    draw = torch.Generator().manual_seed(seed)
    real = [expert for expert in range(experts) if expert not in novices]
    slot_map = torch.tensor([real.index(e) if e in real else -1 - novices.index(e) for e in range(experts)])
    index = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :top_k].contiguous()
    weight = torch.rand(tokens, top_k, generator=draw)
    return index, weight / weight.sum(1, keepdim=True), slot_map


def relative_error(got: Tensor, want: np.ndarray | Tensor) -> float:
    """Return ``|got - want| / |want|``; infinite where a number is not finite."""
    wide = got.detach().double().cpu().numpy()
    want = want.detach().double().cpu().numpy() if isinstance(want, Tensor) else want
    if not np.isfinite(wide).all():
        return float("inf")
    return float(np.linalg.norm(wide - want) / max(np.linalg.norm(want), 1e-30))
