"""Products in fp32 as they are written, whatever was asked for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute fp32 products in fp32 inside a ``with`` block; what was set before holds again afterwards.

    Lightning recommends ``torch.set_float32_matmul_precision("high")``, which cuts the factors to TF32 (10 bits) on a
    GPU, ``medium`` to bf16 on some CPUs. Sums of squares and what is solved with them would be no better.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    precision: str | None
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for single backends, in a way that the one word does not say
        precision = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, value in zip(backends, before, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = value
