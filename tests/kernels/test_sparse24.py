"""Products with 2:4 matrices in plain torch against float64 loops in numpy, and their gradients against autograd.

Those of the compiled product are in test_cpu_sparse24.py.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from moe_kernels import sparse24 as kernels
from moe_kernels import sparse24_grouped_linear, sparse24_row, sparse24_twin
from moe_kernels.machine import Machine
from moe_kernels.packing import Packed24, pack_24_kept, unpack_24
from torch import Tensor

from tests.kernels.packed import draw_rows, relative_error

# In bf16 and fp16 results are rounded, and gradients of rows once for each tile.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SIZES = pytest.mark.parametrize(("outputs", "inputs"), [(5, 8), (1, 4), (3, 12), (16, 64), (7, 100), (33, 40)])
ENDS = pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 0), (4, 4, 4), (0, 0, 9), (1, 2, 3)], ids=str)
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


class Case(NamedTuple):
    """Random matrices and rows."""

    rows: Tensor
    offsets: Tensor
    values: Tensor
    metadata: Tensor
    weight: np.ndarray
    """Spelled out by a loop over the values, float64 ``[S, O, I]``."""


def make_case(outputs: int, inputs: int, ends: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    draw = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(len(ends), outputs, inputs, generator=draw).to(dtype)
    kept = torch.rand(len(ends), outputs, inputs // 4, 4, generator=draw).argsort(-1) < 2
    packed = pack_24_kept(weight, kept.flatten(-2))
    expected = np.zeros(weight.shape)
    values, metadata = packed.values.double().numpy(), packed.metadata.numpy()
    for place in np.ndindex(*values.shape):
        group, second = divmod(place[-1], 2)
        bits = int(metadata[*place[:-1], group // 2]) >> 4 * (group % 2) >> 2 * second
        expected[*place[:-1], 4 * group + (bits & 3)] = values[place]
    offsets = torch.tensor(ends, dtype=torch.int32)
    return Case(draw_rows(ends[-1], inputs, dtype), offsets, *packed, expected)


def product(case: Case) -> np.ndarray:
    """Multiply in float64, one row after another."""
    counts = np.diff(case.offsets.numpy(), prepend=0)
    slots = np.repeat(np.arange(len(counts)), counts)
    rows = case.rows.detach().double().numpy()
    return np.array([case.weight[slot] @ row for slot, row in zip(slots, rows, strict=True)]).reshape(
        len(rows), case.weight.shape[1]
    )


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a small matrix, and a last one that is smaller; also where there is a compiled product."""
    monkeypatch.setattr(kernels, "sparse24_route", lambda *_: "tiles")
    monkeypatch.setattr(kernels, "TILE_BYTES", 600)


