"""The compiled product with 2:4 matrices against float64, and where it is taken."""

from typing import get_args

import numpy as np
import pytest
import torch
from moe_kernels import sparse24 as kernels
from moe_kernels import sparse24_grouped_linear, sparse24_twin
from moe_kernels.cpu_kernels import build, calls
from moe_kernels.cpu_kernels.sparse24 import compiled_sparse24_linear
from moe_kernels.machine import Machine, Sparse24Route, sparse24_route
from torch import Tensor

from tests.kernels.packed import draw_rows, relative_error
from tests.kernels.test_sparse24 import Case, make_case, product

pytestmark = pytest.mark.skipif(
    not build.available(), reason=f"no compiled products: {build.why_not() or 'compiling failed, see the log'}"
)
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
KERNEL = Machine(bf16_emulated=False, int4="kernel", bf16_over_fp32=0.5)


@pytest.fixture(autouse=True)
def kernel_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "this_machine", lambda: KERNEL)


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are spelled out."""
    monkeypatch.setattr(kernels, "Expansion", lambda *_: pytest.fail("tiles"))


@pytest.mark.usefixtures("no_tiles")
@DTYPES
@pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 0), (4, 4, 4), (0, 0, 9), (1, 2, 3), (16, 19, 36)], ids=str)
# Tails of a step, of a byte of places, and fewer outputs than are multiplied at once.
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 4), (5, 8), (3, 12), (16, 64), (7, 100), (33, 260), (4, 32), (6, 348), (9, 512)]
)
def test_products(outputs: int, inputs: int, ends: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(outputs, inputs, ends, dtype)
    got = sparse24_grouped_linear(*case[:4])
    assert got.dtype == dtype
    assert relative_error(got, product(case)) <= 2 * TOLERANCE[dtype]


@pytest.mark.usefixtures("no_tiles")
@DTYPES
@pytest.mark.parametrize("inputs", [76, 8224])
@pytest.mark.parametrize("number", range(1, 35))
def test_every_number_of_rows(number: int, inputs: int, dtype: torch.dtype) -> None:
    """Also where a single row is too long to stay in the first cache."""
    case = make_case(10, inputs, (number,), dtype)
    got = sparse24_grouped_linear(*case[:4])
    for row, expected in zip(got, product(case), strict=True):
        assert relative_error(row, expected) <= 3 * TOLERANCE[dtype]


@pytest.mark.usefixtures("no_tiles")
@DTYPES
def test_more_rows_than_pass_together(dtype: torch.dtype) -> None:
    case = make_case(5, 16384, (1, 300), dtype)
    assert relative_error(sparse24_grouped_linear(*case[:4]), product(case)) <= TOLERANCE[dtype]


@DTYPES
def test_threads_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(80, 256, (9, 9, 40), dtype)
    alone = sparse24_grouped_linear(*case[:4])
    monkeypatch.setattr(calls, "_THREADS_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(sparse24_grouped_linear(*case[:4]), alone, rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("ends", [(11, 20), (1, 20)], ids=str)
def test_a_row_depends_on_nothing_else(dtype: torch.dtype, ends: tuple[int, ...]) -> None:
    case = make_case(32, 92, ends, dtype)
    both = sparse24_grouped_linear(*case[:4])
    poisoned = [0, 15]
    case.rows[poisoned] = float("nan")
    got = sparse24_grouped_linear(*case[:4])
    others = [row for row in range(20) if row not in poisoned]
    torch.testing.assert_close(got[others], both[others], rtol=0, atol=0)
    assert got[poisoned].isnan().all()


@DTYPES
def test_inputs_that_a_weight_does_not_keep_do_not_reach_it(dtype: torch.dtype) -> None:
    """Zeros are not multiplied, so what is infinite there changes nothing: not in a tail either."""
    case = make_case(8, 44, (2,), dtype)
    expected = sparse24_grouped_linear(*case[:4])
    for place in range(44):
        rows = case.rows.clone()
        rows[:, place] = float("inf")
        got = sparse24_grouped_linear(rows, *case[1:4])
        kept = torch.from_numpy(case.weight[0, :, place] != 0)
        assert not got[:, kept].isfinite().any()
        torch.testing.assert_close(got[:, ~kept], expected[:, ~kept], rtol=0, atol=0)


@DTYPES
@pytest.mark.parametrize("trained", ["rows", "values", "both"])
def test_gradients(dtype: torch.dtype, trained: str) -> None:
    """The backward pass spells out tiles, as after any other product."""
    case = make_case(16, 64, (3, 3, 9), dtype)
    rows = case.rows.requires_grad_(trained != "values")
    values = case.values.requires_grad_(trained != "rows")
    grad = draw_rows(9, 16, dtype, seed=1)
    got = sparse24_grouped_linear(rows, case.offsets, values, case.metadata)
    assert relative_error(got, product(case)) <= 2 * TOLERANCE[dtype]
    got.backward(grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (rows, values)]
    sparse24_twin(wide[0], case.offsets, wide[1], case.metadata).backward(grad.double())
    for tensor, other in zip((rows, values), wide, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None and other.grad is not None
            assert relative_error(tensor.grad, other.grad.numpy()) <= 3 * TOLERANCE[dtype]


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the numbers of rows that the compiled product is called with."""
    seen: list[int] = []

    def watched(rows: Tensor, *arguments: Tensor) -> None:
        seen.append(len(rows))
        compiled_sparse24_linear(rows, *arguments)

    monkeypatch.setattr(kernels, "compiled_sparse24_linear", watched)
    return seen


