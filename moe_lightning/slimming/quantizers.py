"""Methods that store weights in fewer bits: RTN, GPTQ; AWQ is in a file of its own.

Legend: S matrices (slots), O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_lightning.experts.stacks.integers import SCALE_TYPE
from moe_lightning.plan import Edit, Quantize
from moe_lightning.slimming.base import (
    Measured,
    Propagate,
    Slimming,
    Targets,
    check_flags,
    check_positive,
    choose,
    handfuls,
    relative_error,
    take,
    with_tokens,
)
from moe_lightning.slimming.gptq import round_by_gptq
from moe_lightning.slimming.hessian import DAMPING
from moe_lightning.slimming.rounding import GroupSize, Quantized, Scheme, dequantize, round_to_nearest
from moe_lightning.slimming.view import LayerView, MomentKind, SlimmedLayer, Target

Bits = Literal[4, 8]


class Rounding(Slimming):
    """What methods share that store weights in fewer bits."""

    @property
    def scheme(self) -> Scheme:
        """How weights are rounded."""
        options: Any = self
        # Codes are taken for the scales as they are stored.
        return Scheme(options.bits, options.group_size, options.symmetric, SCALE_TYPE)

    def edit(self, layer: int, target: Target) -> Edit:
        """Return what the method does to a layer; see :meth:`Slimming.edit`."""
        scheme = self.scheme
        return Quantize(layer, target, scheme.bits, scheme.group_size, scheme.symmetric, type(self).__name__.lower())

    def _check(self) -> None:
        name = type(self).__name__
        options: Any = self
        choose(name, "bits", options.bits, Bits)
        choose(name, "targets", options.targets, Targets)
        check_flags(self, "symmetric")
        size = options.group_size
        number = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not number and size not in ("channel", "auto"):
            raise ValueError(
                f"{name}: group_size must be a positive number that divides the input sizes, 'auto' for the first of "
                f"128, 64 and 32 that does, or 'channel' for one scale for each row; got {size!r}"
            )


def put(into: Quantized | None, slots: Sequence[int], part: Quantized, count: int) -> Quantized:
    """Write some matrices of a stack into tables for all of them.

    Args:
        into: The tables, or None to make them.
        slots: Which matrices.
        part: Theirs.
        count: S.
    """
    if len(slots) == count:
        return part
    if into is None:
        into = Quantized(*(table.new_empty(count, *table.shape[1:]) for table in part))
    for table, values in zip(into, part, strict=True):
        table[list(slots)] = values
    return into


@dataclass
class RTN(Rounding):
    """Round every weight to the nearest point of its group's grid. Needs no calibration data.

    Attributes:
        bits: 4 or 8.
        group_size: Inputs that share a scale: a number that divides the input sizes, 'auto' for the first of 128, 64
            and 32 that does, or 'channel' for one scale for each output row.
        symmetric: The middle of the grid is zero, and no zero points are stored.
        targets: The matrices of the experts, or those of attention as well.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    targets: Targets = "experts"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Round the matrices of one edit; see :meth:`Slimming.slim`."""
        matrices: dict[str, Any] = {}
        for name in view.matrices:
            weight_SOI = view.weight(name)
            quantized = None
            for slots in handfuls(len(weight_SOI), weight_SOI):
                part = round_to_nearest(take(weight_SOI, slots), self.scheme)
                quantized = put(quantized, slots, part, len(weight_SOI))
            matrices[name] = quantized
        statuses = {name: ("rtn",) * len(quantized.codes) for name, quantized in matrices.items()}
        return SlimmedLayer(matrices, statuses)


@dataclass
class GPTQ(Rounding):
    """Round column after column; the columns that are still free make up for each one's error.

    Weights that are zero already, after a pruning method, stay zero.

    Attributes:
        bits: 4 or 8.
        group_size: Inputs that share a scale: a number that divides the input sizes, 'auto' for the first of 128, 64
            and 32 that does, or 'channel' for one scale for each output row.
        symmetric: The middle of the grid is zero, and no zero points are stored.
        desc_act: Begin with the inputs that are largest. Groups are of neighbours even so.
        static_groups: Take grids from the weights as they were, not as earlier columns left them. null: where desc_act
            is on, which needs it.
        sequential: Measure the inputs of a matrix after the matrices before it in the layer have been rounded.
        damping: Share of the mean of the Hessian's diagonal that is added to it at least. It is more where so few
            tokens reached a matrix that errors fed back would be fitted to them, and grows tenfold until the Hessian
            can be inverted; the status then says how much.
        targets: The matrices of the experts, or those of attention as well.
        propagate: Measure each layer on the outputs of the compressed layers before it, or of the original ones.

    Source: 2210.17323.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    desc_act: bool = False
    static_groups: bool | None = None
    sequential: bool = True
    damping: float = DAMPING
    targets: Targets = "experts"
    propagate: Propagate = "compressed"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()
        check_flags(self, "desc_act", "sequential")
        if self.static_groups is not None:
            check_flags(self, "static_groups")
        if self.desc_act and self.static_groups is False:
            raise ValueError(
                "GPTQ: desc_act=True takes the columns of a group at different times: leave static_groups out, or set "
                "static_groups=True"
            )
        check_positive("GPTQ", "damping", self.damping, DAMPING)
        choose("GPTQ", "propagate", self.propagate, Propagate)

    @property
    def moment_kind(self) -> MomentKind:
        """The Hessian."""
        return "full"

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Round the matrices of one edit; see :meth:`Slimming.slim`."""
        measured = Measured(view, "full")
        matrices: dict[str, Any] = {}
        statuses: dict[str, tuple[str, ...]] = {}
        errors: dict[str, Tensor] = {}
        for name in view.matrices:
            weight_SOI, keep_SOI = view.weight(name), view.keep(name)
            quantized = None
            status, error = [""] * len(weight_SOI), torch.empty(len(weight_SOI), dtype=torch.float64)
            for slots, hessian_SII in measured.walk(name, weight_SOI):
                old_SOI = take(weight_SOI, slots)
                result = round_by_gptq(
                    old_SOI,
                    hessian_SII,
                    self.scheme,
                    None if keep_SOI is None else take(keep_SOI, slots),
                    desc_act=self.desc_act,
                    static_groups=self.static_groups,
                    damping=self.damping,
                    tokens=view.tokens[slots],
                )
                quantized = put(quantized, slots, result.quantized, len(weight_SOI))
                error[slots] = relative_error(old_SOI, dequantize(result.quantized), hessian_SII)
                for slot, said in zip(slots, result.status, strict=True):
                    status[slot] = said
            assert quantized is not None
            matrices[name] = quantized
            statuses[name], errors[name] = with_tokens(status, view), error
            if self.sequential and name != view.matrices[-1]:
                view.replace(name, dequantize(quantized, weight_SOI.dtype))
        return SlimmedLayer(matrices, statuses, (), errors)