@DTYPES
@ENDS
@SIZES
def test_products_equal_numpy(outputs: int, inputs: int, ends: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(outputs, inputs, ends, dtype)
    got = sparse24_grouped_linear(*case[:4])
    assert got.dtype == dtype
    assert relative_error(got, product(case)) <= TOLERANCE[dtype]
    assert relative_error(sparse24_twin(*case[:4]), product(case)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@SIZES
def test_single_rows_equal_numpy(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Also of values that lie with strides, and with several tiles, of which the last is smaller."""
    monkeypatch.setattr(sparse24_row, "LOOKUPS", 24)
    case = make_case(outputs, inputs, (1,), dtype)
    strided = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (case.values, strided):
        got = torch.full((outputs,), torch.nan, dtype=dtype)
        sparse24_row.one_row_product(case.rows[0], values[0], case.metadata[0], got)
        assert relative_error(got[None], product(case)) <= TOLERANCE[dtype]


def test_single_rows_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(33, 40, (1, 1, 4, 5))
    seen: list[int] = []

    def watched(row: Tensor, *arguments: Tensor) -> None:
        seen.append(row.data_ptr())
        sparse24_row.one_row_product(row, *arguments)

    monkeypatch.setattr(sparse24_row, "_LEAST_OUTPUTS", 33)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(kernels, "one_row_product", watched)
    rows, values = case.rows.requires_grad_(), case.values.requires_grad_()
    got = sparse24_grouped_linear(rows, case.offsets, values, case.metadata)
    assert seen == [case.rows[0].data_ptr(), case.rows[4].data_ptr()]
    assert relative_error(got, product(case)) <= TOLERANCE[torch.float32]
    got.backward(draw_rows(5, 33, seed=1))
    assert rows.grad is not None and values.grad is not None
    expected = sparse24_twin(*case[:4]), (case.rows, case.values)
    wanted = torch.autograd.grad(expected[0], expected[1], draw_rows(5, 33, seed=1))
    for tensor, other in zip((rows.grad, values.grad), wanted, strict=True):
        assert relative_error(tensor, other.numpy()) <= TOLERANCE[torch.float32]


def test_when_single_rows_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert sparse24_row.one_row_pays(1, 1024, torch.bfloat16)
    assert not sparse24_row.one_row_pays(2, 1024, torch.bfloat16)
    assert not sparse24_row.one_row_pays(1, 64, torch.bfloat16)
    assert not sparse24_row.one_row_pays(1, 1024, torch.float64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not sparse24_row.one_row_pays(1, 1024, torch.bfloat16)


@DTYPES
def test_tiles_are_exact(dtype: torch.dtype) -> None:
    """All six pairs of places, also where the sign and the lowest bits of both values are set."""
    values = torch.tensor([-1, 1, 0, -2]).to(dtype).view(kernels._LANES[dtype.itemsize])
    values = (values[:, None] | values.new_tensor([1, 0, 3])).flatten().view(dtype)
    values = torch.cartesian_prod(values, values)
    nibbles = torch.tensor([4, 8, 12, 9, 13, 14]).repeat_interleave(len(values))
    pairs = values.repeat(6, 1)
    packed = Packed24(pairs.flatten()[None], (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8)[None])
    expected = unpack_24(packed)
    got = kernels.Expansion(1, expected.shape[1], dtype).tile(*packed)
    assert torch.equal(kernels.from_planes(got).view(torch.uint8), expected.view(torch.uint8))
    first, second = kernels.Expansion(1, expected.shape[1], dtype).kept(kernels.to_planes(expected), packed.metadata)
    assert torch.equal(torch.stack([first, second], -1).view(torch.uint8), pairs[None].view(torch.uint8))


@DTYPES
@ENDS
@SIZES
def test_gradients_equal_autograd(outputs: int, inputs: int, ends: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(outputs, inputs, ends, dtype)
    grad = draw_rows(ends[-1], outputs, dtype, seed=1)
    rows, values = case.rows.requires_grad_(), case.values.requires_grad_()
    sparse24_grouped_linear(rows, case.offsets, values, case.metadata).backward(grad)
    wide_rows, wide_values = (tensor.detach().double().requires_grad_() for tensor in (rows, values))
    sparse24_twin(wide_rows, case.offsets, wide_values, case.metadata).backward(grad.double())
    for got, wide in ((rows, wide_rows), (values, wide_values)):
        assert got.grad is not None and wide.grad is not None and got.grad.dtype == dtype
        if wide.grad.any():
            assert relative_error(got.grad, wide.grad.numpy()) <= TOLERANCE[dtype]
    for slot, empty in enumerate(np.diff(ends, prepend=0) == 0):
        assert not empty or not values.grad[slot].any(), "zero, not missing, where no row came"


@pytest.mark.parametrize("trained", ["rows", "values", "both"])
def test_gradient_by_differences(trained: str) -> None:
    case = make_case(5, 12, (1, 1, 4), torch.float64)
    rows = case.rows.requires_grad_(trained != "values")
    values = case.values.requires_grad_(trained != "rows")
    assert torch.autograd.gradcheck(
        lambda rows, values: sparse24_grouped_linear(rows, case.offsets, values, case.metadata), (rows, values)
    )


def test_values_of_another_type_than_the_rows() -> None:
    """As under autocast: values are rounded to the type of the rows, their gradients come in their own."""
    case = make_case(16, 64, (3, 3, 9))
    rows, values = case.rows.bfloat16().requires_grad_(), case.values.requires_grad_()
    got = sparse24_grouped_linear(rows, case.offsets, values, case.metadata)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, product(case)) <= 1e-2
    got.float().square().sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16


def test_values_that_lie_anywhere() -> None:
    case = make_case(6, 24, (2, 2, 7), torch.bfloat16)
    expected = sparse24_grouped_linear(*case[:4])
    longer = torch.cat([case.values.new_zeros(1), case.values.flatten()])
    turned = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (longer[1:].view_as(case.values), turned):
        got = sparse24_grouped_linear(case.rows, case.offsets, values, case.metadata)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("trains", [False, True])
def test_nothing_is_kept_but_what_is_there(trains: bool) -> None:
    case = make_case(32, 64, (1, 1, 3))
    rows, values = case.rows.requires_grad_(), case.values.requires_grad_(trains)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sparse24_grouped_linear(rows, case.offsets, values, case.metadata)
    known = {tensor.data_ptr() for tensor in (values, case.metadata, *([rows] if trains else []))}
    assert {tensor.data_ptr() for tensor in kept} == known


def test_matrices_that_nothing_reached_are_not_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, 8, (0, 3, 3))
    seen = []
    tile = kernels.Expansion.tile

    def watched(self: kernels.Expansion, values: Tensor, metadata: Tensor) -> Tensor:
        seen.append(values.data_ptr())
        return tile(self, values, metadata)

    monkeypatch.setattr(kernels.Expansion, "tile", watched)
    sparse24_grouped_linear(*case[:4])
    assert seen == [case.values[1].data_ptr()]


def test_no_matrices() -> None:
    case = make_case(5, 8, (2, 4))
    none = torch.zeros(0, dtype=torch.int32)
    values = case.values[:0].requires_grad_()
    got = sparse24_grouped_linear(case.rows[:0].requires_grad_(), none, values, case.metadata[:0])
    assert got.shape == (0, 5)
    got.sum().backward()
    assert values.grad is not None and values.grad.shape == (0, 5, 4)


def test_autocast_does_not_reach_inside() -> None:
    case = make_case(32, 64, (2, 2, 5))
    expected = sparse24_grouped_linear(*case[:4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse24_grouped_linear(*case[:4]), expected)


@pytest.mark.parametrize("emulated", [False, True])
def test_bf16_rows_on_both_kinds_of_machines(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    monkeypatch.setattr("moe_kernels.int4.this_machine", lambda: Machine(bf16_emulated=emulated, int4="tiles"))
    case = make_case(32, 64, (20, 20, 50), torch.bfloat16)
    rows, values = case.rows.requires_grad_(), case.values.requires_grad_()
    got = sparse24_grouped_linear(rows, case.offsets, values, case.metadata)
    assert got.dtype == torch.bfloat16
    # Rounded once where the products are in fp32.
    assert relative_error(got, product(case)) <= (3e-3 if emulated else 6e-3)
    got.backward(draw_rows(50, 32, torch.bfloat16))
    assert rows.grad is not None and values.grad is not None
    assert rows.grad.dtype == values.grad.dtype == torch.bfloat16


def test_compiled_equals_eager_without_a_break() -> None:
    case = make_case(8, 16, (2, 2, 5), torch.bfloat16)

    def run(rows: Tensor) -> Tensor:
        return sparse24_grouped_linear(rows * 2, case.offsets, case.values, case.metadata) + 1

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(case.rows)
    assert relative_error(got, run(case.rows).double().numpy()) <= TOLERANCE[torch.bfloat16]


def test_on_the_meta_device() -> None:
    rows, offsets, values, metadata, _ = make_case(8, 16, (2, 2, 5), torch.bfloat16)
    got = sparse24_grouped_linear(*(tensor.to("meta") for tensor in (rows, offsets, values, metadata)))
    assert got.shape == (5, 8) and got.device.type == "meta"
