"""Methods that set weights to zero: Magnitude, Wanda, SparseGPT.

Legend: S matrices (slots), O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moe_lightning.plan import Edit, MaskScope, Pattern, Sparsify
from moe_lightning.schedules import SparsitySchedule
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
from moe_lightning.slimming.hessian import DAMPING
from moe_lightning.slimming.masks import Selection
from moe_lightning.slimming.pruning import (
    Pruned,
    prune_by_magnitude,
    prune_by_router_wanda,
    prune_by_sparse_gpt,
    prune_by_wanda,
)
from moe_lightning.slimming.rounding import Quantized
from moe_lightning.slimming.view import LayerView, MomentKind, SlimmedLayer, Target

Prune = Callable[[Tensor, Tensor | None, Tensor | None, list[int]], Pruned]
"""Takes weights, the mask that is there already, the moments and the slots of some matrices."""


class Pruning(Slimming):
    """What methods share that set weights to zero."""

    @property
    def schedule(self) -> SparsitySchedule | None:
        """How the sparsity grows in a run; None where it is one number, or a pattern."""
        sparsity = self.sparsity  # type: ignore[attr-defined]
        return sparsity if isinstance(sparsity, SparsitySchedule) else None

    def at_share(self, share: float) -> Self:
        """Return the method with a sparsity in the place of its schedule; see :meth:`Method.at_share`."""
        return dataclasses.replace(self, sparsity=share)  # type: ignore[type-var]

    @property
    def selection(self) -> Selection:
        """How many weights go, and among which; at the end of a schedule."""
        options: Any = self
        sparsity = options.sparsity if self.schedule is None else self.schedule.end
        # A pattern is chosen in groups of neighbours, whatever the scope.
        return Selection(sparsity, options.pattern, options.scope if options.pattern is None else "row")

    def edit(self, layer: int, target: Target) -> Edit:
        """Return what the method does to a layer; see :meth:`Slimming.edit`."""
        chosen = self.selection
        return Sparsify(layer, target, chosen.sparsity, chosen.pattern, chosen.scope, self.name)

    @property
    def name(self) -> str:
        """How edits call the method."""
        return type(self).__name__.lower()

    def _check(self) -> None:
        name = type(self).__name__
        options: Any = self
        sparsity, pattern = options.sparsity, options.pattern
        choose(name, "scope", options.scope, MaskScope)
        choose(name, "targets", options.targets, Targets)
        if isinstance(pattern, int):
            raise ValueError(
                f"{name}: pattern is the number {pattern}, as which YAML reads {_unquoted(pattern)}: put quotes around "
                f"it, pattern: '{_unquoted(pattern)}'"
            )
        if pattern is not None:
            choose(name, "pattern", pattern, Pattern)
        if (sparsity is None) == (pattern is None):
            raise ValueError(
                f"{name}: give exactly one of sparsity and pattern, e.g. sparsity=0.5 (half of the weights become "
                f"zero) or pattern='2:4' (two of every four neighbours); got sparsity={sparsity}, pattern={pattern}"
            )
        if pattern is None and not isinstance(sparsity, SparsitySchedule):
            number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
            if not number or not 0 < sparsity < 1:
                raise ValueError(
                    f"{name}: sparsity is the share of zeros and must lie between 0 and 1, got {sparsity!r}"
                )


def _unquoted(number: int) -> str:
    """Return what YAML 1.1 reads as a number with base 60."""
    return f"{number // 60}:{number % 60}"


def _prune(view: LayerView, prune: Prune, measured: Measured | None, sequential: bool) -> SlimmedLayer:
    """Prune all stacks of a layer, those that fit into memory at a time."""
    matrices: dict[str, Quantized | Pruned] = {}
    statuses: dict[str, tuple[str, ...]] = {}
    errors: dict[str, Tensor] = {}
    for name in view.matrices:
        weight_SOI, keep_SOI = view.weight(name), view.keep(name)
        new_SOI = torch.empty_like(weight_SOI, memory_format=torch.contiguous_format)
        new_keep_SOI = torch.empty_like(new_SOI, dtype=torch.bool)
        status, error = [""] * len(weight_SOI), torch.empty(len(weight_SOI), dtype=torch.float64)
        unmeasured = ((list(places), None) for places in handfuls(len(weight_SOI), weight_SOI))
        for slots, moment in unmeasured if measured is None else measured.walk(name, weight_SOI):
            old_SOI = take(weight_SOI, slots)
            pruned = prune(old_SOI, None if keep_SOI is None else take(keep_SOI, slots), moment, slots)
            new_SOI[slots], new_keep_SOI[slots] = pruned.weight, pruned.keep
            if moment is not None:
                error[slots] = relative_error(old_SOI, pruned.weight, moment)
            for slot, said in zip(slots, pruned.status, strict=True):
                status[slot] = said
        statuses[name], errors[name] = with_tokens(status, view), error
        matrices[name] = Pruned(new_SOI, new_keep_SOI, statuses[name])
        if sequential and name != view.matrices[-1]:
            view.replace(name, new_SOI)
    return SlimmedLayer(matrices, statuses, (), None if measured is None else errors)


@dataclass
class Magnitude(Pruning):
    """Set the smallest weights to zero. Needs no calibration data.

    Give exactly one of sparsity and pattern.

    Attributes:
        sparsity: Share of the weights that become zero, between 0 and 1; in fit also a schedule, {start: 0, end: 0.5,
            steps: 100, every: 10}.
        pattern: '2:4', '4:8' or '1:4': so many zeros among so many neighbours along the input. Needs quotes in YAML.
        scope: With a sparsity, weights compete within each output row, or within the whole matrix.
        targets: The matrices of the experts, or those of attention as well.

    Source: 1506.02626.
    """

    sparsity: float | SparsitySchedule | None = None
    pattern: Pattern | None = None
    scope: MaskScope = "row"
    targets: Targets = "experts"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Prune the matrices of one edit; see :meth:`Slimming.slim`."""
        return _prune(view, lambda weight, keep, *_: prune_by_magnitude(weight, self.selection, keep), None, False)


