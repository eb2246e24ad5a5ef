"""The product of a single row with a matrix of the pattern 2:4 on a CPU: the row is looked up, the matrix stays packed.

A byte of places says which four of eight inputs are kept. What they are in the row is in a table of all bytes, so one
look-up fetches the partners of four values. That takes half the time of spelling out the matrix in bf16, a third in
fp32, but once for every row.

Legend: O outputs, I inputs, K kept values, B bytes of places, each of them for eight inputs, T outputs at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOOKUPS = 2**17
"""Bytes of places at a time: 2 MiB of partners. 0.45, 0.37 and 0.34 ns a weight with 2^15, 2^16 and 2^17."""

# The table of bytes takes as long as a third of this many outputs.
_LEAST_OUTPUTS = 512
# torch's look-up in one dimension is the work of one thread; with more, tiles that all share are done no later.
_MOST_THREADS = 1


def one_row_pays(rows: int, outputs: int, dtype: torch.dtype) -> bool:
    """Say whether :func:`one_row_product` is the way for a product.

    Args:
        rows: That reached the matrix.
        outputs: O.
        dtype: Of the rows; wider ones than fp32 have no table.
    """
    return rows == 1 and outputs >= _LEAST_OUTPUTS and dtype.itemsize <= 4 and torch.get_num_threads() <= _MOST_THREADS


def one_row_product(row_I: Tensor, values_OK: Tensor, metadata_OB: Tensor, out_O: Tensor) -> None:
    """Write ``weight @ row`` to ``out_O``, computed in fp32 and rounded once.

    Args:
        row_I: In fp32 or narrower.
        values_OK: Kept values, in the type of the row.
        metadata_OB: Their places, uint8; see `moe_kernels.packing.Packed24`.
        out_O: Is written to.
    """
    outputs, num_bytes = metadata_OB.shape
    table = _partners(row_I, num_bytes)
    step = max(1, min(outputs, LOOKUPS // num_bytes))
    column_B = torch.arange(num_bytes, dtype=torch.int32, device="cpu")
    index_TB = torch.empty(step, num_bytes, dtype=torch.int32, device="cpu")
    found = torch.empty(step * num_bytes, dtype=table.dtype, device="cpu")
    for first in range(0, outputs, step):
        part = slice(first, first + step)
        size = len(metadata_OB[part])
        index = index_TB[:size].copy_(metadata_OB[part])
        torch.add(column_B, index, alpha=num_bytes, out=index)
        torch.index_select(table, 0, index.view(-1), out=found[: size * num_bytes])
        partners_TK = found.view(torch.float64).view(torch.float32).view(step, -1)[:size, : values_OK.shape[1]]
        out_O[part] = partners_TK.mul_(values_OK[part]).sum(-1)


def _partners(row_I: Tensor, num_bytes: int) -> Tensor:
    """Return four numbers of the row for each byte and place of it: 16 bytes each, taken for one complex number."""
    nibble = torch.arange(16, device="cpu")
    places = torch.stack([nibble & 3, nibble >> 2], -1)
    groups_B24 = F.pad(row_I.float(), (0, 8 * num_bytes - row_I.shape[0])).view(num_bytes, 2, 4)
    # Pairs of numbers, as one complex number each: [2, 16, B].
    pairs = torch.view_as_complex(groups_B24[:, :, places]).permute(1, 2, 0).contiguous()
    both = torch.empty(16, 16, num_bytes, 2, dtype=pairs.dtype, device="cpu")
    both[..., 0] = pairs[0]
    both[..., 1] = pairs[1][:, None]
    return both.view(torch.float64).view(torch.complex128).view(-1)
