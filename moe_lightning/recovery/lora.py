"""Methods that put low-rank terms beside the matrices of a model, and fold them into the weights.

Legend: S matrices (slots), O outputs, X inputs, R rank, L layers.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from moe_lightning.experts import LoraStack
from moe_lightning.method import Method
from moe_lightning.plan import AddLora, Edit, MergeLora, ModelShape
from moe_lightning.plan.edits import Target, has
from moe_lightning.statistics import Statistics

Targets = Literal["experts", "attention", "experts+attention"]

Existing = Literal["error", "keep"]


class AdapterMethod(Method):
    """What both methods share: they measure nothing, and go through the layers one by one."""

    @property
    def granularity(self) -> Any:
        """Neither the whole model at once nor as the slimming methods do."""
        return "adapters"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @abstractmethod
    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Decide; see :meth:`Method.propose`."""


@dataclass
class LoRA(AdapterMethod):
    """Put a low-rank term beside each matrix, of each real expert its own: ``y = W x + alpha / rank * B A x``.

    The terms change nothing at first (``B`` is zero), and train while the matrices, packed or not, stay as they are.

    Attributes:
        rank: Rank of each term.
        alpha: Numerator of the factor; twice the rank where None.
        targets: The matrices of the experts, those of attention, or both.
        seed: Of the random numbers in ``A``.
        existing: What becomes of terms that are there already. error: nothing is done. keep: those of the same rank and
            factor stay as they are, and only what is missing is added.

    Source: 2106.09685, eq. 3, with a term for each expert.
    Cost: ``2 R (O + X)`` operations for each routed token.
    """

    rank: int = 16
    alpha: float | None = None
    targets: Targets = "experts+attention"
    seed: int = 0
    existing: Existing = "error"

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA: rank must be a number from 1 on, got {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoRA: alpha must be positive, or None for twice the rank, got {self.alpha!r}")
        if self.targets not in get_args(Targets):
            raise ValueError(f"LoRA: targets must be one of {', '.join(get_args(Targets))}, got {self.targets!r}")
        if self.existing not in get_args(Existing):
            raise ValueError(f"LoRA: existing must be one of {', '.join(get_args(Existing))}, got {self.existing!r}")

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Put terms beside every attention and every layer that has real experts; see :meth:`Method.propose`."""
        alpha = self.numerator
        edits: list[AddLora] = []
        for block in shape.blocks:
            if "attention" in self.targets:
                edits.append(AddLora(block, "attention", self.rank, alpha))
            if "experts" in self.targets and block in shape.moe_layers and shape.layout(block).real:
                edits.append(AddLora(block, "experts", self.rank, alpha))
        if not edits:
            raise ValueError("LoRA: no layer has a real expert to put a term beside: target the attention")
        if self.existing == "keep":
            edits = [edit for edit in edits if not self._is_there(shape, edit)]
        return tuple(edits)

    @property
    def numerator(self) -> float:
        """``alpha`` as a number."""
        return float(self.alpha if self.alpha is not None else 2 * self.rank)

    def _is_there(self, shape: ModelShape, edit: AddLora) -> bool:
        held = shape.lora(edit.layer, edit.target)
        if held is not None and (held.rank, held.alpha) != (edit.rank, edit.alpha):
            raise ValueError(
                f"layer {edit.layer}: its {edit.target} {has(edit.target)} low-rank terms already, of rank "
                f"{held.rank} and alpha {held.alpha:g}, not of rank {edit.rank} and alpha {edit.alpha:g}: take theirs, "
                "or merge them first (MergeLoRA)"
            )
        return held is not None

    @torch.no_grad()
    def begin(self, stack: LoraStack, layer: int, name: str) -> None:
        """Let terms begin as in the paper: ``lora_A`` random, ``lora_B`` zero.

        ``lora_A`` is uniform with the bound ``1 / sqrt(X)``, as peft draws it.

        Args:
            stack: The terms.
            layer: Original number of their layer: with the name it decides about the random numbers, so that they are
                the same on every process and after a resume.
            name: Name of the matrices.
        """
        bound = stack.lora_A.shape[2] ** -0.5
        if stack.lora_A.device.type != "meta":
            seed = zlib.crc32(f"{self.seed} {layer} {name}".encode())
            generator = torch.Generator().manual_seed(seed)
            stack.lora_A.copy_(torch.empty(stack.lora_A.shape).uniform_(-bound, bound, generator=generator))
        stack.lora_B.zero_()


@dataclass
class MergeLoRA(AdapterMethod):
    """Fold low-rank terms into the weights, which then have the size that they had without them.

    Integers are spelled out, get the term added, and are rounded again, each to the nearest point of its group's new
    grid; how much of the term the rounding took is told for each matrix. Zeros of pruned matrices stay zeros.

    Attributes:
        dequantize: Leave weights that were integers in floating point, for a method behind that rounds them with
            calibration data, such as GPTQ.
        targets: Terms beside the matrices of the experts, those of attention, or both.
    """

    dequantize: bool = False
    targets: Targets = "experts+attention"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.targets not in get_args(Targets):
            raise ValueError(f"MergeLoRA: targets must be one of {', '.join(get_args(Targets))}, got {self.targets!r}")

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Merge wherever there are terms; see :meth:`Method.propose`."""
        edits: list[Edit] = []
        for block in shape.blocks:
            places: list[Target] = ["attention", "experts"] if block in shape.moe_layers else ["attention"]
            edits += [
                MergeLora(block, place, self.dequantize)
                for place in places
                if place in self.targets and shape.lora(block, place) is not None
            ]
        if not edits:
            where = "" if self.targets == "experts+attention" else f" beside its {self.targets}"
            raise ValueError(f"MergeLoRA: the model has no low-rank terms{where}: put LoRA (or LoRARecovery) before it")
        return tuple(edits)
