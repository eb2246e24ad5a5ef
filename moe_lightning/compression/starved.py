"""Counting the calibration tokens that reach each expert before anything is done, and drawing more where they are few.

Legend: B sequences of a batch, X slots of all layers in question, one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_lightning.architectures import MoELayer, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.slimming.policy import SlimmingPolicy, TooFewTokens
from moe_lightning.statistics.batches import Batches, checked_counts, inputs_and_mask, over_all_ranks
from moe_lightning.statistics.layer_inputs import slots_reached

REMEDIES = (
    "give more calibration data, let starved='top_up' draw more, choose starved='fallback', or set a lower min_tokens"
)

FRUITLESS_BATCHES = 64
"""Batches of ``top_up`` in a row, of each process, after which drawing ends if none of them reached a starved expert: a
stream without an end may hold nothing that ever does."""


class _LastSeen(Exception):
    """The last layer in question has been seen: no error, but the way out of the pass."""


class SequenceCounter:
    """Counts for every sequence of a batch how many of its tokens reach each slot of some layers.

    Attributes:
        owners: Layer and original number of the expert of each slot, X entries.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """Prepare to count; nothing is changed until :meth:`attached`.

        Args:
            model: The model.
            layers: Original numbers of the MoE layers in question.
        """
        self.model = model
        self.architecture = architecture_of(model)
        self.device = next(model.parameters()).device
        shape = self.architecture.shape(model)
        self.layers = [layer for layer in self.architecture.moe_layers(model) if layer.index in set(layers)]
        self.owners = [(layer.index, expert) for layer in self.layers for expert in shape.layout(layer.index).real]
        self._slots = {layer.index: len(shape.layout(layer.index).real) for layer in self.layers}
        self._counts: list[Tensor] = []
        self._keep_BL = torch.ones(0, dtype=torch.bool)

    def _see(self, layer: MoELayer, _module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        slots = self._slots[layer.index]
        slot_NK = slots_reached(self.architecture.open_experts(layer).slot_map, arguments[1], slots)
        # A token that picks two experts which share a slot reaches it once.
        reached_NS = torch.zeros(len(slot_NK), slots + 1, dtype=torch.bool, device=slot_NK.device)
        reached_NS.scatter_(1, slot_NK, True)
        sequences, length = self._keep_BL.shape
        reached_BLS = reached_NS[:, :slots].reshape(sequences, length, slots) & self._keep_BL[:, :, None]
        self._counts.append(reached_BLS.sum(1))
        if layer is self.layers[-1]:
            raise _LastSeen

    @contextmanager
    def attached(self) -> Iterator[SequenceCounter]:
        """Count inside a ``with`` block; the model is as before afterwards."""
        handles = [layer.experts.register_forward_pre_hook(partial(self._see, layer)) for layer in self.layers]
        try:
            with evaluation_mode(self.model):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, batch: Mapping[str, Any], number: int) -> Tensor:
        """Run a batch and count.

        Args:
            batch: ``input_ids`` and optional ``attention_mask``.
            number: Its number, for messages.

        Returns:
            Int64 ``[B, X]``; padding does not count.
        """
        inputs, mask = inputs_and_mask(batch, number, self.device)
        self._keep_BL = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask
        self._counts = []
        with suppress(_LastSeen):
            self.model.model(input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False)
        return torch.cat(self._counts, dim=1)


@dataclass(frozen=True)
class _Chained:
    """Batches, and others behind them; neither is read before it is asked for."""

    first: Batches
    then: Batches

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        yield from self.first
        yield from self.then


def in_words(owners: Sequence[tuple[int, int]], counts: Sequence[int]) -> str:
    """Name experts with their numbers of tokens, layer by layer."""
    by_layer: dict[int, list[str]] = {}
    for (layer, expert), count in zip(owners, counts, strict=True):
        by_layer.setdefault(layer, []).append(f"{expert} ({count})")
    return "; ".join(f"layer {layer}: experts {', '.join(experts)}" for layer, experts in by_layer.items())


def _short(counter: SequenceCounter, count_X: Tensor, policy: SlimmingPolicy) -> str:
    short = (count_X < policy.min_tokens).nonzero().flatten().tolist()
    return in_words([counter.owners[slot] for slot in short], [int(count_X[slot]) for slot in short])


