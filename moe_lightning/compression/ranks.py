"""What several processes make of the same sums: one of them says, where they could differ by a bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def take_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have on rank 0, in place, on every process of a distributed run.

    Processes solve with the same sums, but another CPU or another number of threads may round a solution, or break a
    tie, the other way. A mask or a code that differs is not mended later: DistributedDataParallel sends the parameters
    of rank 0 around, and every rank would put them in places of its own.

    Args:
        tensors: The same ones on all processes, in the same order.

    Cost: one broadcast of their bytes.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            # As bytes: not every backend knows every type.
            distributed.broadcast(whole.view(-1).view(torch.uint8), 0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)
