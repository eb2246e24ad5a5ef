"""AWQ on a whole layer.

Two balance groups. What the norm makes is read by every expert's gate and up matrices, by the router and by the maps of
low-rank novices (in attention by q, k and v): one scale for all of them, taken out of the norm. What up makes is read
by down of the same expert: a scale for each expert, taken out of the rows of up (in attention v and o, where each head
of v is read by one head of o). Before rounding nothing changes, router logits included.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, H hidden. Z scales: 1, or S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lightning.plan import Edit
from moe_lightning.slimming.awq import (
    POINTS,
    best_scale,
    candidate_scales,
    column_sizes,
    diagonal_of,
    rounding_losses,
    scale_moment,
    search_clip,
    smoothed,
)
from moe_lightning.slimming.base import (
    Measured,
    Propagate,
    Targets,
    check_flags,
    choose,
    handfuls,
    relative_error,
    take,
    with_tokens,
)
from moe_lightning.slimming.hessian import row_errors, work_type
from moe_lightning.slimming.quantizers import Bits, Rounding, put
from moe_lightning.slimming.rounding import GroupSize, dequantize, round_to_nearest
from moe_lightning.slimming.view import LayerView, MomentKind, Rescaled, SlimmedLayer

Loss = Literal["full", "diagonal"]

_WITHOUT_CLIPS = ("q_proj", "k_proj")
"""Their outputs meet in a product, of which the error of each alone says little (as in the released code)."""


@dataclass
class AWQ(Rounding):
    """Give inputs that matter finer grids, by scales that the layers before take out again; then shorten ranges.

    The router reads what the experts read: it is rescaled with them, so that every token keeps its experts.

    Two defaults differ from the paper, whose scales are any numbers. ``power_of_two`` costs up to 3 % of squared error
    at 4 bits (0.765 instead of 0.747 of that of rounding to nearest with groups of 128, 0.803 instead of 0.793 with
    groups of 32) and up to 0.2 % of perplexity, for a router that is rescaled exactly. ``loss='full'`` counts products
    of inputs, as the paper does by running the layer, and is lower (0.765 against 0.897 with ``diagonal``), for the
    memory of full moments and up to twice the time. Beside the inputs measured a few tokens of uniform inputs count,
    so that experts that few tokens reach get nearly the grids of rounding to nearest.

    Attributes:
        bits: 4 or 8.
        group_size: Inputs that share a scale: a number that divides the input sizes, 'auto' for the first of 128, 64
            and 32 that does, or 'channel' for one scale for each output row.
        symmetric: The middle of the grid is zero, and no zero points are stored.
        clip: Search for shorter ranges as well.
        power_of_two: Round the scales that norm and router take to powers of two: then those are rescaled exactly in
            every floating-point type, and every token keeps its experts to the last bit.
        points: Scales to try, no scale at all among them.
        loss: What the search counts: full the whole error of the outputs, diagonal leaves out products of different
            inputs, which is cheap where inputs are very many.
        targets: The matrices of the experts, or those of attention as well.
        propagate: Measure each layer on the outputs of the compressed layers before it, or of the original ones.

    Source: 2306.00978; the router in the balance group is ours.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    clip: bool = True
    power_of_two: bool = True
    points: int = POINTS
    loss: Loss = "full"
    targets: Targets = "experts"
    propagate: Propagate = "compressed"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()
        check_flags(self, "clip", "power_of_two")
        choose("AWQ", "loss", self.loss, Loss)
        choose("AWQ", "propagate", self.propagate, Propagate)
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 1:
            raise ValueError(
                f"AWQ: points must be a whole number, at least 1 (no scale at all), got {self.points!r}: the default "
                f"is {POINTS}"
            )

    @property
    def moment_kind(self) -> MomentKind:
        """What the search counts."""
        return self.loss

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Rescale and round the matrices of one edit; see :meth:`Slimming.slim`."""
        work = _Work(self, view)
        *readers, last = view.matrices
        shared = work.shared_scale(readers)
        for name in readers:
            work.shorten(name, shared)
        rows = work.rows_between(readers[-1], last)
        own = work.shorten(last, None if rows is not None else torch.ones_like(view.weight(last)[:, 0]).to(shared))
        matrices: dict[str, Any] = {last: work.rounded(last, own, None)}
        for name in readers:
            divided = None if rows is None or name != readers[-1] else (rows, own)
            matrices[name] = work.rounded(name, shared, divided)
        factor_H = shared[0]
        rescale: list[tuple[Rescaled, Tensor]] = [("norm", 1 / factor_H)]
        if view.router_weight is not None:
            rescale.append(("router", factor_H))
        if view.novice_in is not None:
            rescale.append(("novice_in", factor_H))
        ordered = {name: matrices[name] for name in view.matrices}
        return SlimmedLayer(ordered, work.statuses, rescale, work.errors)


class _Work:
    """The parts of AWQ on one layer, each of which goes through a stack a few matrices at a time."""

    def __init__(self, method: AWQ, view: LayerView) -> None:
        self.method = method
        self.view = view
        self.measured = Measured(view, method.moment_kind)
        self.clips: dict[str, Tensor] = {}
        self.statuses: dict[str, tuple[str, ...]] = {}
        self.errors: dict[str, Tensor] = {}

    def _candidates(self, names: Sequence[str], shared: bool) -> tuple[Tensor, tuple[float, ...]]:
        """Return the scales to try for the inputs of some stacks, see :func:`candidate_scales`."""
        scheme, view = self.method.scheme, self.view
        size_ZI, square_ZI = [], []
        for name in names:
            weight_SOI = view.weight(name)
            # The whole moments of all slots may not fit into memory together; where they do they are kept for the loss.
            fits = len(view.groups(name, self.measured.kind)) == 1
            measured = self.measured if fits else Measured(view, "diagonal")
            size_SI = weight_SOI.new_zeros(len(weight_SOI), weight_SOI.shape[-1], dtype=work_type(weight_SOI))
            square_SI = torch.zeros_like(size_SI)
            for slots, moment in measured.walk(name, weight_SOI):
                with smoothed(moment, self._tokens(slots)):
                    square_SI[slots] = diagonal_of(moment).to(square_SI)
            for places in handfuls(len(weight_SOI), weight_SOI):
                size_SI[list(places)] = column_sizes(take(weight_SOI, places), scheme)
            size_ZI.append(size_SI.sum(0, keepdim=True) if shared else size_SI)
            square_ZI.append(square_SI.sum(0, keepdim=True) if shared else square_SI)
        whole_ZI = torch.stack(square_ZI).sum(0)
        if not bool(whole_ZI.isfinite().all()):
            raise ValueError(f"moments of the inputs of {' and '.join(names)} are not finite: look at the activations")
        return candidate_scales(
            whole_ZI,
            torch.stack(size_ZI).sum(0),
            # Between up and down only what is rounded takes part: nothing asks for powers of two.
            power_of_two=shared and self.method.power_of_two,
            points=self.method.points,
        )

    def _tokens(self, slots: list[int]) -> Tensor:
        return self.view.tokens[slots]

    def shared_scale(self, names: Sequence[str]) -> Tensor:
        """Return the scale ``[1, I]`` of the stacks that read what the norm makes."""
        scales, ratios = self._candidates(names, shared=True)
        loss = scales.new_zeros(scales.shape[:2])
        for name in names:
            weight_SOI = self.view.weight(name)
            for slots, moment in self.measured.walk(name, weight_SOI):
                with smoothed(moment, self._tokens(slots)):
                    found = rounding_losses(scales, take(weight_SOI, slots), moment, self.method.scheme)
                loss += found.sum(1, keepdim=True)
        return best_scale(scales, ratios, loss).scale

    def rows_between(self, producer: str, last: str) -> int | None:
        """Return the row of a stack from which on the last one's scale is taken out, or None where it cannot be."""
        made, columns = self.view.weight(producer).shape[1], self.view.weight(last).shape[2]
        if self.view.target == "experts":
            # Down reads act(gate x) * (up x): the rows of up are the second half.
            return made - columns
        # Else several heads of o read one head of v.
        return 0 if made == columns else None

    def shorten(self, name: str, scale_ZI: Tensor | None) -> Tensor:
        """Search for the ranges of a stack, and measure its error.

        Args:
            name: Stack.
            scale_ZI: What its columns are multiplied with; None to search for a scale for each matrix first, while its
                moments are there.

        Returns:
            The scale.
        """
        method, scheme = self.method, self.method.scheme
        weight_SOI = self.view.weight(name)
        slots_count, outputs, columns = weight_SOI.shape
        clip = method.clip and name not in _WITHOUT_CLIPS
        scales, ratios = self._candidates([name], shared=False) if scale_ZI is None else (None, ())
        if scale_ZI is None:
            assert scales is not None
            scale_ZI = scales[0].clone()
        shape = (slots_count, outputs, columns // scheme.group_of(columns))
        clip_SOG = torch.ones(shape, dtype=scale_ZI.dtype, device=scale_ZI.device)
        status, error = [""] * slots_count, torch.empty(slots_count, dtype=torch.float64)
        for slots, moment in self.measured.walk(name, weight_SOI):
            old_SOI = take(weight_SOI, slots)
            with smoothed(moment, self._tokens(slots)):
                if scales is not None:
                    loss = rounding_losses(scales[:, slots], old_SOI, moment, scheme)
                    scale_ZI[slots] = best_scale(scales[:, slots], ratios, loss).scale
                scale = scale_ZI if len(scale_ZI) == 1 else scale_ZI[slots]
                wide_SOI = old_SOI.to(scale.dtype) * scale[:, None, :]
                back_SOI = dequantize(round_to_nearest(wide_SOI, scheme)) / scale[:, None, :]
                if clip:
                    clip_SOG[slots], back_SOI = self._clipped(old_SOI, wide_SOI, scale, moment, back_SOI)
            error[slots] = relative_error(old_SOI, back_SOI, moment)
            for slot, empty in zip(slots, (diagonal_of(moment) <= 0).all(1).tolist(), strict=True):
                status[slot] = "rtn fallback: no input reached it" if empty else "awq"
        self.clips[name] = clip_SOG
        self.statuses[name], self.errors[name] = with_tokens(status, self.view), error
        return scale_ZI

    def _clipped(
        self, old_SOI: Tensor, wide_SOI: Tensor, scale_ZI: Tensor, moment: Tensor, back_SOI: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ranges and what is read back with them; rows that whole ranges serve better keep those."""
        scheme = self.method.scheme
        clip_SOG = search_clip(wide_SOI, scale_moment(moment, scale_ZI), scheme)
        short_SOI = dequantize(round_to_nearest(wide_SOI, scheme, clip_SOG)) / scale_ZI[:, None, :]
        # The search took the groups of a row one by one.
        worse_SO = row_errors(old_SOI, short_SOI, moment) > row_errors(old_SOI, back_SOI, moment)
        clip_SOG = torch.where(worse_SO[:, :, None], 1.0, clip_SOG)
        return clip_SOG, torch.where(worse_SO[:, :, None], back_SOI, short_SOI)

    def rounded(self, name: str, scale_ZI: Tensor, divided: tuple[int, Tensor] | None) -> Any:
        """Round a stack with its scale and ranges.

        Args:
            name: Stack.
            scale_ZI: What its columns are multiplied with.
            divided: Row from which on rows are divided, and by what, ``[S, rows]``. A grid belongs to a row, so that
                scales and ranges found before hold as they are.
        """
        weight_SOI = self.view.weight(name)
        result = None
        for slots in handfuls(len(weight_SOI), weight_SOI):
            scale = scale_ZI if len(scale_ZI) == 1 else take(scale_ZI, slots)
            wide_SOI = take(weight_SOI, slots).to(scale.dtype) * scale[:, None, :]
            if divided is not None:
                wide_SOI[:, divided[0] :] /= take(divided[1], slots)[:, :, None]
            part = round_to_nearest(wide_SOI, self.method.scheme, take(self.clips[name], slots))
            result = put(result, slots, part, len(weight_SOI))
        assert result is not None
        return result
