"""The compiled products of rows with dense matrices as they lie.

Legend: S matrices, O outputs, X inputs, P rows sorted by matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import scratch_memory, threads_for


def compiled_grouped_linear(rows_PX: Tensor, weight_SOX: Tensor, ends_S: Tensor, out_PO: Tensor) -> None:
    """Multiply each group of rows with its own matrix, all groups in one call; not differentiable.

    Args:
        rows_PX: Rows sorted by group, bfloat16 or float32 on a CPU, ``[P, X]``, contiguous.
        weight_SOX: One matrix for each group, ``[S, O, X]``, of the same type, contiguous.
        ends_S: End of each group, int32 ``[S]`` on a CPU, contiguous; the last one equals P.
        out_PO: Where the result is written, ``[P, O]``, of the same type, contiguous; sums are in fp32.

    Raises:
        RuntimeError: There is no compiled product on this machine, or a tensor is another than said.
    """
    tensors = (rows_PX, weight_SOX, out_PO)
    found = library()
    types = {tensor.dtype for tensor in tensors}
    if (
        found is None
        or len(types) > 1
        or not types <= {torch.bfloat16, torch.float32}
        or any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors)
    ):
        raise RuntimeError("the compiled product wants a library, and contiguous tensors on the CPU, bf16 or fp32")
    (slots, outputs, inputs), rows = weight_SOX.shape, rows_PX.shape[0]
    if not rows or not outputs:
        return
    wide = rows_PX.dtype == torch.float32
    product = found.moe_dense_fp32_product if wide else found.moe_dense_product
    size = found.moe_dense_fp32_scratch(rows, inputs) if wide else found.moe_dense_scratch(rows, inputs)
    scratch, start = scratch_memory(size)
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
