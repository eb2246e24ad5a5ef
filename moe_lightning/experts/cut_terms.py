"""Products with pruned matrices and low-rank terms that are cut to the weights that are left: ``(W + c B A) * mask``.

Such a sum has to be spelled out. That is done one matrix at a time, and once more on the way back, so that nothing of
the size of the weights is kept in between.

Legend: S matrices (slots), O outputs, X inputs, R rank, P rows sorted by slot.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_kernels import GroupedLora, grouped_linear
from moe_kernels.int4 import row_groups
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lightning.experts.stacks import Masked, Sparse24, WeightStack


def cut_matrix(
    stack: WeightStack, slot: int, lora: GroupedLora, dtype: torch.dtype
) -> tuple[WeightStack, Tensor, Tensor]:
    """Spell out one pruned matrix with its term.

    Args:
        stack: The matrices.
        slot: Which of them.
        lora: The terms beside all of them.
        dtype: Type to compute in.

    Returns:
        The matrix as a stack of one; which of its weights are left, bool ``[O, X]``; and the sum, ``[O, X]``.
    """
    one = stack.slot(slot)
    kept_SOX = one.zeros_kept()
    assert kept_SOX is not None, "nothing was pruned"
    term_OX = lora.scale * (lora.gives_SOR[slot].to(dtype) @ lora.reads_SRX[slot].to(dtype))
    return one, kept_SOX[0], one.dense(dtype)[0] + term_OX.masked_fill_(~kept_SOX[0], 0)


class _CutProduct(torch.autograd.Function):
    """Differentiable in the rows, both halves of the terms, and the weights that are left where they are trained."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_PX: Tensor,
        offsets_S: Tensor,
        reads_SRX: Tensor,
        gives_SOR: Tensor,
        trained: Tensor | None,
        stack: WeightStack,
        scale: float,
    ) -> Tensor:
        ctx.ends, ctx.stack, ctx.scale = offsets_S.tolist(), stack, scale
        # The stack holds the trained weights as well; here autograd sees that nobody changes them before the way back.
        ctx.save_for_backward(rows_PX, reads_SRX, gives_SOR, trained)
        lora = GroupedLora(reads_SRX, gives_SOR, scale)
        out_PO = rows_PX.new_empty(rows_PX.shape[0], stack.outputs)
        with torch.autocast(rows_PX.device.type, enabled=False):
            for slot, group in row_groups(ctx.ends):
                matrix_OX = cut_matrix(stack, slot, lora, rows_PX.dtype)[2]
                end = offsets_S.new_tensor([group.stop - group.start])
                out_PO[group] = grouped_linear(rows_PX[group], matrix_OX[None], end)
        return out_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, ...]:
        rows_PX, reads_SRX, gives_SOR, trained = ctx.saved_tensors
        lora = GroupedLora(reads_SRX, gives_SOR, ctx.scale)
        wants_rows, _, wants_reads, wants_gives, wants_trained = ctx.needs_input_grad[:5]
        # Zeros, and not nothing, where no row came.
        grad_PX = torch.zeros_like(rows_PX) if wants_rows else None
        grad_SRX = torch.zeros_like(reads_SRX) if wants_reads else None
        grad_SOR = torch.zeros_like(gives_SOR) if wants_gives else None
        grad_trained = torch.zeros_like(trained) if wants_trained else None
        kind = rows_PX.dtype
        with torch.autocast(grad_PO.device.type, enabled=False):
            for slot, group in row_groups(ctx.ends):
                one, kept_OX, matrix_OX = cut_matrix(ctx.stack, slot, lora, kind)
                if grad_PX is not None:
                    grad_PX[group] = grad_PO[group] @ matrix_OX
                del matrix_OX
                if grad_SRX is grad_SOR is grad_trained is None:
                    continue
                grad_OX = (grad_PO[group].T @ rows_PX[group]).masked_fill_(~kept_OX, 0)
                if grad_SRX is not None:
                    grad_SRX[slot] = ctx.scale * (gives_SOR[slot].to(kind).T @ grad_OX)
                if grad_SOR is not None:
                    grad_SOR[slot] = ctx.scale * (grad_OX @ reads_SRX[slot].to(kind).T)
                if grad_trained is not None:
                    grad_trained[slot] = _of_trained(one, kept_OX, grad_OX)
        return grad_PX, None, grad_SRX, grad_SOR, grad_trained, None, None


def _of_trained(one: WeightStack, kept_OX: Tensor, grad_OX: Tensor) -> Tensor:
    """Return of the gradient of a matrix, zero where it was pruned, that of the parameter that holds it."""
    if isinstance(one, Sparse24):
        return torch.take_along_dim(grad_OX, one.places[0], -1)
    assert isinstance(one, Masked)
    return grad_OX if one.values is None else grad_OX[kept_OX]


# What is decided by the number of rows of each expert is no business of a compiler.
@torch.compiler.disable
def cut_linear(rows_PX: Tensor, offsets_S: Tensor, stack: WeightStack, lora: GroupedLora) -> Tensor:
    """Multiply each group of rows with its own pruned matrix and the term beside it, cut to the weights that are left.

    Args:
        rows_PX: Rows sorted by slot, in the type to compute in.
        offsets_S: End of each slot's rows, int32; the last one equals P.
        stack: Pruned matrices.
        lora: The terms.

    Returns:
        ``[P, O]``, differentiable in the rows, the terms, and the weights where they are in floating point; gradients
        of slots without rows are zeros.

    Cost: each matrix that rows reached is spelled out, in both directions; kept are the rows alone.
    """
    trained = next(stack.parameters(), None)
    return _CutProduct.apply(rows_PX, offsets_S, lora.reads_SRX, lora.gives_SOR, trained, stack, lora.scale)
