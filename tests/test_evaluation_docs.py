"""What docs/evaluation.md says: callbacks have these options, YAML and Python run, commands and tags exist."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from moe_lightning import callbacks
from moe_lightning.callbacks.quality.telling import intervals_of, scalars
from moe_lightning.cli import main
from moe_lightning.cli.config_files import packaged_configs
from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.evaluation.intervals import tail_probability
from moe_lightning.evaluation.records import QualityMoment, QualityRecord, Rate, Routing, TextScores
from tests.models import SIZES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
CALLBACKS = {"QualityEvaluation", "LMEval", "TimeSpent", "CompressionReport"}


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def moment(name: str, seed: int) -> QualityMoment:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.full((6,), 31)
    nats, divergence = (tokens * torch.rand(6, generator=draw, dtype=torch.float64) for _ in range(2))
    scores = BlockScores(nats, tokens, 4 * tokens, divergence, tokens.double() / 2)
    texts = {text: TextScores(scores, text == "test", "same") for text in ("test", "prose")}
    routing = Routing([0], [[0.5, 0.5]], [[0.7, 0.3]], [[1]])
    rates = {phase: Rate(9.0, 8.0, 10.0, 1, 8) for phase in ("prefill", "decode")}
    return QualityMoment(name, 3, "nothing", texts, 10, 40, 40, 99, rates, routing, {0: 0.1})


def test_callbacks_have_the_options_and_defaults_that_the_table_names() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", TEXT, re.MULTILINE)
    assert {name for name, _ in rows} == CALLBACKS
    for name, options in rows:
        parameters = dict(inspect.signature(getattr(callbacks, name)).parameters)
        parameters.pop("batches", None)  # from Python only
        told = dict(re.findall(r"(\w+)(?:=([^,]+))?", options))
        assert list(told) == list(parameters), name
        for key, value in told.items():
            default = parameters[key].default
            assert default is inspect.Parameter.empty if not value else default == yaml.safe_load(value), key


def test_the_yaml_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses, and the dry run finds nothing wrong with it."""
    (tmp_path / "measured.yaml").write_text(block("yaml"))
    (tmp_path / "model").mkdir()
    fields = {**SIZES, "model_type": "mixtral", "dtype": "float32", "max_position_embeddings": 256}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    given = ["-c", str(tmp_path / "measured.yaml"), "--model.checkpoint", str(tmp_path / "model")]
    assert status(["fit", *given, "--run_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "NoviceTuning: the novices" in capsys.readouterr().out
    named = {item["class_path"] for item in yaml.safe_load(block("yaml"))["trainer"]["callbacks"]}
    assert CALLBACKS - {"LMEval"} <= named


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, run in enumerate(("one", "other")):
        (tmp_path / "runs" / run / "results").mkdir(parents=True)
        QualityRecord([moment("end", seed)], {}).save(tmp_path / "runs" / run / "results" / "quality.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "docs/evaluation.md", "exec"), {})
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["nats_per_token", "perplexity_ratio", "divergence", "agreement"]
    for name in printed:
        assert f"`{name}`" in TEXT


def test_tags_are_those_that_are_logged() -> None:
    before, end = moment("before", 0), moment("end", 1)
    logged = scalars(end, intervals_of(end, before))
    told = {
        name.removeprefix("quality/").replace("layer_N", "layer_0")
        for row in TEXT.splitlines()
        if row.startswith("| `quality/")
        for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])
    }
    assert {tag.removeprefix("quality/") for tag in logged if "prose" not in tag} == told - {"samples", "TEXT/..."}
    assert "quality/prose/perplexity_ratio" in logged


def test_tails_are_those_of_the_formula() -> None:
    numbers = re.search(r"percentile: ([\d.]+) % on each side for 16 blocks, ([\d.]+) % for 64, ([\d.]+) %", TEXT)
    assert numbers is not None
    for told, blocks in zip(numbers.groups(), (16, 64, 100_000), strict=True):
        assert math.isclose(100 * tail_probability(blocks, 0.95), float(told), abs_tol=0.05)


def test_commands_and_configs_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(re.findall(r"\bevaluate/[\w-]+", TEXT)):
        assert name in packaged_configs(), name
    printed = ""
    for command in ("test", "benchmark", "report"):
        assert status([command, "--help"]) == 0
        printed += capsys.readouterr().out
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w.]*", TEXT)):
        assert option in printed, option


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
