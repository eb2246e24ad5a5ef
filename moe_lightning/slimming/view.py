"""What a method sees of a layer while it makes it smaller, and what it gives back.

Methods know no model: the driver shows them one layer after another, attention before experts, and measures what they
ask for when they ask for it.

Legend: S matrices (slots; 1 for attention), O outputs, I inputs, H hidden, R rows of low-rank maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from moe_lightning.plan.edits import Target
from moe_lightning.slimming.pruning import Pruned
from moe_lightning.slimming.rounding import Quantized
from moe_lightning.statistics.moment_memory import MomentKind

Rescaled = Literal["norm", "router", "novice_in"]
"""Parameters beside the matrices that a method may multiply: what makes their input, and the other readers of it."""

FALLBACKS = ("rtn fallback", "magnitude fallback")
"""How the status of a matrix begins that was made without the measurement that the method asks for."""


class LayerView(Protocol):
    """One layer's experts, or its attention, as the method finds them.

    Nothing is measured before it is asked for: a method that asks for no tokens and no moments needs no calibration
    data.
    """

    @property
    def layer(self) -> int:
        """Number of the decoder layer in the original model."""

    @property
    def target(self) -> Target:
        """Which matrices of the layer these are."""

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the stacks in the order of the data flow.

        ``gate_up_proj`` and ``down_proj``; or ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        """

    def weight(self, name: str) -> Tensor:
        """Return a stack as it is now, dense ``[S, O, I]``, in the model's type. It must not be changed in place."""

    def keep(self, name: str) -> Tensor | None:
        """Return which weights of a stack that is sparse already are stored, bool ``[S, O, I]``; None where all are."""

    @property
    def tokens(self) -> Tensor:
        """Calibration tokens that reach each slot, int64 ``[S]`` on the CPU; all of them for attention, ``[1]``."""

    @property
    def starved(self) -> Tensor:
        """Slots that fewer than ``min_tokens`` calibration tokens reach, bool ``[S]`` on the CPU."""

    @property
    def use_fallback(self) -> bool:
        """Whether starved slots are to be treated as if nothing reached them; their moments are then zeros."""

    def groups(self, name: str, kind: MomentKind) -> Sequence[Sequence[int]]:
        """Return lists of slots, ascending and together all, such that the moments of one list fit into memory."""

    def moments(self, name: str, kind: MomentKind, slots: Sequence[int], *, gated: bool = False) -> Tensor:
        """Measure the inputs of some matrices of a stack, in one pass over what enters the layer.

        Args:
            name: The stack.
            kind: ``diagonal``: ``sum x_j^2``, ``[s, I]``. ``full``: ``sum x x^T``, ``[s, I, I]``.
            slots: Which matrices, in which order.
            gated: Take ``g x`` for x, with the routing weight g of each token (1 for attention).

        Returns:
            Sums over the tokens that reach each matrix, in fp32 (float64 in a float64 model). Zeros where none does,
            and for starved slots where :attr:`use_fallback` holds.
        """

    def replace(self, name: str, weight_SOI: Tensor) -> None:
        """Say what stands for a stack from now on: inputs of later stacks are computed with it.

        It has an effect only where compressed outputs are propagated. The inputs of the stack itself stay as they are:
        where the method rescales them, these weights must have the scale taken out.

        Args:
            name: The stack.
            weight_SOI: What the stored matrices amount to, dense.
        """

    @property
    def norm_weight(self) -> Tensor:
        """Weight of the norm that makes the input of the first stacks, ``[H]``. It must not be changed in place."""

    @property
    def router_weight(self) -> Tensor | None:
        """Weight of the router, which reads what the experts read, ``[rows, H]``; None for attention."""

    @property
    def novice_in(self) -> Tensor | None:
        """What the low-rank maps of novices read, ``[R, H]``; None where there are none."""


@dataclass
class SlimmedLayer:
    """What a method makes of the matrices of one edit.

    Attributes:
        matrices: For each name of :attr:`LayerView.matrices` what is stored: codes with their grid, or weights with
            the mask of those that are kept.
        statuses: For each name what was done to each matrix, S entries. Those that begin as :data:`FALLBACKS` do count
            against ``max_fallback``.
        rescale: Factors ``[H]`` that other parameters of the layer are multiplied with, along their last axis.
        errors: For each name ``tr(D H D^T) / tr(W H W^T)`` of each matrix, ``[S]``: the squared error of its outputs in
            units of their squares; NaN where no token reached it. None where the method measured nothing.
    """

    matrices: dict[str, Quantized | Pruned]
    statuses: Mapping[str, tuple[str, ...]]
    rescale: Sequence[tuple[Rescaled, Tensor]] = ()
    errors: Mapping[str, Tensor] | None = field(default=None)
