"""What calls of the compiled products have in common: which tensors they take, memory to work in, and threads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float32)
"""Types of rows, and of scales, that the compiled products know."""

_ALIGNMENT = 64
# Products of fewer multiplications are done before other threads have begun.
_THREADS_FROM = 2**21


def plain_tensors(*tensors: Tensor | None) -> bool:
    """Say whether compiled functions may read tensors: plain ones on the CPU, and nobody follows what becomes of them.

    Not so while a graph is traced, inside transforms of ``torch.func`` and under forward-mode differentiation, which
    see torch's operations only, and for tensors of other classes, whose memory is elsewhere.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(
        tensor is None
        or (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_neg())
        for tensor in tensors
    )


def checked_ends(offsets_S: Tensor, slots: int, rows: int) -> Tensor:
    """Return the ends of groups as the compiled products read them, int32 ``[S]`` on the CPU, contiguous.

    Args:
        offsets_S: End of each group.
        slots: S.
        rows: Rows of all groups.

    Raises:
        ValueError: They are not as many as matrices, do not rise, or do not end with the rows: memory would be read,
            and written, that belongs to others.
    """
    ends = offsets_S.tolist()
    if len(ends) != slots or any(a > b for a, b in zip([0, *ends], [*ends, rows], strict=True)):
        raise ValueError(f"groups of rows that end at {ends} do not fit {slots} matrices and {rows} rows")
    if (ends[-1] if ends else 0) != rows:
        raise ValueError(f"groups of rows that end at {ends} leave out some of {rows} rows")
    return offsets_S.to("cpu", torch.int32).contiguous()


def scratch_memory(size: int) -> tuple[Tensor, int]:
    """Return memory of some bytes, to be held while it is used, and the address in it that is aligned to 64 bytes."""
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = memory.data_ptr()
    return memory, start + -start % _ALIGNMENT


def threads_for(multiplications: int) -> int:
    """Return the threads that a product of a size takes: torch's, or one where it is short."""
    return torch.get_num_threads() if multiplications >= _THREADS_FROM else 1
