"""The compiled product of rows with int8 matrices as they are stored.

Legend: S matrices (slots), O outputs, I inputs, G groups along the input, P rows sorted by slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import FLOATS, checked_ends, scratch_memory, threads_for


def takes_int8(codes_SOI: Tensor, scale_SOG: Tensor, zero_SOG: Tensor | None) -> bool:
    """Say whether :func:`compiled_int8_linear` reads such weights as they lie: by types, sizes, device and strides.

    Args:
        codes_SOI: As for :func:`compiled_int8_linear`, and so are the others.
        scale_SOG: Scales.
        zero_SOG: Zeros, or None.
    """
    (slots, outputs, inputs), groups = codes_SOI.shape, scale_SOG.shape[-1]
    zeros = () if zero_SOG is None else (zero_SOG,)
    return (
        codes_SOI.dtype == torch.uint8
        and scale_SOG.dtype in FLOATS
        and all(zero.dtype == torch.uint8 for zero in zeros)
        and groups > 0
        and inputs % groups == 0
        and all(tensor.shape == (slots, outputs, groups) for tensor in (scale_SOG, *zeros))
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (codes_SOI, scale_SOG, *zeros))
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
        ValueError: Sizes do not fit one another.
    """
    found, others = library("int8"), (rows_PI, ends_S, out_PO)
    if (
        found is None
        or not takes_int8(codes_SOI, scale_SOG, zero_SOG)
        or rows_PI.dtype not in FLOATS
        or (out_PO.dtype, ends_S.dtype) != (rows_PI.dtype, torch.int32)
        or any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in others)
    ):
        raise RuntimeError("the compiled product wants a library, and contiguous tensors of its types on the CPU")
    (slots, outputs, inputs), groups, rows = codes_SOI.shape, scale_SOG.shape[2], rows_PI.shape[0]
    if (rows_PI.shape, ends_S.shape, out_PO.shape) != ((rows, inputs), (slots,), (rows, outputs)):
        raise ValueError(
            f"rows {list(rows_PI.shape)}, codes {list(codes_SOI.shape)}, {len(ends_S)} ends and results "
            f"{list(out_PO.shape)} do not fit one another"
        )
    ends_S = checked_ends(ends_S, slots, rows)
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
