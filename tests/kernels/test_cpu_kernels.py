"""The products that are compiled for this CPU: their form there and back exactly, what they compute, how they come."""

import functools
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_kernels import LaneMatrices, from_lanes, grouped_product, to_lanes
from moe_kernels.cpu_kernels import build, calls, lanes
from moe_kernels.cpu_kernels.dense import compiled_grouped_linear
from moe_kernels.machine import Int4Product, Machine

from tests.kernels.packed import Packed, draw_rows, make_packed, relative_error

needs_library = pytest.mark.skipif(
    not build.available(), reason=f"no compiled products: {build.why_not() or 'compiling failed, see the log'}"
)
ROOT = Path(__file__).parents[2]
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
SCALES = pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float32], ids=["bf16 scales", "fp32 scales"])
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float32: 1e-6, torch.float16: 1e-3, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def kernel_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    be("kernel", monkeypatch)


def be(product: Int4Product, monkeypatch: pytest.MonkeyPatch, bf16_over_fp32: float = 0.5) -> None:
    monkeypatch.setattr(lanes, "this_machine", lambda: Machine(False, product, bf16_over_fp32))


def converted(packed: Packed) -> LaneMatrices:
    matrices = to_lanes(*packed.stored)
    assert matrices is not None
    return matrices


@SCALES
@SYMMETRIC
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(16, 8, 8), (48, 96, 32), (80, 512, 128), (32, 40, 40)])
def test_there_and_back_exactly(
    outputs: int, inputs: int, group: int, symmetric: bool, scale_type: torch.dtype
) -> None:
    packed = make_packed(3, outputs, inputs, group, symmetric, scale_type=scale_type)
    matrices = converted(packed)
    assert (matrices.outputs, matrices.inputs) == (outputs, inputs)
    assert all(tensor is None or tensor.is_contiguous() for tensor in vars(matrices).values())
    for got, expected in zip(from_lanes(matrices), (packed.words, packed.scale, packed.zero), strict=True):
        if expected is None:
            assert got is None
        else:
            assert got is not None and got.is_contiguous() and got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "scale_type"),
    [(24, 64, 32, torch.bfloat16), (32, 60, 20, torch.bfloat16), (32, 64, 32, torch.float16)],
    ids=["outputs", "group", "scales"],
)
def test_what_it_does_not_take(outputs: int, inputs: int, group: int, scale_type: torch.dtype) -> None:
    assert to_lanes(*make_packed(2, outputs, inputs, group, scale_type=scale_type).stored) is None
    words, scale, zero, inputs = make_packed(2, 32, 64, 32).stored
    assert zero is not None and to_lanes(words.to("meta"), scale.to("meta"), zero.to("meta"), inputs) is None


@needs_library
@SCALES
@SYMMETRIC
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", [(1, 0, 2), (0, 0, 5), (16, 3, 17), (0, 40, 33), (7, 13, 0)], ids=str)
def test_products(counts: tuple[int, ...], dtype: torch.dtype, symmetric: bool, scale_type: torch.dtype) -> None:
    packed = make_packed(3, 48, 256, 64, symmetric, scale_type=scale_type)
    ends = torch.tensor(counts).cumsum(0).int()
    rows = draw_rows(sum(counts), 256, dtype)
    got = grouped_product(rows, ends, converted(packed))
    assert got.dtype == dtype
    assert relative_error(got, packed.product(rows, ends)) <= TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("number", range(1, 35))
