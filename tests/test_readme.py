"""What the README and the shipped configs say works: the YAML parses, the Python runs, the options exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.cli import main
from tests.models import tiny_config
from tests.small_runs import write_texts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_the_yaml_of_the_readme_parses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "readme.yaml").write_text(block("yaml"))
    assert status(["fit", "-c", str(tmp_path / "readme.yaml"), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "novice: low_rank" in printed
    assert "max_steps: 700" in printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = r"criterion: residual|criteria:\n\s+- residual"
    if path.parent.name == "sweeps":
        arguments = ["sweep", "-c", str(path), "--model", "somewhere", "--output", "elsewhere"]
    elif path.parent.name == "slimming":  # fragments that stand behind another file
        arguments = ["compress", "-c", "compress", "-c", str(path), "--model", "somewhere"]
        expected = r"moe_lightning\.slimming\.\w+\.(GPTQ|SparseGPT)|class_path: (moe_lightning\.)?(GPTQ|SparseGPT)"
    elif path.parent.name == "mixtral-8x7b" and not path.stem.startswith("recover"):
        command = "cache-logits" if path.stem == "cache-logits" else "compress"
        arguments = [command, "-c", str(path), "--model", "somewhere", "--output", "elsewhere"]
        expected = r"top_k: \d+|(ExpertDrop|LayerDrop|BlockDrop|AWQ|Novices)"
    elif path.parent.name in ("recover", "mixtral-8x7b"):
        arguments = ["fit", "-c", str(path)]
        expected = r"(RouterDistillation|NoviceTuning|LoRARecovery|FullFineTuning)"
    elif path.parent.name == "evaluate":  # alone on a folder, or behind the config of the run that is tested
        arguments = ["test", "-c", "quickstart", "-c", str(path), "--ckpt_path", "somewhere"]
        expected = r"LMEval\n +init_args:\n +tasks: (mone|unified-framework)\n"
    elif path.stem.startswith("compress"):
        arguments = ["compress", "-c", str(path), "--model", "somewhere"]
    else:
        arguments = ["fit", "-c", str(path)]
    assert status([*arguments, "--print_config"]) == 0
    assert re.search(expected, capsys.readouterr().out)


def test_every_option_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps = ""
    for command in ("fit", "predict", "compress", "collect", "plan", "benchmark", "report", "sweep"):
        assert status([command, "--help"]) == 0
        helps += capsys.readouterr().out
    for option in sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.]*", README))):
        assert re.search(rf"{re.escape(option)}\b", helps), option


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "texts")
    options: dict[str, Any] = {"sources": f"{texts}/*.txt", "cache_dir": str(tmp_path / "cache")}
    small = {"vocab_size": 300, "block_size": 16, "batch_size": 2, "validation": 4, "test": 4, "calibration": 40}
    tokenizer = ml.TextDataModule(**options, **small).prepare().tokenizer
    torch.manual_seed(0)
    ml.save_pretrained(
        MixtralForCausalLM(tiny_config(vocab_size=len(tokenizer))),
        tmp_path / "runs/quickstart/models/original",
        tokenizer,
    )
    monkeypatch.chdir(tmp_path)
    code = block("python")
    # The same calls on small texts: the library's own sources would take a minute.
    given = 'ml.TextDataModule(tokenizer="runs/quickstart/models/original")'
    assert given in code
    arguments = {**options, **small, "tokenizer": "runs/quickstart/models/original"}
    exec(code.replace(given, f"ml.TextDataModule(**{arguments!r})"), {})
    printed = capsys.readouterr().out
    assert "tensor(" in printed
    assert "compressed 3 modules" in printed
    smaller = ml.from_pretrained(tmp_path / "smaller")
    assert ml.measure(smaller).parameters < ml.measure(ml.from_pretrained("runs/quickstart/models/original")).parameters


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
