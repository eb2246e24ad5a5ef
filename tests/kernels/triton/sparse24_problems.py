"""Random matrices with the pattern 2:4, as they are stored and in float64."""

from dataclasses import dataclass

import numpy as np
import torch
from moe_kernels.packing import pack_24_kept
from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles


@dataclass
class Sparse24Problem:
    """Matrices as the kernels read them, and what they mean."""

    tiles: Sparse24Tiles
    dense: np.ndarray


def sparse24_problem(
    slots: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Sparse24Problem:
    """Draw values of either sign and their places; all six pairs of places are there."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(slots, outputs, inputs // 4, 4, generator=draw).argsort(-1).lt(2).flatten(-2)
    weight = (torch.randn(slots, outputs, inputs, generator=draw) * inputs**-0.5).to(dtype)
    packed = pack_24_kept(weight, kept)
    tiles = Sparse24Tiles(packed.values.to(device), packed.metadata.to(device))
    return Sparse24Problem(tiles, np.where(kept.numpy(), weight.double().numpy(), 0.0))
