"""The kernels of a training step, one by one, against their twins in float64."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.dispatch import Device, Tiles
from moe_kernels.triton_kernels.schedule import Schedule, make_schedule
from moe_kernels.triton_kernels.training.choose import OuterTiles, choose_training
from moe_kernels.triton_kernels.training.down_backward import down_backward, down_backward_twin
from moe_kernels.triton_kernels.training.gate_up import training_gate_up, training_gate_up_twin
from moe_kernels.triton_kernels.training.pairs_product import pairs_product, pairs_product_twin
from moe_kernels.triton_kernels.training.rank_reads import rank_reads, rank_reads_twin
from moe_kernels.triton_kernels.training.slot_outer import slot_outer, slot_outer_twin
from torch import Tensor

from tests.kernels.triton.problems import relative_error, routing_problem

SLOTS = 4
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
DESCRIPTORS = pytest.mark.parametrize("descriptors", [True, False])
# Tokens, hidden, intermediate, k, rank: tiles of 32 divide all, or nothing.
SIZES = pytest.mark.parametrize("sizes", [(33, 64, 32, 2, 16), (21, 72, 40, 3, 5)], ids=str)


@dataclass
class Room:
    """Where the kernels work."""

    schedule: Schedule
    weight: Tensor
    places: int
    dtype: torch.dtype
    device: str

    def random(self, *size: int) -> Tensor:
        return (torch.randn(size) * size[-1] ** -0.5).to(self.dtype).to(self.device)

    def by_place(self, size: int) -> Tensor:
        """Return rows of places; behind the last stands NaN, which must not be read."""
        rows = torch.full((self.schedule.order_P.shape[0], size), torch.nan, dtype=self.dtype, device=self.device)
        rows[: self.places] = self.random(self.places, size)
        return rows

    def check(self, got: Tensor, want: Tensor) -> None:
        got = got[: self.places] if got.shape[:1] == self.schedule.order_P.shape else got
        assert got.shape == want.shape
        assert relative_error(got, want) <= TOLERANCE[self.dtype]


def make_room(tokens: int, top_k: int, dtype: torch.dtype, device: str) -> Room:
    index, weight, slot_map = routing_problem(tokens, 6, top_k, novices=(2, 4))
    index[0, 0] = 6
    schedule = make_schedule(index.to(device), slot_map.to(device), SLOTS, 16)
    return Room(schedule, weight.to(device), int(schedule.ends_S[-1]), dtype, device)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


TILES = Tiles(32, 4, 2, 32)
STAY = {"tiles_together": 2, "programs": 3}


@SIZES
@DTYPES
@DESCRIPTORS
def test_gate_up(sizes: tuple[int, ...], dtype: torch.dtype, descriptors: bool, device: str) -> None:
    tokens, hidden_size, inner, top_k, rank = sizes
    room = make_room(tokens, top_k, dtype, device)
    hidden, stack = room.random(tokens, hidden_size), room.random(SLOTS, 2 * inner, hidden_size)
    reads, gives = room.by_place(rank), room.random(SLOTS, 2 * inner, rank)
    found = training_gate_up(hidden, stack, room.schedule, TILES, reads, gives, descriptors=descriptors, **STAY)
    first, *others = wide(hidden, stack, reads, gives)
    wanted = training_gate_up_twin(first, others[0], room.schedule, *others[1:])
    for got, want in zip(found, wanted, strict=True):
        room.check(got, want)


@SIZES
@DTYPES
@DESCRIPTORS
@pytest.mark.parametrize("transposed", [True, False])
def test_pairs_product(
    sizes: tuple[int, ...], dtype: torch.dtype, descriptors: bool, transposed: bool, device: str
) -> None:
    tokens, outputs, inputs, top_k, rank = sizes
    room = make_room(tokens, top_k, dtype, device)
    rows, reads = room.by_place(inputs), room.by_place(rank)
    stack, gives = room.random(SLOTS, outputs, inputs), room.random(SLOTS, outputs, rank)
    if transposed:
        stack, gives = stack.mT.contiguous(), gives.mT.contiguous()
    weight = None if transposed else room.weight
    got = pairs_product(
        rows, stack, room.schedule, TILES, transposed, weight, reads, gives, descriptors=descriptors, **STAY
    )
    (rows, stack, reads, gives), pairs = wide(rows, stack, reads, gives), room.schedule.order_P[: room.places].long()
    want = pairs_product_twin(rows, stack, room.schedule, transposed, weight, reads, gives)
    assert got.shape == want.shape == (1, tokens, top_k, outputs)
    assert relative_error(got.flatten(0, 2)[pairs], want.flatten(0, 2)[pairs]) <= 2e-6


@SIZES
@DTYPES
@DESCRIPTORS
def test_down_backward(sizes: tuple[int, ...], dtype: torch.dtype, descriptors: bool, device: str) -> None:
    tokens, hidden_size, inner, top_k, rank = sizes
    room = make_room(tokens, top_k, dtype, device)
    grad, down = room.random(tokens, hidden_size), room.random(SLOTS, hidden_size, inner)
    pre, reads, gives = room.by_place(2 * inner), room.by_place(rank), room.random(SLOTS, rank, inner)
    pre *= 4
    found = down_backward(
        grad, down, pre, room.weight, room.schedule, TILES, reads, gives, descriptors=descriptors, **STAY
    )
    grad, down, pre, reads, gives = wide(grad, down, pre, reads, gives)
    wanted = down_backward_twin(grad, down, pre, room.weight, room.schedule, reads, gives)
    room.check(found[0], wanted[0])
    room.check(found[1], wanted[1])
    pairs = room.schedule.order_P[: room.places].long()
    assert found[2].shape == (-(-inner // 32), tokens, top_k)
    assert relative_error(found[2].sum(0).flatten()[pairs], wanted[2].flatten()[pairs]) <= 2e-6


@SIZES
@DTYPES
@pytest.mark.parametrize("gathered, transposed, shared", [(True, False, False), (False, True, True)])
def test_rank_reads(
    sizes: tuple[int, ...], dtype: torch.dtype, gathered: bool, transposed: bool, shared: bool, device: str
) -> None:
    tokens, inputs, _, top_k, rank = sizes
    room = make_room(tokens, top_k, dtype, device)
    rows = room.random(tokens, inputs) if gathered else room.by_place(inputs)
    matrix = room.random(SLOTS, *((inputs, rank) if transposed else (rank, inputs)))
    weight = room.weight if shared else None
    got = rank_reads(rows, matrix, room.schedule, 1.5, gathered, transposed, weight, block_in=32)
    room.check(got, rank_reads_twin(*wide(rows, matrix), room.schedule, 1.5, gathered, transposed, weight))


@SIZES
@DTYPES
@pytest.mark.parametrize("gathered", [0, 1, 2])
def test_slot_outer(sizes: tuple[int, ...], dtype: torch.dtype, gathered: int, device: str) -> None:
    tokens, left_size, right_size, top_k, _ = sizes
    room = make_room(tokens, top_k, dtype, device)
    left = room.random(tokens, left_size) if gathered == 1 else room.by_place(left_size)
    right = room.random(tokens, right_size) if gathered == 2 else room.by_place(right_size)
    which, tiles = (gathered == 1, gathered == 2), OuterTiles(32, 16, 4, 2)
    # One slot more, which no token reached.
    ends = torch.cat([room.schedule.ends_S, room.schedule.ends_S[-1:]])
    schedule = Schedule(**{**vars(room.schedule), "ends_S": ends})
    got = slot_outer(left, right, schedule, SLOTS + 1, tiles, dtype, *which, tiles_together=2)
    assert got.dtype == dtype
    assert not got[-1].any()
    assert relative_error(got, slot_outer_twin(*wide(left, right), schedule, SLOTS + 1, *which)) <= TOLERANCE[dtype]


def test_tables() -> None:
    """Every architecture has tiles for every format; what is unknown takes those of the next lower one."""
    for form in ("dense", "fp32"):
        found = [choose_training(form, Device(arch)) for arch in (0, 80, 89, 90, 100, 120)]
        assert found[0] == found[1] == found[2]
        assert found[4] == found[5]
    assert OuterTiles(128, 64, 8, 3).of(12, 4096) == (16, 128)
    assert OuterTiles(128, 64, 8, 3).of(100, 5) == (128, 16)
