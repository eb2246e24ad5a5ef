"""fit, validate, test, predict from YAML and command line; what goes wrong is one line before anything is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_lightning.cli import main
from moe_lightning.cli.config_files import find_config, packaged_configs, resolve_configs, run_name
from tests.models import tiny_mixtral
from tests.small_runs import MODEL, small_options, write_config

ROOT = Path(__file__).resolve().parents[2]
COMPRESS = [
    "--trainer.callbacks+=Compress",
    '--trainer.callbacks.methods=[{"class_path": "Novices", "init_args": {"ratio": 0.5}}]',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    """Config of a short run without a dropout."""
    options = small_options(folder, model={"model": MODEL | {"attention_dropout": 0.0}}, trainer={"max_steps": 6})
    return str(write_config(folder / "small.yaml", options))


@pytest.fixture(scope="module")
def trained(folder: Path, config: str) -> Path:
    """A finished run."""
    assert main(["fit", "-c", config, "--run_dir", str(folder / "trained")]) == 0
    return folder / "trained"


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail at once, and return its one line of error."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1
    return lines[0]


# What a run leaves


def test_run_directory_holds_everything(trained: Path) -> None:
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {"config.fit.yaml", "checkpoints/last.ckpt"} <= files
    assert not [name for name in files if "version_" in name or name.endswith((".tmp", ".partial"))]
    assert last(trained)["global_step"] == 6


def test_tensorboard_holds_the_training_curves(trained: Path) -> None:
    events = EventAccumulator(str(trained / "logs")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/aux_loss",
        "train/perplexity",
        "train/learning_rate",
        "train/tokens_per_second",
    } <= tags
    assert {"val/loss", "val/perplexity", "val/bits_per_byte"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    # The loss itself, without the balancing loss, is what perplexity is made of.
    for loss, perplexity in zip(events.Scalars("train/loss"), events.Scalars("train/perplexity"), strict=True):
        assert perplexity.value == pytest.approx(torch.tensor(loss.value).exp().item(), rel=1e-4)


def test_saved_config_is_complete_and_runs_again(trained: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((trained / "config.fit.yaml").read_text())
    assert saved["model"]["learning_rate"] == 0.01 and saved["model"]["betas"] == [0.9, 0.95]
    assert saved["model"]["plan"] is None and saved["ckpt_path"] is None
    assert main(["fit", "-c", str(trained / "config.fit.yaml"), "--run_dir", str(tmp_path)]) == 0
    weights, again = last(trained)["state_dict"], last(tmp_path)["state_dict"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_test_validate_and_predict(trained: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["-c", config, "--run_dir", str(trained), "--ckpt_path", "last"]
    assert main(["test", *base]) == 0
    assert main(["validate", *base]) == 0
    result = json.loads((trained / "results" / "test.json").read_text())
    assert result.keys() == {"test/loss", "test/perplexity", "test/bits_per_byte"}
    assert (trained / "results" / "validate.json").is_file()

    capsys.readouterr()
    assert main(["predict", *base, "--data.prompts", '["abc def", "bed"]', "--model.max_new_tokens", "4"]) == 0
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["abc def", "bed"]
    output = capsys.readouterr().out
    assert all(row["continuation"] in output for row in rows)
    # Looking at a run does not change it.
    assert last(trained)["global_step"] == 6


def test_options_of_the_command_line_win_over_the_checkpoint(folder: Path, config: str) -> None:
    """Resume with another learning rate, decay, dropout and length: the next steps must use them."""
    base = ["fit", "-c", config, "--run_dir", str(folder / "changed")]
    assert main(base) == 0
    changes = ["--model.learning_rate", "0.5", "--model.weight_decay", "0.25", "--model.warmup_steps", "0"]
    more = [
        "--model.min_learning_rate_ratio",
        "1.0",
        "--model.model.attention_dropout",
        "0.3",
        "--trainer.max_steps",
        "8",
    ]
    assert main([*base, "--ckpt_path", "last", *changes, *more]) == 0
    state = last(folder / "changed")
    assert state["global_step"] == 8
    groups = state["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [0.5] * 4
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0, 0.0, 0.0]
    assert state["hyper_parameters"].keys() == {"model", "checkpoint", "plan"}
    assert state["hyper_parameters"]["model"]["attention_dropout"] == 0.3


def test_overwrite_starts_anew(folder: Path, config: str) -> None:
    base = ["fit", "-c", config, "--run_dir", str(folder / "again")]
    assert main([*base, "--trainer.max_steps", "4"]) == 0
    stale = folder / "again" / "results" / "old.json"
    stale.parent.mkdir(exist_ok=True)
    stale.write_text("{}")
    (folder / "again" / "mine.txt").write_text("not of a run")
    assert main([*base, "--trainer.max_steps", "3", "--overwrite", "true"]) == 0
    assert last(folder / "again")["global_step"] == 3
    assert not stale.exists() and (folder / "again" / "mine.txt").exists()
    events = EventAccumulator(str(folder / "again" / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2]


def test_a_model_folder_brings_its_own_tokenizer(trained: Path, config: str, tmp_path: Path) -> None:
    from moe_lightning.checkpoints import save_pretrained
    from moe_lightning.modules import MixtralModule

    model = MixtralModule.load_from_checkpoint(trained / "checkpoints" / "last.ckpt").model
    tokenizer_folder = last(trained)["TextDataModule"]["tokenizer_folder"]
    save_pretrained(model, tmp_path / "model", tokenizer=tokenizer_folder)
    run = ["test", "-c", config, "--run_dir", str(tmp_path / "run")]
    assert main([*run, "--model.model", "null", "--model.checkpoint", str(tmp_path / "model")]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.test.yaml").read_text())
    assert saved["data"]["tokenizer"] == str(tmp_path / "model")
    mine = json.loads((tmp_path / "run" / "results" / "test.json").read_text())
    assert main(["test", "-c", config, "--run_dir", str(trained), "--ckpt_path", "last"]) == 0
    assert mine == pytest.approx(json.loads((trained / "results" / "test.json").read_text()), rel=1e-6)


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.learning_rte", "1"], ["model.learning_rte", "did you mean model.learning_rate"]),
        (["--model.model.hidden_sise", "8"], ["hidden_sise", "did you mean 'hidden_size'"]),
        (["--model.learning_rate", "-1"], ["model.learning_rate=-1.0", "a number > 0"]),
        (["--model.learning_rate", "fast"], ["--model.learning_rate: ", "fast", "Expected a float"]),
        (["--trainer.max_step", "3"], ["--trainer.max_step 3", "did you mean trainer.max_steps"]),
        (["--data.prompts", "3"], ["--data.prompts: '3' is not possible", "list"]),
        (["--data.batch_size", "0"], ["--data.batch_size 0", "at least 1"]),
        (["--data.sources", "/nowhere/*.txt"], ["/nowhere/*.txt"]),
        (["--data.sources", "/"], ["--data.sources: / is a folder"]),
        (["--data.tokenizer", "some/name"], ["--data.tokenizer: there is no folder 'some/name'"]),
        (["--model.checkpoint", "/nowhere"], ["exactly one of", "--model.model null"]),
        (["--model.model", "null", "--model.checkpoint", "/nowhere"], ["model.checkpoint=/nowhere"]),
        (["--model.model.vocab_size", "10"], ["300 tokens", "only 10", "--data.tokenizer"]),
        (["--trainer.default_root_dir", "elsewhere"], ["--run_dir"]),
        (["--trainer.callbacks+=Nonsense"], ["Nonsense"]),
        ([*COMPRESS, "--trainer.callbacks.at_step=60"], ["Compress", "at_step=60", "beyond the run"]),
        ([*COMPRESS, "--trainer.callbacks.at_step=2", "--data.calibration", "0"], ["--data.calibration"]),
        (["--ckpt_path", "last"], ["--ckpt_path last", "there is no checkpoint", "--run_dir"]),
        (["--ckpt_path", "/nowhere.ckpt"], ["/nowhere.ckpt", "no such file"]),
        (["-c", "quikstart"], ["-c quikstart", "quickstart"]),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], ["--trainer.max_steps"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], words: list[str], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", "-c", config, "--run_dir", str(tmp_path / "run"), *arguments], capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("modle: {learning_rate: 1}", "modle"),
        ("model: {learning_rte: 1}", "model.learning_rte"),
        ("trainer: {callbacks: [{class_path: LastCheckpoint, init_args: {every: 3}}]}", "every"),
        ("model: [", "smaller.yaml: this is not YAML"),
        ("modle: {}", "did you mean 'model'"),
        ("just words", "smaller.yaml"),
    ],
)
def test_typos_in_config_files(
    text: str, word: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "smaller.yaml").write_text(text)
    line = refused(
        ["fit", "-c", config, "-c", str(tmp_path / "smaller.yaml"), "--run_dir", str(tmp_path / "run")], capsys
    )
    assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{ratio: 1.0}", "Novices: ratio must lie in [0, 1), got 1.0: 0.25 removes a quarter of the experts"),
        ("{ratio: 0.5, criterion: magic}", "Novices: unknown criterion 'magic': choose one of "),
        ("{ratio: much}", "Compress.methods: Novices.ratio: 'much' is not possible: Expected a float; Expected a null"),
        ("{ratioo: 0.5}", "Compress.methods: Novices: there is no option 'ratioo' (did you mean ratio?)"),
        ("{ratio: 0.5}, name: x", "Compress.methods: Not a valid subclass of Method"),
    ],
)
def test_mistakes_deep_inside_a_callback_are_told_alone(
    method: str, message: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parser tries all types that an option may have and tells why each one failed: a dozen lines."""
    methods = f"[{{class_path: Novices, init_args: {method}}}]"
    text = f"trainer: {{callbacks: [{{class_path: Compress, init_args: {{at_step: 2, methods: {methods}}}}}]}}"
    (tmp_path / "bad.yaml").write_text(text)
    line = refused(["fit", "-c", config, "-c", str(tmp_path / "bad.yaml"), "--run_dir", str(tmp_path / "run")], capsys)
    assert line.startswith("moe-lightning fit: error: ") and message in line and len(line) < 300
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "near"), [("Compres", "Compress"), ("LastCheckpont", "LastCheckpoint")])
def test_class_names_with_a_typo(
    name: str, near: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(f"trainer: {{callbacks: [{{class_path: {name}}}]}}")
    line = refused(["fit", "-c", config, "-c", str(tmp_path / "bad.yaml"), "--run_dir", str(tmp_path / "run")], capsys)
    assert f"--trainer.callbacks: there is no class '{name}' (did you mean {near}?)" in line


def callbacks(folder: Path, *items: str) -> list[str]:
    """Write a config with these callbacks and return the options that use it."""
    path = folder / "callbacks.yaml"
    path.write_text(f"trainer: {{callbacks: [{', '.join(items)}]}}")
    return ["-c", str(path)]


COMPRESS_AT_2 = (
    "{class_path: Compress, init_args: {at_step: 2, calibration_batches: 1, "
    "methods: [{class_path: Novices, init_args: {keep: %d}}]}}"
)


@pytest.mark.parametrize(
    "items",
    [
        ("{class_path: Export, init_args: {name: x, at_step: 2}}", "{class_path: Export, init_args: {name: x}}"),
        (COMPRESS_AT_2 % 3, COMPRESS_AT_2 % 2),
    ],
)
def test_callbacks_of_one_name(
    items: tuple[str, str], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["fit", "-c", config, *callbacks(tmp_path, *items), "--run_dir", str(tmp_path / "run")]
    assert "stands there 2 times: give one of them another name or step" in refused(run, capsys)
    assert not (tmp_path / "run").exists()


def test_a_file_as_run_directory(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    line = refused(["fit", "-c", config, "--run_dir", str(tmp_path / "run")], capsys)
    assert "--run_dir" in line and "this is a file" in line


def test_a_run_that_has_ended(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed as it is there is nothing to do, and that is said; with more steps the export of the end is a new one."""
    export = callbacks(tmp_path, "{class_path: Export, init_args: {name: final}}")
    run = ["fit", "-c", config, *export, "--run_dir", str(tmp_path / "run")]
    assert main([*run, "--trainer.max_steps", "3"]) == 0
    weights = tmp_path / "run" / "models" / "final" / "model.safetensors"
    first = weights.read_bytes()
    capsys.readouterr()
    assert main([*run, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    assert "nothing to do: the run has ended, at step 3" in capsys.readouterr().out
    assert weights.read_bytes() == first
    assert main([*run, "--trainer.max_steps", "5", "--ckpt_path", "last"]) == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert weights.read_bytes() != first


def test_what_is_printed_beside_our_own_lines(config: str, tmp_path: Path) -> None:
    """Warnings read well; what Lightning says about itself is left out."""
    few = callbacks(tmp_path, COMPRESS_AT_2 % 2)
    code = "import sys; from moe_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["fit", "-c", config, *few, "--run_dir", str(tmp_path / "run"), "--data.eval_batch_size", "1"]
    options += ["--data.block_size", "2", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "no calibration token reached" in line]
    assert lines and all(line.startswith("warning: layer ") for line in lines), result.stderr
    assert not [line for line in result.stderr.splitlines() if "LeafSpec" in line or "litlogger" in line]


def test_a_used_run_directory_is_not_overwritten_by_accident(
    trained: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["fit", "-c", config, "--run_dir", str(trained)], capsys)
    assert "--ckpt_path last" in line and "--overwrite true" in line


def test_a_failure_of_any_kind_before_the_first_step_leaves_nothing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("something that nobody foresaw")

    monkeypatch.setattr("moe_lightning.modules.MixtralModule.configure_optimizers", fail)
    with pytest.raises(KeyError):
        main(["fit", "-c", config, "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_overwriting_with_a_mistake_loses_nothing(
    folder: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mistake is found late, when data and model meet; the earlier run is there again afterwards."""
    run = folder / "precious"
    base = ["fit", "-c", config, "--run_dir", str(run)]
    assert main([*base, "--trainer.max_steps", "3"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused([*base, "--overwrite", "--model.model.vocab_size", "10"], capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_untrained_weights_are_not_evaluated_by_accident(
    command: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([command, "-c", config, "--run_dir", str(tmp_path)], capsys)
    assert "--ckpt_path last" in line and "--model.checkpoint" in line


def test_structure_that_contradicts_the_checkpoint(
    trained: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["test", "-c", config, "--run_dir", str(trained), "--ckpt_path", "last"]
    line = refused([*base, "--model.model.hidden_size", "64"], capsys)
    assert "hidden_size=64" in line and "hidden_size=32" in line


def test_files_that_are_no_checkpoints(
    trained: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.ckpt"
    half.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    base = ["test", "-c", config, "--run_dir", str(tmp_path / "run")]
    assert "cannot be read as a checkpoint" in refused([*base, "--ckpt_path", str(half)], capsys)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "no checkpoint of a MixtralModule" in refused([*base, "--ckpt_path", str(tmp_path / "other.ckpt")], capsys)


def test_another_tokenizer_than_the_checkpoints(trained: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["test", "-c", config, "--run_dir", str(trained), "--ckpt_path", "last"]
    assert "--data.tokenizer" in refused([*base, "--data.vocab_size", "290"], capsys)


# Configs by name


def test_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = packaged_configs()["quickstart"]
    assert find_config("quickstart") == find_config("quickstart.yaml") == quickstart
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/quickstart.yaml") == quickstart
    Path("quickstart").write_text("a: 1")
    assert find_config("quickstart") == Path("quickstart"), "a file that exists wins"
    arguments, found = resolve_configs(["fit", "-c", "quickstart.yaml", "--config=quickstart", "--x", "-c1"])
    assert arguments == ["fit", "-c", str(quickstart), "--config=quickstart", "--x", "-c1"]
    assert run_name(found) == "quickstart" and run_name([Path("a.yaml"), Path("x/b.yaml")]) == "a+b"


@pytest.mark.parametrize(
    "name", [name for name in packaged_configs() if "max_steps" in packaged_configs()[name].read_text()]
)
def test_packaged_configs_parse_and_build(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lightning.cli.lightning import MoELightningCLI

    built = []
    monkeypatch.setattr(MoELightningCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    arguments = ["fit", "-c", name, "--run_dir", str(tmp_path / "run")]
    if name.startswith(("recover/", "mixtral-8x7b/")):  # which begin with a folder of trained weights
        tiny_mixtral().save_pretrained(tmp_path / "model")
        arguments += ["--model.checkpoint", str(tmp_path / "model"), "--trainer.accelerator", "cpu"]
        arguments += ["--data.tokenizer", str(tmp_path / "model")]
    assert main(arguments) == 0
    assert built[0].trainer.max_steps > 0
    assert not (tmp_path / "run").exists()


def test_all_options_are_in_the_help() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from moe_lightning.cli import main; main(['fit', '--help'])"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for option in (
        "--run_dir",
        "--overwrite",
        "--ckpt_path",
        "--model.learning_rate",
        "--data.sources",
        "--trainer.max_steps",
    ):
        assert option in result.stdout
    assert "Peak of the schedule" in result.stdout
