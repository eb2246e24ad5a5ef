"""What compressions leave is read back, from this release and from earlier ones."""

import json
from pathlib import Path

import pytest

import moe_lightning as ml
from moe_lightning.callbacks import Compress
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.reporting import CompressionRecord, read_compressions
from moe_lightning.statistics import Statistics
from tests.callbacks.small_fit import batches, fit, tiny_module
from tests.reporting import run_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Compress], ModelShape]:
    """A run that compressed twice."""
    folder, module = tmp_path_factory.mktemp("run"), tiny_module()
    drop = Compress([ml.Novices(ratio=0.5, criterion="random", seed=5)], at_step=10, batches=batches(4))
    packs = Compress([ml.RTN(bits=4, group_size=16)], at_step="end")
    fit(module, folder, [drop, packs], 11)
    return folder, [drop, packs], run_data.shape_of(3, 6)


def test_records_hold_what_happened(trained: tuple[Path, list[Compress], ModelShape]) -> None:
    folder, (drop, packs), original = trained
    first, second = read_compressions(folder)
    assert (first.name, first.step, second.name, second.step) == ("compression-10", 10, "compression-end", 11)
    assert drop.result is not None and packs.result is not None
    assert first.shape_before == original
    assert first.shape_after == second.shape_before == drop.result.shape_after
    assert second.shape_after == packs.result.shape_after
    assert (first.criterion, first.seed, second.criterion, second.seed) == ("random", 5, None, 0)
    assert first.methods == ["Novices(ratio=0.5, criterion='random', seed=5)"]
    assert first.summary["seconds"] == drop.result.seconds
    assert first.statistics is not None and second.statistics is None
    assert second.plan == packs.result.plan
    assert second.modules == packs.result.modules
    assert len(second.modules["model.layers.0.mlp.experts"].matrices) == 6


def test_shapes_of_earlier_releases_are_worked_out(
    trained: tuple[Path, list[Compress], ModelShape], tmp_path: Path
) -> None:
    folder, (drop, packs), original = trained
    old = tmp_path / "results"
    old.mkdir()
    for file in (folder / "results").iterdir():
        if file.name.endswith(".json") and not file.name.endswith(".plan.json"):
            values = json.loads(file.read_text())
            for name in ("shape_before", "shape_after", "criterion", "seed", "seconds"):
                values.pop(name)
            (old / file.name).write_text(json.dumps(values))
        else:
            (old / file.name).write_bytes(file.read_bytes())
    first, second = read_compressions(tmp_path)
    assert drop.result is not None and packs.result is not None
    assert (first.shape_before, first.shape_after) == (original, drop.result.shape_after)
    assert (second.shape_before, second.shape_after) == (drop.result.shape_after, packs.result.shape_after)
    assert (first.criterion, first.seed, second.criterion) == ("random", 5, None)
    # Of still earlier ones there are only plans and statistics.
    for file in old.glob("*.json"):
        if not file.name.endswith(".plan.json"):
            file.unlink()
    bare = read_compressions(tmp_path)
    assert [record.step for record in bare] == [10, 11]
    assert bare[0].methods == ["Novices"] and bare[0].shape_after == first.shape_after


def test_steps_are_in_order_and_half_written_ones_left_out(tmp_path: Path) -> None:
    plan = CompressionPlan()
    for name in ("compression-end", "compression-200", "compression-30-2", "compression-30", "other"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{name}.plan.json").write_text(plan.to_json())
    (tmp_path / "results" / "compression-40.json").write_text("{}")
    found = read_compressions(tmp_path)
    assert [record.name for record in found] == [
        "compression-30",
        "compression-30-2",
        "compression-200",
        "compression-end",
    ]
    assert [record.step for record in found] == [30, 30, 200, None]
    assert all(record.shape_before is None and record.shape_after is None for record in found)
    assert read_compressions(tmp_path / "nothing") == []


def test_a_folder_of_the_command_compress(tmp_path: Path) -> None:
    shape = run_data.shape_of(3, 6)
    statistics = Statistics.synthetic(shape)
    plan = CompressionPlan(ml.Novices(ratio=0.5).propose(shape, statistics))
    numbers = {"model": "original", "compression": {"touched_parameters": 5, "modules": {"a": "b"}}}
    (tmp_path / "compression.json").write_text(json.dumps(numbers))
    (tmp_path / "plan.json").write_text(plan.to_json())
    statistics.save(tmp_path / "statistics.safetensors")
    (record,) = read_compressions(tmp_path)
    assert isinstance(record, CompressionRecord)
    assert (record.name, record.step, record.shape_before) == ("compression", None, shape)
    assert record.shape_after == plan.check(shape)
    assert record.summary["touched_parameters"] == 5 and record.summary["model"] == "original"
    assert record.modules["a"].status == "b"


@pytest.mark.parametrize(
    ("name", "text"), [("compression-3.json", "[1]"), ("compression-3.json", "{"), ("compression-3.plan.json", "{}")]
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "compression-3.plan.json").write_text(CompressionPlan().to_json())
    (results / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_compressions(tmp_path)
