"""Dense products on CPUs that only emulate bf16, and the choice between ways of multiplying."""

from typing import get_args

import pytest
import torch
from moe_kernels import grouped_linear, upcast
from moe_kernels.machine import DenseRoute, Int4Product, Int4Route, Machine, dense_route, int4_route
from moe_kernels.upcast import upcast_grouped_linear, upcast_pays

from tests.kernels.packed import draw_rows, relative_error

NATIVE = Machine(bf16_emulated=False, int4="op")
EMULATED = Machine(bf16_emulated=True, int4="op")
KERNEL = Machine(bf16_emulated=False, int4="kernel")


def draw_case(ends: tuple[int, ...], outputs: int = 40, inputs: int = 24) -> tuple[torch.Tensor, ...]:
    weight = draw_rows(len(ends) * outputs, inputs, torch.bfloat16, seed=1).view(len(ends), outputs, inputs)
    return draw_rows(ends[-1], inputs, torch.bfloat16), weight, torch.tensor(ends, dtype=torch.int32)


def in_float64(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([rows[a:b].double() @ w.double().T for a, b, w in zip(starts, ends, weight, strict=True)])


@pytest.mark.parametrize("ends", [(20, 20, 23, 40), (0, 0, 0, 9), (1, 2, 3, 4), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("tile", [1, 24 * 20, 2**20])
def test_equals_float64(monkeypatch: pytest.MonkeyPatch, ends: tuple[int, ...], tile: int) -> None:
    monkeypatch.setattr(upcast, "_TILE_WEIGHTS", tile)
    monkeypatch.setattr(upcast, "_TILE_ROWS", 16)
    case = draw_case(ends)
    got = upcast_grouped_linear(*case, machine=EMULATED)
    assert got.dtype == torch.bfloat16
    expected = in_float64(*case)
    assert relative_error(got, expected.numpy()) <= 3e-3
    if min(ends) > 7:  # rounded once: nothing is nearer
        torch.testing.assert_close(got, expected.float().bfloat16(), rtol=0, atol=0)


def test_the_default_device_is_not_where_tiles_go() -> None:
    case = draw_case((20, 40))
    expected = upcast_grouped_linear(*case, machine=EMULATED)
    with torch.device("meta"):
        got = upcast_grouped_linear(*case, machine=EMULATED)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_is_taken_where_bf16_is_emulated_and_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        taken.append(True)
        return upcast_grouped_linear(*arguments, machine=EMULATED)

    monkeypatch.setattr("moe_kernels.experts.upcast_grouped_linear", watched)
    rows, weight, offsets = draw_case((20, 20, 23, 40))
    expected = in_float64(rows, weight, offsets).numpy()
    for machine, trained, should in ((EMULATED, False, 1), (NATIVE, False, 0), (EMULATED, True, 0)):
        monkeypatch.setattr(upcast, "this_machine", lambda machine=machine: machine)
        weight = weight.detach().requires_grad_(trained)
        got = grouped_linear(rows, weight, offsets)
        assert len(taken) == should and got.requires_grad == trained
        assert relative_error(got, expected) <= 3e-3
        taken.clear()
    with torch.no_grad():
        monkeypatch.setattr(upcast, "this_machine", lambda: EMULATED)
        assert upcast_pays(rows, weight) and not upcast_pays(rows[:3], weight)
        assert not upcast_pays(rows.float(), weight.float()) and not upcast_pays(rows.to("meta"), weight.to("meta"))


@pytest.mark.parametrize(
    ("machine", "rows", "route"),
    [
        (NATIVE, 64, "op"),
        (NATIVE, 96, "bf16 tiles"),
        (EMULATED, 256, "op"),
        (EMULATED, 1024, "fp32 tiles"),
        (KERNEL, 1, "kernel"),
        (KERNEL, 4096, "kernel"),
        (Machine(False, "kernel", bf16_over_fp32=0.1), 63, "kernel"),
        (Machine(False, "kernel", bf16_over_fp32=0.1), 64, "bf16 tiles"),
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


def test_every_way_is_taken_somewhere() -> None:
    machines = [Machine(emulated, product) for emulated in (False, True) for product in get_args(Int4Product)]
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    seen = {
        (dense_route(rows, dtype, machine), int4_route(rows, dtype, machine), dtype)
        for machine in machines
        for rows in (1, 8, 64, 1024)
        for dtype in types
    }
    assert {dense for dense, _, _ in seen} == set(get_args(DenseRoute))
    assert {packed for _, packed, _ in seen} == set(get_args(Int4Route))
    # Other types are multiplied as they are.
    assert {dense for dense, _, dtype in seen if dtype != torch.bfloat16} == {"product"}
    assert {packed for _, packed, dtype in seen if dtype == torch.float32} == {"exact tiles", "kernel"}
    assert {packed for _, packed, dtype in seen if dtype not in (torch.bfloat16, torch.float32)} == {"exact tiles"}
