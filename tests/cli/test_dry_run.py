"""Dry runs on the sizes of Mixtral 8x7B alone: no weights, no text, and the numbers that the papers have."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from moe_lightning.cli import main
from moe_lightning.cli.config_files import packaged_configs

ROOT = Path(__file__).resolve().parents[2]
SIZES = ROOT / "configs" / "mixtral-8x7b"

# Parameters, and GiB in bfloat16 as they are on disk (int4: 4.16 bits a weight of the experts that are left).
COMPRESSED = {
    "awq": (46_702_792_704, 24.81),
    "expert-drop": (35_428_241_408, 65.99),
    "expert-drop-awq": (35_428_241_408, 19.36),
    "layer-drop": (35_428_208_640, 65.99),
    "layer-drop-awq": (35_428_208_640, 19.36),
    "block-drop": (39_446_441_984, 73.47),
    "block-drop-awq": (39_446_441_984, 21.01),
    "novices": (35_428_765_696, 65.99),
}


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def compress(*arguments: str, model: Path = SIZES) -> int:
    return status(["compress", *arguments, "--model", str(model), "--dry_run"])


def test_every_packaged_compression_of_mixtral_is_here() -> None:
    names = {name.removeprefix("mixtral-8x7b/") for name in packaged_configs() if name.startswith("mixtral-8x7b/")}
    assert {name for name in names if name.split("-")[0] not in ("recover", "cache")} == set(COMPRESSED)


@pytest.mark.parametrize("name", COMPRESSED)
def test_sizes_of_the_papers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parameters, gib = COMPRESSED[name]
    assert compress("-c", f"mixtral-8x7b/{name}") == 0
    out = capsys.readouterr().out
    assert f"46,702,792,704 -> {parameters:,} parameters" in out
    disk = re.search(r"([\d,.]+) MiB -> ([\d,.]+) MiB of weights on disk", out)
    assert disk is not None
    before, after = (float(number.replace(",", "")) / 1024 for number in disk.groups())
    assert abs(before - 86.99) < 0.005 and abs(after - gib) < 0.006
    blocks, length = (100, 4096) if name == "novices" else (128, 2048)
    assert f"{blocks} calibration blocks, 64 test blocks of {length} tokens" in out
    memory = re.search(r"memory   about ([\d,]+) MiB", out)
    assert memory is not None and int(memory[1].replace(",", "")) > 86.99 * 1024
    assert "holds no weights: only sizes were looked at" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.test", "0.1"], "--data.test 0.1: how many blocks of text that is depends on a text"),
        (["--calibration_batches", "200"], "200 calibration batches of 1 blocks were asked for"),
        (["--data.block_size", "40000"], "--data.block_size 40000 is more than the model's longest sequence"),
        (["--methods", "[{class_path: LayerDrop, init_args: {count: 33}}]"], "LayerDrop"),
    ],
)
def test_mistakes_are_found_without_weights(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress("-c", "mixtral-8x7b/layer-drop-awq", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_real_run_wants_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["compress", "-c", "mixtral-8x7b/awq", "--model", str(SIZES), "--output", str(tmp_path / "out")]
    assert status(given) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


def test_weights_that_are_there_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SIZES / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert compress("-c", "mixtral-8x7b/awq", model=tmp_path) == 2
    assert "damaged or cut short" in capsys.readouterr().err


def test_the_type_must_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads((SIZES / "config.json").read_text())
    del fields["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert compress("-c", "mixtral-8x7b/awq", model=tmp_path) == 2
    assert "its config.json names no type" in capsys.readouterr().err
    assert compress("-c", "mixtral-8x7b/awq", "--dtype", "float16", model=tmp_path) == 0


def test_what_the_comments_promise() -> None:
    for name in COMPRESSED:
        text = (SIZES / f"{name}.yaml").read_text()
        assert f"moe-lightning compress -c mixtral-8x7b/{name} --model DIR --dry_run\n" in text
        assert yaml.safe_load(text)["data"]["calibration"] in (100, 128)
