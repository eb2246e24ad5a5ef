"""Seeing what every expert gets and gives while the model runs.

An experts module returns the weighted sum only, so for the time of the observation its forward is replaced on the
instance: it computes the same from the same weights and shows each pair's output on the way. No class and no config is
touched.

Legend: N tokens, H hidden, R router rows, K top-k, P routed pairs (N * K), Q those of them that reach a real expert, I
channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from moe_kernels import RoutedPairs
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer, OpenExperts


@dataclass(frozen=True)
class PairOutputs:
    """What the experts of a layer gave for every routed pair, before the routing weight.

    Attributes:
        order_P: Place of each pair in the flattened ``[tokens * k]`` routing table, int64; grouped by router row.
        segments: ``(router row, start, end)`` of each group that is not empty, in the order of the groups: first the
            rows with weights (those that share a slot side by side), then novices, then absent experts.
        outputs_PH: ``E_i(x)`` of each pair in that order. A novice gives its vector and its map, an absent expert zero.
        channels_QI: ``act(gate x) * up x`` of the first Q pairs, those of real experts; None where not asked for.
        top_k: K.
    """

    order_P: Tensor
    segments: tuple[tuple[int, int, int], ...]
    outputs_PH: Tensor
    channels_QI: Tensor | None
    top_k: int

    @cached_property
    def outputs_NKH(self) -> Tensor:
        """The outputs by token, ``[tokens, k, hidden]``."""
        num_pairs, hidden = self.outputs_PH.shape
        table = torch.empty_like(self.outputs_PH).index_copy_(0, self.order_P, self.outputs_PH)
        return table.view(num_pairs // self.top_k, self.top_k, hidden)


@dataclass(frozen=True)
class RoutedOutputs:
    """What the experts of a layer did with a batch, padding left out.

    Attributes:
        hidden_NH: Input of the block after its norm.
        logits_NR: Router logits.
        weight_NK: Effective routing weights ``g``.
        index_NK: Router rows chosen.
        pairs: Outputs of the experts, grouped by router row.
        experts: The weights that made them.
    """

    hidden_NH: Tensor
    logits_NR: Tensor
    weight_NK: Tensor
    index_NK: Tensor
    pairs: PairOutputs = field(repr=False)
    experts: OpenExperts = field(repr=False)

    @property
    def outputs_NKH(self) -> Tensor:
        """``E_i(x)`` of each pair before the routing weight, by token."""
        return self.pairs.outputs_NKH

    @cached_property
    def gate_P(self) -> Tensor:
        """Routing weight of each pair in the order of ``pairs``, float64."""
        return self.weight_NK.reshape(-1)[self.pairs.order_P].double()

    @property
    def token_P(self) -> Tensor:
        """Token of each pair in the order of ``pairs``."""
        return self.pairs.order_P // self.pairs.top_k

    def kept(self, keep_N: Tensor) -> RoutedOutputs:
        """Return the same without the tokens that ``keep_N`` (bool) leaves out."""
        pairs = self.pairs
        keep_P = keep_N[self.token_P]
        # Tokens and pairs get new numbers: those before them that stay.
        token_N = keep_N.cumsum(0) - 1
        order_P = (token_N[self.token_P] * pairs.top_k + pairs.order_P % pairs.top_k)[keep_P]
        ends = [end for _, _, end in pairs.segments]
        counts = keep_P.cumsum(0)[torch.tensor([end - 1 for end in ends], dtype=torch.int64, device=keep_P.device)]
        starts = [0, *counts.tolist()]
        segments = tuple(
            (row, start, end)
            for (row, _, _), start, end in zip(pairs.segments, starts, starts[1:], strict=False)
            if end > start
        )
        channels_QI = pairs.channels_QI
        if channels_QI is not None:
            channels_QI = channels_QI[keep_P[: channels_QI.shape[0]]]
        kept = PairOutputs(order_P, segments, pairs.outputs_PH[keep_P], channels_QI, pairs.top_k)
        return RoutedOutputs(
            self.hidden_NH[keep_N],
            self.logits_NR[keep_N],
            self.weight_NK[keep_N],
            self.index_NK[keep_N],
            kept,
            self.experts,
        )


def pair_outputs(
    experts: OpenExperts, hidden_NH: Tensor, index_NK: Tensor, *, with_channels: bool = False
) -> PairOutputs:
    """Compute what each chosen expert gives for a token, whatever stands in its place.

    Args:
        experts: The weights of a layer.
        hidden_NH: Input of the block after its norm.
        index_NK: Router rows chosen, each one that the layer has.
        with_channels: Hold the inner activations too.

    Returns:
        The outputs, grouped by router row.
    """
    num_slots, num_novices = experts.num_slots, 0 if experts.novices is None else experts.novices.shape[0]
    slots = experts.slot_map.tolist()
    # Rows in the order of their slots, so that the rows of a slot are one group for the products; then the others.
    rows = sorted(range(len(slots)), key=lambda row: (slots[row] < 0, abs(slots[row]), row))
    place_R = torch.empty_like(experts.slot_map)
    place_R[torch.tensor(rows, device=place_R.device)] = torch.arange(len(rows), device=place_R.device)
    place_P = place_R[index_NK.reshape(-1)]
    order_P = torch.argsort(place_P, stable=True)
    counts = torch.bincount(place_P, minlength=len(rows)).tolist()
    segments, slot_ends, end = [], [0] * num_slots, 0
    for row, count in zip(rows, counts, strict=True):
        start, end = end, end + count
        if slots[row] >= 0:
            slot_ends[slots[row]] = end
        if count:
            segments.append((row, start, end))
    num_real = slot_ends[-1] if slot_ends else 0
    offsets_S = torch.tensor(slot_ends, dtype=torch.int32, device=hidden_NH.device)
    pairs = RoutedPairs(order_P[:num_real], offsets_S, index_NK.shape[-1])
    channels_QI = experts.channels(hidden_NH, pairs)
    outputs_PH = experts.project(channels_QI, pairs)
    if num_real < order_P.shape[0]:
        parts = [outputs_PH]
        for row, start, end in segments:
            if slots[row] < 0:
                hidden_XH = hidden_NH[order_P[start:end] // index_NK.shape[-1]]
                number = -1 - slots[row]
                parts.append(_novice(experts, number, hidden_XH) if number < num_novices else 0 * hidden_XH)
        outputs_PH = torch.cat([part.to(outputs_PH.dtype) for part in parts])
    return PairOutputs(order_P, tuple(segments), outputs_PH, channels_QI if with_channels else None, index_NK.shape[-1])


def _novice(experts: OpenExperts, number: int, hidden_XH: Tensor) -> Tensor:
    assert experts.novices is not None
    vector_XH = experts.novices[number].to(hidden_XH.dtype).expand_as(hidden_XH)
    if experts.maps is None:
        return vector_XH
    mine = experts.maps.novice_R == number
    read_XR = hidden_XH @ experts.maps.in_RH[mine].to(hidden_XH.dtype).T
    return vector_XH + read_XR @ experts.maps.out_RH[mine].to(hidden_XH.dtype)


Sink = Callable[[int, RoutedOutputs], None]


class ExpertObserver:
    """Shows every MoE layer's routed outputs to a sink while it is attached."""

    def __init__(
        self, model: nn.Module, architecture: Architecture, sink: Sink, *, with_channels: bool = False
    ) -> None:
        """Prepare to watch a model; nothing is changed until :meth:`attached`.

        Args:
            model: The model.
            architecture: Its architecture.
            sink: Called with the row of the layer (position among the MoE layers) and what was seen, once for each
                call, outside of autocast.
            with_channels: Show the inner activations too.
        """
        self.model = model
        self.architecture = architecture
        self.sink = sink
        self.with_channels = with_channels
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
                undo.append(override_forward(layer.experts, partial(self._forward, row, layer, seen)))
            yield self
        finally:
            for step in reversed(undo):
                step()

    def _forward(
        self, row: int, layer: MoELayer, seen: dict[str, Tensor], hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor
    ) -> Tensor:
        opened = self.architecture.open_experts(layer)
        pairs = pair_outputs(opened, hidden_NH, index_NK, with_channels=self.with_channels)
        wide = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_NK.dtype), torch.float32)
        # Autocast would make the sums' products narrow.
        with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            mixed_NH = torch.bmm(weight_NK.unsqueeze(1).to(wide), pairs.outputs_NKH.to(wide)).squeeze(1)
            routed = RoutedOutputs(hidden_NH, seen.pop("logits"), weight_NK, index_NK, pairs, opened)
            self.sink(row, routed if self.keep_N is None else routed.kept(self.keep_N))
        return mixed_NH.to(hidden_NH.dtype)


def _remember_logits(seen: dict[str, Tensor], _module: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
    seen["logits"] = output[0]


def override_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], object]:
    """Replace a module's forward on the instance.

    Args:
        module: The module.
        forward: What is called instead.

    Returns:
        A function that undoes it.
    """
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
