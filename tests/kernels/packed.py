"""Random int4 matrices, and what they mean, in numpy."""

from dataclasses import dataclass

import numpy as np
import torch
from moe_kernels.packing import pack_int4
from torch import Tensor


@dataclass
class Packed:
    """A stack of int4 matrices, plain and packed."""

    codes: np.ndarray
    scale: Tensor
    zeros: np.ndarray
    words: Tensor
    zero: Tensor | None

    @property
    def stored(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        return self.words, self.scale, self.zero, self.codes.shape[-1]

    @property
    def weight(self) -> np.ndarray:
        """``(code - zero) * scale`` in float64, weight by weight."""
        scale = self.scale.double().numpy()
        inputs = self.codes.shape[-1]
        group = inputs // scale.shape[-1]
        weight = np.empty(self.codes.shape)
        for column in range(inputs):
            place = column // group
            steps = self.codes[:, :, column].astype(float) - self.zeros[:, :, place]
            weight[:, :, column] = steps * scale[:, :, place]
        return weight

    def product(self, rows: Tensor, offsets: Tensor) -> np.ndarray:
        """``rows[group s] @ weight[s].T`` in float64, row by row."""
        weight, result, slot = self.weight, [], 0
        for number, row in enumerate(rows.detach().double().numpy()):
            while number >= offsets[slot]:
                slot += 1
            result.append(weight[slot] @ row)
        return np.array(result).reshape(-1, self.codes.shape[1])


def make_packed(
    slots: int, outputs: int, inputs: int, group: int, symmetric: bool = False, scale_type: torch.dtype = torch.bfloat16
) -> Packed:
    draw = torch.Generator().manual_seed(slots + outputs + inputs + group)
    codes = torch.randint(0, 16, (slots, outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(slots, outputs, inputs // group, generator=draw) * 0.05 + 1e-3).to(scale_type)
    zeros = torch.randint(0, 16, scale.shape, generator=draw, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(8)
    zero = None if symmetric else pack_int4(zeros, torch.uint8)
    return Packed(codes.numpy(), scale, zeros.numpy().astype(float), pack_int4(codes), zero)


def draw_rows(number: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(number, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(got: Tensor, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    if not expected.size:
        return 0.0
    return float(np.linalg.norm(got.detach().double().numpy() - expected) / np.linalg.norm(expected))
