"""The compress command: a checkpoint goes in, a smaller folder that loads comes out, or one clear error and nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, LlamaConfig, MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.cli import main
from moe_lightning.plan import CompressionPlan, KeepExperts
from moe_lightning.surgery import plan_of
from tests.models import tiny_config
from tests.small_runs import write_texts

NOVICES = "[{class_path: Novices, init_args: {ratio: 0.5, criterion: residual, scope: global, novice: gate2_mean}}]"
DROP = "[{class_path: ExpertDrop, init_args: {keep: 3}}]"
UNEVEN = "[{class_path: ExpertDrop, init_args: {keep: 3, scope: global}}]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a config, and a Mixtral that transformers alone wrote: hub layout, bf16."""
    folder = tmp_path_factory.mktemp("compress")
    write_texts(folder / "texts")
    data = {
        "sources": f"{folder}/texts/*.txt",
        "vocab_size": 300,
        "block_size": 16,
        "batch_size": 2,
        "validation": 0,
        "test": 8,
        "calibration": 8,
        "cache_dir": str(folder / "cache"),
    }
    (folder / "compress.yaml").write_text(yaml.safe_dump({"data": data, "methods": yaml.safe_load(NOVICES)}))
    tokenizer = ml.TextDataModule(**data).prepare().tokenizer
    torch.manual_seed(0)
    model = MixtralForCausalLM(tiny_config(vocab_size=len(tokenizer))).to(torch.bfloat16)
    model.save_pretrained(folder / "hub")
    tokenizer.save_pretrained(folder / "hub")
    return folder


