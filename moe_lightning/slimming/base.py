"""What all methods have in common that make matrices smaller."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_lightning.method import Method
from moe_lightning.plan import Edit, ModelShape
from moe_lightning.slimming.hessian import output_error
from moe_lightning.slimming.view import FALLBACKS, LayerView, MomentKind, SlimmedLayer, Target
from moe_lightning.statistics import Statistics

Targets = Literal["experts", "experts+attention"]
"""The router, norms, embeddings and the head are never touched."""

Propagate = Literal["compressed", "original"]
"""Whether a layer is measured on the outputs of the layers before as they are now, or as they were."""

WORK = 1 << 27
"""Weights that are worked on at a time, where nothing asks for more: half a GiB in fp32."""

_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj"}


class Slimming(Method):
    """A method that makes the matrices of experts, and of attention where asked, smaller one layer after another.

    The driver applies each edit by :meth:`slim`, with a view of the layer.
    """

    # No annotated attributes here either, see Method.

    @property
    def granularity(self) -> Literal["model", "layer"]:
        """Layers are measured and changed one after another."""
        return "layer"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing: what enters a layer is measured when its turn comes."""
        return frozenset()

    @property
    def moment_kind(self) -> MomentKind | None:
        """Largest of the moments of inputs that the method reads; None where it needs no calibration data."""
        return None

    @abstractmethod
    def edit(self, layer: int, target: Target) -> Edit:
        """Return what the method does to a layer.

        Args:
            layer: Its original number.
            target: Its experts, or its attention.
        """

    @abstractmethod
    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Make the matrices of one edit smaller.

        Args:
            edit: One of the edits proposed.
            view: The layer as it is now.

        Returns:
            What is to be stored, and what was done to each matrix.
        """

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Take every layer with real experts, and every attention where asked; see :meth:`Method.propose`."""
        name = type(self).__name__
        schedule = self.schedule
        if schedule is not None:
            raise ValueError(
                f"{name}: sparsity is a schedule, which takes a training run to follow: give the method to the "
                f"callback Compress in fit, or a number here, e.g. sparsity={schedule.at(schedule.moments()[-1])}"
            )
        attention = getattr(self, "targets", "experts") == "experts+attention"
        moe = {layout.layer for layout in shape.layouts if layout.real}
        edits = []
        for block in shape.blocks:
            if attention:
                edits.append(self.edit(block, "attention"))
            if block in moe:
                edits.append(self.edit(block, "experts"))
        if not edits:
            raise ValueError(
                f"{name}: no layer has real experts, so that there is no matrix to make smaller: leave it out, or put "
                "it before the method that takes the experts away"
            )
        return tuple(edits)


def choose(name: str, option: str, value: Any, kinds: Any) -> None:
    """Raise unless an option has one of its values.

    Args:
        name: Of the method.
        option: Of the option.
        value: What was given.
        kinds: The ``Literal`` of its values.
    """
    if value not in get_args(kinds):
        raise ValueError(f"{name}: unknown {option} {value!r}: choose {' or '.join(map(str, get_args(kinds)))}")


def check_positive(name: str, option: str, value: Any, default: float) -> None:
    """Raise unless an option is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: {option} must be a positive number, got {value!r}: the default is {default}")


def check_flags(method: Method, *options: str) -> None:
    """Raise unless options are true or false."""
    for option in options:
        value = getattr(method, option)
        if not isinstance(value, bool):
            raise ValueError(f"{type(method).__name__}: {option} must be true or false, got {value!r}")


def take(tensor: Tensor, slots: Sequence[int]) -> Tensor:
    """Return some matrices of a stack, without a copy where they are neighbours."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return tensor[first : first + len(slots)]
    return tensor[list(slots)]


def handfuls(count: int, weight_SOI: Tensor) -> Iterator[range]:
    """Cut the places of some matrices into pieces of at most :data:`WORK` weights, at least one matrix each.

    Args:
        count: How many matrices.
        weight_SOI: Their stack, or one with matrices of the same size.
    """
    size = max(1, WORK // max(1, weight_SOI[0].numel()))
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


class Measured:
    """The moments that a method reads of one layer; stacks with one input are measured together.

    Args:
        view: The layer.
        kind: Which moments.
        gated: Those of ``g x``.
    """

    def __init__(self, view: LayerView, kind: MomentKind, gated: bool = False) -> None:
        self.view = view
        self.kind = kind
        self.gated = gated
        self._last: tuple[str, tuple[int, ...], Tensor] | None = None

    def moments(self, name: str, slots: Sequence[int]) -> Tensor:
        """Return the moments of some matrices; those of the call before are remembered.

        Args:
            name: Stack.
            slots: Matrices.
        """
        source, wanted = _SAME_INPUT.get(name, name), tuple(slots)
        if self._last is None or self._last[:2] != (source, wanted):
            self._last = None  # two at a time would take twice the memory
            self._last = (source, wanted, self.view.moments(source, self.kind, list(slots), gated=self.gated))
        return self._last[2]

    def walk(self, name: str, weight_SOI: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Go through a stack a few matrices at a time, and yield their slots and moments.

        Args:
            name: Stack.
            weight_SOI: Its weights. Moments are measured for as many matrices as fit into memory; of those as many are
                shown at a time as :func:`handfuls` says.
        """
        for group in self.view.groups(name, self.kind):
            moment = self.moments(name, group)
            for places in handfuls(len(group), weight_SOI):
                yield [group[place] for place in places], take(moment, places)


def relative_error(weight_SOI: Tensor, other_SOI: Tensor, moment: Tensor) -> Tensor:
    """Return the squared change of the outputs in units of their squares, ``tr(D H D^T) / tr(W H W^T)``.

    Args:
        weight_SOI: Weights before.
        other_SOI: Weights after.
        moment: H ``[S, I, I]``, or its diagonal ``[S, I]``, which leaves out products of inputs.

    Returns:
        float64 ``[S]`` on the CPU; NaN where no token reached a matrix.
    """
    found = []
    for slot in range(len(weight_SOI)):
        one = slice(slot, slot + 1)
        # Divided first: sums over very many tokens must not leave the range of fp32.
        size = moment[one].diagonal(dim1=-2, dim2=-1).mean() if moment.dim() == 3 else moment[one].mean()
        unit = moment[one] / size if float(size) > 0 else moment[one]
        error = output_error(weight_SOI[one], other_SOI[one], unit)
        whole = output_error(weight_SOI[one], torch.zeros_like(weight_SOI[one]), unit)
        found.append(error.double() / whole.double())
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)


def with_tokens(status: Sequence[str], view: LayerView) -> tuple[str, ...]:
    """Let statuses of matrices that were made without measurement say how many tokens reached them.

    Args:
        status: One for each slot.
        view: The layer.
    """
    if not any(entry.startswith(FALLBACKS) for entry in status):
        return tuple(status)
    found = []
    for entry, tokens in zip(status, view.tokens.tolist(), strict=True):
        name, _, reason = entry.partition(": ")
        if entry.startswith(FALLBACKS) and reason == "no input reached it":
            entry = f"{name}: {tokens} token{'' if tokens == 1 else 's'}"
        found.append(entry)
    return tuple(found)
