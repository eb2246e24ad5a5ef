"""A tiny Mixtral trained for a few seconds on real text: its experts differ and its router is sure of itself."""

import copy
import functools
import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor

from tests.models import tiny_config

BLOCK = 48


@functools.cache
def _text() -> Tensor:
    topics = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return torch.tensor(list(topics.encode()), dtype=torch.int64)


def text_batches(count: int, batch: int = 8, seed: int = 0, held_out: bool = False) -> list[dict[str, Tensor]]:
    """Return blocks of bytes; those held out come from the last tenth of the text."""
    text = _text()
    border = len(text) * 9 // 10
    low, high = (border, len(text)) if held_out else (0, border)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        starts = torch.randint(low, high - BLOCK, (batch,), generator=generator)
        found.append({"input_ids": torch.stack([text[start : start + BLOCK] for start in starts])})
    return found


@functools.cache
def _trained(steps: int) -> Any:
    from transformers import MixtralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(vocab_size=256, max_position_embeddings=64)
        config._experts_implementation = "grouped_mm"
        model = MixtralForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
        for step, batch in enumerate(text_batches(steps, 16, seed=1)):
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1.0 - 0.9 * step / steps)
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    return model.eval()


def trained_mixtral(dtype: torch.dtype = torch.float32, steps: int = 250) -> Any:
    """Return a copy of the trained model; trained once in each process.

    Args:
        dtype: Type of the weights. In float64 its experts and attention are transformers' plain loops.
        steps: Training steps.
    """
    model = copy.deepcopy(_trained(steps)).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
        model.set_attn_implementation("eager")
    return model


def loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Return the mean loss in nats for each byte."""
    with torch.no_grad():
        return sum(float(model(**batch, labels=batch["input_ids"]).loss) for batch in batches) / len(batches)
