"""The kernels for many tokens against numpy in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.grouped_down import grouped_down, grouped_down_twin
from moe_kernels.triton_kernels.grouped_gate_up import grouped_gate_up, grouped_gate_up_twin
from moe_kernels.triton_kernels.schedule import make_schedule

from tests.kernels.triton.problems import DTYPES, TOLERANCE, relative_error, routing_problem

# Tokens, hidden, intermediate, k, rows, outputs and inputs of a tile.
SIZES = [
    (33, 64, 48, 2, 16, 32, 32),
    (70, 72, 40, 3, 32, 16, 32),
    (17, 32, 64, 1, 32, 64, 32),
    (0, 32, 32, 2, 16, 16, 16),
]


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, hidden_size, inner_size, top_k, rows, outputs, inputs", SIZES)
def test_both_projections(
    dtype: torch.dtype,
    tokens: int,
    hidden_size: int,
    inner_size: int,
    top_k: int,
    rows: int,
    outputs: int,
    inputs: int,
    descriptors: bool,
    device: str,
) -> None:
    slots = 4
    index, weight, slot_map = routing_problem(tokens, 6, top_k, novices=(2, 4))
    if tokens:
        index[0, 0] = 6
    hidden = torch.randn(tokens, hidden_size).to(dtype).to(device)
    gate_up = (torch.randn(slots, 2 * inner_size, hidden_size) * hidden_size**-0.5).to(dtype).to(device)
    down = torch.randn(slots, hidden_size, inner_size).to(dtype).to(device)
    schedule = make_schedule(index.to(device), slot_map.to(device), slots, rows)
    inner = grouped_gate_up(hidden, gate_up, schedule, outputs, inputs, 2, programs=3, descriptors=descriptors)
    end = int(schedule.ends_S[-1])
    places = schedule.order_P[:end].long().cpu()
    slot = torch.where(index < 6, slot_map[index.clamp(max=5)], -9).flatten()[places]
    x = hidden.double().cpu().numpy()[places.numpy() // top_k]
    matrices = gate_up.double().cpu().numpy()[slot.numpy()]
    gate, up = np.split(np.einsum("pox,px->po", matrices, x), 2, -1)
    want = gate / (1 + np.exp(-gate)) * up
    assert relative_error(grouped_gate_up_twin(hidden, gate_up, schedule), want) < 1e-6
    assert relative_error(inner[:end], want) <= TOLERANCE[dtype]

    inner[end:] = torch.nan
    parts = grouped_down(
        inner, down, weight.to(device), schedule, outputs, inputs, 2, programs=3, descriptors=descriptors
    )
    channels = inner[:end].double().cpu().numpy()
    want = np.einsum("pox,px->po", down.double().cpu().numpy()[slot.numpy()], channels)
    want = want * weight.double().numpy().reshape(-1)[places.numpy(), None]
    twin = grouped_down_twin(inner, down, weight.to(device), schedule)
    assert parts.shape == twin.shape == (1, tokens, top_k, hidden_size)
    assert relative_error(twin.flatten(0, 2)[places], want) < 1e-6
    assert relative_error(parts.flatten(0, 2)[places], want) <= 1e-5
