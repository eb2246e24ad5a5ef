"""How fast a model runs here and now: medians of whole runs, measured as it is used.

Prefill is one forward pass over whole sequences, decoding goes on from them token by token with the key/value cache.
Where the time is a GPU's it is taken between two events on its stream, with nothing else waiting there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.records import Rate

PROMPT_TOKENS = 16384
"""Tokens of a prompt that go in at a time before decoding: all at once would take far more memory than the decoding."""


class Work(Protocol):
    """What is timed.

    Attributes:
        device: Where it runs.
        tokens: Tokens that a run goes through, of all sequences.
        steps: Forward passes of a run.
        batch: Sequences.
        context: Tokens of each that go in (prefill), or were there before (decoding).
    """

    device: torch.device
    tokens: int
    steps: int
    batch: int
    context: int

    def prepare(self) -> None:
        """Do what comes before a run and is not timed."""

    def run(self) -> None:
        """Do what is timed."""

    def forget(self) -> None:
        """Free what is kept between runs."""


class Prefill:
    """One forward pass over whole sequences, without a cache; all logits are computed."""

    def __init__(self, model: nn.Module, input_ids: Tensor) -> None:
        """Note what runs on what.

        Args:
            model: A causal language model as transformers makes them, in eval mode.
            input_ids: Token ids [batch, sequence].
        """
        self.model = model
        self.device = next(model.parameters()).device
        self.ids = input_ids.to(self.device)
        self.batch, self.context = self.ids.shape
        self.tokens, self.steps = self.ids.numel(), 1

    def prepare(self) -> None:
        """Do nothing: every pass begins anew."""

    def forget(self) -> None:
        """Do nothing: nothing is kept."""

    def run(self) -> None:
        """Make the pass."""
        self.model(input_ids=self.ids, use_cache=False)


class Decoding:
    """Decoding with the key/value cache that ``generate`` takes, one token of each sequence a step.

    Greedy; or along a text that is given, so that all models read the same and nothing ends in a loop of one word. The
    likeliest token is found in either case.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        new_tokens: int,
        following: Tensor | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        """Note what runs on what.

        Args:
            model: A causal language model as transformers makes them, in eval mode.
            input_ids: Prompt [batch, sequence].
            new_tokens: Steps of a run.
            following: Tokens to go on with [batch, new_tokens], or None.
            prompt_tokens: Tokens of the prompt that go in at a time, of all sequences; ``PROMPT_TOKENS`` where None.

        Raises:
            ValueError: No step.
        """
        if new_tokens < 1:
            raise ValueError(f"new_tokens {new_tokens}: at least 1 token must be decoded")
        self.model = model
        self.device = next(model.parameters()).device
        self.ids = input_ids.to(self.device)
        self.following = None if following is None else following[:, :new_tokens].to(self.device)
        self.batch, self.context = self.ids.shape
        self.tokens, self.steps = self.batch * new_tokens, new_tokens
        self._piece = max(1, (prompt_tokens or PROMPT_TOKENS) // self.batch)
        self._cache: Any = None
        self._first = self.ids

    def prepare(self) -> None:
        """Put the prompt into the cache, or take out of it what the run before has put there."""
        if self._cache is not None and getattr(self.model.config, "sliding_window", None) is None:
            self._cache.crop(-self.steps)
            return
        self._cache = None
        for start in range(0, self.context, self._piece):
            ids = self.ids[:, start : start + self._piece]
            output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
        self._first = output.logits[:, -1:].argmax(dim=-1)

    def run(self) -> None:
        """Decode."""
        token = self._first
        for step in range(self.steps):
            if self.following is not None:
                token = self.following[:, step : step + 1]
            output = self.model(input_ids=token, past_key_values=self._cache, use_cache=True)
            token = output.logits[:, -1:].argmax(dim=-1)

    def forget(self) -> None:
        """Free the cache; the next run begins with the prompt again."""
        self._cache = None


def seconds_of(work: Work) -> float:
    """Return how long one run takes, prepared before.

    Args:
        work: What to run.
    """
    work.prepare()
    if work.device.type != "cuda":
        start = time.perf_counter()
        work.run()
        return time.perf_counter() - start
    with torch.cuda.device(work.device):
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work.run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3


def rate_of(work: Work, seconds: Sequence[float]) -> Rate:
    """Return the tokens a second that runs of some times make.

    Args:
        work: What ran.
        seconds: Of each run.
    """
    median = statistics.median(seconds)
    return Rate(work.tokens / median, work.tokens / max(seconds), work.tokens / min(seconds), work.batch, work.context)


def prefill_rate(model: nn.Module, ids: Tensor, repeats: int = 5, warm_up: int = 1) -> Rate:
    """Measure prefill: one forward pass over whole sequences, without a cache.

    Args:
        model: A causal language model as transformers makes them; its mode is restored.
        ids: Token ids [batch, sequence].
        repeats: Passes that are timed.
        warm_up: Passes before that, not timed.

    Returns:
        Tokens per second, by the median time of the passes, with the slowest and the fastest.

    Raises:
        ValueError: When nothing would be timed.
    """
    return _rate(model, Prefill(model, ids), repeats, warm_up)


def decode_rate(model: nn.Module, ids: Tensor, new_tokens: int = 32, repeats: int = 3, warm_up: int = 1) -> Rate:
    """Measure decoding: greedy, one token per sequence and step, with the key/value cache; the prompt is not timed.

    Args:
        model: A causal language model as transformers makes them; its mode is restored.
        ids: Prompt [batch, sequence].
        new_tokens: Steps of each repeat.
        repeats: Repeats that are timed.
        warm_up: Repeats before that, not timed.

    Returns:
        New tokens of all sequences per second, by the median time, with the slowest and the fastest.

    Raises:
        ValueError: When nothing would be timed.
    """
    return _rate(model, Decoding(model, ids, new_tokens), repeats, warm_up)


def _rate(model: nn.Module, work: Work, repeats: int, warm_up: int) -> Rate:
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: at least 1 run must be timed")
    with evaluation_mode(model):
        seconds = [seconds_of(work) for _ in range(warm_up + repeats)]
    return rate_of(work, seconds[warm_up:])


def tokens_per_second(model: nn.Module, input_ids: Tensor, repeats: int = 5, warm_up: int = 1) -> float:
    """Return the median of :func:`prefill_rate`; its arguments."""
    return prefill_rate(model, input_ids, repeats, warm_up).median


def decoded_tokens_per_second(
    model: nn.Module, input_ids: Tensor, new_tokens: int = 32, repeats: int = 3, warm_up: int = 1
) -> float:
    """Return the median of :func:`decode_rate`; its arguments."""
    return decode_rate(model, input_ids, new_tokens, repeats, warm_up).median
