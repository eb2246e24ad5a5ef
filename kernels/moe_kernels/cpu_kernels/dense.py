"""The compiled products of rows with dense matrices as they lie.

Legend: S matrices, O outputs, X inputs, P rows sorted by matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import checked_ends, scratch_memory, threads_for

_LIBRARIES = {torch.bfloat16: "dense", torch.float32: "dense_fp32"}


def has_dense_product(dtype: torch.dtype) -> bool:
    """Say whether there is a compiled product of this type on this machine."""
    return dtype in _LIBRARIES and library(_LIBRARIES[dtype]) is not None


def compiled_grouped_linear(rows_PX: Tensor, weight_SOX: Tensor, ends_S: Tensor, out_PO: Tensor) -> None:
    """Multiply each group of rows with its own matrix, all groups in one call; not differentiable.

    Args:
        rows_PX: Rows sorted by group, bfloat16 or float32 on a CPU, ``[P, X]``, contiguous.
        weight_SOX: One matrix for each group, ``[S, O, X]``, of the same type, contiguous.
        ends_S: End of each group, ``[S]``; the last one equals P.
        out_PO: Where the result is written, ``[P, O]``, of the same type, contiguous; sums are in fp32.

    Raises:
        RuntimeError: There is no compiled product on this machine, or a tensor is another than said.
        ValueError: Sizes do not fit one another.
    """
    tensors = (rows_PX, weight_SOX, out_PO)
    dtype = rows_PX.dtype
    found = library(_LIBRARIES[dtype]) if dtype in _LIBRARIES else None
    if found is None or any(
        tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors
    ):
        raise RuntimeError("the compiled product wants a library, and contiguous tensors on the CPU, bf16 or fp32")
    (slots, outputs, inputs), rows = weight_SOX.shape, rows_PX.shape[0]
    if (rows_PX.shape, out_PO.shape) != ((rows, inputs), (rows, outputs)):
        raise ValueError(
            f"rows {list(rows_PX.shape)}, weights {list(weight_SOX.shape)} and results {list(out_PO.shape)} do not fit "
            "one another"
        )
    ends_S = checked_ends(ends_S, slots, rows)
    if not rows or not outputs:
        return
    product, size_of = found.moe_dense_product, found.moe_dense_scratch
    scratch, start = scratch_memory(size_of(rows, inputs))
    product(
        rows_PX.data_ptr(),
        ends_S.data_ptr(),
        weight_SOX.data_ptr(),
        out_PO.data_ptr(),
        start,
        slots,
        outputs,
        inputs,
        threads_for(rows * outputs * inputs),
    )
    del scratch  # held until here
