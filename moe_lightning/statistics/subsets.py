"""What a layer's output loses when only a subset of its experts can be chosen, for every subset.

Tokens of deleted experts go to others, which an ordinary pass has not seen at work: here every expert computes every
token.

Legend: L MoE layers, E experts of the original model, N tokens without padding, R router rows, K top-k, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lightning.architectures import Architecture, MoELayer, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.plan import ExpertLayout, ModelShape
from moe_lightning.statistics.batches import Batches, checked_counts, inputs_and_mask, over_all_ranks, size_in_words
from moe_lightning.statistics.groups import MOST_SUBSET_EXPERTS, TOKENS_AT_ONCE, statistics_bytes
from moe_lightning.statistics.observer import pair_outputs
from moe_lightning.statistics.routing import routing_table


def subset_number(experts: tuple[int, ...]) -> int:
    """Return the column of a set of experts in ``subset_error``: bit ``i`` for expert ``i``."""
    return sum(1 << expert for expert in experts)


def check_subset_experts(num_experts: int) -> None:
    """Check that every subset of the experts can be tried out.

    Raises:
        ValueError: There are too many experts.
    """
    if num_experts > MOST_SUBSET_EXPERTS:
        raise ValueError(
            f"'subsets' tries out all sets of experts, which is possible up to {MOST_SUBSET_EXPERTS} experts a layer, "
            f"and this model has {num_experts}: use criterion=naee, which adds up errors of pairs, or another one"
        )


def collect_subsets(model: nn.Module, batches: Batches, shape: ModelShape, *, progress: bool = True) -> dict[str, Any]:
    """Measure the error of every layer's output for every subset of its experts that could stay.

    Args:
        model: The model.
        batches: Calibration batches; gone through once.
        shape: Its shape.
        progress: Show a progress bar.

    Returns:
        ``subset_error [L, 2^E]``: mean over tokens of ``|y - y_S|^2``, with the router choosing among the experts of
        the set only, by :func:`subset_number`; NaN for sets with experts that the layer does not have, and for the
        empty one. ``subset_tokens [1]``. Float64, on the CPU.

    Raises:
        ValueError: Too many experts, no batches, or no tokens.

    Source: 2402.14800 (NAEE), where each subset is a run of the layer. Here the outputs of all experts are computed
    once, and the error of a set is ``d G d`` with the change ``d`` of the routing weights and the outputs' Gram ``G``.

    Cost: a forward pass with all experts for all tokens, and ``2^E * E^2`` operations for each token and layer.
    """
    check_subset_experts(shape.num_experts)
    architecture = architecture_of(model)
    device = next(model.parameters()).device
    layers = architecture.moe_layers(model)
    sums = torch.zeros(len(layers), 1 << shape.num_experts, dtype=torch.float64, device=device)
    watches = [
        _Watch(architecture, layer, layout, sums[row])
        for row, (layer, layout) in enumerate(zip(layers, shape.layouts, strict=True))
    ]
    num_batches = num_tokens = 0
    memory = size_in_words(statistics_bytes(shape, {"subsets"}))
    bar = tqdm(batches, desc=f"subsets ({memory})", unit="batch", disable=None if progress else True, leave=False)
    handles = [handle for watch in watches for handle in watch.attached()]
    try:
        with evaluation_mode(model):
            for batch in bar:
                inputs, mask = inputs_and_mask(batch, num_batches, device)
                for watch in watches:
                    watch.keep_N = None if mask is None else mask.reshape(-1)
                model.model(  # type: ignore[operator]
                    input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False
                )
                num_batches += 1
                num_tokens += inputs.numel() if mask is None else int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    checked_counts(num_batches, num_tokens, device)
    total = over_all_ranks(sums.new_tensor([num_tokens]))
    error = (over_all_ranks(sums) / total).cpu()
    for row, watch in enumerate(watches):
        possible = torch.zeros(error.shape[1], dtype=torch.bool)
        possible[[number for number, _ in watch.subsets]] = True
        error[row, ~possible] = torch.nan
    return {"subset_error": error, "subset_tokens": total.cpu()}


class _Watch:
    """Adds up the errors of one layer's subsets."""

    def __init__(self, architecture: Architecture, layer: MoELayer, layout: ExpertLayout, sums: Tensor) -> None:
        self.architecture = architecture
        self.layer = layer
        self.sums = sums
        self.keep_N: Tensor | None = None
        self._logits: Tensor | None = None
        rows = [row for row, expert in enumerate(layout.router) if expert not in layout.absent]
        self.subsets: list[tuple[int, list[int]]] = []
        for number in range(1, 1 << len(rows)):
            members = [row for place, row in enumerate(rows) if number >> place & 1]
            self.subsets.append((subset_number(tuple(layout.router[row] for row in members)), members))

    def attached(self) -> list[Any]:
        """Hook the router and the experts; return the handles."""
        return [
            self.layer.router.register_forward_hook(self._remember),
            self.layer.experts.register_forward_pre_hook(self._observe),
        ]

    def _remember(self, _module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        self._logits = output[0]

    def _observe(self, _module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        assert self._logits is not None
        everything = (args[0], self._logits, args[1], args[2])
        if self.keep_N is not None:
            everything = tuple(tensor[self.keep_N] for tensor in everything)  # type: ignore[assignment]
        for parts in zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in everything), strict=True):
            self._add(*parts)

    def _add(self, hidden_NH: Tensor, logits_NR: Tensor, index_NK: Tensor, weight_NK: Tensor) -> None:
        tokens, num_rows = logits_NR.shape
        everyone = torch.arange(num_rows, device=hidden_NH.device).expand(tokens, -1)
        outputs_NRH = pair_outputs(self.architecture.open_experts(self.layer), hidden_NH, everyone).outputs_NKH.double()
        gram_NRR = outputs_NRH @ outputs_NRH.transpose(1, 2)
        intact_NR = routing_table(index_NK, weight_NK, num_rows)
        for number, members in self.subsets:
            masked_NR = torch.full_like(logits_NR, -torch.inf)
            masked_NR[:, members] = logits_NR[:, members]
            weight, index = self.architecture.route(self.layer, masked_NR)
            change_NR = intact_NR - routing_table(index, weight, num_rows)
            self.sums[number] += torch.einsum("nr,nrs,ns->", change_NR, gram_NRR, change_NR)
