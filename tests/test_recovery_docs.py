"""What docs/recovery.md says: stages have these options and defaults, the YAML parses, configs and commands exist."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from moe_lightning import callbacks
from moe_lightning.cli import main
from moe_lightning.cli.config_files import packaged_configs
from tests.models import SIZES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")
STAGES = {"RouterDistillation", "NoviceTuning", "LoRARecovery", "FullFineTuning"}


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def yaml_block() -> str:
    found = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def test_stages_have_the_options_and_defaults_that_the_table_names() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", TEXT, re.MULTILINE)
    assert {name for name, _ in rows} == STAGES
    for name, options in rows:
        parameters = inspect.signature(getattr(callbacks, name)).parameters
        assert options.startswith("at_step")
        for key, value in re.findall(r"(\w+)=([^,]+)", options):
            assert parameters[key].default == yaml.safe_load(value), f"{name}: {key}"
        for key in parameters:
            assert re.search(rf"\b{key}\b", TEXT), f"{name}: {key} is not told"


def test_the_yaml_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses, and the dry run finds nothing wrong with it."""
    (tmp_path / "chain.yaml").write_text(yaml_block())
    (tmp_path / "model").mkdir()
    fields = {**SIZES, "model_type": "mixtral", "dtype": "float32", "max_position_embeddings": 256}
    fields["intermediate_size"] = 64
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    given = [
        "-c",
        str(tmp_path / "chain.yaml"),
        "--model.checkpoint",
        str(tmp_path / "model"),
        "--data.calibration=128",
    ]
    assert status(["fit", *given, "--run_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for stage in STAGES - {"FullFineTuning"}:
        assert f"{stage}: the " in out
    assert "no stage" not in out


def test_the_yaml_is_the_packaged_chain() -> None:
    """In short: the same callbacks, and what it says of them is what stands there."""
    short = yaml.safe_load(yaml_block())["trainer"]["callbacks"]
    full = yaml.safe_load(packaged_configs()["recover/chain"].read_text())["trainer"]["callbacks"]
    names = [item["class_path"] for item in short]
    kept = [item for item in full if item["class_path"] in names]
    assert [item["class_path"] for item in kept] == names
    for brief, whole in zip(short, kept, strict=True):
        options, all_options = dict(brief["init_args"]), whole["init_args"]
        methods = [item["init_args"] for item in options.pop("methods", [])]
        assert all(all_options[key] == value for key, value in options.items()), brief["class_path"]
        for method, item in zip(methods, all_options.get("methods", []), strict=True):
            assert all(item["init_args"][key] == value for key, value in method.items())


def test_commands_and_configs_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for name in set(re.findall(r"\b((?:recover|mixtral-8x7b)/[\w-]+)\b", TEXT)) - {"recover/"}:
        assert name in packaged_configs(), name
    printed = ""
    for command in ("fit", "compress", "cache-logits"):
        assert status([command, "--help"]) == 0
        printed += capsys.readouterr().out
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w.]*", TEXT)):
        assert option in printed, option


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
