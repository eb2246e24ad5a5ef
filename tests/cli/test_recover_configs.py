"""The packaged configs of recovery, each run from first step to last on a tiny model; dry runs foretell them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.cli import main
from moe_lightning.cli.config_files import find_config, packaged_configs
from moe_lightning.reporting.report import read
from tests.models import tiny_config
from tests.small_runs import write_texts

STAGES = {
    "router": ["RouterDistillation"],
    "novices": ["NoviceTuning"],
    "lora": ["LoRARecovery"],
    "full": ["FullFineTuning"],
    "chain": ["RouterDistillation", "NoviceTuning", "LoRARecovery"],
}
QUICKSTART = 600 * 8 * 256
"""Tokens that the quickstart's model has trained on when it is compressed."""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures, which take longer than the runs."""
    monkeypatch.setattr(read, "run_figures", lambda *data: {})


def content(name: str) -> dict:
    return yaml.safe_load(find_config(name).read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("recover")
    options = data(folder)
    tokenizer = ml.TextDataModule(**options).prepare().tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(vocab_size=len(tokenizer), intermediate_size=64)
        ml.save_pretrained(MixtralForCausalLM(config), folder / "model", tokenizer)
    return folder


def data(folder: Path) -> dict:
    if not (folder / "texts").exists():
        write_texts(folder / "texts")
    sizes = {"vocab_size": 300, "block_size": 16, "batch_size": 2, "validation": 4, "test": 4, "calibration": 32}
    return {"sources": f"{folder}/texts/*.txt", "cache_dir": str(folder / "cache"), **sizes}


def fit(place: Path, name: str, run: Path, *arguments: str) -> int:
    given = [f"--data.{key}={value}" for key, value in data(place).items() if key != "vocab_size"]
    given += ["--model.checkpoint", str(place / "model"), "--run_dir", str(run)]
    try:
        return main(["fit", "-c", f"recover/{name}", *given, *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_these_are_all() -> None:
    assert {name for name in packaged_configs() if name.startswith("recover/")} == {f"recover/{n}" for n in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_what_a_config_is(name: str) -> None:
    options, quickstart = content(f"recover/{name}"), content("quickstart")
    callbacks = [item["class_path"] for item in options["trainer"]["callbacks"]]
    known = {stage for stages in STAGES.values() for stage in stages}
    assert [item for item in callbacks if item in known] == STAGES[name]
    assert {"RecoveredShare", "Compress", "LastCheckpoint"} <= set(callbacks)
    exported = [i["init_args"]["name"] for i in options["trainer"]["callbacks"] if i["class_path"] == "Export"]
    assert exported == ["compressed", "recovered"]
    # The model comes from a folder: a config that set fields would have to be undone by hand.
    assert not {"model", "checkpoint", "plan"} & set(options["model"])
    # The same splits as the quickstart's: nothing that is tested on was trained on.
    same = {key: value for key, value in quickstart["data"].items() if key != "vocab_size"}
    assert {key: value for key, value in options["data"].items() if key != "order_seed"} == same
    tokens = options["trainer"]["max_steps"] * options["data"]["batch_size"] * options["data"]["block_size"]
    assert tokens <= QUICKSTART / 10
    # Every step belongs to a stage.
    stages = [item["init_args"] for item in options["trainer"]["callbacks"] if item["class_path"] in STAGES[name]]
    step = 0
    for stage in stages:
        assert stage["at_step"] == step and stage["learning_rate"] and stage["teacher"] == "before"
        step += stage.get("steps", options["trainer"]["max_steps"] - step)
    assert step == options["trainer"]["max_steps"]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_does_what_its_dry_run_said(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(place, name, run, "--dry_run") == 0
    dry = capsys.readouterr().out
    assert not run.exists()
    assert fit(place, name, run) == 0
    out = capsys.readouterr().out
    said = re.findall(r"^step (\d+): (\w+) trains the ([\w -]+): ([\d,]+) of ([\d,]+) parameters", out, re.MULTILINE)
    assert [item[1] for item in said] == STAGES[name]
    for step, stage, words, trained, total in said:
        row = re.search(rf"^ +{step} +{total} +{trained} .* {stage}: the {words}, learning rate", dry, re.MULTILINE)
        assert row is not None, dry
    recovery = json.loads((run / "results" / "recovery.json").read_text())
    events = [item["event"] for item in recovery["boundaries"]]
    assert [event for event in events if event != "compressed"] == STAGES[name]
    assert events.count("compressed") == len(re.findall(r" Compress: ", dry)) == (3 if name == "chain" else 1)
    recovered = ml.from_pretrained(run / "models" / "recovered")
    last = [line.split()[1] for line in dry.splitlines() if re.match(r" +(\d+|end) +[\d,]+ ", line)][-1]
    assert f"{ml.measure(recovered).parameters:,}" == last
    assert (run / "models" / "compressed").is_dir()
    assert not [key for key in recovered.state_dict() if "lora_" in key]


def test_without_a_folder_the_message_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "-c", "recover/chain", "--run_dir", str(tmp_path / "run")])
    assert "model.checkpoint" in capsys.readouterr().err


def test_a_run_shorter_than_its_validation_interval(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(place, "router", run, "--trainer.max_steps", "6") == 0
    assert "--trainer.val_check_interval 20 is more than the 6 batches of the run" in capsys.readouterr().err
    boundaries = json.loads((run / "results" / "recovery.json").read_text())["boundaries"]
    assert boundaries[-1]["step"] == 6


def test_lightning_on_epochs_that_are_too_short_for_validation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5")
    assert fit(place, "router", tmp_path / "run", *options) == 2
    said = "error: --trainer.val_check_interval 20 is more than the 5 batches of an epoch: set it to 5 or less"
    assert said in capsys.readouterr().err
