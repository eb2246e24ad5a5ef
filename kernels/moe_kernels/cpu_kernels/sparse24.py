"""The compiled product of rows with matrices of the pattern 2:4 as they are stored.

Legend: S matrices (slots), O outputs, I inputs, K kept values of a row (I / 2), B bytes of places, P rows sorted by
slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import FLOATS, checked_ends, scratch_memory, threads_for


def has_sparse24_product() -> bool:
    """Say whether there is a compiled product on this machine."""
    return library("sparse24") is not None


def compiled_sparse24_linear(
    rows_PI: Tensor, values_SOK: Tensor, metadata_SOB: Tensor, ends_S: Tensor, out_PO: Tensor
) -> None:
    """Multiply each group of rows with its own matrix, all groups in one call; not differentiable.

    Args:
        rows_PI: Rows sorted by slot, bfloat16 or float32 on a CPU, contiguous.
        values_SOK: The kept two of every four, in the type of the rows, contiguous; see
            `moe_kernels.packing.Packed24` for these two.
        metadata_SOB: Their places, uint8, contiguous.
        ends_S: End of each group, int32 on a CPU, contiguous; the last one equals P.
        out_PO: Where the result is written, in the type of the rows, contiguous; sums are in fp32 and rounded once.

    Raises:
        RuntimeError: There is no compiled product on this machine, or a tensor is another than said.
        ValueError: Sizes do not fit one another.
    """
    found, wide = library("sparse24"), rows_PI.dtype == torch.float32
    numbers = (rows_PI, values_SOK, out_PO)
    if (
        found is None
        or rows_PI.dtype not in FLOATS
        or any(tensor.dtype != rows_PI.dtype for tensor in numbers)
        or (metadata_SOB.dtype, ends_S.dtype) != (torch.uint8, torch.int32)
        or any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in (*numbers, metadata_SOB, ends_S))
    ):
        raise RuntimeError("the compiled product wants a library, and contiguous tensors of one type on the CPU")
    (slots, outputs, kept), rows = values_SOK.shape, rows_PI.shape[0]
    if (rows_PI.shape, metadata_SOB.shape, ends_S.shape, out_PO.shape) != (
        (rows, 2 * kept),
        (slots, outputs, -(-kept // 4)),
        (slots,),
        (rows, outputs),
    ):
        raise ValueError(
            f"rows {list(rows_PI.shape)}, values {list(values_SOK.shape)}, places {list(metadata_SOB.shape)}, "
            f"{len(ends_S)} ends and results {list(out_PO.shape)} do not fit one another"
        )
    ends_S = checked_ends(ends_S, slots, rows)
    if not rows or not outputs:
        return
    if not kept:
        out_PO.zero_()
        return
    scratch, start = scratch_memory(found.moe_sparse24_scratch(rows, 2 * kept, wide))
    found.moe_sparse24_product(
        rows_PI.data_ptr(),
        ends_S.data_ptr(),
        values_SOK.data_ptr(),
        metadata_SOB.data_ptr(),
        out_PO.data_ptr(),
        start,
        slots,
        outputs,
        2 * kept,
        wide,
        threads_for(rows * outputs * kept),
    )
    del scratch  # held until here
