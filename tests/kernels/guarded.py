"""Every compiled product on tensors that end where memory ends; in a process of its own, which a fault would end."""

from __future__ import annotations

import ctypes
import mmap
from unittest import mock

import torch
from moe_kernels import from_lanes, grouped_product, to_lanes
from moe_kernels.cpu_kernels import lanes
from moe_kernels.cpu_kernels.dense import compiled_grouped_linear
from moe_kernels.cpu_kernels.int8 import compiled_int8_linear
from moe_kernels.cpu_kernels.lanes import LaneMatrices
from moe_kernels.cpu_kernels.sparse24 import compiled_sparse24_linear
from moe_kernels.machine import Machine
from moe_kernels.packing import pack_24
from torch import Tensor

from tests.kernels.packed import make_packed

_KEPT: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """Copy a tensor to where the next byte after it belongs to nobody."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    _KEPT.append(memory)
    last = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    start = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)


def main() -> None:
    """Multiply with odd numbers of rows, outputs and inputs."""
    for counts in ((1, 0), (0, 5), (3, 13)):
        ends, total = torch.tensor(counts).cumsum(0).int(), sum(counts)
        for dtype in (torch.bfloat16, torch.float32):
            rows, out = guarded(torch.randn(total, 84).to(dtype)), guarded(torch.empty(total, 6, dtype=dtype))
            weight = torch.randn(2, 6, 84).to(dtype)
            compiled_grouped_linear(rows, guarded(weight), ends, out)
            values, metadata = pack_24(weight * torch.tensor([1, 0, 0, 1]).repeat(21).to(dtype))
            compiled_sparse24_linear(rows, guarded(values), guarded(metadata), ends, out)
            codes = torch.randint(0, 256, (2, 6, 84), dtype=torch.uint8)
            scale, zero = guarded(torch.rand(2, 6, 3).bfloat16()), guarded(codes[:, :, :3].contiguous())
            compiled_int8_linear(rows, ends, guarded(codes), scale, zero, out)
            found = to_lanes(*make_packed(2, 16, 72, 24).stored)
            assert found is not None
            matrices = LaneMatrices(*(None if part is None else guarded(part) for part in vars(found).values()))
            with mock.patch.object(lanes, "this_machine", lambda: Machine(False, "kernel")):
                grouped_product(guarded(torch.randn(total, 72).to(dtype)), ends, matrices)
            assert torch.equal(from_lanes(matrices)[0], from_lanes(found)[0])
    print("nothing outside was touched")


if __name__ == "__main__":
    main()
