"""What docs/slimming.md says: options exist, the YAML parses, the Python runs, the bits are those of the formats."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from transformers import MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.cli import main
from moe_lightning.plan import WeightFormat
from moe_lightning.slimming.policy import SlimmingPolicy, Starved
from moe_lightning.surgery import plan_of
from tests.models import tiny_config
from tests.small_runs import write_texts

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "slimming.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    return found[1]


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_methods_have_the_options_and_defaults_that_the_table_names() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", TEXT, re.MULTILINE)
    assert {name for name, _ in rows} == {"Magnitude", "Wanda", "SparseGPT", "RTN", "GPTQ", "AWQ"}
    for name, options in rows:
        values = {key: yaml.safe_load(value) for key, value in re.findall(r"(\w+)=([^,]+)", options)}
        method = getattr(ml, name)(**values)
        defaults = {field.name: field.default for field in dataclasses.fields(method)}
        for key, value in values.items():
            assert key in ("sparsity", "pattern") or defaults[key] == value, f"{name}: {key}"
        text = " ".join(TEXT.split())
        for key in defaults:
            assert re.search(rf"\b{key}\b", text), f"{name}: {key} is not told"


def test_policies_and_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ", TEXT, re.MULTILINE)
    assert tuple(rows) == get_args(Starved)
    policy = SlimmingPolicy()
    for words in (f"`min_tokens` ({policy.min_tokens})", f"`max_fallback` ({policy.max_fallback})"):
        assert words in TEXT
    assert f"`max_moment_bytes` ({policy.max_moment_bytes // 2**30} GiB)" in TEXT


def test_bits_of_the_table() -> None:
    formats = {
        "int4, group 128": WeightFormat(4, 128),
        "int4, group 128, symmetric": WeightFormat(4, 128, symmetric=True),
        "int4, group 32": WeightFormat(4, 32),
        "int8, group 128": WeightFormat(8, 128),
        "2:4": WeightFormat(pattern="2:4"),
        "4:8, or half of the weights": WeightFormat(pattern="4:8"),
        "1:4, or a quarter of the weights": WeightFormat(sparsity=0.25),
    }
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| [^|]+ \| (?:no|yes) \|$", TEXT, re.MULTILINE)
    assert [name for name, _ in rows] == list(formats)
    for name, bits in rows:
        stored = 8 * formats[name].stored_bytes(1, 4096, 4096, 2) / 4096**2
        assert abs(stored - float(bits)) < 0.0051, name


def test_the_yaml_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slimming.yaml").write_text(block("yaml"))
    assert status(["fit", "-c", str(tmp_path / "slimming.yaml"), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    (compress,) = [item for item in printed["trainer"]["callbacks"] if item["class_path"].endswith("Compress")]
    (method,) = compress["init_args"]["methods"]
    assert method["init_args"]["sparsity"] == {"start": 0.1, "end": 0.5, "steps": 100, "every": 20, "shape": "cubic"}


def test_options_of_the_command_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["compress", "--help"]) == 0
    printed = capsys.readouterr().out
    for option in set(re.findall(r"(?<![\w-])--[a-z]\w*", TEXT)):
        assert option in printed, option


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "texts")
    options: dict[str, Any] = {"sources": f"{texts}/*.txt", "cache_dir": str(tmp_path / "cache")}
    small = {"vocab_size": 300, "block_size": 16, "batch_size": 2, "validation": 4, "test": 4, "calibration": 20}
    tokenizer = ml.TextDataModule(**options, **small).prepare().tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(vocab_size=len(tokenizer), intermediate_size=64)
        ml.save_pretrained(MixtralForCausalLM(config), tmp_path / "runs/quickstart/models/original", tokenizer)
    monkeypatch.chdir(tmp_path)
    code = block("python")
    given = 'ml.TextDataModule(tokenizer="runs/quickstart/models/original")'
    assert given in code
    arguments = {**options, **small, "tokenizer": "runs/quickstart/models/original"}
    exec(code.replace(given, f"ml.TextDataModule(**{arguments!r})"), {})
    assert "compressed 3 modules" in capsys.readouterr().out
    shape = ml.from_pretrained(tmp_path / "smaller")
    kinds = [edit.kind for edit in plan_of(shape).edits]
    assert kinds == ["drop_moe", "novice_experts", "novice_experts", "quantize", "quantize"]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
