"""Dense products in bf16 on a CPU, and the choice between ways of multiplying."""

from typing import get_args

import pytest
import torch
from moe_kernels import cpu_dense, grouped_linear
from moe_kernels.cpu_dense import cpu_grouped_linear, cpu_product_pays
from moe_kernels.cpu_kernels import build, calls
from moe_kernels.cpu_kernels.dense import compiled_grouped_linear
from moe_kernels.machine import DenseRoute, Int4Product, Int4Route, Machine, dense_route, int4_route
from torch.autograd import forward_ad

from tests.kernels.packed import draw_rows, relative_error

NATIVE = Machine(bf16_emulated=False, int4="op")
EMULATED = Machine(bf16_emulated=True, int4="op")
KERNEL = Machine(bf16_emulated=False, int4="kernel")
KERNEL_EMULATED = Machine(bf16_emulated=True, int4="kernel")
MATRIX_UNITS = Machine(bf16_emulated=False, int4="kernel", bf16_over_fp32=0.1)
needs_library = pytest.mark.skipif(
    not build.available(), reason=f"no compiled products: {build.why_not() or 'compiling failed, see the log'}"
)


def draw_case(
    ends: tuple[int, ...], outputs: int = 40, inputs: int = 24, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    weight = draw_rows(len(ends) * outputs, inputs, dtype, seed=1).view(len(ends), outputs, inputs)
    return draw_rows(ends[-1], inputs, dtype), weight, torch.tensor(ends, dtype=torch.int32)


def in_float64(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([rows[a:b].double() @ w.double().T for a, b, w in zip(starts, ends, weight, strict=True)])


@pytest.mark.parametrize("ends", [(20, 20, 23, 40), (0, 0, 0, 9), (1, 2, 3, 4), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("tile", [1, 24 * 20, 2**20])
def test_equals_float64(monkeypatch: pytest.MonkeyPatch, ends: tuple[int, ...], tile: int) -> None:
    monkeypatch.setattr(cpu_dense, "_TILE_WEIGHTS", tile)
    monkeypatch.setattr(cpu_dense, "_TILE_ROWS", 16)
    case = draw_case(ends)
    got = cpu_grouped_linear(*case, machine=EMULATED)
    assert got.dtype == torch.bfloat16
    expected = in_float64(*case)
    assert relative_error(got, expected.numpy()) <= 3e-3
    if min(ends) > 7:  # rounded once: nothing is nearer
        torch.testing.assert_close(got, expected.float().bfloat16(), rtol=0, atol=0)


def test_the_default_device_is_not_where_tiles_go() -> None:
    case = draw_case((20, 40))
    expected = cpu_grouped_linear(*case, machine=EMULATED)
    with torch.device("meta"):
        got = cpu_grouped_linear(*case, machine=EMULATED)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_is_taken_where_bf16_is_emulated_and_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        taken.append(True)
        return cpu_grouped_linear(*arguments, machine=EMULATED)

    monkeypatch.setattr("moe_kernels.experts.cpu_grouped_linear", watched)
    rows, weight, offsets = draw_case((20, 20, 23, 40))
    expected = in_float64(rows, weight, offsets).numpy()
    for machine, trained, should in ((EMULATED, False, 1), (NATIVE, False, 0), (EMULATED, True, 0)):
        monkeypatch.setattr(cpu_dense, "this_machine", lambda machine=machine: machine)
        weight = weight.detach().requires_grad_(trained)
        got = grouped_linear(rows, weight, offsets)
        assert len(taken) == should and got.requires_grad == trained
        assert relative_error(got, expected) <= 3e-3
        taken.clear()
    with torch.no_grad():
        monkeypatch.setattr(cpu_dense, "this_machine", lambda: KERNEL)
        assert cpu_product_pays(rows, weight) and cpu_product_pays(rows[:1], weight)
        monkeypatch.setattr(cpu_dense, "this_machine", lambda: EMULATED)
        assert cpu_product_pays(rows, weight) and not cpu_product_pays(rows[:3], weight)
        assert not cpu_product_pays(rows.double(), weight.double()) and not cpu_product_pays(
            rows.to("meta"), weight.to("meta")
        )


@pytest.mark.parametrize(
    ("machine", "rows", "route"),
    [
        (NATIVE, 64, "op"),
        (NATIVE, 96, "bf16 tiles"),
        (EMULATED, 256, "op"),
        (EMULATED, 1024, "fp32 tiles"),
        (KERNEL, 1, "kernel"),
        (KERNEL, 4096, "kernel"),
        (MATRIX_UNITS, 63, "kernel"),
        (MATRIX_UNITS, 64, "bf16 tiles"),
    ],
    ids=[
        "native few",
        "native many",
        "emulated few",
        "emulated many",
        "kernel few",
        "kernel many",
        "matrix units few",
        "matrix units many",
    ],
)
def test_many_rows_are_multiplied_with_tiles(machine: Machine, rows: int, route: Int4Route) -> None:
    assert int4_route(rows, torch.bfloat16, machine) == route


@pytest.mark.parametrize(
    ("machine", "rows", "inputs", "route"),
    [
        (NATIVE, 1, 4096, "product"),
        (NATIVE, 512, 4096, "product"),
        (EMULATED, 7, 4096, "product"),
        (EMULATED, 8, 4096, "fp32 tiles"),
        (KERNEL, 1, 4096, "kernel"),
        (KERNEL, 64, 512, "kernel"),
        (KERNEL, 65, 4096, "product"),
        (KERNEL, 32, 128, "kernel"),
        (KERNEL, 33, 128, "product"),
        (KERNEL_EMULATED, 1, 4096, "product"),
        (KERNEL_EMULATED, 2, 4096, "kernel"),
        (KERNEL_EMULATED, 4096, 128, "kernel"),
        (MATRIX_UNITS, 8, 4096, "kernel"),
        (MATRIX_UNITS, 9, 4096, "product"),
    ],
)
def test_the_way_of_rows_in_bf16(machine: Machine, rows: int, inputs: int, route: DenseRoute) -> None:
    assert dense_route(rows, inputs, torch.bfloat16, machine) == route


@pytest.mark.parametrize(
    ("machine", "rows", "inputs", "route"),
    [
        (NATIVE, 1, 4096, "product"),
        (KERNEL, 1, 64, "kernel"),
        (KERNEL, 8, 128, "kernel"),
        (KERNEL, 9, 128, "product"),
        (KERNEL, 256, 4096, "kernel"),
        (KERNEL_EMULATED, 257, 14336, "product"),
    ],
)
def test_the_way_of_rows_in_fp32(machine: Machine, rows: int, inputs: int, route: DenseRoute) -> None:
    assert dense_route(rows, inputs, torch.float32, machine) == route
    assert dense_route(rows, inputs, torch.float64, machine) == "product"


@needs_library
@pytest.mark.parametrize("machine", [KERNEL, KERNEL_EMULATED], ids=["native", "emulated"])
@pytest.mark.parametrize("ends", [(1, 1, 3, 5), (0, 7, 30, 31), (20, 90, 91, 200), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (7, 65), (64, 256), (3, 1), (129, 130)])
def test_the_kernel_equals_float64(machine: Machine, ends: tuple[int, ...], outputs: int, inputs: int) -> None:
    case = draw_case(ends, outputs, inputs)
    got = cpu_grouped_linear(*case, machine=machine)
    expected = in_float64(*case)
    assert relative_error(got, expected.numpy()) <= 3e-3
    # Rounded once: nothing is nearer, where a sum does not lie between two.
    exact = expected.float().bfloat16()
    assert (got == exact).float().mean() >= 0.99 if got.numel() else True
    torch.testing.assert_close(got, exact, rtol=2**-7, atol=1e-2)


@needs_library
@pytest.mark.parametrize("ends", [(1, 1, 3, 5), (0, 7, 30, 31), (20, 90, 91, 400), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (7, 65), (64, 256), (3, 1), (129, 130)])
def test_the_kernel_in_fp32_equals_float64(ends: tuple[int, ...], outputs: int, inputs: int) -> None:
    case = draw_case(ends, outputs, inputs, torch.float32)
    got = cpu_grouped_linear(*case, machine=KERNEL)
    assert got.dtype == torch.float32 and relative_error(got, in_float64(*case).numpy()) <= 1e-6


@needs_library
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("number", range(1, 26))
def test_the_kernel_with_every_number_of_rows(number: int, dtype: torch.dtype, tolerance: float) -> None:
    rows, weight, offsets = draw_case((number,), 10, 200, dtype)
    got = torch.empty(number, 10, dtype=dtype)
    compiled_grouped_linear(rows, weight, offsets, got)
    for row, expected in zip(got, in_float64(rows, weight, offsets), strict=True):
        assert relative_error(row, expected.numpy()) <= tolerance


@needs_library
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw_case((9, 9, 40, 41), 150, 72)
    alone = cpu_grouped_linear(*case, machine=KERNEL)
    monkeypatch.setattr(calls, "_THREADS_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(cpu_grouped_linear(*case, machine=KERNEL), alone, rtol=0, atol=0)


@needs_library
def test_weights_that_do_not_lie_in_a_row_are_multiplied_otherwise() -> None:
    rows, weight, offsets = draw_case((4, 9), 32, 48)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    expected = in_float64(rows, weight, offsets).numpy()
    assert relative_error(cpu_grouped_linear(rows, turned, offsets, machine=KERNEL), expected) <= 3e-3
    spread = rows.repeat_interleave(2, 1)[:, ::2]
    assert relative_error(cpu_grouped_linear(spread, weight, offsets, machine=KERNEL), expected) <= 3e-3
    with pytest.raises(RuntimeError, match="wants a library, and contiguous tensors on the CPU"):
        compiled_grouped_linear(rows, turned, offsets, rows.new_empty(9, 32))
    with pytest.raises(RuntimeError, match="wants a library, and contiguous tensors on the CPU"):
        compiled_grouped_linear(rows.float(), weight, offsets, rows.new_empty(9, 32))
    with pytest.raises(RuntimeError, match="wants a library, and contiguous tensors on the CPU"):
        compiled_grouped_linear(rows.double(), weight.double(), offsets, rows.new_empty(9, 32).double())


@needs_library
def test_a_row_depends_on_nothing_else() -> None:
    rows, weight, offsets = draw_case((11, 30), 32, 130)
    both = cpu_grouped_linear(rows, weight, offsets, machine=KERNEL)
    poisoned = rows.clone()
    poisoned[[3, 15]] = float("nan")
    got = cpu_grouped_linear(poisoned, weight, offsets, machine=KERNEL)
    others = [row for row in range(30) if row not in (3, 15)]
    torch.testing.assert_close(got[others], both[others], rtol=0, atol=0)
    assert got[[3, 15]].isnan().all()


@needs_library
def test_sizes_that_do_not_fit_are_refused() -> None:
    rows, weight, offsets = draw_case((2, 4), 8, 64, torch.float32)
    for given in (
        (rows[:, :32].contiguous(), weight, offsets),
        (rows, weight, torch.tensor([2, 6], dtype=torch.int32)),
        (rows, weight, torch.tensor([3, 2], dtype=torch.int32)),
        (rows, weight, torch.tensor([2, 3], dtype=torch.int32)),
        (rows, torch.cat([weight, weight]), offsets),
    ):
        with pytest.raises(ValueError, match=r"fit|leave out some"):
            compiled_grouped_linear(*given, rows.new_empty(4, 8))


class Other(torch.Tensor):
    """A tensor that is not a plain one."""


@needs_library
@pytest.mark.parametrize(
    "why", ["rows of another class", "weights of another class", "negated", "forward mode", "vmap", "traced"]
)
def test_what_follows_operations_gets_those_of_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_dense, "this_machine", lambda: KERNEL)
    rows, weight, _ = draw_case((4,), 8, 64, torch.float32)
    seen = []

    def ask(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append(cpu_product_pays(x, w))
        return x

    with torch.no_grad():
        assert cpu_product_pays(rows, weight)
        if why == "rows of another class":
            ask(rows.as_subclass(Other), weight)
        elif why == "weights of another class":
            ask(rows, weight.as_subclass(Other))
        elif why == "negated":
            ask(torch._neg_view(rows), weight)
        elif why == "forward mode":
            with forward_ad.dual_level():
                ask(forward_ad.make_dual(rows, rows), weight)
        elif why == "vmap":
            torch.func.vmap(lambda row: ask(row[None], weight))(rows)
        else:
            torch.jit.trace(lambda x: ask(x, weight) * 1, rows, check_trace=False)
    assert seen == [False]


@needs_library
@pytest.mark.parametrize("rows", [4, 600])
def test_autocast_changes_nothing(rows: int) -> None:
    case = draw_case((rows,), 16, 512, torch.float32)
    expected = in_float64(*case)
    with torch.autocast("cpu", torch.bfloat16):
        got = cpu_grouped_linear(*case, machine=KERNEL)
    assert got.dtype == torch.float32 and relative_error(got, expected.numpy()) <= 1e-6


def test_every_way_is_taken_somewhere() -> None:
    machines = [Machine(emulated, product) for emulated in (False, True) for product in get_args(Int4Product)]
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    seen = {
        (dense_route(rows, 1024, dtype, machine), int4_route(rows, dtype, machine), dtype)
        for machine in machines
        for rows in (1, 8, 64, 1024)
        for dtype in types
    }
    assert {dense for dense, _, _ in seen} == set(get_args(DenseRoute))
    assert {packed for _, packed, _ in seen} == set(get_args(Int4Route))
    # Other types are multiplied as they are.
    assert {dense for dense, _, dtype in seen if dtype == torch.float32} == {"product", "kernel"}
    assert {dense for dense, _, dtype in seen if dtype not in (torch.bfloat16, torch.float32)} == {"product"}
    assert {packed for _, packed, dtype in seen if dtype == torch.float32} == {"exact tiles", "kernel"}
    assert {packed for _, packed, dtype in seen if dtype not in (torch.bfloat16, torch.float32)} == {"exact tiles"}
