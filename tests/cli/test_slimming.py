"""Pruning and integers on the command line: compress, fit and test, plan; what is printed, written and refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig

import moe_lightning as ml
from moe_lightning.checkpoints import stored_bytes
from moe_lightning.cli import main
from moe_lightning.plan import CompressionPlan, Quantize, Sparsify
from moe_lightning.surgery import plan_of
from tests.small_checkpoints import write_checkpoint
from tests.small_runs import MODEL, small_options, write_config

GPTQ = "[{class_path: GPTQ, init_args: {group_size: 16, targets: experts+attention}}]"
EASY = ("--min_tokens", "1", "--max_fallback", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a config of the data, and a checkpoint in the hub's layout."""
    folder = tmp_path_factory.mktemp("slim")
    data = write_checkpoint(folder)
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def run(command: str, *arguments: str) -> int:
    try:
        return main([command, *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def compress(place: Path, *arguments: str, model: Path | None = None) -> int:
    return run("compress", "-c", str(place / "data.yaml"), "--model", str(model or place / "hub"), *arguments)


@pytest.fixture(scope="module")
def int4(place: Path) -> Path:
    """The checkpoint with integers everywhere."""
    assert compress(place, "--output", str(place / "int4"), "--methods", GPTQ, *EASY) == 0
    return place / "int4"


def test_everything_is_in_the_folder(int4: Path, place: Path) -> None:
    numbers = json.loads((int4 / "compression.json").read_text())
    model = ml.from_pretrained(int4)
    size = ml.measure(model, sequence_length=16)
    after = numbers["after"]
    assert (after["parameters"], after["bytes"], after["flops"]) == (size.parameters, size.bytes, size.flops)
    assert after["bytes_on_disk"] == stored_bytes(int4)
    assert abs(stored_bytes(int4) - size.bytes) < 20_000 and after["bytes"] < 0.6 * numbers["before"]["bytes"]
    assert numbers["after"]["parameters"] == numbers["before"]["parameters"]
    found = numbers["compression"]
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn", "mlp.experts")]
    assert list(found["modules"]) == list(found["matrices"]) == names
    experts = found["matrices"][names[1]]
    assert len(experts) == 12 and all(status.startswith(("gptq", "rtn fallback: ")) for status in experts.values())
    assert list(found["matrices"][names[0]]) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert len(found["tokens"][names[1]]) == 6
    measured = {name for name, status in experts.items() if status.startswith("gptq")}
    assert measured and set(found["errors"][names[1]]) == measured
    assert all(0 <= error < 0.1 for error in found["errors"][names[1]].values())
    card = (int4 / "README.md").read_text()
    assert "* weights: int4, group 16, asymmetric: experts of layers 0 1 2, attention of layers 0 1 2" in card
    assert f"{size.bytes:,} in memory" in card
    assert numbers["loaded_again_max_logit_difference"] == 0


def test_what_is_printed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--output", str(tmp_path / "out"), "--methods", GPTQ.replace("experts+attention", "experts"), *EASY)
    assert compress(place, *given, "--dry_run") == 0
    dry = capsys.readouterr().out
    assert re.search(r"memory   about \d", dry) and not (tmp_path / "out").exists()
    assert compress(place, *given) == 0
    printed = capsys.readouterr().out
    assert "weights  int4, group 16, asymmetric: experts of layers 0 1 2\n" in dry
    for text in (dry, printed):
        assert re.search(r"\d\.\d MiB -> \d\.\d MiB of weights in memory", text)
        assert re.search(r"\d\.\d MiB -> \d\.\d MiB of weights on disk \(\d\d\.\d%\)", text)
    lines = re.findall(r"^  model\.layers\.\d\.mlp\.experts: .*$", printed, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert re.search(r"6 of 6 experts real, int4, group 16, asymmetric.*; \d+ (gptq|rtn fallback)", line)
        assert "relative error" in line and len(line) < 420
    assert re.search(r"^36 matrices: \d+ gptq", printed, re.MULTILINE)
    assert "in memory" in printed and "on disk" in printed


def test_the_dry_run_counts_the_memory_of_moments(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def memory(*arguments: str) -> int:
        assert compress(place, "--dry_run", "--methods", *arguments) == 0
        capsys.readouterr()
        return dry["memory_bytes"]

    dry: dict[str, Any] = {}
    from moe_lightning.cli import compress as module

    original = module._dry_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_dry_run", lambda prepared: dry.update(original(prepared)) or dry)
        nothing = memory("[{class_path: RTN, init_args: {group_size: 16}}]")
        # Six Hessians of 48 inputs are the largest moments; with less memory, one expert at a time.
        few = memory(GPTQ, "--max_moment_bytes", "1")
        many = memory(GPTQ)
    assert many - few == 4 * (6 * 48**2 - 48**2)
    assert few > nothing


def test_a_quantised_folder_is_tested_trained_and_exported(int4: Path, place: Path, tmp_path: Path) -> None:
    """Its checkpoint too, in a run of its own."""
    options = yaml.safe_load((place / "data.yaml").read_text())
    config = write_config(
        tmp_path / "fit.yaml",
        {
            **options,
            "model": {"checkpoint": str(int4), "warmup_steps": 1},
            "trainer": {
                "max_steps": 2,
                "accelerator": "cpu",
                "limit_val_batches": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [{"class_path": "Export", "init_args": {"name": "final"}}],
            },
        },
    )
    base = ("-c", str(config), "--run_dir", str(tmp_path / "run"))
    assert run("fit", *base) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    first = ml.from_pretrained(int4).state_dict()
    final = ml.from_pretrained(tmp_path / "run" / "models" / "final").state_dict()
    words = [name for name in first if name.endswith((".words", ".scale", ".zero"))]
    assert len(words) == 3 * 6 * 3
    for name in words:
        assert torch.equal(first[name], saved[f"model.{name}"]) and torch.equal(first[name], final[name])
    assert not torch.equal(first["model.layers.0.mlp.gate.weight"], final["model.layers.0.mlp.gate.weight"])
    assert run("test", *base, "--ckpt_path", "last") == 0
    of_checkpoint = json.loads((tmp_path / "run" / "results" / "test.json").read_text())
    folder = str(tmp_path / "run" / "models" / "final")
    assert run("test", "-c", str(config), "--run_dir", str(tmp_path / "b"), "--model.checkpoint", folder) == 0
    assert of_checkpoint == json.loads((tmp_path / "b" / "results" / "test.json").read_text())


def test_pruned_models_can_be_plain(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where that is asked for: a plain folder holds every zero."""
    half = "[{class_path: Magnitude, init_args: {sparsity: 0.5}}]"
    sizes = {}
    for name, given in (("auto", ()), ("plain", ("--format", "transformers"))):
        assert compress(place, "--output", str(tmp_path / name), "--methods", half, *given) == 0
        sizes[name] = stored_bytes(tmp_path / name)
        printed = capsys.readouterr().out
        numbers = json.loads((tmp_path / name / "compression.json").read_text())["after"]
        assert numbers["bytes"] == ml.measure(ml.from_pretrained(tmp_path / name)).bytes
        # What was said before is what came, but for the names in the file.
        said = re.findall(r"-> ([\d.]+) MiB of weights", printed)
        assert float(said[0]) == pytest.approx(numbers["bytes"] / 2**20, abs=0.051)
        assert float(said[1]) == pytest.approx(numbers["bytes_on_disk"] / 2**20, abs=0.1)
        assert ("a plain Mixtral holds zeros like other weights" in printed) == (name == "plain")
        card = (tmp_path / name / "README.md").read_text()
        assert f"* bytes: {numbers['bytes']:,} in memory" in card and ("* weights: " in card) == (name == "auto")
    assert AutoConfig.from_pretrained(tmp_path / "plain").model_type == "mixtral"
    assert sizes["auto"] < 0.75 * sizes["plain"]
    inputs = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = [ml.from_pretrained(tmp_path / name)(inputs).logits for name in sizes]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_sizes_before_are_those_of_the_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a pruned one, whose masks are beside all weights in memory, and of one that is loaded in another type."""
    half = "[{class_path: Magnitude, init_args: {sparsity: 0.5}}]"
    assert compress(place, "--output", str(tmp_path / "half"), "--methods", half) == 0
    capsys.readouterr()
    more = "[{class_path: Magnitude, init_args: {sparsity: 0.75}}]"
    given = ("--output", str(tmp_path / "more"), "--methods", more, "--dtype", "bfloat16")
    assert compress(place, *given, model=tmp_path / "half") == 0
    said = re.findall(r"([\d.]+) MiB -> ([\d.]+) MiB of weights", capsys.readouterr().out)
    numbers = json.loads((tmp_path / "more" / "compression.json").read_text())
    loaded = ml.from_pretrained(tmp_path / "half", torch.bfloat16), ml.from_pretrained(tmp_path / "more")
    assert [numbers[name]["bytes"] for name in ("before", "after")] == [ml.measure(model).bytes for model in loaded]
    files = [stored_bytes(tmp_path / name) for name in ("half", "more")]
    assert [numbers[name]["bytes_on_disk"] for name in ("before", "after")] == files
    for place_, found in enumerate(([numbers[name]["bytes"] for name in ("before", "after")], files)):
        for told, real in zip(said[place_], found, strict=True):
            assert float(told) == pytest.approx(real / 2**20, abs=0.1)


def test_weights_that_get_larger(place: Path) -> None:
    tiny = "[{class_path: Magnitude, init_args: {sparsity: 0.03, scope: matrix}}]"
    with pytest.warns(UserWarning, match=r"^the weights get larger on disk, from [\d,]+ to [\d,]+ bytes.*beside"):
        assert compress(place, "--dry_run", "--methods", tiny) == 0
    half = "[{class_path: Magnitude, init_args: {sparsity: 0.5}}]"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compress(place, "--dry_run", "--methods", half) == 0
        assert compress(place, "--dry_run", "--methods", half, "--format", "transformers") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "[{class_path: Magnitude, init_args: {sparsity: 0.000001}}]"],
            r"sparsity=1e-06.* would set no weight to zero: .* matrices of \[32, 48\] and \[96, 32\]: ask for more",
        ),
        (["--methods", GPTQ, "--data.test", "0"], "data.test"),
        (
            ["--methods", GPTQ, "--format", "transformers"],
            r"plain Mixtral because layers \[0, 1, 2\] have experts of i",
        ),
        (["--methods", "[{class_path: Wanda, init_args: {pattern: 2:4}}]"], "put quotes around it, '2:4'"),
        (["--methods", "[{class_path: Wanda, init_args: {sparsity: 0.5, pattern: '2:4'}}]"], "exactly one of"),
        (
            ["--methods", "[{class_path: Wanda, init_args: {sparsity: half}}]"],
            "'half' is not possible: Expected",
        ),
        (["--methods", "[{class_path: Wandaa, init_args: {sparsity: 0.5}}]"], r"did you mean Wanda\?"),
        (["--methods", "[{class_path: GPTQ}]"], "group_size 128 does not divide the input size 32"),
        (
            ["--methods", "[{class_path: GPTQ, init_args: {group_size: 16, bits: 3}}]"],
            r"bits: Expected one of \[4",
        ),
        (
            ["--methods", "[{class_path: Wanda, init_args: {sparsity: {start: 0, end: 0.5, steps: 20}}}]"],
            "a schedule, which takes a training run to follow",
        ),
        (["--methods", GPTQ, "--starved", "top_up"], "--starved top_up: there are no further calibration batches"),
        (["--methods", GPTQ, "--starved", "never"], "--starved"),
        (["--methods", GPTQ, "--min_tokens", "-1"], "min_tokens must be a whole number"),
        (["--methods", GPTQ, "--max_fallback", "1.5"], "max_fallback must be a share from 0 to 1"),
        (["--methods", GPTQ, "--max_moment_bytes", "0"], "max_moment_bytes must be a positive number"),
        (["--methods", f"[{GPTQ[1:-1]}, {GPTQ[1:-1]}]"], "again, their weights are int4"),
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
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was found")

    monkeypatch.setattr("moe_lightning.cli.compress.from_pretrained", no_work)
    assert compress(place, "--output", str(tmp_path / "out"), *arguments) == 2
    printed, found = capsys.readouterr()
    assert not printed
    assert len([line for line in found.splitlines() if "error:" in line]) == 1
    assert re.search(message, found), found
    assert not any(tmp_path.iterdir())


def test_starved_experts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that ends the work is told in one line; one that draws more does."""
    given = ["--output", str(tmp_path / "out"), "--methods", GPTQ, "--calibration_batches", "1"]
    assert compress(place, *given, "--starved", "error", "--min_tokens", "30") == 1
    error = capsys.readouterr().err
    assert re.search(r"moe-lightning compress: fewer than min_tokens=30 .*Nothing was written\n$", error)
    assert "Traceback" not in error
    assert compress(place, *given, "--starved", "fallback", "--min_tokens", "30") == 1
    assert "more than max_fallback=0.1 allows" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert compress(place, *given, "--starved", "top_up", "--min_tokens", "8") == 0
    tokens = json.loads((tmp_path / "out" / "compression.json").read_text())["compression"]["tokens"]
    assert min(count for experts in tokens.values() for count in experts.values()) >= 4  # routing changes on the way


def test_plan_of_slimming(int4: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = str(tmp_path / "routing.safetensors")
    collected = ("-c", str(place / "data.yaml"), "--model", str(place / "hub"), "--output", statistics)
    assert run("collect", *collected, "--needs", "routing") == 0
    capsys.readouterr()
    sparse = "{class_path: SparseGPT, init_args: {pattern: '2:4'}}"
    methods = f"[{sparse}, {GPTQ[1:-1]}]"
    assert run("plan", "--statistics", statistics, "--methods", methods, "--output", str(tmp_path / "plan.json")) == 0
    printed = capsys.readouterr().out
    assert "experts: 2:4 (error not predicted)" in printed
    assert "experts: int4, group 16, asymmetric, 2:4 (error not predicted)" in printed
    assert "attention: int4, group 16, asymmetric (error not predicted)" in printed
    assert "their errors take the weights and what enters them" in printed
    assert "weights    int4, group 16, asymmetric: attention of layers 0 1 2" in printed
    # Zeros among integers save no bytes: the model that was written has the same number of them.
    assert f"-> {ml.measure(ml.from_pretrained(int4)).bytes:,} (" in printed
    planned = CompressionPlan.from_json((tmp_path / "plan.json").read_text())
    assert [type(edit) for edit in planned.edits] == [Sparsify] * 3 + [Quantize] * 6
    assert run("plan", "--statistics", statistics, "--methods", "[{class_path: GPTQ}]") == 2
    assert "group_size 128 does not divide" in capsys.readouterr().err
    twice = f"[{sparse}, {GPTQ[1:-1]}, {GPTQ[1:-1]}]"
    assert run("plan", "--statistics", statistics, "--methods", twice) == 2
    both = capsys.readouterr()
    assert not both.out and "cannot quantise the attention again" in both.err
    none = "[{class_path: Wanda, init_args: {sparsity: 0.001}}]"
    assert run("plan", "--statistics", statistics, "--methods", none) == 2
    assert "would set no weight to zero" in capsys.readouterr().err


def test_a_plan_of_slimming_is_replayed(int4: Path, place: Path, tmp_path: Path) -> None:
    plan = str(int4 / "plan.json")
    assert compress(place, "--output", str(tmp_path / "again"), "--plan", plan, *EASY) == 0
    first, second = ml.from_pretrained(int4), ml.from_pretrained(tmp_path / "again")
    assert plan_of(first) == plan_of(second)
    one, two = first.state_dict(), second.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# fit


def methods(*items: str, **options: Any) -> str:
    listed = ", ".join(items)
    more = "".join(f", {name}: {value}" for name, value in options.items())
    return f"trainer: {{callbacks: [{{class_path: Compress, init_args: {{at_step: 2, methods: [{listed}]{more}}}}}]}}"


WANDA = "{class_path: Wanda, init_args: {%s}}"
SCHEDULE = WANDA % "sparsity: {start: 0, end: 0.5, steps: %d, every: 2}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            methods(WANDA % "pattern: 2:4"),
            "Wanda.pattern: got the number 124, as which YAML reads 2:4: put quotes",
        ),
        (methods(WANDA % "pattern: 3"), "Compress.methods: Wanda.pattern: Expected one of ['2:4', '4:8', '1:4']"),
        (
            methods(WANDA % "sparsity: 2.5"),
            "Wanda: sparsity is the share of zeros and must lie between 0 and 1",
        ),
        (methods(WANDA % "sparsity: {start: 0.5, end: 0.1, steps: 4}"), "SparsitySchedule: start=0.5 and end=0.1 must"),
        (
            methods(WANDA % "sparsity: {start: 0, ende: 0.1}"),
            "SparsitySchedule: there is no option 'ende'",
        ),
        (methods(SCHEDULE % 4), "at_step=2 begins a schedule that ends at step 6, beyond the run, which has 6 steps"),
        (methods(SCHEDULE % 2, "{class_path: GPTQ}"), "GPTQ stores integers, which Wanda could not prune further"),
        (methods("{class_path: GPTQ}"), "group_size 128 does not divide the input size 32"),
        (
            methods("{class_path: GPTQ, init_args: {group_size: 16}}", starved="top_up"),
            "Compress: starved: top_up, but there are no further calibration batches",
        ),
        (
            methods("{class_path: RTN}", starved="some"),
            "starved: Expected one of ['warn', 'top_up', ",
        ),
    ],
)
def test_mistakes_in_fit_are_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = small_options(tmp_path, model={"model": MODEL}, trainer={"max_steps": 6})
    config = write_config(tmp_path / "small.yaml", options)
    (tmp_path / "bad.yaml").write_text(text)
    assert run("fit", "-c", str(config), "-c", str(tmp_path / "bad.yaml"), "--run_dir", str(tmp_path / "run")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_for_too_few_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and the way on: from the last checkpoint with another policy."""
    items = ["{class_path: LastCheckpoint, init_args: {every_n_train_steps: 2}}"]
    text = methods(
        "{class_path: GPTQ, init_args: {group_size: 16}}", starved="%s", calibration_batches=1, min_tokens=25
    )
    text = text.replace("callbacks: [", f"callbacks: [{items[0]}, ")
    config = write_config(tmp_path / "small.yaml", small_options(tmp_path, trainer={"max_steps": 3}))
    base = ["fit", "-c", str(config), "-c", str(tmp_path / "policy.yaml"), "--run_dir", str(tmp_path / "run")]
    (tmp_path / "policy.yaml").write_text(text % "error")
    assert run(*base) == 1
    error = capsys.readouterr().err
    assert "moe-lightning fit: stopped at step 2: fewer than min_tokens=25 calibration tokens reach layer 0" in error
    assert "go on from the last checkpoint with --ckpt_path last" in error and "Traceback" not in error
    (tmp_path / "policy.yaml").write_text(text % "top_up")
    assert run(*base, "--ckpt_path", "last") == 0
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
