"""collect, then plan: what would be decided, without the model; and the plan is what compress then does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_lightning as ml
from moe_lightning.cli import collect as collect_command
from moe_lightning.cli import plan as plan_command
from moe_lightning.cli.compress import main as compress_main
from moe_lightning.plan import CompressionPlan
from moe_lightning.surgery import plan_of
from tests.small_checkpoints import write_checkpoint

NOVICES = "[{class_path: Novices, init_args: {ratio: 0.5, criterion: residual, scope: global, novice: gate2_mean}}]"
DROP = "[{class_path: ExpertDrop, init_args: {keep: 4}}]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    data = write_checkpoint(folder)
    (folder / "data.yaml").write_text("data:\n" + "".join(f"  {name}: {value}\n" for name, value in data.items()))
    assert collect(folder, "--output", str(folder / "all.safetensors"), "--needs", "routing,outputs,pairs,layers") == 0
    assert collect(folder, "--output", str(folder / "routing.safetensors"), "--needs", "routing") == 0
    return folder


def status(run: Any, arguments: list[str]) -> int:
    try:
        return run(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def collect(place: Path, *arguments: str) -> int:
    given = ["-c", str(place / "data.yaml"), "--model", str(place / "hub"), *arguments]
    return status(collect_command.main, given)


def plan(place: Path, *arguments: str, statistics: str = "all") -> int:
    return status(plan_command.main, ["--statistics", str(place / f"{statistics}.safetensors"), *arguments])


def test_collect_writes_what_collect_measures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ml.Statistics.load(place / "all.safetensors")
    assert saved.groups == {"routing", "outputs", "pairs", "layers"}
    data = ml.TextDataModule(**data_options(place), tokenizer=str(place / "hub")).prepare()
    again = ml.collect(ml.from_pretrained(place / "hub"), data.calibration_batches(), saved.groups, progress=False)
    assert saved.tensors.keys() == again.tensors.keys()
    assert all(saved[name].equal(again[name]) for name in ("count", "gate_sum", "output_m2", "moe_cosine_sum"))
    assert saved.info["base_model"] == str(place / "hub")
    assert saved.info["data"]["fingerprint"] == data.describe()["fingerprint"]
    assert collect(place, "--output", str(place / "all.safetensors")) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert (
        collect(place, "--output", str(place / "all.safetensors"), "--overwrite", "--needs", "[routing,outputs]") == 0
    )
    assert "memory   about" in capsys.readouterr().out
    saved.save(place / "all.safetensors")


def data_options(place: Path) -> dict[str, Any]:
    return yaml.safe_load((place / "data.yaml").read_text())["data"]


@pytest.mark.parametrize("methods", [NOVICES, DROP])
def test_the_plan_is_what_compress_decides(
    methods: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By methods on the model, and by the plan made without it: the same edits, the same weights."""
    assert plan(place, "--methods", methods, "--output", str(tmp_path / "plan.json")) == 0
    printed = capsys.readouterr().out
    planned = CompressionPlan.from_json((tmp_path / "plan.json").read_text())
    common = ["-c", str(place / "data.yaml"), "--model", str(place / "hub")]
    assert compress_main([*common, "--output", str(tmp_path / "one"), "--methods", methods]) == 0
    assert compress_main([*common, "--output", str(tmp_path / "two"), "--plan", str(tmp_path / "plan.json")]) == 0
    one, two = ml.from_pretrained(tmp_path / "one"), ml.from_pretrained(tmp_path / "two")
    done = CompressionPlan.from_json((tmp_path / "one" / "plan.json").read_text())
    assert planned == done
    assert len(planned.steps()) == 1
    assert planned.origin["history"][0]["method"] == done.origin["history"][0]["method"]
    assert planned.origin["history"][0]["calibration"]["base_model"] == str(place / "hub")
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert plan_of(two) in (planned, CompressionPlan())  # a plain Mixtral needs no plan
    original = ml.from_pretrained(place / "hub")
    before, after = ml.measure(original), ml.measure(one, routed_share=novice_shares(place, plan_of(one)))
    assert f"parameters {before.parameters:,} -> {after.parameters:,}" in printed
    assert f"bytes      {before.bytes:,} -> {after.bytes:,}" in printed
    assert f"FLOPs      {before.flops:,} -> {after.flops:,}" in printed
    assert "agreement of criteria" in printed


