"""The layout of torch's int4 product on a CPU: there and back exactly, and the products of every way it can take."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from moe_kernels import CpuMatrices, cpu_layout, from_cpu_layout, grouped_product, int4, to_cpu_layout
from moe_kernels.machine import Machine
from moe_kernels.packing import pack_int4

from tests.kernels.packed import Packed, draw_rows, make_packed, relative_error

OUTPUTS = pytest.mark.parametrize("outputs", [16, 32, 48, 64, 80, 112, 4096])
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
NATIVE = Machine(bf16_emulated=False, int4="op")
EMULATED = Machine(bf16_emulated=True, int4="op")
WITHOUT = Machine(bf16_emulated=False, int4="tiles")


def torch_packs() -> bool:
    try:
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(16, 32, dtype=torch.int32), 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


# Where it does, a layout that is not understood is a failure.
pytestmark = pytest.mark.skipif(not torch_packs(), reason="torch has no int4 product for this CPU")


def converted(packed: Packed) -> CpuMatrices:
    matrices = to_cpu_layout(*packed.stored)
    assert matrices is not None
    return matrices


def be(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (int4, cpu_layout):
        monkeypatch.setattr(module, "this_machine", lambda: machine)


@SYMMETRIC
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
@OUTPUTS
def test_there_and_back_exactly(outputs: int, group: int, symmetric: bool) -> None:
    packed = make_packed(1 if outputs > 1000 else 3, outputs, 512, group, symmetric)
    matrices = converted(packed)
    assert (matrices.outputs, matrices.inputs, matrices.group) == (outputs, 512, min(group, 256))
    words, scale, zero = from_cpu_layout(matrices, 512 // group, symmetric)
    for got, expected in ((words, packed.words), (scale, packed.scale), (zero, packed.zero)):
        if expected is None:
            assert got is None
        else:
            assert got is not None and got.is_contiguous() and got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@OUTPUTS
def test_large_groups_are_cut(outputs: int) -> None:
    packed = make_packed(1, outputs, 1024, 512)
    matrices = converted(packed)
    assert matrices.group == 256
    for got, expected in zip(from_cpu_layout(matrices, 2, False), packed.stored[:3], strict=True):
        assert got is not None and expected is not None and torch.equal(got, expected)
    rows, offsets = draw_rows(3, 1024), torch.tensor([3], dtype=torch.int32)
    assert relative_error(grouped_product(rows, offsets, matrices), packed.product(rows, offsets)) <= 1e-6


@OUTPUTS
def test_layout_is_that_of_torch(outputs: int) -> None:
    """On sizes that the probe has not seen."""
    packed = make_packed(1, outputs, 160, 32)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(packed.codes[0]).int(), 1)
    torch.testing.assert_close(converted(packed).packed_SOB[0], expected.view(outputs, -1), rtol=0, atol=0)


@SYMMETRIC
@pytest.mark.parametrize("machine", [NATIVE, EMULATED, WITHOUT], ids=str)
@pytest.mark.parametrize(("outputs", "group"), [(16, 32), (80, 64), (112, 256), (192, 128), (256, 512)])
@pytest.mark.parametrize("ends", [(1, 1, 5), (0, 140, 200), (0, 0, 0), (60, 60, 60)], ids=str)
def test_products_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
    outputs: int,
    group: int,
    symmetric: bool,
    ends: tuple[int, ...],
) -> None:
    be(machine, monkeypatch)
    monkeypatch.setattr(cpu_layout, "TILE_WEIGHTS", 2**15)
    packed = make_packed(3, outputs, 512, group, symmetric)
    offsets = torch.tensor(ends, dtype=torch.int32)
    rows = draw_rows(ends[-1], 512, torch.bfloat16)
    got = grouped_product(rows, offsets, converted(packed))
    assert got.dtype == torch.bfloat16
    assert relative_error(got, packed.product(rows, offsets)) <= 3e-3


@pytest.mark.parametrize("zero", [0, 8, 15])
def test_products_where_all_zeros_are_far_from_the_middle(zero: int) -> None:
    """What torch adds is rounded to bf16: at its worst where the zero is 0 or 15."""
    packed = make_packed(1, 64, 512, 128)
    packed.zeros[:] = zero
    packed.zero = pack_int4(torch.full(packed.scale.shape, zero, dtype=torch.uint8), torch.uint8)
    rows, offsets = draw_rows(4, 512, torch.bfloat16), torch.tensor([4], dtype=torch.int32)
    assert relative_error(grouped_product(rows, offsets, converted(packed)), packed.product(rows, offsets)) <= 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@SYMMETRIC
def test_other_types_and_gradients_are_exact(dtype: torch.dtype, symmetric: bool) -> None:
    packed = make_packed(2, 112, 256, 64, symmetric)
    rows, offsets = draw_rows(9, 256, dtype).requires_grad_(), torch.tensor([3, 9], dtype=torch.int32)
    got = grouped_product(rows, offsets, converted(packed))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert relative_error(got, packed.product(rows, offsets)) <= tolerance
    grad = draw_rows(9, 112, dtype, seed=1)
    got.backward(grad)
    weight = torch.from_numpy(packed.weight)
    expected = torch.cat([grad[:3].double() @ weight[0], grad[3:].double() @ weight[1]])
    assert rows.grad is not None and relative_error(rows.grad, expected.numpy()) <= tolerance


@pytest.mark.parametrize("number", [3, 100])
@pytest.mark.parametrize("machine", [NATIVE, EMULATED], ids=str)
def test_gradient_in_bf16(monkeypatch: pytest.MonkeyPatch, machine: Machine, number: int) -> None:
    be(machine, monkeypatch)
    packed = make_packed(1, 80, 128, 32)
    rows = draw_rows(number, 128, torch.bfloat16).requires_grad_()
    grad = draw_rows(number, 80, torch.bfloat16, seed=1)
    grouped_product(rows, torch.tensor([number], dtype=torch.int32), converted(packed)).backward(grad)
    expected = grad.double().numpy() @ packed.weight[0]
    assert rows.grad is not None and relative_error(rows.grad, expected) <= 3e-3


@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "scale_type"),
    [
        (24, 64, 32, torch.bfloat16),
        (16, 64, 16, torch.bfloat16),
        (16, 192, 96, torch.bfloat16),
        (16, 64, 32, torch.float32),
        (16, 64, 32, torch.float16),
    ],
)
def test_what_torch_does_not_take_stays_as_it_is(
    outputs: int, inputs: int, group: int, scale_type: torch.dtype
) -> None:
    assert to_cpu_layout(*make_packed(2, outputs, inputs, group, scale_type=scale_type).stored) is None


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_scales_that_lose_the_zeros_stay_as_they_are(scale: float) -> None:
    packed = make_packed(2, 16, 64, 32)
    packed.scale[1, 3, 1] = scale
    assert to_cpu_layout(*packed.stored) is None


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda packed: packed.flip(0),
        lambda packed: packed ^ 1,
        lambda packed: packed.unflatten(0, (-1, 32)).flip(0).flatten(),
    ],
    ids=["order", "codes", "inputs"],
)
def test_a_layout_that_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch, shuffle) -> None:
    honest = cpu_layout._packed_by_torch
    monkeypatch.setattr(cpu_layout, "_packed_by_torch", lambda codes: shuffle(honest(codes)))
    assert cpu_layout.cpu_layout.__wrapped__(64) is None


def test_without_torchs_product_there_is_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(codes: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such op")

    monkeypatch.setattr(cpu_layout, "_packed_by_torch", missing)
    assert cpu_layout.cpu_layout.__wrapped__(64) is None


@pytest.mark.parametrize("rows_of_block", [16, 32, 64])
@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
def test_there_and_back_with_blocks_as_other_machines_have_them(
    rows_of_block: int, neighbours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of two rows half a block apart (vector units), or of two neighbours (none), and a smaller last block."""

    def packed_elsewhere(codes: torch.Tensor) -> torch.Tensor:
        out = []
        for first in range(0, codes.shape[0], rows_of_block):
            block = codes[first : first + rows_of_block].tolist()
            half = len(block) // 2
            pairs = [(2 * d, 2 * d + 1) if neighbours else (d, d + half) for d in range(half)]
            out += [block[low][i] | block[high][i] << 4 for i in range(codes.shape[1]) for low, high in pairs]
        return torch.tensor(out, dtype=torch.uint8)

    monkeypatch.setattr(cpu_layout, "_packed_by_torch", packed_elsewhere)
    monkeypatch.setattr(cpu_layout, "cpu_layout", functools.cache(cpu_layout.cpu_layout.__wrapped__))
    for outputs in (16, 48, 80, 128):
        packed = make_packed(2, outputs, 64, 32)
        matrices = converted(packed)
        expected = packed_elsewhere(torch.from_numpy(packed.codes[1]))
        torch.testing.assert_close(matrices.packed_SOB[1].flatten(), expected, rtol=0, atol=0)
        for got, stored in zip(from_cpu_layout(matrices, 2, False), packed.stored[:3], strict=True):
            assert got is not None and stored is not None and torch.equal(got, stored)
        rows, offsets = draw_rows(3, 64), torch.tensor([1, 3], dtype=torch.int32)
        assert relative_error(grouped_product(rows, offsets, matrices), packed.product(rows, offsets)) <= 1e-6


OTHER_WIDTH = """
import torch
from moe_kernels import from_cpu_layout, to_cpu_layout
from tests.kernels.packed import make_packed
for outputs in (16, 48, 80, 128):
    packed = make_packed(2, outputs, 64, 32)
    words, scale, zero = from_cpu_layout(to_cpu_layout(*packed.stored), 2, False)
    assert torch.equal(words, packed.words) and torch.equal(scale, packed.scale) and torch.equal(zero, packed.zero)
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
def test_there_and_back_with_another_vector_width() -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", OTHER_WIDTH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