@DTYPES
def test_many_rows_are_multiplied_with_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    monkeypatch.setattr(kernels, "sparse24_route", lambda rows, *_: "kernel" if rows <= 4 else "tiles")
    case = make_case(16, 64, (3, 3, 9, 10, 14), dtype)
    assert relative_error(sparse24_grouped_linear(*case[:4]), product(case)) <= 2 * TOLERANCE[dtype]
    assert seen == [3, 1, 4]


@pytest.mark.parametrize(
    "why", ["strides of rows", "strides of values", "another type", "wide", "offsets", "autocast", "not compiled"]
)
def test_odd_calls(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch)
    case = make_case(16, 64, (3, 3, 9), torch.float64 if why == "wide" else torch.float32)
    rows, offsets, values, metadata, _ = case
    if why == "strides of rows":
        rows = rows.repeat_interleave(2, 1)[:, ::2]
    if why == "strides of values":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    if why == "another type":
        rows = rows.bfloat16()
    if why == "offsets":
        offsets = offsets.long().repeat_interleave(2)[::2]
    if why == "not compiled":
        monkeypatch.setattr(kernels, "has_sparse24_product", lambda: False)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got = sparse24_grouped_linear(rows, offsets, values, metadata)
    assert got.dtype == rows.dtype
    assert relative_error(got, product(case)) <= (1e-2 if why == "another type" else 1e-6)
    assert seen == ([9] if why in ("strides of rows", "offsets", "autocast") else [])


def test_no_matrices() -> None:
    case = make_case(5, 8, (2, 4))
    none = torch.zeros(0, dtype=torch.int32)
    assert sparse24_grouped_linear(case.rows[:0], none, case.values[:0], case.metadata[:0]).shape == (0, 5)


@pytest.mark.parametrize("why", ["rows", "values", "metadata", "types", "type of ends"])
def test_what_the_product_does_not_take(why: str) -> None:
    rows, offsets, values, metadata, _ = make_case(4, 16, (3,))
    if why == "rows":
        rows = rows.double()
    if why == "values":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    if why == "metadata":
        metadata = metadata.transpose(1, 2).contiguous().transpose(1, 2)
    if why == "type of ends":
        offsets = offsets.long()
    if why == "types":
        values = values.bfloat16()
    with pytest.raises(RuntimeError, match="contiguous tensors of one type"):
        compiled_sparse24_linear(rows, values, metadata, offsets, torch.empty(3, 4, dtype=rows.dtype))


@pytest.mark.parametrize("wrong", range(5))
def test_sizes_that_do_not_fit(wrong: int) -> None:
    rows, offsets, values, metadata, _ = make_case(4, 16, (3,))
    tensors = [rows, values, metadata, offsets, torch.empty(3, 4)]
    tensors[wrong] = tensors[wrong].repeat_interleave(2, -1)
    with pytest.raises(ValueError, match="do not fit one another"):
        compiled_sparse24_linear(*tensors)


@pytest.fixture
def without_bf16(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A library for a CPU that does not multiply bf16 numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-mno-avx512bf16"))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("without_bf16", "no_tiles")
def test_cpus_without_products_in_bf16() -> None:
    found = build.library("sparse24")
    assert found is not None
    assert found.moe_sparse24_scratch(10, 1024, 0) == 10 * 1024 * 4 and not found.moe_sparse24_scratch(10, 1024, 1)
    cases: list[Case] = [
        make_case(outputs, inputs, ends, torch.bfloat16)
        for outputs, inputs in ((5, 8), (3, 12), (7, 100), (33, 256))
        for ends in ((1, 1, 3), (16, 19, 36))
    ]
    for case in cases:
        assert relative_error(sparse24_grouped_linear(*case[:4]), product(case)) <= 5e-3


def test_routes() -> None:
    emulated, units = Machine(True, "kernel"), Machine(False, "kernel", bf16_over_fp32=0.1)
    seen = set()
    for rows, inputs, dtype, machine, route in (
        (1, 64, torch.bfloat16, KERNEL, "kernel"),
        (256, 64, torch.bfloat16, KERNEL, "kernel"),
        (257, 1024, torch.bfloat16, KERNEL, "tiles"),
        (257, 4096, torch.bfloat16, KERNEL, "kernel"),
        (4096, 64, torch.bfloat16, emulated, "kernel"),
        (4096, 64, torch.float32, KERNEL, "kernel"),
        (1, 64, torch.float16, KERNEL, "tiles"),
        (1, 64, torch.float64, KERNEL, "tiles"),
        (64, 64, torch.bfloat16, units, "kernel"),
        (65, 4096, torch.bfloat16, units, "tiles"),
        (65, 64, torch.float32, units, "kernel"),
        (1, 64, torch.bfloat16, Machine(False, "op"), "tiles"),
    ):
        assert sparse24_route(rows, inputs, dtype, machine) == route
        seen.add(route)
    assert seen == set(get_args(Sparse24Route))


def test_sums_are_rounded_once() -> None:
    case = make_case(64, 1024, (1, 4, 20), torch.bfloat16)
    got, expected = sparse24_grouped_linear(*case[:4]), torch.from_numpy(product(case)).float().bfloat16()
    # Sums in fp32 seldom lie on the other side of a border between two bf16 numbers.
    assert np.mean((got != expected).numpy()) < 0.01
