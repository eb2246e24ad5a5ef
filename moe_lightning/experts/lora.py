"""Low-rank terms that stand beside matrices and train while the matrices stay: LoRA, with a term for each expert.

Legend: S matrices (slots), O outputs, X inputs, R rank, P rows sorted by slot.

Source: Hu et al. 2021 (2106.09685), eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from moe_kernels import GroupedLora, grouped_linear, lora_term
from torch import Tensor, nn

from moe_lightning.experts.cut_terms import cut_linear
from moe_lightning.experts.stacks import WeightStack

LORA_PARAMETERS = ("lora_A", "lora_B")
"""Last part of the names of the parameters of low-rank terms, as peft names them."""


class LoraStack(nn.Module):
    """A low-rank term for each matrix of a stack: ``alpha / R * lora_B lora_A``.

    The terms are in the type of the model. Where that is bf16 (``precision: bf16-true``), a step smaller than half the
    distance to the next bf16 number is lost: of 50 steps of AdamW with noisy gradients, 99 % of the way that fp32 goes
    is left at a learning rate of 1e-4, and 62 % at 1e-5. Train in ``bf16-mixed``, or with a larger learning rate.

    Attributes:
        lora_A: What the terms read of the input, ``[S, R, X]``.
        lora_B: What they add to the output, ``[S, O, R]``.
        alpha: Numerator of the factor.
    """

    def __init__(self, lora_A: nn.Parameter, lora_B: nn.Parameter, alpha: float) -> None:
        """Hold both stacks.

        Raises:
            ValueError: They do not fit each other.
        """
        super().__init__()
        if lora_A.shape[0] != lora_B.shape[0] or lora_A.shape[1] != lora_B.shape[2]:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit")
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.alpha = alpha

    @classmethod
    def empty(cls, slots: int, outputs: int, inputs: int, rank: int, alpha: float, like: Tensor) -> LoraStack:
        """Make terms that are zero, in the type and on the device of a tensor."""
        with torch.inference_mode(False):
            shapes = ((slots, rank, inputs), (slots, outputs, rank))
            first, second = (
                nn.Parameter(torch.zeros(*shape, dtype=like.dtype, device=like.device)) for shape in shapes
            )
        return cls(first, second, alpha)

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[1]

    @property
    def scale(self) -> float:
        """Factor of the products."""
        return self.alpha / self.rank

    def grouped(self) -> GroupedLora:
        """Return the terms as the operations take them."""
        return GroupedLora(self.lora_A, self.lora_B, self.scale)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the terms add to the matrices, ``[S, O, X]``; differentiable."""
        kind = dtype or self.lora_A.dtype
        return self.scale * (self.lora_B.to(kind) @ self.lora_A.to(kind))

    def extra_repr(self) -> str:
        """Say how many terms of what rank there are."""
        return f"slots={self.lora_A.shape[0]}, rank={self.rank}, alpha={self.alpha}"


def adapted_linear(rows_PX: Tensor, offsets_S: Tensor, weight: Tensor | WeightStack, lora: LoraStack | None) -> Tensor:
    """Multiply each group of rows with its own matrix and add the low-rank term beside it.

    Beside pruned matrices the term is cut to the weights that are left, so that it can be folded into them without
    error; each matrix that rows reached is then spelled out with its term, on the way back once more. Elsewhere a term
    costs ``R (O + X)`` a row.

    Args:
        rows_PX: Rows sorted by slot.
        offsets_S: End of each slot's rows, int32.
        weight: ``[S, O, X]``, or a packed stack.
        lora: The terms, or None.

    Returns:
        ``[P, O]``, differentiable in the rows, the terms, and weights in floating point.
    """
    if not isinstance(weight, WeightStack):
        product_PO = grouped_linear(rows_PX, weight, offsets_S)
    elif lora is not None and weight.is_pruned:
        return cut_linear(rows_PX, offsets_S, weight, lora.grouped())
    else:
        product_PO = weight.linear(rows_PX, offsets_S)
    return product_PO if lora is None else product_PO + lora_term(rows_PX, offsets_S, lora.grouped())


def kept_delta(weight: WeightStack, lora: LoraStack, dtype: torch.dtype) -> Tensor | None:
    """Return what terms add to pruned matrices, ``[S, O, X]``, nothing to the pruned weights; None if none were."""
    kept_SOX = weight.zeros_kept()
    return None if kept_SOX is None else lora.delta(dtype).masked_fill(~kept_SOX, 0)


def whole_weights(weight: Tensor | WeightStack, lora: LoraStack | None) -> Tensor:
    """Return matrices with the terms beside them in floating point, ``[S, O, X]``; weights alone are no copy.

    Args:
        weight: ``[S, O, X]``, or a packed stack.
        lora: The terms, or None.
    """
    dense_SOX = weight.dense() if isinstance(weight, WeightStack) else weight
    if lora is None:
        return dense_SOX
    delta_SOX = kept_delta(weight, lora, dense_SOX.dtype) if isinstance(weight, WeightStack) else None
    return dense_SOX + (lora.delta(dense_SOX.dtype) if delta_SOX is None else delta_SOX)


def lora_stacks(module: nn.Module) -> Mapping[str, LoraStack]:
    """Return the low-rank terms in a module, by name."""
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, LoraStack)}


def is_lora(name: str) -> bool:
    """Say whether a parameter of this name belongs to a low-rank term."""
    return name.rpartition(".")[2] in LORA_PARAMETERS
