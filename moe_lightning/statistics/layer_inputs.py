"""What enters one decoder layer after another, and the moments of what its matrices read.

The calibration tokens run through the model once, a layer at a time: what enters the current layer is kept for all of
them, and what leaves it is computed when its weights are what they are to be. So a layer can be measured as often as
its matrices need, in the state in which the layers before it are.

Legend: N tokens, H hidden, K top-k, S slots, O outputs, I inputs of a matrix, P tokens that reach a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from moe_kernels import grouped_linear
from torch import Tensor, nn

from moe_lightning.architectures import Architecture, MoELayer, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.statistics.batches import Batches, checked_counts, inputs_and_mask, over_all_ranks
from moe_lightning.statistics.moment_memory import MomentKind
from moe_lightning.statistics.observer import override_forward


class _Seen(Exception):
    """What was waited for has come: no error, but the way out of a pass that has nothing more to give."""


@dataclass
class _Batch:
    """One batch on its way through the layers.

    Attributes:
        hidden: What enters the current layer, ``[batch, sequence, H]``.
        options: The other arguments of the first decoder layer, which every later one gets as well: masks, positions.
        keep_N: Tokens that count, bool ``[batch * sequence]``; None where all do.
    """

    hidden: Tensor
    options: dict[str, Any]
    keep_N: Tensor | None

    def counted(self, tensor: Tensor) -> Tensor:
        """Return the rows of tokens that count, ``[N, ...]``."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.keep_N is None else flat[self.keep_N]


