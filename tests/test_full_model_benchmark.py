"""``benchmarks/full_model.py``: that it runs, compares, and makes the models that it says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moe_lightning as ml

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def full_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("full_model")


def test_a_dry_run(full_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["base", "B5/32 + int4", "novices 25 %"]
    assert full_model.main(["--dry-run", "--output", str(tmp_path), "--variants", *variants]) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("full-model-cpu-*.json")
    written = json.loads(path.read_text())
    assert list(written["models"]) == variants and written["context"]["in_turn"]
    rows = {
        (row["model"], row["implementation"], row["phase"], row["batch"], row["context"]): row
        for row in written["rows"]
    }
    cells = {("prefill", 1, 16), ("decode", 1, 8), ("decode", 2, 8)}
    ours = {(variant, "moe_lightning", *cell) for variant in variants for cell in cells}
    assert rows.keys() == ours | {("base", name, *cell) for name in ("eager", "grouped_mm") for cell in cells}
    assert all(row["refused"] is None and row["relative_error"] < 1e-5 for row in rows.values())
    lines = [line for line in printed.splitlines() if line.startswith("| base, eager |")]
    assert len(lines) == 1 and "| 87.7 |" in lines[0] and lines[0].count(", 1.00, ") == 3
    assert set(lines) <= set(path.with_suffix(".md").read_text().splitlines())


def test_one_at_a_time_where_memory_is_short(
    full_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    random_model = full_model.random_model
    largest = 6_500_000  # bytes of the tiny base, and a little

    def note(*arguments: object) -> object:
        made.append("")
        return random_model(*arguments)

    monkeypatch.setattr(full_model, "random_model", note)
    monkeypatch.setattr(full_model, "free_bytes", lambda _: 2 * largest)
    assert full_model.main(["--dry-run", "--variants", "base", "novices 25 %"]) == 0
    assert "one model at a time" in capsys.readouterr().out and len(made) == 2
    monkeypatch.setattr(full_model, "free_bytes", lambda _: largest)
    with pytest.raises(SystemExit, match="do not fit into 0 GiB: try --scale 16"):
        full_model.main(["--dry-run", "--variants", "base"])
    with pytest.raises(SystemExit, match="--scale 5: give 1, 4, 16"):
        full_model.main(["--scale", "5"])


def test_what_does_not_compute_what_it_holds_is_refused(
    full_model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model = full_model.random_model

    def broken(*arguments: object) -> object:
        model = random_model(*arguments)
        model.model.layers[3].mlp.register_forward_hook(lambda _m, _a, output: 1.1 * output)
        return model

    monkeypatch.setattr(full_model, "random_model", broken)
    assert full_model.main(["--dry-run", "--variants", "novices 25 %"]) == 1
    assert "prefill is wrong: layer 3: off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "gibibytes"),
    [("base", 86.99), ("E2/8", 65.99), ("L8/32", 65.99), ("B5/32", 73.47), ("novices 25 %", 65.99), ("int4", 24.81)],
)
def test_sizes_of_the_papers_models(full_model: ModuleType, variant: str, gibibytes: float) -> None:
    """Of int4: 45.1 billion weights of experts with 4 bits, and 20 bits for each 128; the others take two bytes."""
    config, plan = full_model.config_of(1, 32, 4096), full_model.plan_of_variant(variant, 32, 128)
    with torch.device("meta"):
        model = full_model.build(config, plan).to(torch.bfloat16)
    assert round(ml.measure(model).bytes / 2**30, 2) == gibibytes


def test_random_weights_are_the_same_each_time_and_of_one_size(full_model: ModuleType) -> None:
    config, plan = full_model.config_of(4096, 2, 32), full_model.plan_of_variant("int4", 2, 32)
    first, second = (full_model.random_model(config, plan, torch.device("cpu"), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    dense = full_model.random_model(config, ml.CompressionPlan(), torch.device("cpu"), torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        packed = getattr(first.model.layers[0].mlp.experts.storage, name).dense(torch.float32)
        plain = getattr(dense.model.layers[0].mlp.experts, name)
        assert float(packed.std() / plain.std()) == pytest.approx(1.0, abs=0.1)
    # Frequencies are not rounded with the weights.
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32


def test_needs_neither_data_sets_nor_a_command_line() -> None:
    code = "import sys; import full_model; print(sorted({'datasets', 'jsonargparse', 'lightning'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
