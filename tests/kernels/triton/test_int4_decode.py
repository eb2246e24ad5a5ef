"""The int4 kernels for few tokens against numpy in float64 with the same quantised weights."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.int4_down import int4_down, int4_down_twin
from moe_kernels.triton_kernels.int4_gate_up import int4_gate_up, int4_gate_up_twin
from moe_kernels.triton_kernels.routing import decode_routing, decode_routing_twin

from tests.kernels.triton.problems import DTYPES, TOLERANCE, int4_problem, relative_error, routing_problem


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (16, 8), (3, 3)])
def test_routing_equals_its_twin(tokens: int, top_k: int, group: int | None, device: str) -> None:
    index, weight, slot_map = routing_problem(tokens, 40, top_k, novices=(1, 3, 38))
    slot_map[5] = ABSENT
    index[0, 0] = 40  # nobody
    hidden = torch.randn(tokens, 192)
    arguments = tuple(tensor.to(device) for tensor in (hidden, index, weight, slot_map))
    got = decode_routing(*arguments, 37, group)
    want = decode_routing_twin(*arguments, 37, group)
    assert torch.equal(got.slot_NK, want.slot_NK) and torch.equal(got.reached_S, want.reached_S)
    assert torch.equal(got.weight_NK, want.weight_NK)
    if group is None:
        assert got.sums_NG is None
    else:
        torch.testing.assert_close(got.sums_NG, want.sums_NG, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "group", "sum_over", "symmetric"),
    [(1, 64, 32, False), (5, 128, 64, True), (16, 64, 64, False)],
)
def test_gate_up(dtype: torch.dtype, tokens: int, group: int, sum_over: int, symmetric: bool, device: str) -> None:
    hidden_size, inner_size, slots = 256, 128, 3
    problem = int4_problem(slots, 2 * inner_size, hidden_size, group, symmetric, device=device)
    index, weight, slot_map = routing_problem(tokens, 4, 2, novices=(2,))
    hidden = torch.randn(tokens, hidden_size).to(dtype)
    routing = decode_routing(hidden.to(device), index.to(device), weight.to(device), slot_map.to(device), slots, group)
    inner, sums = int4_gate_up(hidden.to(device), routing.sums_NG, problem.tiles, routing, sum_over)
    gate, up = np.split(hidden.double().numpy() @ problem.dense.transpose(0, 2, 1), 2, -1)
    want = gate / (1 + np.exp(-gate)) * up
    twin = int4_gate_up_twin(hidden.to(device), problem.tiles)
    assert relative_error(twin, want) < 1e-6
    for slot in range(slots):
        chose = (slot_map[index] == slot).any(1)
        if chose.any():
            assert relative_error(inner[slot, chose], want[slot, chose.numpy()]) <= TOLERANCE[dtype]
            expected = inner[slot, chose].double().unflatten(-1, (-1, sum_over)).sum(-1)
            torch.testing.assert_close(sums[slot, chose].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "group", "sum_over", "splits", "top_k"),
    [(1, 64, 32, 4, 1), (5, 128, 64, 4, 2), (16, 64, 64, 3, 3)],
)
def test_down(dtype: torch.dtype, tokens: int, group: int, sum_over: int, splits: int, top_k: int, device: str) -> None:
    hidden_size, inner_size, slots = 64, 384, 3
    problem = int4_problem(slots, hidden_size, inner_size, group, device=device)
    index, weight, slot_map = routing_problem(tokens, 4, top_k, novices=(2,))
    hidden = torch.zeros(tokens, hidden_size, device=device)
    routing = decode_routing(hidden, index.to(device), weight.to(device), slot_map.to(device), slots)
    inner = torch.randn(slots, tokens, inner_size).to(dtype)
    sums = inner.double().unflatten(-1, (-1, sum_over)).sum(-1).float()
    # What nobody chose was never written by the kernel before: it must not be read either.
    for slot in range(slots):
        nobody = ~(slot_map[index] == slot).any(1)
        inner[slot, nobody], sums[slot, nobody] = torch.nan, torch.nan
    parts = int4_down(inner.to(device), sums.to(device), problem.tiles, routing, splits)
    assert parts.shape == (splits, tokens, top_k, hidden_size) and parts.dtype == torch.float32
    got = parts.sum(0)
    for token, row in enumerate(index.tolist()):
        for place, expert in enumerate(row):
            slot = int(slot_map[expert])
            if slot >= 0:
                channels = inner[slot, token].double().numpy()
                want = weight[token, place].double().numpy() * (problem.dense[slot] @ channels)
                assert relative_error(got[token, place], want) <= max(TOLERANCE[dtype] / 100, 1e-5)
    clean = inner.nan_to_num().to(device)
    twin = int4_down_twin(clean, problem.tiles)
    assert relative_error(twin, clean.double().cpu().numpy() @ problem.dense.transpose(0, 2, 1)) < 1e-6


@pytest.mark.parametrize(("block_tokens", "splits"), [(32, 2), (64, 1)])
def test_zeros_taken_off_behind_the_loop(block_tokens: int, splits: int, device: str) -> None:
    """More sums than are taken at a time, of inputs whose mean is not zero: what zeros take off is large."""
    wide, rows, slots, tokens, group = 1152, 64, 1, block_tokens - 3, 64
    index, weight, slot_map = routing_problem(tokens, 3, 2, novices=(1, 2))
    index, weight, slot_map = index.to(device), weight.to(device), slot_map.to(device)
    draw = torch.Generator().manual_seed(0)
    hidden = ((torch.randn(tokens, wide, generator=draw) + 0.5) / 8).to(device, torch.float16)
    routing = decode_routing(hidden, index, weight, slot_map, slots, group)
    options = {"block_out": 64, "block_tokens": block_tokens, "num_warps": 4, "num_stages": 3}
    token, place = (slot_map[index] == 0).nonzero(as_tuple=True)
    chosen = hidden[token].double().cpu().numpy()

    problem = int4_problem(slots, 2 * rows, wide, group, device=device)
    got = int4_gate_up(hidden, routing.sums_NG, problem.tiles, routing, 32, **options)[0][0, token]
    gate, up = np.split(chosen @ problem.dense[0].T, 2, -1)
    assert relative_error(got, gate / (1 + np.exp(-gate)) * up) <= TOLERANCE[torch.float16]

    problem = int4_problem(slots, rows, wide, group, seed=1, device=device)
    sums = hidden.float().unflatten(-1, (-1, 32)).sum(-1)
    got = int4_down(hidden[None], sums[None], problem.tiles, routing, splits, **options).sum(0)[token, place]
    share = weight[token, place, None].double().cpu().numpy()
    assert relative_error(got, share * (chosen @ problem.dense[0].T)) <= 1e-5