@dataclass
class ExpertInputs:
    """What enters the experts of a layer in one batch, padding left out.

    Attributes:
        hidden_NH: Hidden states after the norm.
        index_NK: Router rows chosen.
        weight_NK: Routing weights.
    """

    hidden_NH: Tensor
    index_NK: Tensor
    weight_NK: Tensor

    def gates(self, slot_map: Tensor, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return which tokens reach which slot, bool ``[N, S]``, and the routing weight of each, ``[N, S]`` in dtype.

        Experts that were merged share a slot: a token that picks two of them reaches it once, with the sum.
        """
        slot_NK = slots_reached(slot_map, self.index_NK, slots)
        gate_NS = torch.zeros(len(slot_NK), slots + 1, dtype=dtype, device=slot_NK.device)
        gate_NS.scatter_add_(1, slot_NK, self.weight_NK.to(dtype))
        reached_NS = torch.zeros_like(gate_NS, dtype=torch.bool).scatter_(1, slot_NK, True)
        return reached_NS[:, :slots], gate_NS[:, :slots]


def slots_reached(slot_map: Tensor, index_NK: Tensor, slots: int) -> Tensor:
    """Return the slot that each choice of a router leads to, int64 ``[N, K]``.

    Args:
        slot_map: Slot of each router row; negative where there is none.
        index_NK: Router rows chosen. Numbers that are no row mean "nobody", as in transformers.
        slots: S. It stands for everything that is no slot: novices, absent experts, nobody.
    """
    rows = len(slot_map)
    slot_NK = slot_map[index_NK.clamp(0, rows - 1)]
    return torch.where((index_NK < 0) | (index_NK >= rows) | (slot_NK < 0), slots, slot_NK)


def _check_alike(model: Any) -> None:
    """Raise where layers do not attend alike: the masks that the first one gets would be wrong for others."""
    kinds = sorted({str(kind) for kind in getattr(model.config, "layer_types", None) or ()})
    if len(kinds) > 1:
        raise ValueError(
            f"the layers of this model attend in different ways ({', '.join(kinds)} in config.layer_types), and each "
            "would be measured with the attention mask of the first: methods that read the inputs of matrices cannot "
            "work on it. Take one that needs no calibration data (RTN, Magnitude)"
        )


def _shared(options: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return options with the tensors of an earlier batch where they are the same: masks of every batch take memory."""
    if before is None:
        return options
    return {name: _same(value, before.get(name)) for name, value in options.items()}


def _same(value: Any, before: Any) -> Any:
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(map(_same, value, before))
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return value
    alike = (value.shape, value.dtype, value.device) == (before.shape, before.dtype, before.device)
    return before if alike and torch.equal(value, before) else value


@contextmanager
def _stand_ins(linears: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute linears with other weights ``[O, I]`` inside a ``with`` block."""
    undo: list[Callable[[], object]] = []
    try:
        for name, weight_OI in weights.items():

            def forward(inputs: Tensor, weight_OI: Tensor = weight_OI) -> Tensor:
                return F.linear(inputs, weight_OI)

            undo.append(override_forward(linears[name], forward))
        yield
    finally:
        for step in reversed(undo):
            step()


class LayerInputs:
    """The inputs of one decoder layer after another, for all calibration batches.

    Everything is measured with the weights that the model has at that moment. Between the calls the model may be
    changed, but for the number of its decoder layers; no hook and no mode is left behind in it.

    In a distributed run tokens and moments are sums over all ranks: each asks for the same in the same order.

    Attributes:
        place: Position of the current layer among the decoder layers that the model has.
        num_tokens: Calibration tokens of this process that are no padding.
    """

    def __init__(self, model: nn.Module, batches: Batches, place: int = 0) -> None:
        """Run all batches up to a layer.

        Args:
            model: A model with its language head, compressed or not.
            batches: Dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask`` (0 = padding).
            place: Position of the layer to begin with.

        Raises:
            ValueError: No batches, no tokens outside the padding, a batch without ``input_ids``; or layers that attend
                in different ways.
        """
        _check_alike(model)
        self.model = model
        self.architecture: Architecture = architecture_of(model)
        self.place = place
        self.device = next(model.parameters()).device
        self._batches = self._caught(batches)
        self.num_tokens = sum(
            batch.hidden[..., 0].numel() if batch.keep_N is None else int(batch.keep_N.sum()) for batch in self._batches
        )
        checked_counts(len(self._batches), self.num_tokens, self.device)
        self._experts: list[ExpertInputs] | None = None
        self._ahead: list[Tensor] | None = None
        self._replaced: dict[str, Tensor] = {}

    @property
    def decoder_layer(self) -> Any:
        """The current layer."""
        return self.architecture.decoder_layers(self.model)[self.place]

    @property
    def moe_layer(self) -> MoELayer:
        """The current layer's MoE sub-layer."""
        here = self.decoder_layer
        return next(layer for layer in self.architecture.moe_layers(self.model) if layer.decoder_layer is here)

    @property
    def dtype(self) -> torch.dtype:
        """Type of sums: fp32, or float64 in a float64 model."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    @property
    def kept_bytes(self) -> int:
        """Memory of the hidden states that are kept now, attention masks left out."""
        kept = [batch.hidden for batch in self._batches] + (self._ahead or [])
        for inputs in self._experts or []:
            kept += [inputs.hidden_NH, inputs.index_NK, inputs.weight_NK]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def _caught(self, batches: Batches) -> list[_Batch]:
        """Run batches up to the current layer and keep what enters it, with all of its arguments."""
        caught: list[_Batch] = []
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def see(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            options = dict(options)
            hidden = arguments[0] if arguments else options.pop("hidden_states")
            seen.append((hidden, options))
            raise _Seen

        handle = self.decoder_layer.register_forward_pre_hook(see, with_kwargs=True)
        try:
            with evaluation_mode(self.model):
                for number, batch in enumerate(batches):
                    inputs, mask = inputs_and_mask(batch, number, self.device)
                    with suppress(_Seen):
                        self.model.model(  # type: ignore[operator]
                            input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False
                        )
                    hidden, options = seen.pop()
                    options = _shared(options, caught[-1].options if caught else None)
                    caught.append(_Batch(hidden, options, None if mask is None else mask.reshape(-1)))
        finally:
            handle.remove()
        return caught

    def _run(self, visit: Callable[[_Batch, Tensor], object]) -> None:
        """Run the current layer on one batch after the other and show what leaves it."""
        # What is shown is visited in here, not yielded: an error there must find its way out through the context.
        layer = self.decoder_layer
        with evaluation_mode(layer):
            for batch in self._batches:
                visit(batch, layer(batch.hidden, **batch.options))

    def _run_to(self, module: nn.Module, visit: Callable[[_Batch, tuple[Any, ...]], object]) -> None:
        """Run the current layer up to one of its modules and show the arguments of that."""
        seen: list[tuple[Any, ...]] = []

        def see(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments)
            raise _Seen

        layer = self.decoder_layer
        handle = module.register_forward_pre_hook(see)
        try:
            with evaluation_mode(layer):
                for batch in self._batches:
                    with suppress(_Seen):
                        layer(batch.hidden, **batch.options)
                    visit(batch, seen.pop())
        finally:
            handle.remove()

    def run_ahead(self) -> None:
        """Compute what leaves the current layer before the layer is changed; :meth:`advance` then goes on from there.

        Where the attention is changed before the experts are measured, ask for :meth:`expert_inputs` before as well.
        """
        ahead: list[Tensor] = []
        self._run(lambda _, hidden: ahead.append(hidden))
        self._ahead = ahead

    def advance(self) -> None:
        """Go to the next layer: run the current one as it is now, or as it was at :meth:`run_ahead`."""
        # One batch after the other: what leaves the layer takes the place of what entered it.
        if self._ahead is None:
            self._run(lambda batch, hidden: setattr(batch, "hidden", hidden))
        else:
            for batch, hidden in zip(self._batches, self._ahead, strict=True):
                batch.hidden = hidden
        self._ahead = self._experts = None
        self._replaced.clear()
        self.place += 1

    def expert_inputs(self) -> list[ExpertInputs]:
        """Return what enters the current layer's experts, one entry for each batch; kept until the next layer."""
        if self._experts is None:
            found: list[ExpertInputs] = []
            self._run_to(
                self.moe_layer.experts,
                lambda batch, arguments: found.append(ExpertInputs(*map(batch.counted, arguments))),
            )
            self._experts = found
        return self._experts

    def replace(self, name: str, weight_SOI: Tensor) -> None:
        """Compute the inputs of later matrices of the current layer with other weights.

        Args:
            name: ``gate_up_proj`` ``[S, 2I, H]``, or one of the attention's linears ``[1, O, I]``.
            weight_SOI: The weights.
        """
        self._replaced[name] = weight_SOI.detach()

    def changed(self) -> None:
        """Forget the weights of :meth:`replace`: the layer holds them itself now."""
        self._replaced.clear()

    def _slots(self) -> tuple[Tensor, int]:
        opened = self.architecture.open_experts(self.moe_layer)
        return opened.slot_map, int(opened.slot_map.max().clamp(min=-1)) + 1

    def expert_tokens(self) -> Tensor:
        """Return how many tokens of all ranks reach each slot of the current layer, int64 ``[S]`` on the CPU."""
        slot_map, slots = self._slots()
        count_S = torch.zeros(slots, dtype=torch.int64, device=self.device)
        for inputs in self.expert_inputs():
            count_S += inputs.gates(slot_map, slots, self.dtype)[0].sum(0)
        return over_all_ranks(count_S).cpu()

    def all_tokens(self) -> Tensor:
        """Return how many tokens there are on all ranks, int64 ``[1]`` on the CPU."""
        return over_all_ranks(torch.tensor([self.num_tokens], device=self.device)).cpu()

    def expert_moments(self, name: str, kind: MomentKind, slots: Sequence[int], *, gated: bool = False) -> Tensor:
        """Sum up the inputs of some matrices of the current layer's experts over the tokens that reach them.

        Args:
            name: ``gate_up_proj`` or ``down_proj``, whose input is ``act(gate x) * up x``.
            kind: ``diagonal`` or ``full``.
            slots: Which.
            gated: Take ``g x`` for x, with the effective routing weight g.

        Returns:
            ``[s, I]`` or ``[s, I, I]``, summed in fp32 (float64 in a float64 model); zeros where no token came.

        Raises:
            ValueError: The sums are not finite.

        Cost: for each slot ``P I`` or ``P I^2`` multiply-adds, and ``2 P H I`` more for ``down_proj``.
        """
        opened = self.architecture.open_experts(self.moe_layer)
        slot_map, num_slots = self._slots()
        gate_up = self._replaced.get("gate_up_proj", opened.gate_up_proj.detach())
        size = gate_up.shape[2] if name == "gate_up_proj" else gate_up.shape[1] // 2
        total = self._zeros(len(slots), size, kind)
        for inputs in self.expert_inputs():
            reached_NS, gate_NS = inputs.gates(slot_map, num_slots, self.dtype)
            for row, slot in enumerate(slots):
                members_P = reached_NS[:, slot].nonzero().squeeze(-1)
                if not len(members_P):
                    continue
                x_PI = inputs.hidden_NH[members_P]
                if name == "down_proj":
                    weight = gate_up[slot].to(opened.gate_up_proj.dtype)
                    ends = torch.tensor([len(x_PI)], dtype=torch.int32, device=x_PI.device)
                    gate_PI, up_PI = grouped_linear(x_PI, weight[None], ends).chunk(2, dim=-1)
                    x_PI = opened.activation(gate_PI) * up_PI
                _add(total[row], x_PI, gate_NS[members_P, slot] if gated else None)
        return self._finished(total, name)

    def attention_moments(self, name: str, kind: MomentKind) -> Tensor:
        """Sum up the inputs of one of the current layer's attention matrices over all tokens.

        Args:
            name: Of a linear, e.g. ``o_proj``.
            kind: ``diagonal`` or ``full``.

        Returns:
            ``[1, I]`` or ``[1, I, I]``, as of :meth:`expert_moments`.

        Raises:
            ValueError: The sums are not finite.
        """
        linears = self.architecture.attention_linears(self.decoder_layer)
        dtype = next(self.model.parameters()).dtype
        weights = {other: weight[0].to(dtype) for other, weight in self._replaced.items() if other in linears}
        total = self._zeros(1, linears[name].in_features, kind)
        with _stand_ins(linears, weights):
            self._run_to(linears[name], lambda batch, arguments: _add(total[0], batch.counted(arguments[0]), None))
        return self._finished(total, name)

    def _zeros(self, slots: int, size: int, kind: MomentKind) -> Tensor:
        shape = (slots, size) if kind == "diagonal" else (slots, size, size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _finished(self, total: Tensor, name: str) -> Tensor:
        total = over_all_ranks(total)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"the inputs of {name} in decoder layer {self.place} are not finite: "
                "the model's weights or activations overflow"
            )
        return total


def _add(total: Tensor, x_PI: Tensor, gate_P: Tensor | None) -> None:
    """Add the moments of some rows; products in the type of the sum, whatever autocast says."""
    with torch.autocast(x_PI.device.type, enabled=False):
        x_PI = x_PI.to(total.dtype)
        if gate_P is not None:
            x_PI = x_PI * gate_P[:, None]
        if total.dim() == 1:
            total += x_PI.square().sum(0)
        else:
            total.addmm_(x_PI.T, x_PI)
