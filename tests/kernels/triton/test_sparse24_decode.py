"""The 2:4 kernels for few tokens against numpy in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.routing import decode_routing
from moe_kernels.triton_kernels.sparse24_down import sparse24_down, sparse24_down_twin
from moe_kernels.triton_kernels.sparse24_gate_up import sparse24_gate_up, sparse24_gate_up_twin

from tests.kernels.triton.problems import DTYPES, TOLERANCE, relative_error, routing_problem
from tests.kernels.triton.sparse24_problems import sparse24_problem

# Tokens, hidden, intermediate, k, splits, tokens of a tile: sizes that tiles divide, and that they do not.
SIZES = [(1, 128, 64, 1, 4, 16), (5, 72, 40, 2, 3, 8), (16, 64, 200, 3, 2, 16), (20, 136, 72, 2, 1, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden_size", "inner_size", "top_k", "splits", "block_tokens"), SIZES)
def test_both_projections(
    dtype: torch.dtype,
    tokens: int,
    hidden_size: int,
    inner_size: int,
    top_k: int,
    splits: int,
    block_tokens: int,
    device: str,
) -> None:
    slots, draw = 3, torch.Generator().manual_seed(tokens)
    index, weight, slot_map = routing_problem(tokens, 4, top_k, novices=(2,))
    hidden = torch.randn(tokens, hidden_size, generator=draw).to(dtype)
    gate_up = sparse24_problem(slots, 2 * inner_size, hidden_size, dtype, device=device)
    down = sparse24_problem(slots, hidden_size, inner_size, dtype, seed=1, device=device)
    routing = decode_routing(hidden.to(device), index.to(device), weight.to(device), slot_map.to(device), slots)
    inner = sparse24_gate_up(hidden.to(device), gate_up.tiles, routing, block_tokens=block_tokens).cpu()
    gate, up = np.split(hidden.double().numpy() @ gate_up.dense.transpose(0, 2, 1), 2, -1)
    want = gate / (1 + np.exp(-gate)) * up
    assert relative_error(sparse24_gate_up_twin(hidden.to(device), gate_up.tiles), want) < 1e-6
    chose = torch.stack([(slot_map[index] == slot).any(1) for slot in range(slots)])
    assert relative_error(inner[chose], want[chose.numpy()]) <= TOLERANCE[dtype]

    # What nobody chose was never written by the kernel before: it must not be read either.
    inner[~chose] = torch.nan
    parts = sparse24_down(inner.to(device), down.tiles, routing, splits, block_tokens=block_tokens).cpu()
    assert parts.shape == (splits, tokens, top_k, hidden_size) and parts.dtype == torch.float32
    want = inner.nan_to_num().double().numpy() @ down.dense.transpose(0, 2, 1)
    assert relative_error(sparse24_down_twin(inner.nan_to_num().to(device), down.tiles), want) < 1e-6
    got = parts.sum(0)
    for token, row in enumerate(slot_map[index].tolist()):
        for place, slot in enumerate(row):
            if slot >= 0:
                expected = weight[token, place].double().numpy() * want[slot, token]
                assert relative_error(got[token, place], expected) <= 1e-5


def test_smallest_and_largest_tiles(device: str) -> None:
    """Sizes of tiles change the order of sums, and nothing else."""
    index, weight, slot_map = routing_problem(6, 3, 2)
    hidden = torch.randn(6, 256, generator=torch.Generator().manual_seed(3)).to(device)
    tiles = sparse24_problem(3, 96, 256, device=device).tiles
    routing = decode_routing(hidden, index.to(device), weight.to(device), slot_map.to(device), 3)
    want = sparse24_gate_up_twin(hidden, tiles)
    chose = torch.stack([(slot_map[index] == slot).any(1) for slot in range(3)])
    for block_out, block_in, block_tokens in ((16, 64, 8), (32, 256, 16), (64, 128, 64)):
        got = sparse24_gate_up(hidden, tiles, routing, block_out, block_in, block_tokens)
        assert relative_error(got[chose], want[chose]) <= 1e-6
