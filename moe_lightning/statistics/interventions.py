"""What the model's predictions lose when one expert cannot be chosen.

Legend: L MoE layers, E experts of the original model (columns), N tokens without padding, R router rows, K top-k, H
hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lightning.architectures import Architecture, MoELayer, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.divergence import kl_divergence
from moe_lightning.plan import ModelShape
from moe_lightning.statistics.batches import Batches, checked_counts, inputs_and_mask, over_all_ranks, size_in_words
from moe_lightning.statistics.groups import LOGIT_BYTES, statistics_bytes
from moe_lightning.statistics.observer import override_forward


def collect_interventions(
    model: nn.Module, batches: Batches, shape: ModelShape, *, progress: bool = True
) -> dict[str, Tensor]:
    """Mask each expert alone and measure how far the predictions move.

    The expert's router logit becomes minus infinity, so that the router chooses others in its place; where a layer has
    one expert only, that contributes zero instead. Novices and absent experts are masked, too: they have a routing
    weight.

    Args:
        model: The model.
        batches: Calibration batches; gone through once.
        shape: Its shape.
        progress: Show a progress bar over batches, layers and experts.

    Returns:
        ``expert_divergence [L, E]``: mean over tokens of ``KL(intact || masked)`` in nats; ``divergence_tokens [1]``.

    Source: the ablation that every other score stands for; 2406.02500 and 2507.00390 do not make it.

    Cost: for each batch, layer and expert a forward pass of the blocks from that layer on. The hidden states of one
    batch between all blocks are held meanwhile, and its intact logits as far as they fit into ``LOGIT_BYTES``.
    """
    architecture = architecture_of(model)
    device = next(model.parameters()).device
    layers = architecture.moe_layers(model)
    divergence = torch.zeros(len(layers), shape.num_experts, dtype=torch.float64, device=device)
    num_batches = num_tokens = 0
    kept = list(batches)
    tokens = max((batch["input_ids"].numel() for batch in kept if "input_ids" in batch), default=0)
    bar = tqdm(
        total=len(kept) * sum(len(layout.router) for layout in shape.layouts),
        desc=f"interventions ({size_in_words(statistics_bytes(shape, {'interventions'}, tokens))})",
        unit="expert",
        disable=None if progress else True,
        leave=False,
    )
    with evaluation_mode(model), bar:
        for batch in kept:
            run = _Batch(model, architecture, *inputs_and_mask(batch, num_batches, device))
            num_batches += 1
            num_tokens += run.num_tokens
            if not run.num_tokens:
                bar.update(sum(len(layout.router) for layout in shape.layouts))
                continue
            for row, (layer, layout) in enumerate(zip(layers, shape.layouts, strict=True)):
                for router_row, expert in enumerate(layout.router):
                    divergence[row, expert] += run.divergence(layer, router_row)
                    bar.update()
    checked_counts(num_batches, num_tokens, device)
    total = over_all_ranks(divergence.new_tensor([num_tokens]))
    return {"expert_divergence": (over_all_ranks(divergence) / total).cpu(), "divergence_tokens": total.cpu()}


class _Batch:
    """What the intact model does with a batch, and the divergence of a masked one from it."""

    def __init__(self, model: Any, architecture: Architecture, inputs: Tensor, mask: Tensor | None) -> None:
        self.model = model
        self.architecture = architecture
        self.inputs = inputs
        self.mask = mask
        self.blocks = list(architecture.decoder_layers(model))
        self.states: list[Tensor] = []
        handles = [block.register_forward_pre_hook(self._remember, with_kwargs=True) for block in self.blocks]
        try:
            self.intact_NH = self._hidden()
        finally:
            for handle in handles:
                handle.remove()
        self.num_tokens = self.intact_NH.shape[0]
        vocabulary = model.get_output_embeddings().weight.shape[0]
        fits = self.num_tokens * vocabulary * self.intact_NH.element_size() <= LOGIT_BYTES
        self.step = self.num_tokens if fits else max(1, LOGIT_BYTES // (vocabulary * self.intact_NH.element_size()))
        self.logits_NV = self._head(self.intact_NH) if fits else None

    def _remember(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states.append(args[0] if args else kwargs["hidden_states"])

    def _hidden(self) -> Tensor:
        """Return what the head reads, ``[N, H]``."""
        mask = None if self.mask is None else self.mask.long()
        states = self.model.model(input_ids=self.inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return states.flatten(0, 1) if self.mask is None else states[self.mask]

    def _head(self, hidden_NH: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden_NH)
        return logits

    def divergence(self, layer: MoELayer, router_row: int) -> Tensor:
        """Return the sum over tokens of the divergence with one router row masked, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.inputs.device)
        with _masked(layer, self.architecture, router_row), self._resumed_at(layer):
            masked_NH = self._hidden()
        for start in range(0, self.num_tokens, max(1, self.step)):
            part = slice(start, start + self.step)
            intact_NV = self._head(self.intact_NH[part]) if self.logits_NV is None else self.logits_NV
            total += kl_divergence(intact_NV, self._head(masked_NH[part])).sum()
        return total

    @contextmanager
    def _resumed_at(self, layer: MoELayer) -> Iterator[None]:
        """Let the model begin at a decoder layer, with the intact model's input of that layer."""
        place = next(number for number, block in enumerate(self.blocks) if block is layer.decoder_layer)
        forward = layer.decoder_layer.forward
        undo: list[Callable[[], object]] = []
        try:
            for block in self.blocks[:place]:
                undo.append(override_forward(block, _unchanged))
            undo.append(override_forward(layer.decoder_layer, partial(_with_input, forward, self.states[place])))
            yield
        finally:
            for step in reversed(undo):
                step()


def _unchanged(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states


def _with_input(forward: Callable[..., Any], states: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return forward(states, *args, **kwargs)


@contextmanager
def _masked(layer: MoELayer, architecture: Architecture, router_row: int) -> Iterator[None]:
    """Keep the router from choosing a row."""

    def mask(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_NR = output[0].clone()
        logits_NR[:, router_row] = -torch.inf
        weight_NK, index_NK = architecture.route(layer, logits_NR)
        # Where there are no others to choose from the masked one is still chosen, with a weight of 0 or 0 / 0.
        return logits_NR, weight_NK.masked_fill(index_NK == router_row, 0.0), index_NK

    handle = layer.router.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()
