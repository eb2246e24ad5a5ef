"""How kernels behave in triton's interpreter, which runs them on a CPU (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels of this process run in the interpreter."""


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type in which kernels multiply numbers of a type.

    The interpreter's arithmetic in bfloat16 is wrong (loads, stores and casts to fp32 are right), so fp32 there.

    Args:
        dtype: Of the activations: bfloat16, float16 or float32.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return {torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
