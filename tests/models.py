"""Tiny models and batches that the tests share."""

from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def tiny_config(**changes: Any) -> MixtralConfig:
    """Return the config of a tiny Mixtral."""
    return MixtralConfig(**{**SIZES, **changes})


def tiny_mixtral(
    seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0, **changes: Any
) -> MixtralForCausalLM:
    """Return a random tiny Mixtral in eval mode.

    Args:
        seed: Seed of the weights.
        dtype: Their type.
        spread: Standard deviation of the matrices, in units of ``1 / sqrt(inputs)``: large enough that experts differ.
        **changes: Fields of the config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MixtralForCausalLM(tiny_config(**changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name:
                    parameter.normal_(0.0, spread * parameter.shape[-1] ** -0.5)
                elif "embed" in name:
                    parameter.normal_(0.0, 1.0)
    if dtype.itemsize < 4:
        # As transformers loads it: weights are narrow, the frequencies of the rotary embedding stay in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model.eval()
    return model.to(dtype).eval()


def random_batches(
    count: int = 3, batch: int = 2, sequence: int = 11, vocab_size: int = SIZES["vocab_size"], seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Return batches of random tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocab_size, (batch, sequence), generator=generator)} for _ in range(count)]
