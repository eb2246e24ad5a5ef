"""What ml.compress says, in the words of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import moe_lightning as ml
from moe_lightning.callbacks import CompactProgress
from moe_lightning.cli import main
from moe_lightning.cli.messages import for_the_command
from moe_lightning.sizes import count_trainable
from tests.callbacks.slimming_runs import INT4
from tests.callbacks.small_fit import fit, tiny_module
from tests.small_checkpoints import write_checkpoint


def test_top_up_is_not_an_option_of_the_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"data": write_checkpoint(tmp_path)}))
    given = ["--model", str(tmp_path / "hub"), "--output", str(tmp_path / "out"), "--calibration_batches", "1"]
    methods = "[{class_path: GPTQ, init_args: {group_size: 16}}]"
    draws = ["--methods", methods, "--starved", "top_up", "--min_tokens", "5000"]
    with pytest.warns(UserWarning, match=r"fewer than min_tokens=5000") as caught:
        assert main(["compress", "-c", str(config), *given, *draws, "--max_fallback", "1"]) == 0
    told = [for_the_command(str(item.message), "compress") for item in caught]
    (few,) = [text for text in told if "calibration tokens reach layer" in text]
    assert few.startswith(
        "the calibration split is exhausted, and fewer than min_tokens=5000 calibration tokens reach "
    )
    assert few.endswith(" and 10 more: raise --data.calibration, give other text, or set a lower min_tokens")
    assert "top_up" not in few


def test_lists_of_experts_end() -> None:
    listed = "; ".join(f"layer {layer}: experts " + ", ".join(f"{e} ({e})" for e in range(3)) for layer in range(4))
    text = f"min_tokens=9, but fewer calibration tokens reach {listed}: let starved='top_up' draw more"
    assert for_the_command(text, "compress") == (
        "min_tokens=9, but fewer calibration tokens reach layer 0: experts 0 (0), 1 (1), 2 (2); layer 1: experts "
        "0 (0), 1 (1), 2 (2); layer 2: experts 0 (0), 1 (1) and 4 more: let --starved top_up draw more"
    )
    assert for_the_command("let starved='top_up' draw", "fit") == "let starved: top_up draw"
    matrices = ", ".join(f"{expert}.down_proj" for expert in range(9))
    text = f"allows (layer 3: {matrices}): give"
    assert for_the_command(text, "fit") == f"allows (layer 3: {matrices[: -len(', 8.down_proj')]} and 1 more): give"
    for short in ("layer 0: experts 1 (2)", "layer 1: Wanda asks for fewer", "nothing", f"layer 3: {matrices[:40]}"):
        assert for_the_command(short, "compress") == short


def test_packed_weights_are_parameters_that_do_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny_module()
    module.configure_model()
    whole = ml.measure(module.model).parameters
    ml.compress(module.model, None, [ml.Magnitude(sparsity=0.5, targets="experts+attention")], progress=False)
    sparse = ml.measure(module.model).parameters
    zeros = sum(int((parameter == 0).sum()) for name, parameter in module.named_parameters() if "stack" in name)
    zeros += sum(int((item == 0).sum()) for name, item in module.named_parameters() if "storage" in name)
    assert sparse == whole and count_trainable(module) == whole - zeros < whole
    ml.compress(module.model, None, ml.RTN(**INT4), progress=False)
    trained = count_trainable(module)
    assert ml.measure(module.model).parameters == whole and 0 < trained < whole - zeros
    fit(module, tmp_path, [CompactProgress()], steps=1, enable_progress_bar=True)
    assert f": {whole:,} parameters, {trained:,} of them train, 1 steps on cpu" in capsys.readouterr().out
