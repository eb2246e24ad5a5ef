"""int8 products in plain torch against float64 in numpy, several tiles to a matrix."""

import numpy as np
import pytest
import torch
from moe_kernels import grouped_product, int4, int8
from moe_kernels.int8 import ByteMatrices, dequantize_codes
from moe_kernels.machine import Machine

from tests.kernels.packed import draw_rows, relative_error

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(5, 7, 7), (1, 1, 1), (37, 30, 15), (16, 64, 32)])
def test_products_and_gradients_equal_numpy(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(int4, "TILE_WEIGHTS", 16)
    monkeypatch.setattr(int8, "this_machine", lambda: Machine(False, "tiles"))
    draw = torch.Generator().manual_seed(outputs)
    codes = torch.randint(0, 256, (3, outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(3, outputs, inputs // group, generator=draw) * 0.05 + 1e-3).bfloat16()
    zero = None if symmetric else torch.randint(0, 256, scale.shape, generator=draw, dtype=torch.uint8)
    shift = 128.0 if zero is None else np.repeat(zero.double().numpy(), group, -1)
    weight = (codes.double().numpy() - shift) * np.repeat(scale.double().numpy(), group, -1)
    given = 128 if zero is None else zero
    np.testing.assert_array_equal(dequantize_codes(codes, scale, given, torch.float64).numpy(), weight)

    rows, grad = draw_rows(7, inputs, dtype).requires_grad_(), draw_rows(7, outputs, dtype, seed=1)
    got = grouped_product(rows, torch.tensor([2, 2, 7], dtype=torch.int32), ByteMatrices(codes, scale, zero))
    got.backward(grad)
    x, g = rows.detach().double().numpy(), grad.double().numpy()
    assert got.dtype == dtype
    assert relative_error(got, np.concatenate([x[:2] @ weight[0].T, x[2:] @ weight[2].T])) <= TOLERANCE[dtype]
    assert rows.grad is not None and rows.grad.dtype == dtype
    assert relative_error(rows.grad, np.concatenate([g[:2] @ weight[0], g[2:] @ weight[2]])) <= TOLERANCE[dtype]