@dataclass
class Wanda(Pruning):
    """Set the weights to zero whose size times the size of their input is smallest.

    Give exactly one of sparsity and pattern.

    Attributes:
        sparsity: Share of the weights that become zero, between 0 and 1; in fit also a schedule, {start: 0, end: 0.5,
            steps: 100, every: 10}.
        pattern: '2:4', '4:8' or '1:4': so many zeros among so many neighbours along the input. Needs quotes in YAML.
        scope: With a sparsity, weights compete within each output row, or within the whole matrix.
        router_weighted: Let tokens count by the routing weight with which the expert's output is taken (MoE-Pruner).
        targets: The matrices of the experts, or those of attention as well.
        propagate: Measure each layer on the outputs of the compressed layers before it, or of the original ones.

    Source: 2306.11695; router_weighted: 2410.12013.
    """

    sparsity: float | SparsitySchedule | None = None
    pattern: Pattern | None = None
    scope: MaskScope = "row"
    router_weighted: bool = False
    targets: Targets = "experts"
    propagate: Propagate = "compressed"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()
        check_flags(self, "router_weighted")
        choose("Wanda", "propagate", self.propagate, Propagate)

    @property
    def name(self) -> str:
        """How edits call the method."""
        return "router_wanda" if self.router_weighted else "wanda"

    @property
    def moment_kind(self) -> MomentKind:
        """The squares of the inputs."""
        return "diagonal"

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Prune the matrices of one edit; see :meth:`Slimming.slim`."""
        by_norm = prune_by_router_wanda if self.router_weighted else prune_by_wanda

        def prune(weight: Tensor, keep: Tensor | None, moment: Tensor | None, slots: list[int]) -> Pruned:
            assert moment is not None
            return by_norm(weight, moment.sqrt(), self.selection, keep)

        return _prune(view, prune, Measured(view, "diagonal", self.router_weighted), False)


@dataclass
class SparseGPT(Pruning):
    """Set the weights to zero that cost least, and let the others make up for them.

    Give exactly one of sparsity and pattern.

    Attributes:
        sparsity: Share of the weights that become zero, between 0 and 1; in fit also a schedule, {start: 0, end: 0.5,
            steps: 100, every: 10}.
        pattern: '2:4', '4:8' or '1:4': so many zeros among so many neighbours along the input. Needs quotes in YAML.
        scope: With a sparsity, weights compete within all rows of a block of columns, or within each output row.
        damping: Share of the mean of the Hessian's diagonal that is added to it at least. It is more where so few
            tokens reached a matrix that errors fed back would be fitted to them, and grows tenfold until the Hessian
            can be inverted; the status then says how much.
        sequential: Measure the inputs of a matrix after the matrices before it in the layer have been pruned.
        targets: The matrices of the experts, or those of attention as well.
        propagate: Measure each layer on the outputs of the compressed layers before it, or of the original ones.

    Source: 2301.00774.
    """

    sparsity: float | SparsitySchedule | None = None
    pattern: Pattern | None = None
    scope: MaskScope = "matrix"
    damping: float = DAMPING
    sequential: bool = True
    targets: Targets = "experts"
    propagate: Propagate = "compressed"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check()
        check_flags(self, "sequential")
        check_positive("SparseGPT", "damping", self.damping, DAMPING)
        choose("SparseGPT", "propagate", self.propagate, Propagate)

    @property
    def moment_kind(self) -> MomentKind:
        """The Hessian."""
        return "full"

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Prune the matrices of one edit; see :meth:`Slimming.slim`."""

        def prune(weight: Tensor, keep: Tensor | None, moment: Tensor | None, slots: list[int]) -> Pruned:
            assert moment is not None
            tokens = view.tokens[slots]
            return prune_by_sparse_gpt(weight, moment, self.selection, keep, damping=self.damping, tokens=tokens)

        return _prune(view, prune, Measured(view, "full"), self.sequential)