def novice_shares(place: Path, plan: CompressionPlan) -> list[float]:
    """Return the share of the routed pairs that went to what are novices now, layer by layer."""
    statistics = ml.Statistics.load(place / "all.safetensors")
    shares = []
    for row, layout in enumerate(plan.check(statistics.shape).layouts):
        count = statistics["count"][row, list(layout.router)]
        novices = [layout.router.index(expert) for expert in layout.novices]
        shares.append(float(count[novices].sum() / count.sum()))
    return shares


def test_sections_of_the_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(place, "--methods", DROP, "--criteria", "mone,power:1,1,1,reap") == 0
    printed = capsys.readouterr().out
    assert "approximate: their outputs as zero" in printed
    assert "1.00 / 100%" in printed  # power:1,1,1 is reap
    low_rank = "[{class_path: Novices, init_args: {ratio: 0.5, novice: low_rank, rank: 2}}]"
    assert plan(place, "--methods", low_rank) == 0
    assert "low-rank fit not in the file" in capsys.readouterr().out
    assert plan(place, "--methods", "[{class_path: LayerDrop, init_args: {count: 1}}]") == 0
    printed = capsys.readouterr().out
    assert "100.00%" in printed
    assert "6->0" in printed


def test_a_second_method_that_needs_nothing_may_follow(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = "{class_path: ExpertDrop, init_args: {keep: 3, criterion: random}}"
    methods = f"[{{class_path: LayerDrop, init_args: {{count: 1}}}}, {random}]"
    assert plan(place, "--methods", methods, "--output", str(tmp_path / "plan.json")) == 0
    planned = CompressionPlan.from_json((tmp_path / "plan.json").read_text())
    assert [step.origin["method"] for step in planned.steps()] == ["LayerDrop", "ExpertDrop"]
    assert "not measured after the first method" in capsys.readouterr().out


def test_statistics_of_a_compressed_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ml.from_pretrained(place / "hub")
    ml.compress(model, [], ml.ExpertDrop(keep=5, criterion="random"), progress=False)
    ml.save_pretrained(model, tmp_path / "small", place / "hub", format="native")
    given = ["-c", str(place / "data.yaml"), "--model", str(tmp_path / "small")]
    assert collect_command.main([*given, "--output", str(tmp_path / "small.safetensors")]) == 0
    statistics = ["--statistics", str(tmp_path / "small.safetensors"), "--methods", DROP]
    assert plan_command.main(statistics) == 0
    assert "5->4" in capsys.readouterr().out
    assert plan_command.main([*statistics, "--output", str(tmp_path / "plan.json")]) == 2
    assert "compressed already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "statistics", "message"),
    [
        (["--methods", "[]"], "all", "nothing to plan: give --methods"),
        (["--methods", DROP], "nowhere", "there is no statistics file"),
        (["--methods", DROP], "../data", "there is no statistics file"),
        (["--methods", NOVICES], "routing", "holds no outputs, which Novices needs: moe-lightning collect --needs"),
        (["--methods", f"[{DROP[1:-1]}, {NOVICES[1:-1]}]"], "all", "nobody has measured. Plan the first method alone"),
        (["--methods", DROP, "--criteria", "mone"], "all", "at least two"),
        (["--methods", DROP, "--criteria", "mone,magic"], "all", "unknown criterion 'magic'"),
        (["--methods", DROP, "--criteria", "mone,reap"], "routing", "which were not collected"),
        (["--methods", DROP, "--output", "."], "all", "--output . is a folder"),
        (["--methods", "[{class_path: ExpertDrop, init_args: {keep: 1}}]"], "all", "keep"),
        (
            ["--methods", "[{class_path: Novices, init_args: {keep: 3, scope: sensitivity}}]"],
            "all",
            "layer_divergence",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], statistics: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(place, *arguments, statistics=statistics) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--needs", "magic"], "unknown statistics ['magic']"),
        (["--needs", "sensitivity"], "measured by compress itself"),
        (["--needs", ""], "--needs is empty"),
        (["--calibration_batches", "99"], "calibration"),
        (["--device", "toaster"], "--device toaster"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_of_collect(
    arguments: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("moe_lightning.cli.collect.from_pretrained", no_work)
    assert collect(place, "--output", str(tmp_path / "out.safetensors"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
