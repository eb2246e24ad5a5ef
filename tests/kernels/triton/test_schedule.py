"""Sorted pairs and tiles against plain torch, whatever tokens chose."""

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.schedule import make_schedule, make_schedule_twin, most_tiles_of
from torch import Tensor

from tests.kernels.triton.problems import routing_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(index: Tensor, slot_map: Tensor, slots: int, tile_rows: int) -> None:
    index, slot_map = index.to(DEVICE), slot_map.to(DEVICE)
    got, want = (make(index, slot_map, slots, tile_rows) for make in (make_schedule, make_schedule_twin))
    assert torch.equal(got.slot_NK, want.slot_NK)
    assert torch.equal(got.ends_S, want.ends_S)
    assert torch.equal(got.order_P[: len(want.order_P)], want.order_P)
    assert torch.equal(got.num_tiles, want.num_tiles)
    tiles = int(want.num_tiles)
    assert tiles <= most_tiles_of(index.numel(), slots, tile_rows) == len(got.tile_slot_M)
    assert torch.equal(got.tile_slot_M[:tiles], want.tile_slot_M)
    assert torch.equal(got.tile_first_M[:tiles], want.tile_first_M)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 300),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 4),
    novices=st.integers(0, 11),
    tile_rows=st.sampled_from([16, 128]),
    seed=st.integers(0, 1000),
)
def test_equals_its_twin(tokens: int, experts: int, top_k: int, novices: int, tile_rows: int, seed: int) -> None:
    novices = min(novices, experts - 1)
    index, _, slot_map = routing_problem(tokens, experts, min(top_k, experts), tuple(range(novices)), seed)
    check(index, slot_map, experts - novices, tile_rows)


@pytest.mark.parametrize("expert", [0, 3, 5, 6])
def test_all_tokens_to_one_expert_or_nobody(expert: int) -> None:
    slot_map = torch.tensor([0, -1, 1, -2, 2, ABSENT])
    check(torch.full((150, 1), expert), slot_map, 3, 32)


def test_experts_that_share_a_slot() -> None:
    index, _, _ = routing_problem(70, 6, 2)
    check(index, torch.tensor([0, 1, 0, 1, 1, 0]), 2, 16)


def test_nothing_is_written_behind_the_end() -> None:
    """What is not a place of a pair keeps what was there before: readers must stop at the counts."""
    index, _, slot_map = routing_problem(40, 6, 2, novices=(0, 1, 2))
    ends = make_schedule(index.to(DEVICE), slot_map.to(DEVICE), 3, 16).ends_S
    assert int(ends[-1]) == int((slot_map[index] >= 0).sum()) < index.numel()