def test_every_number_of_rows(number: int, dtype: torch.dtype) -> None:
    packed = make_packed(1, 32, 128, 32)
    rows = draw_rows(number, 128, dtype)
    got = grouped_product(rows, torch.tensor([number], dtype=torch.int32), converted(packed))
    for row, expected in zip(got, packed.product(rows, torch.tensor([number])), strict=True):
        assert relative_error(row, expected) <= 3 * TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed(3, 80, 256, 64)
    matrices, ends = converted(packed), torch.tensor([9, 9, 40], dtype=torch.int32)
    rows = draw_rows(40, 256, dtype)
    alone = grouped_product(rows, ends, matrices)
    monkeypatch.setattr(calls, "_THREADS_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(grouped_product(rows, ends, matrices), alone, rtol=0, atol=0)


@needs_library
def test_a_row_depends_on_nothing_else() -> None:
    packed = make_packed(2, 32, 128, 32)
    matrices = converted(packed)
    rows = draw_rows(20, 128, torch.float32)
    both = grouped_product(rows, torch.tensor([11, 20], dtype=torch.int32), matrices)
    poisoned = rows.clone()
    poisoned[[3, 15]] = float("nan")
    got = grouped_product(poisoned, torch.tensor([11, 20], dtype=torch.int32), matrices)
    others = [row for row in range(20) if row not in (3, 15)]
    torch.testing.assert_close(got[others], both[others], rtol=0, atol=0)
    assert got[[3, 15]].isnan().all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    packed = make_packed(3, 48, 128, 32)
    rows = draw_rows(12, 128, dtype).requires_grad_()
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    probe = draw_rows(12, 48, dtype)
    grouped_product(rows, ends, converted(packed)).backward(probe)
    weight, given = packed.weight, probe.double().numpy()
    wanted = np.concatenate([given[:5] @ weight[0], given[5:] @ weight[2]])
    assert rows.grad is not None and relative_error(rows.grad, wanted) <= 2 * TOLERANCE[dtype]


@needs_library
def test_sizes_that_do_not_fit_are_refused() -> None:
    packed = make_packed(2, 32, 64, 32)
    matrices = converted(packed)
    for rows, ends in ((draw_rows(4, 32), [2, 4]), (draw_rows(4, 64), [2, 4, 4]), (draw_rows(4, 64), [2, 6])):
        with pytest.raises(ValueError, match="fit"):
            grouped_product(rows, torch.tensor(ends, dtype=torch.int32), matrices)
    with pytest.raises(ValueError, match="leave out some"):
        grouped_product(draw_rows(4, 64), torch.tensor([2, 3], dtype=torch.int32), matrices)


@needs_library
@pytest.mark.parametrize("why", ["no rows", "no slots", "matrix units", "strides", "autocast"])
def test_odd_calls(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed(2, 32, 64, 32)
    number = {"no rows": 0, "no slots": 0, "matrix units": 70}.get(why, 6)
    rows, ends = draw_rows(number, 64, torch.bfloat16), [number // 2, number]
    matrices = converted(packed)
    if why == "no slots":
        matrices, ends = LaneMatrices(*(part if part is None else part[:0] for part in vars(matrices).values())), []
    if why == "matrix units":
        ends = [0, number]
        be("kernel", monkeypatch, bf16_over_fp32=0.1)
    if why == "strides":
        rows = rows.repeat_interleave(2, 1)[:, ::2]
        assert not rows.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got = grouped_product(rows, torch.tensor(ends, dtype=torch.int32), matrices)
    assert got.shape == (number, 32)
    if number:
        assert relative_error(got, packed.product(rows, torch.tensor(ends))) <= 4e-3


@needs_library
def test_nothing_outside_of_tensors_is_touched() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.guarded"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (found.returncode, found.stdout) == (0, "nothing outside was touched\n"), found.stderr


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own, and nothing compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "moe_kernels"
    build.library.cache_clear()


@needs_library
def test_cpus_without_products_in_bf16(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-mno-avx512bf16"))
    int4, dense = build.library("int4"), build.library("dense")
    assert int4 is not None and dense is not None
    # Rows become fp32 there: twice the memory to work in.
    assert int4.moe_int4_scratch(10, 1024, 8, 0) == int4.moe_int4_scratch(10, 1024, 8, 1)
    assert dense.moe_dense_scratch(10, 1024) == 10 * 1024 * 4
    assert not build.multiplies_pairs()
    for counts in ((1, 0, 2), (16, 3, 17)):
        packed, ends = make_packed(3, 48, 256, 64), torch.tensor(counts).cumsum(0).int()
        rows = draw_rows(sum(counts), 256, torch.bfloat16)
        got = grouped_product(rows, ends, converted(packed))
        assert relative_error(got, packed.product(rows, ends)) <= 2.5e-3
        weight = draw_rows(3 * 50, 250, torch.bfloat16).view(3, 50, 250)
        rows = rows[:, :250].contiguous()
        out = torch.empty(len(rows), 50, dtype=torch.bfloat16)
        compiled_grouped_linear(rows, weight, ends, out)
        parts = zip(rows.split(counts), weight, strict=True)
        expected = torch.cat([part.double() @ matrix.double().T for part, matrix in parts])
        assert relative_error(out, expected.numpy()) <= 2.5e-3


@needs_library
def test_is_compiled_once_and_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: build.library.__wrapped__("pairs"), range(2)))
    (kept,) = own_cache.iterdir()
    assert kept.name.startswith("pairs-") and kept.suffix == ".so" and stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.available() and len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [("false", "false failed with 1"), ("no-such-compiler --fast", None)],
    ids=["fails", "is not there"],
)
def test_a_compiler_that_fails_is_told(
    command: str,
    said: str | None,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(build.shutil, "which", lambda name: None if "no-such" in name or name != "false" else name)
    monkeypatch.setenv("CC", command)
    caplog.set_level(logging.INFO, build.logger.name)
    assert not build.available() and not build.available()
    (line,) = (record.getMessage() for record in caplog.records)
    assert (said or "there is no C compiler: install gcc or clang") in line
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_other_cpus_are_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX2 and no AVX-512" in str(build.why_not())


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary" / f"moe_kernels-{os.getuid()}"


def test_a_cache_that_others_can_write_is_not_trusted(own_cache: Path, own_temporary: Path) -> None:
    assert build.cache_folder() == own_cache
    own_cache.chmod(0o777)
    assert build.cache_folder() == own_temporary and stat.S_IMODE(own_temporary.stat().st_mode) == 0o700
    own_cache.rmdir()
    own_cache.write_text("in the way")
    assert build.cache_folder() == own_temporary
    own_temporary.chmod(0o722)
    with pytest.raises(OSError, match=r"kept nowhere: .*; .* is not this user's alone.*; set XDG_CACHE_HOME"):
        build.cache_folder()


def test_without_a_home_libraries_are_among_temporary_files(
    own_cache: Path, own_temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert build.cache_folder() == own_temporary


@needs_library
def test_a_damaged_library_is_made_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = build._compiled("pairs")
    damaged.write_bytes(b"")
    assert build.available() and damaged.stat().st_size > 1000
    assert [path.name for path in own_cache.iterdir()] == [damaged.name]


@needs_library
@pytest.mark.parametrize("why", ["quotes", "functions", "vectors"])
def test_a_compiler_can_be_anything(why: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "quotes":
        monkeypatch.setenv("CC", 'gcc "')
    elif why == "functions":
        empty = tmp_path / "empty.c"
        empty.write_text("int nothing(void) { return 0; }")
        real = build.compiler()
        monkeypatch.setattr(
            build,
            "_compile",
            lambda command, name, target: build.subprocess.run(
                [*real, "-shared", "-fPIC", str(empty), "-o", str(target)], check=True
            ),
        )
    else:
        monkeypatch.setattr(build, "_FLAGS", tuple(flag for flag in build._FLAGS if flag != "-march=native"))
    assert not build.available()
    said = {"quotes": "No closing quotation", "functions": "moe_", "vectors": "AVX-512"}
    assert said[why] in build.what_failed()


def test_the_fingerprint_holds_compiler_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    if not build.compiler():
        pytest.skip("there is no C compiler")
    fingerprint = functools.partial(build._fingerprint, build.compiler(), "pairs")
    first = fingerprint()
    assert fingerprint() == first != build._fingerprint(build.compiler(), "int4")
    monkeypatch.setattr(build, "_cpu", lambda: "another")
    assert fingerprint() != first
    monkeypatch.undo()
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert fingerprint() != first


def test_sources_are_installed_with_the_package() -> None:
    here = Path(build.__file__).parent
    sources = {f"{name}.c" for name in build.NAMES}
    assert {path.name for path in here.iterdir() if path.suffix in (".c", ".h")} == {*sources, *build.HEADERS}
    assert os.access(here / "int4.c", os.R_OK)
