"""What calls of the compiled products have in common: memory to work in, and threads."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64
# Products of fewer multiplications are done before other threads have begun.
_THREADS_FROM = 2**21


def scratch_memory(size: int) -> tuple[Tensor, int]:
    """Return memory of some bytes, to be held while it is used, and the address in it that is aligned to 64 bytes."""
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = memory.data_ptr()
    return memory, start + -start % _ALIGNMENT


def threads_for(multiplications: int) -> int:
    """Return the threads that a product of a size takes: torch's, or one where it is short."""
    return torch.get_num_threads() if multiplications >= _THREADS_FROM else 1