def compress(place: Path, *arguments: str, model: str = "hub", config: bool = True) -> int:
    given = ["-c", str(place / "compress.yaml")] if config else []
    try:
        return main(["compress", *given, "--model", str(place / model), *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_hub_checkpoint_becomes_a_smaller_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(place, "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "loaded again" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert {"compression.json", "plan.json", "statistics.safetensors"} <= names
    numbers = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert numbers["after"]["parameters"] < numbers["before"]["parameters"]
    assert numbers["after"]["bytes_on_disk"] < numbers["before"]["bytes_on_disk"]
    assert numbers["compression"]["touched_parameters"] == numbers["compression"]["claimed_parameters"] > 0
    model = ml.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert numbers["after"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    plan = CompressionPlan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert plan == plan_of(model)
    assert plan.origin["history"][0]["calibration"]["base_model"] == str(place / "hub")
    kept = sum(
        len(layout.real)
        for layout in plan.check(ml.Statistics.load(tmp_path / "out" / "statistics.safetensors").shape).layouts
    )
    assert kept == 9  # half of 3 layers x 6 experts
    # In a process of its own, as a user of the folder would.
    code = (
        "import sys, moe_lightning; from transformers import pipeline\n"
        "print(len(pipeline('text-generation', sys.argv[1])('abc', max_new_tokens=4)[0]['generated_text']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 3


def test_methods_of_the_command_line_replace_those_of_the_config(place: Path, tmp_path: Path) -> None:
    assert compress(place, "--output", str(tmp_path / "out"), "--methods", DROP) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "mixtral"
    assert AutoConfig.from_pretrained(tmp_path / "out").num_local_experts == 3


def test_a_plan_is_replayed_to_the_same_weights(place: Path, tmp_path: Path) -> None:
    assert compress(place, "--output", str(tmp_path / "one")) == 0
    assert compress(place, "--output", str(tmp_path / "two"), "--plan", str(tmp_path / "one" / "plan.json")) == 0
    first, second = ml.from_pretrained(tmp_path / "one"), ml.from_pretrained(tmp_path / "two")
    assert plan_of(first) == plan_of(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_dry_run_says_what_would_be_done_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(place, "--dry_run", "--output", str(tmp_path / "out"), "--dtype", "float32") == 0
    printed = capsys.readouterr().out
    for word in ("method", "size", "memory", "time", "nothing was written", "float32"):
        assert word in printed
    assert not (tmp_path / "out").exists()
    # The sizes of a dry run are those of the real one.
    assert compress(place, "--output", str(tmp_path / "out"), "--dtype", "float32") == 0
    size = next(line for line in printed.splitlines() if line.startswith("size"))
    assert size in capsys.readouterr().out
    model = ml.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert f"-> {ml.measure(model).parameters:,} parameters" in size


def test_a_compressed_folder_is_compressed_further(place: Path, tmp_path: Path) -> None:
    assert compress(place, "--output", str(tmp_path / "one")) == 0
    (tmp_path / "again.yaml").write_text((place / "compress.yaml").read_text())
    arguments = ["--output", str(tmp_path / "two"), "--methods", "[{class_path: ExpertDrop, init_args: {keep: 5}}]"]
    assert main(["compress", "-c", str(tmp_path / "again.yaml"), "--model", str(tmp_path / "one"), *arguments]) == 0
    plan = plan_of(ml.from_pretrained(tmp_path / "two"))
    assert plan.edits[:-3] == plan_of(ml.from_pretrained(tmp_path / "one")).edits
    assert all(isinstance(edit, KeepExperts) for edit in plan.edits[-3:])


def test_a_folder_with_low_rank_terms(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = "[{class_path: LoRA, init_args: {rank: 2}}]"
    assert compress(place, "--output", str(tmp_path / "lora"), "--methods", lora) == 0
    assert re.search(r"^6 modules changed: ", capsys.readouterr().out, re.MULTILINE)
    terms, drop = str(tmp_path / "lora"), "{class_path: ExpertDrop, init_args: {keep: 5}}"
    assert compress(place, "--output", str(tmp_path / "no"), "--methods", f"[{drop}]", model=terms) == 2
    found = capsys.readouterr().err
    assert "its experts have low-rank terms" in found and "'methods: [{class_path: MergeLoRA}, ...]'" in found
    methods = f"[{{class_path: MergeLoRA}}, {drop}]"
    assert compress(place, "--output", str(tmp_path / "yes"), "--methods", methods, model=terms) == 0
    assert re.search(r"^compressed 6 modules: ", capsys.readouterr().out, re.MULTILINE)


def bad_model(place: Path, kind: str) -> str:
    """Make a folder that cannot be compressed, next to the good one."""
    target = place / kind
    if target.exists():
        return kind
    if kind == "llama":
        LlamaConfig().save_pretrained(target)
        return kind
    target.mkdir()
    for path in (place / "hub").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if kind == "truncated":
        weights = target / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
    if kind == "no_tokenizer":
        for path in target.glob("*token*"):
            path.unlink()
    return kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "[{class_path: Novices, init_args: {ratio: 1.0}}]"], r"ratio must lie in \[0, 1\), got 1.0"),
        (["--methods", "[{class_path: Novices, init_args: {ratio: -0.1}}]"], "ratio must lie in"),
        (["--methods", "[{class_path: Novices, init_args: {ratio: 0.5, keep: 2}}]"], "exactly one of ratio, keep"),
        (["--methods", "[{class_path: Novices, init_args: {keep: 3, criterion: magic}}]"], "unknown criterion 'magic'"),
        (["--methods", "[{class_path: Novices, init_args: {keep: 3, novice: median}}]"], "median"),
        (
            ["--methods", "[{class_path: ExpertDrop, init_args: {keep: 1}}]"],
            "keep 1 expert.*picks 2: .*set keep to at least 2",
        ),
        (["--methods", "[{class_path: ExpertDrop, init_args: {keeep: 3}}]"], "keeep"),
        (["--methods", "[{class_path: ExpertDropp, init_args: {keep: 3}}]"], "ExpertDropp"),
        (["--methods", "[]"], "nothing to do: give --methods"),
        (["--calibration_batches", "999"], "calibration"),
        (["--data.sources", "/nowhere/*.txt"], "/nowhere"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "toaster"], "--device toaster"),
        (["--format", "transformers"], "plain Mixtral because"),
        (["--format", "transformers", "--methods", UNEVEN], "scope=layer or --format auto"),
        (["--plan", "/nowhere/plan.json"], "--plan"),
        (["--calibration_batchs", "1"], "calibration_batchs"),
        (["--data.blok_size", "16"], "blok_size"),
        (["--dtype", "int3"], "dtype"),
        (["--data.block_size", "65"], "--data.block_size 65 .* at most 64"),
        (["--methods", "[{class_path: ExpertDrop, init_args: {ratio: 0.01}}]"], "nothing would go: ExpertDrop"),
        (["--plan", str(Path(__file__).parent / "test_compress.py")], "--plan .* is no plan"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    arguments: list[str],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moe_lightning.cli.compress.from_pretrained", no_work)
    assert compress(place, "--output", str(tmp_path / "out"), *arguments) == 2
    found = capsys.readouterr().err
    assert found.startswith(("moe-lightning", "python", "pytest", "__main__"))
    assert len([line for line in found.splitlines() if "error:" in line]) == 1
    assert re.search(message, found), found
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_found_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lightning.cli.compress.from_pretrained", no_work)
    assert compress(place, "--output", "/dev/null/out") == 2
    assert "/dev/null/out cannot be written" in capsys.readouterr().err


def test_a_plan_for_a_model_of_other_sizes_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(place, "--output", str(tmp_path / "one")) == 0
    wider = MixtralForCausalLM(tiny_config(vocab_size=300, intermediate_size=64))
    wider.save_pretrained(tmp_path / "wider")
    for path in (place / "hub").glob("*token*"):
        (tmp_path / "wider" / path.name).write_bytes(path.read_bytes())
    capsys.readouterr()
    plan = str(tmp_path / "one" / "plan.json")
    assert compress(place, "--output", str(tmp_path / "two"), "--plan", plan, model=str(tmp_path / "wider")) == 2
    assert (
        "made for another model: " in (found := capsys.readouterr().err) and "intermediate_size 48 (here 64)" in found
    )


def no_work(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was loaded before the mistake was found")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama", "'llama' is not supported"),
        ("truncated", "cut short"),
        ("no_tokenizer", r"--data.tokenizer"),
        ("missing", "no checkpoint folder"),
    ],
)
def test_bad_models(kind: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = kind if kind == "missing" else bad_model(place, kind)
    assert compress(place, "--output", str(tmp_path / "out"), model=model) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_plans_that_do_not_fit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = {
        "layer 9 is not an MoE layer": CompressionPlan((KeepExperts(9, (0, 1)),)).to_json(),
        "cannot keep experts [7]": CompressionPlan((KeepExperts(0, (0, 7)),)).to_json(),
        "not JSON": "{",
        "not a compression plan": "[]",
        "unknown kind of edit": '{"version": 1, "edits": [{"kind": "magic"}]}',
        "reads version 1": '{"version": 99, "edits": []}',
    }
    for message, text in plans.items():
        (tmp_path / "plan.json").write_text(text)
        assert compress(place, "--output", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_plan_is_not_replayed_on_a_compressed_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress(place, "--output", str(tmp_path / "one")) == 0
    empty = CompressionPlan().to_json()
    monkeypatch.setattr("moe_lightning.cli.compress.from_pretrained", no_work)
    for text in (empty, (tmp_path / "one" / "plan.json").read_text()):
        (tmp_path / "plan.json").write_text(text)
        arguments = ["--output", str(tmp_path / "two"), "--plan", str(tmp_path / "plan.json")]
        assert compress(place, *arguments, model=str(tmp_path / "one")) == 2
        assert "compressed already" in capsys.readouterr().err
        assert not (tmp_path / "two").exists()


def test_an_output_that_holds_something_stays(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert compress(place, "--output", str(tmp_path / "out")) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    assert compress(place, "--output", str(tmp_path / "out"), "--overwrite") == 0
    assert not (tmp_path / "out" / "precious").exists()


def test_a_failure_in_the_middle_leaves_no_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise RuntimeError("the proof failed")

    monkeypatch.setattr("moe_lightning.cli.compress._prove", fail)
    with pytest.raises(RuntimeError, match="the proof failed"):
        compress(place, "--output", str(tmp_path / "out"))
    assert not any(tmp_path.iterdir())


def test_an_uneven_drop_is_native_however_it_looked_before(place: Path, tmp_path: Path) -> None:
    method = "[{class_path: ExpertDrop, init_args: {keep: 4, scope: global, criterion: frequency}}]"
    assert compress(place, "--output", str(tmp_path / "out"), "--methods", method) == 0
    model = ml.from_pretrained(tmp_path / "out")
    counts = {layer.mlp.gate.weight.shape[0] for layer in model.model.layers}
    uniform = AutoConfig.from_pretrained(tmp_path / "out").model_type == "mixtral"
    assert uniform == (len(counts) == 1)
