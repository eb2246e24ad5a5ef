"""How fast a model runs here and now: wall-clock medians, measured as it is used."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_lightning.architectures.modes import evaluation_mode


def tokens_per_second(model: torch.nn.Module, input_ids: Tensor, repeats: int = 5, warm_up: int = 1) -> float:
    """Measure prefill: one forward pass over whole sequences, without a cache.

    Args:
        model: A causal language model as transformers makes them; its mode is restored.
        input_ids: Token ids [batch, sequence].
        repeats: Passes that are timed.
        warm_up: Passes before that, not timed.

    Returns:
        Tokens per second, by the median time of the passes.

    Raises:
        ValueError: When nothing would be timed.
    """
    ids = input_ids.to(next(model.parameters()).device)

    def run() -> None:
        model(input_ids=ids, use_cache=False)

    return ids.numel() / _median_seconds(model, run, repeats, warm_up)


def decoded_tokens_per_second(
    model: torch.nn.Module, input_ids: Tensor, new_tokens: int = 32, repeats: int = 3, warm_up: int = 1
) -> float:
    """Measure decoding: greedy, one token per sequence and step, with the key/value cache; the prompt is not timed.

    Args:
        model: A causal language model as transformers makes them; its mode is restored.
        input_ids: Prompt [batch, sequence].
        new_tokens: Steps that are timed in each repeat.
        repeats: Repeats that are timed.
        warm_up: Repeats before that, not timed.

    Returns:
        New tokens of all sequences per second, by the median time.

    Raises:
        ValueError: When nothing would be timed.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens {new_tokens}: at least 1 token must be decoded")
    ids = input_ids.to(next(model.parameters()).device)
    state: dict[str, object] = {}

    def prefill() -> None:
        output = model(input_ids=ids, use_cache=True)
        state["cache"] = output.past_key_values
        state["next"] = output.logits[:, -1:].argmax(dim=-1)

    def run() -> None:
        cache, token = state["cache"], state["next"]
        for _ in range(new_tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)

    return ids.shape[0] * new_tokens / _median_seconds(model, run, repeats, warm_up, before_each=prefill)


def _median_seconds(
    model: torch.nn.Module,
    run: Callable[[], None],
    repeats: int,
    warm_up: int,
    before_each: Callable[[], None] | None = None,
) -> float:
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: at least 1 run must be timed")
    on_gpu = next(model.parameters()).is_cuda
    seconds = []
    with evaluation_mode(model):
        for _ in range(warm_up + repeats):
            if before_each is not None:
                before_each()
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])
