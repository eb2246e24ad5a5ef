"""Second moments of what single experts get and give: what a linear map in their place is fitted from.

Unlike the sums of the one pass they are large (``[hidden, hidden]`` each, in float64), so they are measured for as many
experts at a time as a budget of memory allows, in as many passes as that takes, and freed after each.

Every sum stands once for each of a few folds, to fit on all of them but one and to judge on that one. The folds are
sections of the pass, not tokens or sequences drawn at random: what follows one another comes from the same document,
and a map that was fitted on one half of a document looks good on the other half.

Legend: N tokens, H hidden, P tokens that reach one expert, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lightning.architectures import Architecture, MoELayer, OpenExperts, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.plan import ModelShape
from moe_lightning.statistics.batches import inputs_and_mask

NUM_FOLDS = 4
"""Sections of the pass, each of which is held out once."""

MAX_BYTES = 4 * 2**30
"""Memory for the second moments of one pass, in bytes."""

PADDING = -1

SecondMoments = tuple["FoldMoments", ...]
"""The second moments of one expert, one entry for each fold."""


@dataclass
class FoldMoments:
    """Sums over the tokens of one fold that reach one expert, float64.

    ``x`` is the expert's input (after the norm), ``y = E(x)`` its output before the routing weight, ``g`` the effective
    routing weight.

    Attributes:
        tokens: Tokens of the fold, whether they reach the expert or not; scalar.
        count: Those that do; scalar.
        gate2: ``sum g^2``; scalar.
        gate2_input: ``sum g^2 x``, ``[H]``.
        gate2_output: ``sum g^2 y``, ``[H]``.
        gate2_input_square: ``sum g^2 x x^T``, ``[H, H]``.
        gate2_cross: ``sum g^2 x y^T``, ``[H, H]``.
        gate2_norm_square: ``sum g^2 |y|^2``; scalar.
    """

    tokens: Tensor
    count: Tensor
    gate2: Tensor
    gate2_input: Tensor
    gate2_output: Tensor
    gate2_input_square: Tensor
    gate2_cross: Tensor
    gate2_norm_square: Tensor

    @classmethod
    def zeros(cls, hidden_size: int, device: torch.device | str = "cpu") -> FoldMoments:
        """Start from nothing.

        Args:
            hidden_size: H.
            device: Where the sums are kept.
        """
        sizes = {"gate2_input": 1, "gate2_output": 1, "gate2_input_square": 2, "gate2_cross": 2}
        return cls(
            *(
                torch.zeros((hidden_size,) * sizes.get(entry.name, 0), dtype=torch.float64, device=device)
                for entry in fields(cls)
            )
        )

    def add(self, tokens: int, input_PH: Tensor, output_PH: Tensor, gate_P: Tensor) -> None:
        """Add tokens.

        Args:
            tokens: How many tokens of the fold went through the layer.
            input_PH: ``x`` of those that reached the expert, ``[P, H]``.
            output_PH: ``E(x)``, ``[P, H]``.
            gate_P: ``g(x)``, ``[P]``.
        """
        self.tokens += tokens
        self.count += gate_P.shape[0]
        if not gate_P.shape[0]:
            return
        x_PH, y_PH, square_P = input_PH.double(), output_PH.double(), gate_P.double().square()
        weighted_HP = (square_P[:, None] * x_PH).T
        self.gate2 += square_P.sum()
        self.gate2_input += weighted_HP.sum(1)
        self.gate2_output += square_P @ y_PH
        self.gate2_input_square.addmm_(weighted_HP, x_PH)
        self.gate2_cross.addmm_(weighted_HP, y_PH)
        self.gate2_norm_square += square_P @ y_PH.square().sum(1)

    @classmethod
    def total(cls, folds: Iterable[FoldMoments]) -> FoldMoments:
        """Return the sums over several folds.

        Args:
            folds: At least one.
        """
        first, *others = folds
        result = cls(*(getattr(first, entry.name).clone() for entry in fields(cls)))
        for other in others:
            for entry in fields(cls):
                getattr(result, entry.name).add_(getattr(other, entry.name))
        return result

    def over_all_ranks(self) -> None:
        """Add up the sums of all processes of a distributed run, in place."""
        for entry in fields(self):
            torch.distributed.all_reduce(getattr(self, entry.name))

    @property
    def finite(self) -> bool:
        """Whether every sum is a number."""
        return all(bool(torch.isfinite(getattr(self, entry.name)).all()) for entry in fields(self))


def second_moment_bytes(hidden_size: int, num_experts: int) -> int:
    """Return the memory that the second moments of some experts take at once.

    Args:
        hidden_size: H.
        num_experts: How many experts.

    Returns:
        Bytes: for each fold two ``[H, H]`` and two ``[H]`` in float64, and four numbers.
    """
    return num_experts * NUM_FOLDS * 8 * (2 * hidden_size**2 + 2 * hidden_size + 4)


class _LayersDone(Exception):
    """The last wanted layer has been seen: no error, but the way out of a pass that has nothing more to give."""


def split_folds(batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Say which fold every calibration token is in: contiguous sections of the pass with equally many tokens.

    How the sequences were put into batches does not matter, nor does the padding; their order does. With fewer tokens
    than folds some folds are empty.

    Args:
        batches: Dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask`` (0 = padding).

    Returns:
        For each batch the fold of each token, -1 for padding, int8 ``[batch, sequence]``.
    """
    counted = []
    for batch in batches:
        mask = batch.get("attention_mask")
        every = torch.ones(batch["input_ids"].shape, dtype=torch.bool, device="cpu")
        counted.append(every if mask is None else mask.bool().cpu())
    total = sum(int(mask.sum()) for mask in counted)
    folds, start = [], 0
    for mask in counted:
        number = start + mask.reshape(-1).cumsum(0) - 1
        start += int(mask.sum())
        fold = torch.where(mask.reshape(-1), number * NUM_FOLDS // max(total, 1), PADDING)
        folds.append(fold.reshape(mask.shape).to(torch.int8))
    return folds


class _Observed(NamedTuple):
    """One expert that is being watched: the router rows that lead to it, its slot, and its sums."""

    rows: Tensor
    slot: int
    moments: SecondMoments


def _expert_output(opened: OpenExperts, slot: int, input_PH: Tensor) -> Tensor:
    gate_PI, up_PI = F.linear(input_PH, opened.gate_up_proj[slot]).chunk(2, dim=-1)
    output_PH = F.linear(opened.activation(gate_PI) * up_PI, opened.down_proj[slot])
    return output_PH if opened.bias is None else output_PH + opened.bias[slot]


class _Watch:
    """Hooks that sum up the wanted experts' tokens and leave the forward pass after the last wanted layer."""

    def __init__(
        self, model: nn.Module, architecture: Architecture, wanted: Mapping[int, Mapping[int, SecondMoments]]
    ) -> None:
        self.architecture = architecture
        self.fold_N = torch.empty(0, dtype=torch.int8)
        layouts = {layout.layer: layout for layout in architecture.shape(model).layouts}
        self.layers = [layer for layer in architecture.moe_layers(model) if wanted.get(layer.index)]
        self.watched = [self._observe(layer, layouts[layer.index].router, wanted[layer.index]) for layer in self.layers]

    def _observe(
        self, layer: MoELayer, router: Sequence[int], wanted: Mapping[int, SecondMoments]
    ) -> tuple[_Observed, ...]:
        slot_map = self.architecture.open_experts(layer).slot_map
        watched = []
        for expert, moments in wanted.items():
            slot = int(slot_map[router.index(expert)])
            watched.append(_Observed((slot_map == slot).nonzero().squeeze(-1), slot, moments))
        return tuple(watched)

    def attach(self) -> list[Any]:
        """Put the hooks in and return their handles."""
        return [
            layer.experts.register_forward_pre_hook(partial(self._see, number))
            for number, layer in enumerate(self.layers)
        ]

    def _see(self, number: int, _module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden_NH, index_NK, weight_NK = arguments
        opened = self.architecture.open_experts(self.layers[number])
        totals = [int((self.fold_N == fold).sum()) for fold in range(NUM_FOLDS)]
        for rows, slot, moments in self.watched[number]:
            chosen_NK = torch.isin(index_NK, rows) & (self.fold_N != PADDING)[:, None]
            members_P = chosen_NK.any(1).nonzero().squeeze(-1)
            # Experts that were merged share a slot: a token that picks two of them weighs it with the sum.
            gate_P = (weight_NK.double() * chosen_NK).sum(1)[members_P]
            input_PH = hidden_NH[members_P]
            output_PH = _expert_output(opened, slot, input_PH)
            for fold, (total, sums) in enumerate(zip(totals, moments, strict=True)):
                here = self.fold_N[members_P] == fold
                sums.add(total, input_PH[here], output_PH[here], gate_P[here])
        if number + 1 == len(self.layers):
            raise _LayersDone


def _check_wanted(shape: ModelShape, wanted: Mapping[int, Iterable[int]]) -> list[tuple[int, int]]:
    real = {layout.layer: layout.real for layout in shape.layouts}
    flat = []
    for layer in sorted(wanted):
        for expert in sorted(set(wanted[layer])):
            if expert not in real.get(layer, ()):
                raise ValueError(
                    f"second moments: layer {layer} has no real expert {expert}: "
                    f"choose from {list(real.get(layer, ()))}"
                )
            flat.append((layer, expert))
    return flat


def iterate_second_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    wanted: Mapping[int, Iterable[int]],
    *,
    progress: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Iterator[dict[tuple[int, int], SecondMoments]]:
    """Measure second moments, as many experts at a time as the memory allows.

    Every group of experts takes a pass over the batches, which ends in the last layer that it needs. The model is as
    before between the groups and afterwards. In a distributed run every rank gets the sums over all ranks, and
    divides its own tokens into folds.

    Args:
        model: A model with its language head, compressed or not.
        batches: Dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask`` (0 = padding). Kept for
            the passes, so they must fit into memory.
        wanted: Real experts by the original number of their layer.
        progress: Show a progress bar, which states the memory.
        max_bytes: Largest memory for the sums of a group, see :func:`second_moment_bytes`; one expert at a time where
            not even that fits.

    Yields:
        The moments of a group by (layer, expert), in ascending order, on the model's device. Let go of them before the
        next group, or the memory is that of all.

    Raises:
        ValueError: An expert that is not there, no batches or no tokens, or sums that are not finite.

    Cost: in each pass a forward pass up to the last layer of the group, and ``4 * H^2`` float64 operations for each
    token that reaches an expert of the group.
    """
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    flat = _check_wanted(shape, wanted)
    if not flat:
        return
    kept = list(batches)
    folds = split_folds(kept)
    device = next(model.parameters()).device
    at_once = max(1, max_bytes // second_moment_bytes(shape.hidden_size, 1))
    groups = [flat[start : start + at_once] for start in range(0, len(flat), at_once)]
    for number, group in enumerate(groups):
        moments = {
            pair: tuple(FoldMoments.zeros(shape.hidden_size, device) for _ in range(NUM_FOLDS)) for pair in group
        }
        memory = second_moment_bytes(shape.hidden_size, len(group)) / 2**20
        description = f"second moments {number + 1}/{len(groups)}, {len(group)} experts, {memory:.4g} MiB"
        _measure(model, architecture, kept, folds, moments, device, description, progress)
        for (layer, expert), folded in moments.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                for sums in folded:
                    sums.over_all_ranks()
            if not all(sums.finite for sums in folded):
                raise ValueError(
                    f"second moments of expert {expert} in layer {layer} are not finite: "
                    "the model's weights or activations overflow"
                )
            if not any(float(sums.tokens) for sums in folded):
                raise ValueError("second moments: the calibration batches hold no token outside the padding")
        yield moments
        del moments


def _measure(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, Any]],
    folds: Sequence[Tensor],
    moments: Mapping[tuple[int, int], SecondMoments],
    device: torch.device,
    description: str,
    progress: bool,
) -> None:
    by_layer: dict[int, dict[int, SecondMoments]] = {}
    for (layer, expert), folded in moments.items():
        by_layer.setdefault(layer, {})[expert] = folded
    bar = tqdm(
        zip(batches, folds, strict=True),
        total=len(batches),
        desc=description,
        unit="batch",
        disable=None if progress else True,
        leave=False,
    )
    with evaluation_mode(model):
        watch = _Watch(model, architecture, by_layer)
        handles = watch.attach()
        try:
            for number, (batch, fold_BS) in enumerate(bar):
                watch.fold_N = fold_BS.reshape(-1).to(device)
                inputs, mask = inputs_and_mask(batch, number, device)
                with suppress(_LayersDone):
                    # The decoder without its head, of which not even all is run.
                    model.model(  # type: ignore[operator]
                        input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False
                    )
        finally:
            for handle in handles:
                handle.remove()
