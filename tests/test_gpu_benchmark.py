"""``benchmarks/gpu.py`` from beginning to end, on a CPU: that it runs, checks, and refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="kernels are timed, and triton is not installed")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels were not imported for the interpreter")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@interpreted
def test_a_dry_run(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("novices 25 %", "int4 + novices 50 %"):  # seconds in the interpreter, and nothing new
        monkeypatch.delitem(gpu.FORMATS, form)
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--routings", "skewed", "--tokens", "2", "66"]) == 0
    (path,) = tmp_path.glob("gpu-*.json")
    result = json.loads(path.read_text())
    assert {"device", "torch", "triton", "transformers", "commit", "date", "ceilings", "sizes"} <= result.keys()
    found = {(row["tokens"], row["format"], row["implementation"]) for row in result["rows"]}
    ours = {(tokens, name, "ours") for tokens in (2, 66) for name in gpu.FORMATS}
    theirs = {(2, "bf16", name) for name in gpu.THEIRS} | {(66, "bf16", "eager"), (66, "bf16", "grouped_mm")}
    assert found == ours | theirs | {(tokens, "int4", "int4 loop") for tokens in (2, 66)}
    assert all(row["microseconds"] > 0 and row["relative_error"] < 1e-4 for row in result["rows"])
    assert all(
        row["share_of_floor"] * row["microseconds"] == pytest.approx(row["floor_microseconds"])
        for row in [*result["rows"], *result["training"]]
    )
    steps = {(row["tokens"], row["format"], row["implementation"]): row for row in result["training"]}
    ways = ("ours", "plain torch", "whole stack")
    assert steps.keys() == {(3, form, way) for form in ("bf16", "int4") for way in ways}
    assert all(len(row["relative_errors"]) == 7 and row["relative_error"] < 1e-4 for row in steps.values())
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(("| int4 | 2 |", "| int4 | 66 |", "| int4 | 3 |"))]
    assert len(lines) == 2 + len(ways)

    figures = pytest.importorskip("figures")
    figures.main([str(path), "--output", str(tmp_path / "drawn")])
    names = {f"{path.stem}-{name}.png" for name in ("floor", "latency", "ratios", "memory", "training")}
    assert {drawn.name for drawn in (tmp_path / "drawn").iterdir()} == {*names, f"{path.stem}.md"}
    tables = (tmp_path / "drawn" / f"{path.stem}.md").read_text().splitlines()
    assert set(lines) <= set(tables)


@interpreted
def test_wrong_outputs_are_not_timed(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"implementation": "ours", "refused": "relative error of output 2.00e-01"}

    def broken(call, form: str, real: int):
        if form == "int4":
            raise ValueError("no such kernel")
        return lambda: 1.1 * call.oracle(form, real)

    monkeypatch.setattr(gpu, "ours", broken)
    monkeypatch.setattr(gpu, "training_rows", lambda *_: [{"tokens": 1, "format": "bf16", **refused}])
    assert gpu.main(["--dry-run", "--tokens", "1", "--routings", "uniform"]) == 1
    text = capsys.readouterr().out
    assert "* ours, novices 25 %: refused: relative error 1.00e-01 (1 tokens, uniform)" in text
    assert "* ours, int4: refused: ValueError: no such kernel (1 tokens, uniform)" in text
    assert "* ours, bf16: refused: relative error of output 2.00e-01 (1 tokens)" in text
    assert "'bf16': " not in text


def test_wrong_gradients_are_not_timed(gpu: ModuleType) -> None:
    import training_step

    weights = gpu.Weights(gpu.DRY, 0)

    def without_gate(case, inputs):
        """The right output, and no gradient for the first low-rank matrix."""
        return training_step.plain_torch(
            case, inputs._replace(gate_up_reads_ERH=1 * inputs[2].detach() + 0 * inputs[2])
        )

    compared = {"right": training_step.plain_torch, "packed": training_step.packed_torch, "wrong": without_gate}
    ceilings = {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    rows = training_step.training_rows(
        weights, 20, ceilings, 1, {"dense": {**compared, "packed": training_step.whole_stack}, "int4": compared}
    )
    assert [row.get("refused") for row in rows] == 2 * [None, None, "relative error of gate_up_reads_ERH 1.00e+00"]
    # By hand: 64 x 64 x 3 weights of each expert in fp32 are read twice, and 20 rows go in and out.
    assert rows[0]["floor_microseconds"] == pytest.approx(2 * (8 * 12288 * 4 + 2 * 20 * 64 * 4) / 1e9 * 1e6)
    assert rows[0]["share_of_floor"] == pytest.approx(rows[0]["floor_microseconds"] / rows[0]["microseconds"])


def test_what_torch_does_not_take_is_not_there(gpu: ModuleType) -> None:
    import int4_loop
    import timing

    with pytest.raises(timing.Unavailable, match="torch's int4 product"):
        # Groups of 16.
        int4_loop.int4_loop(gpu.Weights(replace(gpu.DRY, group=16), 0))(torch.randn(3, 64))

    def gone():
        raise timing.Unavailable("no such product")

    assert timing.measure(gone, [], gpu.DRY, False) == {"unavailable": "no such product"}


def test_not_without_a_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run tries this script out"):
        gpu.main([])


def test_routings_and_floors(gpu: ModuleType) -> None:
    import gpu_layers

    weights = gpu.Weights(gpu.DRY, 0)
    counts = {}
    for routing in gpu.ROUTINGS:
        call = gpu.make_call(weights, 2000, routing, 0)
        index, weight = call.chosen
        torch.testing.assert_close(weight.sum(-1), torch.ones(2000))
        counts[routing] = torch.bincount(index.flatten(), minlength=8)
    assert counts["uniform"].min() > 400 and counts["uniform"].max() < 600
    assert counts["skewed"].max() > 4 * counts["skewed"].min()
    assert counts["one expert"][0] == 2000 and counts["one expert"][1:].min() > 200

    # By hand: 64 x 64 x 3 weights an expert, in fp32.
    call = gpu.make_call(weights, 1, "uniform", 0)
    ceilings = {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    assert call.floor("dense", 8, ceilings) == (pytest.approx((2 * 12288 * 4 + 2 * 64 * 4) / 1e9), "bytes")
    assert call.floor("int4", 8, ceilings)[0] == pytest.approx((2 * 12288 * (0.5 + 2.5 / 64) + 512) / 1e9)
    assert call.floor("dense", 8, {**ceilings, "flops_per_second": 1e6}) == (
        pytest.approx(2 * 2 * 12288 / 1e6),
        "operations",
    )
    assert gpu_layers.GPU.tokens == (1, 4, 16, 64, 512, 2048, 8192)


def test_the_suite_of_a_cpu(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cpu
    import figures

    assert cpu.main(["--small", "--output", str(tmp_path), "--tokens", "20", "--routings", "uniform"]) == 0
    (path,) = tmp_path.glob("cpu-bf16-*.json")
    result = json.loads(path.read_text())
    assert {"threads", "clock", "machine", "load_before", "load_after", "ceilings", "commit"} <= result.keys()
    timed = {(row["format"], row["implementation"]) for row in result["rows"] if "microseconds" in row}
    assert timed >= {(form, "ours") for form in gpu.FORMATS} | {("bf16", "eager"), ("bf16", "grouped_mm")}
    assert all(0 < row["relative_error"] < 1e-2 for row in result["rows"] if "microseconds" in row)
    steps = [(row["format"], row["implementation"]) for row in result["training"] if "microseconds" in row]
    ways = ("ours", "dequantised once", "whole stack")
    assert steps == [("bf16", "ours"), ("bf16", "whole stack"), *(("int4", way) for way in ways)]
    memory = {row["format"]: row["weight_bytes"] for row in result["rows"]}
    assert memory["novices 50 %"] == memory["bf16"] / 2 and memory["2:4"] == memory["bf16"] * 9 / 16
    # 8 experts of 3 x 64 x 64 weights: 4 bits each, and in groups of 64 a scale and a byte of zeros for each or two.
    assert memory["int4"] == 8 * 12288 * (0.5 + 3 / 64)

    capsys.readouterr()
    figures.main([str(path)])
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert "thread" in (tmp_path / f"{path.stem}.md").read_text().splitlines()[3]


def test_needs_only_torch_and_triton() -> None:
    code = (
        "import sys; import gpu; print(sorted({'datasets', 'jsonargparse', 'lightning', 'wrapt'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
