"""The compiled product with int8 weights, against float64 in numpy with the codes as they are stored."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from moe_kernels import grouped_product, int4, int8
from moe_kernels.cpu_kernels import build, calls
from moe_kernels.cpu_kernels.int8 import compiled_int8_linear
from moe_kernels.int8 import ByteMatrices
from moe_kernels.machine import Int4Product, Int8Route, Machine, int8_route
from torch import Tensor

from tests.kernels.packed import draw_rows, relative_error

pytestmark = pytest.mark.skipif(
    not build.available(), reason=f"no compiled products: {build.why_not() or 'compiling failed, see the log'}"
)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
SCALES = pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float32], ids=["bf16 scales", "fp32 scales"])
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
TOLERANCE = {torch.bfloat16: 3e-3, torch.float32: 1e-6, torch.float16: 1e-3, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def kernel_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    be("kernel", monkeypatch)


@pytest.fixture
def tiles_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not the compiled product."""
    monkeypatch.setattr(ByteMatrices, "_tile", lambda *_: pytest.fail("dequantised"))


def be(product: Int4Product, monkeypatch: pytest.MonkeyPatch, bf16_over_fp32: float = 0.5) -> None:
    for module in (int4, int8):
        monkeypatch.setattr(module, "this_machine", lambda: Machine(False, product, bf16_over_fp32))


