"""int4 products in plain torch against float64 loops in numpy, and their gradients against autograd of dense ones."""

import numpy as np
import pytest
import torch
from moe_kernels import WordMatrices, dequantize_int4, grouped_product, int4_grouped_linear
from moe_kernels import int4 as kernels
from moe_kernels.machine import Machine

from tests.kernels.packed import draw_rows, make_packed, relative_error

# In bf16 weights and results are rounded: 2.3e-3 together on larger matrices, twice that where a few numbers cancel.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3}
SIZES = pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(5, 7, 7), (1, 1, 1), (3, 30, 15), (16, 64, 32), (7, 192, 64), (9, 128, 128), (33, 40, 8)],
)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a small matrix, and a last one that is smaller."""
    monkeypatch.setattr(kernels, "TILE_WEIGHTS", 16)


@SYMMETRIC
@SIZES
def test_weights_equal_numpy(outputs: int, inputs: int, group: int, symmetric: bool) -> None:
    packed = make_packed(3, outputs, inputs, group, symmetric)
    # Exact: a scale of 8 bits times a number of 4.
    np.testing.assert_array_equal(dequantize_int4(*packed.stored, torch.float32).double().numpy(), packed.weight)
    rounded = torch.from_numpy(packed.weight).bfloat16()
    torch.testing.assert_close(dequantize_int4(*packed.stored, torch.bfloat16), rounded, rtol=0, atol=0)


def test_weights_are_rounded_once() -> None:
    packed = make_packed(1, 64, 64, 32, scale_type=torch.float32)
    got = dequantize_int4(*packed.stored, torch.float64)
    np.testing.assert_array_equal(got.numpy(), packed.weight)
    narrow = dequantize_int4(*packed.stored, torch.float32)
    np.testing.assert_array_equal(narrow.numpy(), packed.weight.astype(np.float32))


def test_groups_that_do_not_divide_the_inputs() -> None:
    packed = make_packed(1, 4, 12, 4)
    with pytest.raises(ValueError, match="3 groups do not divide 10 inputs"):
        dequantize_int4(packed.words, packed.scale, packed.zero, 10, torch.float32)


@SYMMETRIC
@SIZES
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 0), (4, 4, 4), (0, 0, 9)], ids=str)
def test_products_equal_numpy(
    outputs: int, inputs: int, group: int, symmetric: bool, dtype: torch.dtype, ends: tuple[int, ...]
) -> None:
    packed = make_packed(3, outputs, inputs, group, symmetric)
    offsets = torch.tensor(ends, dtype=torch.int32)
    rows = draw_rows(ends[-1], inputs, dtype)
    got = int4_grouped_linear(rows, offsets, *packed.stored)
    assert got.dtype == dtype
    assert relative_error(got, packed.product(rows, offsets)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@SYMMETRIC
def test_gradient_equals_that_of_dense_weights(dtype: torch.dtype, symmetric: bool) -> None:
    packed = make_packed(3, 21, 24, 8, symmetric)
    offsets = torch.tensor([4, 4, 11], dtype=torch.int32)
    rows = draw_rows(11, 24, dtype).requires_grad_()
    grad = draw_rows(11, 21, dtype, seed=1)
    int4_grouped_linear(rows, offsets, *packed.stored).backward(grad)
    wide = rows.detach().double().requires_grad_()
    weight = torch.from_numpy(packed.weight)
    torch.cat([wide[:4] @ weight[0].T, wide[4:] @ weight[2].T]).backward(grad.double())
    assert rows.grad is not None and wide.grad is not None and rows.grad.dtype == dtype
    assert relative_error(rows.grad, wide.grad.numpy()) <= TOLERANCE[dtype]


def test_gradient_by_differences() -> None:
    packed = make_packed(2, 5, 6, 3)
    rows = draw_rows(4, 6, torch.float64).requires_grad_()
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda rows: int4_grouped_linear(rows, offsets, *packed.stored), (rows,))


def test_no_rows_have_a_gradient_too() -> None:
    packed = make_packed(2, 5, 6, 3)
    rows = torch.zeros(0, 6, requires_grad=True)
    int4_grouped_linear(rows, torch.zeros(2, dtype=torch.int32), *packed.stored).sum().backward()
    assert rows.grad is not None and rows.grad.shape == (0, 6)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    packed = make_packed(2, 32, 64, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        int4_grouped_linear(draw_rows(3, 64).requires_grad_(), torch.tensor([1, 3], dtype=torch.int32), *packed.stored)
    assert not kept


def test_autocast_does_not_reach_inside() -> None:
    packed = make_packed(2, 32, 64, 32)
    rows, offsets = draw_rows(5, 64), torch.tensor([2, 5], dtype=torch.int32)
    expected = int4_grouped_linear(rows, offsets, *packed.stored)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(int4_grouped_linear(rows, offsets, *packed.stored), expected, rtol=0, atol=0)


@pytest.mark.parametrize("emulated", [False, True])
def test_bf16_rows_on_both_kinds_of_machines(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    monkeypatch.setattr(kernels, "this_machine", lambda: Machine(bf16_emulated=emulated, int4="tiles"))
    packed = make_packed(2, 32, 64, 32)
    rows, offsets = draw_rows(50, 64, torch.bfloat16).requires_grad_(), torch.tensor([20, 50], dtype=torch.int32)
    got = int4_grouped_linear(rows, offsets, *packed.stored)
    assert got.dtype == torch.bfloat16 and kernels.tile_type(rows) == (torch.float32 if emulated else torch.bfloat16)
    assert relative_error(got, packed.product(rows, offsets)) <= TOLERANCE[torch.bfloat16]
    got.backward(draw_rows(50, 32, torch.bfloat16))
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16


def test_compiled_equals_eager() -> None:
    packed = make_packed(2, 16, 32, 32)
    rows, offsets = draw_rows(5, 32), torch.tensor([2, 5], dtype=torch.int32)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return grouped_product(rows * 2, offsets, WordMatrices(*packed.stored)) + 1

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(rows), run(rows))
