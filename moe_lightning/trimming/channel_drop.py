"""Channel Drop: every expert of a layer keeps the same number of channels, a bias stands for the others.

Legend: L layers with real experts, S real experts (slots) of a layer, H hidden, I channels of an expert.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moe_lightning.architectures import OpenExperts
from moe_lightning.criteria.selection import round_half_up
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ExpertLayout, KeepChannels, ModelShape
from moe_lightning.statistics import Statistics

ChannelScope = Literal["layer", "global"]

CHANNEL_NEEDS = frozenset({"channels"})
"""What the choice of channels and their bias need."""


class ChannelMoments(NamedTuple):
    """Moments of the channels ``h = act(gate x) * (up x)`` of the real experts of a layer.

    Attributes:
        tokens: Tokens behind them, ``[S]``.
        mean: ``[S, I]``.
        m2: Sums of squared deviations, ``[S, I]``.
    """

    tokens: Tensor
    mean: Tensor
    m2: Tensor


def width_of(layout: ExpertLayout, shape: ModelShape) -> int:
    """Return the channels that each real expert of a layer has now."""
    return shape.intermediate_size if layout.width is None else layout.width


def channel_moments(statistics: Statistics, layer: int) -> ChannelMoments:
    """Return the moments of the channels of every slot.

    Args:
        statistics: What was measured, group ``channels``.
        layer: Original number of the layer.

    Returns:
        One row for each real expert, in the order of the slots. Experts that share a slot after a merge are one.
    """
    layout = statistics.shape.layout(layer)
    at = (statistics.row(layer), list(layout.real))
    width = width_of(layout, statistics.shape)
    return ChannelMoments(
        statistics["channel_count"][at],
        statistics["channel_mean"][at][:, :width],
        statistics["channel_m2"][at][:, :width],
    )


def channel_scores(statistics: Statistics, layer: int) -> Tensor:
    """Score the channels of the real experts of a layer: ``Var(h_j) * ||W_down[:, j]||^2``, larger = keep.

    Args:
        statistics: What was measured, group ``channels``.
        layer: Original number of the layer.

    Returns:
        ``[S, I]`` float64; the variance is the unbiased one over the expert's tokens, 0 for fewer than two.

    Source: 2312.11983 (FLAP), eq. 5.
    """
    layout = statistics.shape.layout(layer)
    moments = channel_moments(statistics, layer)
    weight_square_SI = statistics["channel_weight_square"][statistics.row(layer), list(layout.real)]
    variance_SI = moments.m2 / (moments.tokens - 1).clamp(min=1)[:, None]
    return variance_SI * weight_square_SI[:, : moments.m2.shape[1]]


def standardised(score_SI: Tensor) -> Tensor:
    """Bring the scores of every expert to mean 0 and standard deviation 1, so that one threshold holds for all.

    Args:
        score_SI: From :func:`channel_scores`.

    Returns:
        ``[S, I]``; zeros for an expert whose channels all score the same.

    Source: 2312.11983 (FLAP), eq. 7; here a module is one expert.
    """
    if score_SI.shape[1] < 2:
        return torch.zeros_like(score_SI)
    centred_SI = score_SI - score_SI.mean(1, keepdim=True)
    spread_S1 = score_SI.std(1, keepdim=True)
    return torch.where(spread_S1 > 0, centred_SI / spread_S1, 0.0)


def best_channels(score_SI: Tensor, width: int) -> Tensor:
    """Choose the channels that stay in each expert; of equal ones the first go.

    Args:
        score_SI: From :func:`channel_scores`.
        width: Channels that stay.

    Returns:
        int64 ``[S, width]`` on the CPU, ascending in every row.
    """
    order_SI = torch.argsort(score_SI.cpu(), dim=1, stable=True)
    return order_SI[:, score_SI.shape[1] - width :].sort(dim=1).values


def kept_channels(statistics: Statistics, layer: int, width: int, weights: OpenExperts) -> dict[str, Tensor]:
    """Choose the channels that stay in a layer, and compute the bias that stands for the others.

    Args:
        statistics: What was measured, group ``channels``.
        layer: Original number of the layer.
        width: Channels that stay in each expert.
        weights: The layer before the edit, slots in the order of its real experts.

    Returns:
        ``channels``, int64 ``[S, width]``, ascending; ``bias``, float64 ``[S, H]``: ``W_down[:, gone] @ mean(h_gone)``,
        added to the bias that is there already. An expert that no token reached adds none.

    Raises:
        ValueError: The layer has other experts or widths than when it was measured.
    """
    layout = statistics.shape.layout(layer)
    measured = (len(layout.real), width_of(layout, statistics.shape))
    found = (weights.down_proj.shape[0], weights.down_proj.shape[-1])
    if found != measured:
        raise ValueError(
            f"layer {layer}: {measured[0]} experts of {measured[1]} channels were measured, but there are "
            f"{found[0]} of {found[1]} now: put the edits before the one that keeps channels into a step of their own"
        )
    channels_SW = best_channels(channel_scores(statistics, layer), width)
    mean_SI = channel_moments(statistics, layer).mean.cpu()
    biases = []
    for slot, (down_HI, mean_I) in enumerate(zip(weights.down_proj.detach(), mean_SI, strict=True)):
        gone_I = mean_I.clone()
        gone_I[channels_SW[slot]] = 0.0
        biases.append(down_HI.double() @ gone_I.to(down_HI.device))
    bias_SH = torch.stack(biases)
    if weights.bias is not None:
        bias_SH = bias_SH + weights.bias.detach().double()
    return {"channels": channels_SW, "bias": bias_SH}


class Step(NamedTuple):
    """One step of a layer's width, from one permitted width to the next larger one.

    Attributes:
        threshold: Highest threshold at which the layer has the larger width.
        row: Row of the layer.
        width: The larger width.
        cost: What the step adds, in the unit of the budget.
    """

    threshold: float
    row: int
    width: int
    cost: int


def widths_at_budget(steps: Sequence[Step], least: Sequence[int], budget: int) -> list[int]:
    """Lower one threshold for all layers until the next step would go over the budget.

    Args:
        steps: Steps of all layers.
        least: Width of each layer before any step.
        budget: What the steps may cost together.

    Returns:
        The width of each layer. Of steps at the same threshold those of the first layers come first.
    """
    widths = list(least)
    for step in sorted(steps, key=lambda step: (-step.threshold, step.width, step.row)):
        if step.cost > budget:
            break
        budget -= step.cost
        widths[step.row] = step.width
    return widths


@dataclass
class ChannelDrop(Method):
    """Delete channels of the experts; a bias in each expert stands for the mean of what they gave.

    A channel is ``h_j = act(gate_j x) * (up_j x)``, its score ``Var(h_j) * ||W_down[:, j]||^2`` over the tokens routed
    to the expert. All experts of a layer keep the same number of channels, so that they stay one stack; each keeps its
    own best. Scores are standardised in every expert and compared with one threshold for the whole model; the width of
    a layer is the mean over its experts of the channels above it, rounded (halves up) to a permitted width. The
    threshold is as low as the budget allows, so that what is kept does not go over it (but for widths that may not be
    smaller) and misses it by less than one step of one layer (with scope=layer of all layers; there a ratio rounds to
    the nearest permitted width). Experts that no token reached have no say in their layer's width. Give exactly one of
    the first three options.

    Attributes:
        ratio: Share of the channels of all real experts to remove, in [0, 1).
        parameters: Remove as few as leave the model at most this many parameters, biases counted.
        bytes: Remove as few as leave the model's parameters at most this many bytes.
        scope: global compares all layers, layer gives every layer the same width.
        floor: Channels that every expert keeps at least.
        multiple_of: Permitted widths are the multiples of this (and the width that the layer has). Experts of other
            widths than multiples of 8 are computed one after the other, not as one grouped product.

    Source: 2312.11983 (FLAP), WIFV scores with the adaptive structure. There a module is a whole feed-forward network
    and modules have widths of their own; here it is an expert, and the experts of a layer share a width. Attention is
    left alone. The unbiased variance is over all calibration tokens; the released code's recurrence over batches is
    not.
    """

    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    scope: ChannelScope = "global"
    floor: int = 1
    multiple_of: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        given = {name: value for name in ("ratio", "parameters", "bytes") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(
                "ChannelDrop needs exactly one of ratio, parameters and bytes: got "
                f"{', '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
            )
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ChannelDrop: ratio must lie in [0, 1), got {self.ratio}: 0.25 removes a quarter")
        for name in ("parameters", "bytes"):
            if name in given and not given[name] > 0:
                raise ValueError(
                    f"ChannelDrop: {name} must be more than 0, got {given[name]}: it is what the model may have"
                )
        if self.scope not in get_args(ChannelScope):
            raise ValueError(f"ChannelDrop: unknown scope {self.scope!r}: choose layer or global")
        for name in ("floor", "multiple_of"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != int(value) or value < 1:
                raise ValueError(f"ChannelDrop: {name} must be at least 1, and a whole number, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """The moments of all channels."""
        return CHANNEL_NEEDS

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Choose the width of every layer; see :meth:`Method.propose`."""
        layouts = [layout for layout in shape.layouts if layout.real]
        if not layouts:
            raise ValueError("ChannelDrop: no real expert is left in the model: leave it out, or put it first")
        levels = [self._levels(width_of(layout, shape)) for layout in layouts]
        self._check_ratio(levels)
        if self.scope == "layer":
            widths = self._layer_widths(shape, layouts, levels)
        else:
            widths = self._global_widths(shape, layouts, levels, statistics)
        return tuple(
            KeepChannels(layout.layer, width)
            for layout, width in zip(layouts, widths, strict=True)
            if width < width_of(layout, shape)
        )

    def _check_ratio(self, levels: Sequence[Sequence[int]]) -> None:
        """Refuse a ratio that the permitted widths miss by a step or more, or that would do nothing."""
        if self.ratio is None:
            return
        for level in levels:
            width, least = level[-1], level[0]
            wanted = max(1, width - round_half_up(self.ratio * width))  # one stays in any case
            if wanted < width and (least - wanted >= self.multiple_of or len(level) == 1):
                raise ValueError(
                    f"ChannelDrop: ratio={self.ratio} asks for {wanted} of {width} channels, and floor={self.floor} "
                    f"with multiple_of={self.multiple_of} permits no fewer than {least}: set multiple_of=1, or lower "
                    "ratio or floor"
                )

    def _levels(self, width: int) -> list[int]:
        """Return the widths that a layer may have, ascending; the last is the one that it has."""
        first = min(width, math.ceil(self.floor / self.multiple_of) * self.multiple_of)
        return sorted({*range(first, width + 1, self.multiple_of), width})

    def _cost(self, shape: ModelShape, layout: ExpertLayout, width: int) -> int:
        """Return what a width costs: channels under ``ratio``, else parameters, the bias included."""
        if self.ratio is not None:
            return len(layout.real) * width
        after = layout if width == width_of(layout, shape) else dataclasses.replace(layout, width=width)
        return after.parameters(shape.hidden_size, shape.intermediate_size)

    def _spare(self, shape: ModelShape, layouts: Sequence[ExpertLayout], levels: Sequence[Sequence[int]]) -> int:
        """Return what may be spent above the least widths."""
        least = sum(self._cost(shape, layout, level[0]) for layout, level in zip(layouts, levels, strict=True))
        now = sum(self._cost(shape, layout, level[-1]) for layout, level in zip(layouts, levels, strict=True))
        if self.ratio is not None:
            return max(now - round_half_up(self.ratio * now) - least, 0)
        name = "parameters" if self.parameters is not None else "bytes"
        target = getattr(self, name)
        unit = 1 if name == "parameters" else shape.weight_bytes
        smallest = shape.parameters - now + least
        if smallest * unit > target:
            raise ValueError(
                f"ChannelDrop: {name}={target} is out of reach: with the least width in each layer the model still "
                f"has {smallest * unit}: raise {name} to that, lower floor, or add another method"
            )
        return target // unit - smallest

    def _layer_widths(
        self, shape: ModelShape, layouts: Sequence[ExpertLayout], levels: Sequence[Sequence[int]]
    ) -> list[int]:
        if self.ratio is not None:
            wanted = [level[-1] - round_half_up(self.ratio * level[-1]) for level in levels]
            return [
                min(level, key=lambda width, want=want: (abs(width - want), -width))  # type: ignore[misc]
                for level, want in zip(levels, wanted, strict=True)
            ]
        spare = self._spare(shape, layouts, levels)

        def widths(most: int) -> list[int]:
            return [max(width for width in level if width <= max(most, level[0])) for level in levels]

        def spent(most: int) -> int:
            return sum(
                self._cost(shape, layout, width) - self._cost(shape, layout, level[0])
                for layout, width, level in zip(layouts, widths(most), levels, strict=True)
            )

        permitted = sorted({width for level in levels for width in level})
        within = bisect.bisect_right(permitted, spare, key=spent)
        return widths(permitted[within - 1] if within else 0)

    def _global_widths(
        self,
        shape: ModelShape,
        layouts: Sequence[ExpertLayout],
        levels: Sequence[Sequence[int]],
        statistics: Statistics,
    ) -> list[int]:
        steps = []
        for row, (layout, level) in enumerate(zip(layouts, levels, strict=True)):
            reached_S = channel_moments(statistics, layout.layer).tokens > 0
            voices_SI = standardised(channel_scores(statistics, layout.layer))[reached_S]
            ranked = voices_SI.flatten().sort(descending=True).values.tolist()
            costs = [self._cost(shape, layout, width) for width in level]
            for place in range(1, len(level)):
                # The mean count rounds up to this width from half-way on: the threshold at which so many are above.
                needed = math.ceil(len(voices_SI) * (level[place - 1] + level[place]) / 2)
                threshold = ranked[needed - 1] if needed else -math.inf
                steps.append(Step(threshold, row, level[place], costs[place] - costs[place - 1]))
        return widths_at_budget(steps, [level[0] for level in levels], self._spare(shape, layouts, levels))

    def fill(self, edit: Edit, statistics: Statistics, weights: OpenExperts | None = None) -> dict[str, Tensor]:
        """Return the channels that stay and the bias; see :meth:`Method.fill`."""
        if not isinstance(edit, KeepChannels):
            return {}
        assert weights is not None
        return kept_channels(statistics, edit.layer, edit.width, weights)