def make_bytes(
    slots: int, outputs: int, inputs: int, group: int, symmetric: bool = False, scale_type: torch.dtype = torch.bfloat16
) -> ByteMatrices:
    draw = torch.Generator().manual_seed(slots + outputs + inputs + group)
    codes = torch.randint(0, 256, (slots, outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(slots, outputs, inputs // group, generator=draw) * 0.05 + 1e-3).to(scale_type)
    zero = None if symmetric else torch.randint(0, 256, scale.shape, generator=draw, dtype=torch.uint8)
    return ByteMatrices(codes, scale, zero)


def weight_of(matrices: ByteMatrices) -> np.ndarray:
    """``(code - zero) * scale`` in float64."""
    scale = matrices.scale_SOG.double().numpy()
    group = matrices.inputs // scale.shape[-1]
    zero = 128.0 if matrices.zero_SOG is None else np.repeat(matrices.zero_SOG.double().numpy(), group, -1)
    return (matrices.codes_SOI.double().numpy() - zero) * np.repeat(scale, group, -1)


def product_of(rows: Tensor, ends: Tensor, matrices: ByteMatrices) -> np.ndarray:
    x = np.split(rows.detach().double().numpy(), ends.tolist()[:-1])
    parts = [part @ weight.T for part, weight in zip(x, weight_of(matrices), strict=True)] if len(ends) else []
    return np.concatenate(parts) if parts else np.zeros((0, matrices.outputs))


def ends_of(*counts: int) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


@pytest.mark.usefixtures("tiles_fail")
@SCALES
@SYMMETRIC
@TYPES
@pytest.mark.parametrize("counts", [(1, 0, 2), (0, 0, 5), (6, 7, 13), (0, 12, 33)], ids=str)
def test_products(counts: tuple[int, ...], dtype: torch.dtype, symmetric: bool, scale_type: torch.dtype) -> None:
    matrices, ends = make_bytes(3, 50, 256, 64, symmetric, scale_type), ends_of(*counts)
    rows = draw_rows(sum(counts), 256, dtype)
    got = grouped_product(rows, ends, matrices)
    assert got.dtype == dtype
    assert relative_error(got, product_of(rows, ends, matrices)) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("tiles_fail")
@SYMMETRIC
@TYPES
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(4, 32, 32), (9, 192, 64), (3, 384, 128), (5, 256, 256), (6, 250, 250), (7, 30, 15), (2, 96, 48), (1, 1, 1)],
)
def test_sizes_and_groups(outputs: int, inputs: int, group: int, dtype: torch.dtype, symmetric: bool) -> None:
    matrices = make_bytes(3, outputs, inputs, group, symmetric)
    ends = ends_of(3, 1, 8)
    rows = draw_rows(12, inputs, dtype)
    got = grouped_product(rows, ends, matrices)
    assert relative_error(got, product_of(rows, ends, matrices)) <= 1.5 * TOLERANCE[dtype]


@pytest.mark.usefixtures("tiles_fail")
@TYPES
def test_many_rows(dtype: torch.dtype) -> None:
    matrices, ends = make_bytes(3, 6, 2048, 2048), ends_of(300, 0, 1)
    rows = draw_rows(301, 2048, dtype)
    got, expected = grouped_product(rows, ends, matrices), product_of(rows, ends, matrices)
    for part in (slice(first, first + 43) for first in range(0, 301, 43)):
        assert relative_error(got[part], expected[part]) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("tiles_fail")
@TYPES
@pytest.mark.parametrize("number", range(1, 21))
def test_every_number_of_rows(number: int, dtype: torch.dtype) -> None:
    matrices, ends = make_bytes(1, 32, 128, 32), ends_of(number)
    rows = draw_rows(number, 128, dtype)
    got = grouped_product(rows, ends, matrices)
    for row, expected in zip(got, product_of(rows, ends, matrices), strict=True):
        assert relative_error(row, expected) <= 3 * TOLERANCE[dtype]


@TYPES
def test_threads_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large enough for threads to be at work at the same time, each in its own memory.
    matrices, ends = make_bytes(4, 300, 2048, 32), ends_of(9, 0, 31, 1)
    rows = draw_rows(41, 2048, dtype)
    alone = grouped_product(rows, ends, matrices)
    monkeypatch.setattr(calls, "_THREADS_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(grouped_product(rows, ends, matrices), alone, rtol=0, atol=0)


@TYPES
def test_a_row_depends_on_nothing_else(dtype: torch.dtype) -> None:
    matrices, ends = make_bytes(2, 34, 130, 130), ends_of(11, 19)
    rows = draw_rows(30, 130, dtype)
    both = grouped_product(rows, ends, matrices)
    for row in (0, 10):
        alone = grouped_product(rows[row : row + 1], ends_of(1, 0), matrices)
        torch.testing.assert_close(alone[0], both[row], rtol=0, atol=0)
    poisoned = rows.clone()
    poisoned[[3, 15]] = float("nan")
    got = grouped_product(poisoned, ends, matrices)
    others = [row for row in range(30) if row not in (3, 15)]
    torch.testing.assert_close(got[others], both[others], rtol=0, atol=0)
    assert got[[3, 15]].isnan().all()


@TYPES
@SYMMETRIC
def test_a_code_at_its_zero_is_nothing_at_all(symmetric: bool, dtype: torch.dtype) -> None:
    matrices = make_bytes(1, 8, 96, 32, symmetric)
    zero = 128 if matrices.zero_SOG is None else matrices.zero_SOG.repeat_interleave(32, -1)
    matrices.codes_SOI.copy_(torch.as_tensor(zero))
    assert not grouped_product(draw_rows(8, 96, dtype) * 1e30, ends_of(8), matrices).any()


@TYPES
def test_gradients_are_those_of_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, ends = make_bytes(3, 48, 128, 32), ends_of(5, 0, 7)
    rows, grad = draw_rows(12, 128, dtype).requires_grad_(), draw_rows(12, 48, dtype, seed=1)
    grads = []
    for product in get_args(Int4Product):
        be(product, monkeypatch)
        got = grouped_product(rows, ends, matrices)
        assert relative_error(got, product_of(rows, ends, matrices)) <= TOLERANCE[dtype]
        grads.extend(torch.autograd.grad(got, rows, grad))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=0)
    weight, given = weight_of(matrices), grad.double().numpy()
    wanted = np.concatenate([given[:5] @ weight[0], given[5:] @ weight[2]])
    assert relative_error(grads[0], wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.usefixtures("tiles_fail")
@pytest.mark.parametrize("why", ["no rows", "no slots", "strides", "autocast", "int64 ends"])
def test_odd_calls(why: str) -> None:
    matrices, number = make_bytes(2, 32, 64, 32), 0 if why.startswith("no ") else 6
    ends = torch.tensor([number // 2, number], dtype=torch.int64 if why == "int64 ends" else torch.int32)
    rows = draw_rows(number, 64, torch.bfloat16)
    if why == "no slots":
        matrices, ends = (
            ByteMatrices(*(part if part is None else part[:0] for part in vars(matrices).values())),
            ends[:0],
        )
    if why == "strides":
        rows = rows.repeat_interleave(2, 1)[:, ::2]
        assert not rows.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got = grouped_product(rows, ends, matrices)
    assert got.shape == (number, 32)
    assert relative_error(got, product_of(rows, ends, matrices)) <= 4e-3


@pytest.mark.parametrize("why", ["codes", "scales", "rows in half", "rows in double"])
def test_what_it_does_not_take_is_dequantised(why: str) -> None:
    matrices, ends = make_bytes(2, 32, 64, 32), ends_of(3, 4)
    codes, scale, zero = matrices.codes_SOI, matrices.scale_SOG, matrices.zero_SOG
    rows = draw_rows(7, 64, {"rows in half": torch.float16, "rows in double": torch.float64}.get(why, torch.float32))
    if why == "codes":
        codes = codes.mT.contiguous().mT
        assert not codes.is_contiguous()
    if why == "scales":
        scale = scale.half()
    matrices = ByteMatrices(codes, scale, zero)
    got = grouped_product(rows, ends, matrices)
    assert relative_error(got, product_of(rows, ends, matrices)) <= TOLERANCE[rows.dtype]
    with pytest.raises(RuntimeError, match="wants a library, and contiguous tensors of its types on the CPU"):
        compiled_int8_linear(rows, ends, codes, scale, zero, torch.empty_like(got))


@pytest.mark.parametrize("wrong", ["rows", "ends", "out", "zero"])
def test_sizes_that_do_not_fit_are_told(wrong: str) -> None:
    matrices, rows, ends, out = make_bytes(2, 32, 64, 32), draw_rows(7, 64), ends_of(3, 4), torch.empty(7, 32)
    codes, scale, zero = matrices.codes_SOI, matrices.scale_SOG, matrices.zero_SOG
    assert zero is not None
    if wrong == "zero":
        with pytest.raises(RuntimeError, match="contiguous tensors of its types"):
            compiled_int8_linear(rows, ends, codes, scale, zero[:, :1].contiguous(), out)
        return
    given = {"rows": rows, "ends": ends, "out": out}
    given[wrong] = given[wrong][..., :-1].contiguous()
    with pytest.raises(ValueError, match="do not fit one another"):
        compiled_int8_linear(given["rows"], given["ends"], codes, scale, zero, given["out"])


@pytest.mark.parametrize(
    ("machine", "rows", "inputs", "bf16", "fp32"),
    [
        (Machine(False, "op"), 1, 4096, "tiles", "tiles"),
        (Machine(True, "tiles"), 1, 4096, "tiles", "tiles"),
        (Machine(False, "kernel"), 64, 32, "kernel", "kernel"),
        (Machine(False, "kernel", 0.4), 65, 511, "tiles", "tiles"),
        (Machine(False, "kernel", 0.4), 65, 512, "kernel", "tiles"),
        (Machine(True, "kernel", 2.0), 4096, 2048, "kernel", "kernel"),
        (Machine(False, "kernel", 0.1), 63, 4096, "kernel", "kernel"),
        (Machine(False, "kernel", 0.1), 64, 4096, "tiles", "kernel"),
    ],
)
def test_the_way_of_rows(machine: Machine, rows: int, inputs: int, bf16: Int8Route, fp32: Int8Route) -> None:
    assert int8_route(rows, inputs, torch.bfloat16, machine) == bf16
    assert int8_route(rows, inputs, torch.float32, machine) == fp32
    assert {int8_route(rows, inputs, dtype, machine) for dtype in (torch.float16, torch.float64)} == {"tiles"}


def test_many_rows_of_few_inputs_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, ends = make_bytes(2, 20, 64, 32), ends_of(65, 3)
    rows = draw_rows(68, 64, torch.bfloat16)
    monkeypatch.setattr(int8, "compiled_int8_linear", lambda *_: pytest.fail("the kernel"))
    assert relative_error(grouped_product(rows, ends, matrices), product_of(rows, ends, matrices)) <= 3e-3


@pytest.fixture
def without_products_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled for a CPU that has AVX-512 and no instructions for bf16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-mno-avx512bf16"))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("without_products_in_bf16", "tiles_fail")
def test_cpus_without_products_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    found = build.library("int8")
    assert found is not None
    # Rows become fp32 there, and so do weights.
    assert found.moe_int8_scratch(10, 1024, 8, 0, 1) == found.moe_int8_scratch(10, 1024, 8, 1, 1) + 10 * 1024 * 4
    for counts in ((1, 0, 2), (6, 3, 17)):
        for inputs, group in ((256, 64), (250, 250)):
            matrices, ends = make_bytes(3, 50, inputs, group), ends_of(*counts)
            rows = draw_rows(sum(counts), inputs, torch.bfloat16)
            got = grouped_product(rows, ends, matrices)
            assert relative_error(got, product_of(rows, ends, matrices)) <= 2.5e-3
            monkeypatch.setattr(calls, "_THREADS_FROM", 0)
            monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
            torch.testing.assert_close(grouped_product(rows, ends, matrices), got, rtol=0, atol=0)
