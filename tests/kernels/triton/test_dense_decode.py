"""The dense kernels for few tokens against numpy in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.dense_down import dense_down, dense_down_twin
from moe_kernels.triton_kernels.dense_gate_up import dense_gate_up, dense_gate_up_twin
from moe_kernels.triton_kernels.routing import decode_routing

from tests.kernels.triton.problems import DTYPES, TOLERANCE, relative_error, routing_problem

# Tokens, hidden, intermediate, k, splits: sizes that tiles divide, and that they do not.
SIZES = [(1, 128, 64, 1, 4), (5, 72, 40, 2, 3), (16, 64, 200, 3, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden_size", "inner_size", "top_k", "splits"), SIZES)
def test_both_projections(
    dtype: torch.dtype, tokens: int, hidden_size: int, inner_size: int, top_k: int, splits: int, device: str
) -> None:
    slots = 3
    index, weight, slot_map = routing_problem(tokens, 4, top_k, novices=(2,))
    hidden = torch.randn(tokens, hidden_size).to(dtype)
    gate_up = (torch.randn(slots, 2 * inner_size, hidden_size) * hidden_size**-0.5).to(dtype)
    down = torch.randn(slots, hidden_size, inner_size).to(dtype)
    routing = decode_routing(hidden.to(device), index.to(device), weight.to(device), slot_map.to(device), slots)
    inner = dense_gate_up(hidden.to(device), gate_up.to(device), routing).cpu()
    gate, up = np.split(hidden.double().numpy() @ gate_up.double().numpy().transpose(0, 2, 1), 2, -1)
    want = gate / (1 + np.exp(-gate)) * up
    assert relative_error(dense_gate_up_twin(hidden, gate_up), want) < 1e-6
    chose = torch.stack([(slot_map[index] == slot).any(1) for slot in range(slots)])
    assert relative_error(inner[chose], want[chose.numpy()]) <= TOLERANCE[dtype]

    inner[~chose] = torch.nan
    parts = dense_down(inner.to(device), down.to(device), routing, splits).cpu()
    assert parts.shape == (splits, tokens, top_k, hidden_size) and parts.dtype == torch.float32
    channels = inner.nan_to_num().double()
    want = channels.numpy() @ down.double().numpy().transpose(0, 2, 1)
    assert relative_error(dense_down_twin(inner.nan_to_num(), down), want) < 1e-6
    got = parts.sum(0)
    for token, row in enumerate(slot_map[index].tolist()):
        for place, slot in enumerate(row):
            if slot >= 0:
                expected = weight[token, place].double().numpy() * want[slot, token]
                assert relative_error(got[token, place], expected) <= 1e-5