def enough_batches(
    model: PreTrainedModel, batches: Batches, layers: Sequence[int], policy: SlimmingPolicy, progress: bool = True
) -> tuple[Batches, frozenset[tuple[int, int]]]:
    """Return calibration batches in which no expert is starved, as far as the policy asks for that.

    Counts are those of the model as it is: once layers are compressed, routing may differ in later ones.

    Args:
        model: The model; it is not changed.
        batches: Calibration batches; to be iterated more than once.
        layers: Layers whose experts are to be measured.
        policy: With ``error`` and ``top_up`` a pass is made; else the batches are returned as they are.
        progress: Show a progress bar.

    Returns:
        The batches, with those drawn behind them; and layer and original number of the experts that are still starved.

    Raises:
        ValueError: There are no batches.
        TooFewTokens: An expert is starved, and that is an error.

    Warns:
        UserWarning: Experts are still starved: the batches of ``top_up`` are exhausted, or
            :data:`FRUITLESS_BATCHES` of them in a row reached none of these experts.
    """
    if policy.starved not in ("error", "top_up") or not layers:
        return batches, frozenset()
    counter = SequenceCounter(model, layers)
    count_X = torch.zeros(len(counter.owners), dtype=torch.int64, device=counter.device)
    num_batches = num_tokens = 0
    hidden = None if progress else True
    with counter.attached():
        for batch in tqdm(batches, desc="tokens per expert", unit="batch", disable=hidden, leave=False):
            count_X += counter(batch, num_batches).sum(0)
            mask = batch.get("attention_mask")
            num_tokens += batch["input_ids"].numel() if mask is None else int(mask.bool().sum())
            num_batches += 1
        # Together with the other processes: one of them may have no batches of its own.
        checked_counts(num_batches, num_tokens, counter.device)
        count_X = over_all_ranks(count_X)
        if not bool((count_X < policy.min_tokens).any()):
            return batches, frozenset()
        if policy.starved == "error":
            short = f"min_tokens={policy.min_tokens} calibration tokens reach {_short(counter, count_X, policy)}"
            raise TooFewTokens(f"fewer than {short}: {REMEDIES}")
        drawn, ended = _draw(counter, count_X, policy, hidden)
    few = (count_X < policy.min_tokens).nonzero().flatten().tolist()
    if few:
        warnings.warn(
            f"{ended}, and fewer than min_tokens={policy.min_tokens} calibration tokens reach "
            f"{_short(counter, count_X, policy)}: give more batches to top_up, other text, or set a lower min_tokens",
            stacklevel=2,
        )
    return _Chained(batches, drawn), frozenset(counter.owners[slot] for slot in few)


def _draw(
    counter: SequenceCounter, count_X: Tensor, policy: SlimmingPolicy, hidden: bool | None
) -> tuple[list[dict[str, Tensor]], str]:
    """Draw further batches; return their sequences that reach starved slots, and in words why nothing more is drawn.

    ``count_X`` is kept up to date.
    """
    assert policy.top_up is not None
    source = iter(policy.top_up)
    drawn: list[dict[str, Tensor]] = []
    number = fruitless = 0
    ended = "top_up is exhausted"
    bar = tqdm(desc="drawing more", unit="batch", disable=hidden, leave=False)
    while bool((count_X < policy.min_tokens).any()):
        if fruitless == FRUITLESS_BATCHES:
            ended = f"{fruitless} batches of top_up in a row reached no starved expert"
            break
        batch = next(source, None)
        # Every rank goes on as long as one of them has something: the sums are of all.
        if not int(over_all_ranks(torch.tensor(batch is not None, dtype=torch.int64, device=counter.device))):
            break
        here_X = count_X.clone()
        if batch is not None:
            rows = []
            for row, row_X in enumerate(counter(batch, number)):
                if bool(((here_X < policy.min_tokens) & (row_X > 0)).any()):
                    rows.append(row)
                    here_X += row_X
            if rows:
                names = [name for name in ("input_ids", "attention_mask") if batch.get(name) is not None]
                drawn.append({name: batch[name][rows] for name in names})
        gained_X = over_all_ranks(here_X - count_X)
        count_X += gained_X
        # Only sequences that reach a starved expert are taken, so that there is a gain or nothing.
        fruitless = 0 if bool(gained_X.any()) else fruitless + 1
        number += 1
        bar.update()
    bar.close()
    return drawn, ended
