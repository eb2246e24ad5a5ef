"""Low-rank terms beside the matrices of a stack: ``y = W x + scale * gives (reads x)``, each slot with its own pair.

The cost is that of the routed pairs alone, and the matrices themselves, which may be packed, stay as they are.

Legend: P rows sorted by slot, X inputs, O outputs, S matrices (slots), R rank.

Source: Hu et al. 2021 (2106.09685), eq. 3, with one pair of matrices for each expert.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_kernels.experts import grouped_linear


class GroupedLora(NamedTuple):
    """One low-rank term for each matrix of a stack.

    Attributes:
        reads_SRX: What the term reads of the input (``lora_A`` of peft), ``[S, R, X]``.
        gives_SOR: What it adds to the output (``lora_B``), ``[S, O, R]``.
        scale: Factor, alpha / R.
    """

    reads_SRX: Tensor
    gives_SOR: Tensor
    scale: float


def lora_term(rows_PX: Tensor, offsets_S: Tensor, lora: GroupedLora) -> Tensor:
    """Compute ``scale * gives[s] (reads[s] x)`` for rows sorted by slot.

    Args:
        rows_PX: Rows, ``[P, X]``, in the type to compute in.
        offsets_S: End of each slot's rows, int32 ``[S]``; the last one equals P.
        lora: The terms; computed in the type of the rows.

    Returns:
        ``[P, O]``, differentiable in the rows and in both matrices.
    """
    read_PR = grouped_linear(rows_PX, lora.reads_SRX.to(rows_PX.dtype), offsets_S)
    # Scaled where it is smallest.
    return grouped_linear(read_PR * lora.scale, lora.gives_SOR.to(rows_PX.dtype), offsets_S)
