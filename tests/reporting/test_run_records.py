"""What compressions leave is read back, from this release and from earlier ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, CompressionReport, LastCheckpoint, QualityEvaluation, RandomState
from moe_lightning.callbacks.compression_log import ABANDONED
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.reporting import CompressionRecord, read_compressions
from moe_lightning.reporting.report import Run, read, read_run, summary_text, write_report
from moe_lightning.reporting.run_records import recorded_compressions
from moe_lightning.statistics import Statistics
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
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


class Early(Callback):
    """Keep the checkpoint of step 2."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "early.ckpt")


def resumed(folder: Path, callbacks: list[Callback], path: Path | None = None, steps: int = 6) -> None:
    quality = QualityEvaluation(divergence_tokens=0, layer_tokens=0, speed=False, batches=batches(3, seed=8))
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[RandomState(), quality, *callbacks, LastCheckpoint(1)],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(tiny_module(), loader(batches(8)), ckpt_path=path, weights_only=True if path else None)


def drop(ratio: float, step: int) -> Compress:
    return Compress([ml.ExpertDrop(ratio=ratio, criterion="random")], at_step=step, batches=batches(1))


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was compressed at the steps 4 and 5, and resumed from step 2 with another method at step 3."""
    folder = tmp_path_factory.mktemp("branches")
    resumed(folder, [drop(0.25, 4), drop(0.5, 5), Early()])
    assert [record.name for record in read_compressions(folder)] == ["compression-4", "compression-5"]
    novices = Compress([ml.Novices(ratio=0.25, criterion="random")], at_step=3, batches=batches(1))
    resumed(folder, [novices], folder / "early.ckpt")
    return folder


def test_an_abandoned_branch_is_set_aside(branches: Path) -> None:
    results = branches / "results"
    assert sorted(path.name for path in results.glob("compression-*.json")) == [
        "compression-3.json",
        "compression-3.plan.json",
    ]
    moved = {path.name for path in (results / ABANDONED).iterdir()}
    assert {f"compression-{step}{end}" for step in (4, 5) for end in (".json", ".plan.json")} <= moved
    assert not [path for path in results.iterdir() if path.name.startswith(("compression-4", "compression-5"))]
    run = read_run(branches)
    assert [record.methods[0].partition("(")[0] for record in run.compressions] == ["Novices"] and not run.left_out
    assert summary_text(run).startswith("Novices at step 3 ")


@pytest.mark.parametrize("newest", ["quality", "time"])
def test_a_folder_with_two_branches_tells_of_the_models(
    branches: Path, tmp_path: Path, newest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier releases left it: the state of the run says which branch counts, or else when it was written."""
    shutil.copytree(branches, tmp_path / "run")
    results = tmp_path / "run" / "results"
    for path in (results / ABANDONED).iterdir():
        path.rename(results / path.name)
    for path in results.glob("compression-*"):
        late = path.name.startswith("compression-3") != (newest == "quality")
        os.utime(path, (1e9 + late, 1e9 + late))
    if newest == "time":
        (results / "quality.json").unlink()
    run = read_run(tmp_path / "run")
    assert [record.name for record in run.compressions] == ["compression-3"]
    assert run.left_out == ["compression-4", "compression-5"]
    monkeypatch.setattr(Run, "figures", {})
    assert "compression-4, compression-5" in write_report(run).read_text()


def test_a_fit_that_does_not_compress_again_sets_aside_too(
    branches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "run_figures", lambda *data: {})
    shutil.copytree(branches, tmp_path / "run")
    resumed(tmp_path / "run", [CompressionReport()], tmp_path / "run" / "early.ckpt", steps=4)
    assert read_run(tmp_path / "run").compressions == []
    assert (tmp_path / "run" / "results" / ABANDONED / "compression-3.plan.json").is_file()
    assert "Nothing was compressed" in (tmp_path / "run" / "report.html").read_text()


def test_compressions_that_change_nothing_stay(tmp_path: Path) -> None:
    """Their plans have the same edits, and one more entry in the history."""
    (tmp_path / "results").mkdir()
    plan = CompressionPlan()
    for step in (1, 2, 3):
        plan = plan.extended([], {"method": "Novices", "step": step})
        (tmp_path / "results" / f"compression-{step}.plan.json").write_text(plan.to_json())
        os.utime(tmp_path / "results" / f"compression-{step}.plan.json", (1e9 - step, 1e9 - step))
    found = recorded_compressions(tmp_path)
    assert [record.step for record in found.records] == [1, 2, 3] and found.left_out == []
