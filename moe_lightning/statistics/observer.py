"""Seeing what every expert gets and gives while the model runs.

An experts module returns the weighted sum only, so for the time of the observation its forward is replaced on the
instance: it computes the same from the same weights and shows each pair's output on the way. No class and no config is
    touched.

Legend: N tokens, H hidden, R router rows, K top-k, P pairs that reach a real expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from moe_kernels import combine_pairs, expert_outputs, sort_pairs
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer


class RoutedOutputs(NamedTuple):
    """What the experts of a layer did with a batch, padding left out.

    Attributes:
        logits_NR: Router logits, ``[tokens, router rows]``.
        weight_NK: Effective routing weights ``g``, ``[tokens, k]``.
        index_NK: Router rows chosen, int64 ``[tokens, k]``.
        outputs_NKH: ``E_i(x)`` of each pair before the routing weight, ``[tokens, k, hidden]``; a novice gives its
            vector.
    """

    logits_NR: Tensor
    weight_NK: Tensor
    index_NK: Tensor
    outputs_NKH: Tensor


Sink = Callable[[int, RoutedOutputs], None]


class ExpertObserver:
    """Shows every MoE layer's routed outputs to a sink while it is attached."""

    def __init__(self, model: nn.Module, architecture: Architecture, sink: Sink) -> None:
        """Prepare to watch a model; nothing is changed until :meth:`attached`.

        Args:
            model: The model.
            architecture: Its architecture.
            sink: Called with the row of the layer (position among the MoE layers) and what was seen, once for each
                call.
        """
        self.model = model
        self.architecture = architecture
        self.sink = sink
        self.keep_N: Tensor | None = None
        """Which tokens of the running batch count, bool ``[batch * sequence]``; None where all do."""

    @contextmanager
    def attached(self) -> Iterator[ExpertObserver]:
        """Watch inside a ``with`` block."""
        undo: list[Callable[[], object]] = []
        try:
            for row, layer in enumerate(self.architecture.moe_layers(self.model)):
                seen: dict[str, Tensor] = {}
                hook = layer.router.register_forward_hook(partial(_remember_logits, seen))
                undo.append(hook.remove)
                undo.append(_override_forward(layer.experts, partial(self._forward, row, layer, seen)))
            yield self
        finally:
            for step in reversed(undo):
                step()

    def _forward(
        self, row: int, layer: MoELayer, seen: dict[str, Tensor], hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor
    ) -> Tensor:
        opened = self.architecture.open_experts(layer)
        pairs = sort_pairs(index_NK, opened.slot_map, opened.gate_up_proj.shape[0])
        outputs_PH = expert_outputs(hidden_NH, pairs, opened.gate_up_proj, opened.down_proj, opened.activation)
        num_tokens, top_k = index_NK.shape
        table = outputs_PH.new_zeros(num_tokens * top_k, hidden_NH.shape[-1]).index_copy(0, pairs.order, outputs_PH)
        slot_NK = opened.slot_map[index_NK]
        mixed_NH = combine_pairs(outputs_PH, pairs, weight_NK)
        if opened.novices is not None:
            novice_pairs = (slot_NK.reshape(-1) < 0).nonzero().squeeze(-1)
            vectors = opened.novices[-1 - slot_NK.reshape(-1)[novice_pairs]]
            table = table.index_copy(0, novice_pairs, vectors.to(table.dtype))
            weighted = vectors.to(mixed_NH.dtype) * weight_NK.reshape(-1)[novice_pairs, None].to(mixed_NH.dtype)
            mixed_NH = mixed_NH.index_add(0, novice_pairs // top_k, weighted)
        logits_NR = seen.pop("logits")
        outputs_NKH = table.view(num_tokens, top_k, hidden_NH.shape[-1])
        with torch.no_grad():
            if self.keep_N is None:
                routed = RoutedOutputs(logits_NR, weight_NK, index_NK, outputs_NKH)
            else:
                keep = self.keep_N
                routed = RoutedOutputs(logits_NR[keep], weight_NK[keep], index_NK[keep], outputs_NKH[keep])
            self.sink(row, routed)
        return mixed_NH.to(hidden_NH.dtype)


def _remember_logits(seen: dict[str, Tensor], _module: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
    seen["logits"] = output[0]


def _override_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], object]:
    # Through the instance's dictionary: a wrapper that somebody put there before (accelerate does) comes back
    # afterwards.
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> None:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous

    return restore
