"""Tiny compressed models of the kinds that the Triton kernels know, for comparing ways to compute them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lightning.architectures import mixtral_layer
from moe_lightning.experts import compressed
from moe_lightning.experts.kernel_path import use_kernels
from moe_lightning.plan import (
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    NoviceExperts,
    Quantize,
    Sparsify,
)
from tests.packed import packed_mixtral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The least that int4 tiles take.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}

MODELS: dict[str, tuple[Edit, ...]] = {
    # Layers that are not named are as transformers made them. Two experts are picked, here of one.
    "dense": (KeepExperts(0, (0, 1, 3, 5)), KeepExperts(2, (4,), allow_fewer_than_top_k=True)),
    "channels": (KeepChannels(0, 32), KeepExperts(1, (0, 2, 3), router="keep")),
    "novices": (
        NoviceExperts(0, (1, 4), "low_rank", (3, 0)),
        NoviceExperts(2, (0, 1, 2, 3, 4, 5), "low_rank", (1,) * 6),
    ),
    "int4": (KeepExperts(0, (1, 3, 5)), Quantize(0, group_size=64)),
    "int4 and novices": (NoviceExperts(1, (0, 1, 4), "low_rank", (3, 0, 1)), Quantize(1, group_size=64)),
    "2:4 and novices": (NoviceExperts(1, (0, 4), "low_rank", (2, 0)), Sparsify(1, pattern="2:4")),
    "dropped": (DropMoE(1), DropBlock(2)),
}
"""Edits by name."""

ALL_MODELS = pytest.mark.parametrize("name", MODELS)


def make_model(name: str, **options: Any) -> Any:
    """Return a model in eval mode, its novices and biases with values."""
    model = packed_mixtral(MODELS[name], **{**SIZES, **options})
    return fill_new(model).to(DEVICE)


def fill_new(model: Any) -> Any:
    """Give novices, biases and low-rank terms of a model values, the same at every call."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("novice", "bias", "lora")):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 8)
    return model


def tokens(number: int = 4, batch: int = 1, seed: int = 0) -> Tensor:
    """Return token ids ``[batch, number]``, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, number), generator=draw).to(DEVICE)


@contextmanager
def by_kernels() -> Iterator[list[str]]:
    """Take the kernels everywhere, and note what goes through them.

    Yields:
        ``block`` for a router, experts and residual; ``sum`` for experts and residual; ``experts`` for these alone.
    """
    found: list[str] = []

    def noted(module: Any, name: str, word: str) -> None:
        operation = getattr(module, name)

        def call(*arguments: Any) -> Tensor:
            found.append(word)
            return operation(*arguments)

        patch.setattr(module, name, call)

    with pytest.MonkeyPatch.context() as patch, use_kernels("always"):
        noted(mixtral_layer, "block_by_kernels", "block")
        noted(mixtral_layer, "mix_by_kernels", "sum")
        noted(compressed, "mix_by_kernels", "experts")
        yield found
