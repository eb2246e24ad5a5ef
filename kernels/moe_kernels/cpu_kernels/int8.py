"""The compiled product of rows with int8 matrices as they are stored.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, P rows sorted by slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import scratch_memory, threads_for

_FLOATS = (torch.bfloat16, torch.float32)


def takes_int8(rows_PI: Tensor, codes_SOI: Tensor, scale_SOG: Tensor, zero_SOG: Tensor | None) -> bool:
    """Say whether :func:`compiled_int8_linear` reads such tensors as they lie.

    Args:
        rows_PI: As for :func:`compiled_int8_linear`, and so are the others; rows may have any strides.
        codes_SOI: uint8.
        scale_SOG: bfloat16 or float32.
        zero_SOG: uint8, or None.
    """
    weights = (codes_SOI, scale_SOG) if zero_SOG is None else (codes_SOI, scale_SOG, zero_SOG)
    groups = scale_SOG.shape[2]
    return (
        rows_PI.dtype in _FLOATS
        and scale_SOG.dtype in _FLOATS
        and codes_SOI.dtype == torch.uint8
        and (zero_SOG is None or zero_SOG.dtype == torch.uint8)
        and all(tensor.device.type == "cpu" for tensor in (rows_PI, *weights))
        and all(tensor.is_contiguous() for tensor in weights)
        and groups > 0
        and codes_SOI.shape[2] % groups == 0
    )


def compiled_int8_linear(
    rows_PI: Tensor, ends_S: Tensor, codes_SOI: Tensor, scale_SOG: Tensor, zero_SOG: Tensor | None, out_PO: Tensor
) -> None:
    """Multiply each group of rows with its own matrix, all groups in one call; not differentiable.

    ``w = (code - zero) * scale`` in fp32, rounded to bfloat16 for bfloat16 rows where the CPU multiplies such numbers;
    sums in fp32, rounded once.

    Args:
        rows_PI: Rows sorted by slot, bfloat16 or float32 on a CPU, ``[P, I]``, contiguous.
        ends_S: End of each slot's rows, int32 ``[S]`` on a CPU, contiguous; the last one equals P.
        codes_SOI: uint8 ``[S, O, I]``, contiguous.
        scale_SOG: bfloat16 or float32 ``[S, O, G]``, contiguous; G divides I.
        zero_SOG: uint8 ``[S, O, G]``, contiguous; None for a symmetric grid, whose zero is 128.
        out_PO: Where the result is written, ``[P, O]`` in the type of the rows, contiguous.

    Raises:
        RuntimeError: There is no compiled product on this machine, or a tensor is another than said.
    """
    found = library("int8")
    if (
        found is None
        or not takes_int8(rows_PI, codes_SOI, scale_SOG, zero_SOG)
        or not (rows_PI.is_contiguous() and out_PO.is_contiguous() and out_PO.dtype == rows_PI.dtype)
    ):
        raise RuntimeError("the compiled product wants a library, and contiguous tensors of its types on the CPU")
    (slots, outputs, inputs), groups, rows = codes_SOI.shape, scale_SOG.shape[2], rows_PI.shape[0]
    if not rows or not outputs:
        return
    wide, threads = rows_PI.dtype == torch.float32, threads_for(rows * outputs * inputs)
    scratch, start = scratch_memory(found.moe_int8_scratch(rows, inputs, groups, wide, threads))
    found.moe_int8_product(
        rows_PI.data_ptr(),
        ends_S.data_ptr(),
        codes_SOI.data_ptr(),
        scale_SOG.data_ptr(),
        None if zero_SOG is None else zero_SOG.data_ptr(),
        out_PO.data_ptr(),
        start,
        slots,
        outputs,
        inputs,
        groups,
        wide,
        scale_SOG.dtype == torch.float32,
        threads,
    )
    del scratch  # held until here
