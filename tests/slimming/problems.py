"""Random matrices with inputs that are correlated and of very different size, as in a transformer."""

import torch
from torch import Tensor


def weights(slots: int, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(slots, outputs, inputs, dtype=torch.float64, generator=generator)


def inputs_of(slots: int, tokens: int, inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    mixing = torch.randn(slots, inputs, inputs, dtype=torch.float64, generator=generator)
    mixing = mixing / inputs**0.5 + 0.5 * torch.eye(inputs, dtype=torch.float64)
    size = torch.randn(slots, 1, inputs, dtype=torch.float64, generator=generator).exp()
    return torch.randn(slots, tokens, inputs, dtype=torch.float64, generator=generator) @ mixing * size


def hessian_of(tokens: Tensor) -> Tensor:
    return tokens.mT @ tokens


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Add 1 % of the mean of the diagonal to one matrix's diagonal."""
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
