"""``fit --dry_run`` on the sizes of Mixtral 8x7B: what trains, what it takes, and what is found before a run."""

import json
import re
from pathlib import Path

import pytest
import yaml

from moe_lightning.cli import main
from moe_lightning.cli.config_files import find_config
from moe_lightning.recovery.logit_cache import CacheHeader

ROOT = Path(__file__).resolve().parents[2]
SIZES = ROOT / "configs" / "mixtral-8x7b"

HIDDEN, WIDTH, LAYERS, EXPERTS, KEY_VALUES = 4096, 14336, 32, 8, 1024
BASE, LAYER_DROP = 46_702_792_704, 35_428_208_640
LEFT = 24
"""Layers that keep their MoE."""
LORA = 16 * (
    LAYERS * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KEY_VALUES))
    + LEFT * EXPERTS * ((HIDDEN + 2 * WIDTH) + (WIDTH + HIDDEN))
)


def fit(*arguments: str, model: Path = SIZES) -> int:
    try:
        return main(["fit", *arguments, "--model.checkpoint", str(model), "--dry_run"])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def table(out: str) -> list[list[str]]:
    """Return the rows, cell by cell; what has no number is missing."""
    return [line.split() for line in out.splitlines() if re.match(r" *(\d+|end) +[\d,]+ ", line)]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_chain_for_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("-c", "mixtral-8x7b/recover-lora", "--run_dir", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert f"{BASE:,} parameters, 86.99 GiB in bfloat16" in out
    assert "1,000 steps on 1 x gpu, 32,768 tokens a step" in out
    rows = table(out)
    assert [row[0] for row in rows] == ["0", "0", "200", "200", "end", "end"]
    sizes = [number(row[1]) for row in rows]
    assert sizes == [LAYER_DROP, LAYER_DROP, LAYER_DROP + LORA, LAYER_DROP + LORA, LAYER_DROP, LAYER_DROP]
    router, lora = rows[1], rows[3]
    routers = LEFT * EXPERTS * HIDDEN
    assert [number(cell) for cell in router[2:5]] == [routers, 200, 200 * 32_768]
    assert [number(cell) for cell in lora[2:5]] == [LORA, 800, 800 * 32_768]
    # int4 by hand: 4 bits, 4 of a zero point and 16 of a scale for 128 weights; gradient and two moments in bfloat16.
    experts = LEFT * EXPERTS * 3 * HIDDEN * WIDTH
    held = 2 * (LAYER_DROP - experts) + experts * (4 + 20 / 128) / 8
    assert abs(number(router[5]) - (held + 6 * routers) / 2**30) < 0.06
    assert abs(number(lora[5]) - (held + 8 * LORA) / 2**30) < 0.06
    cached = 16_000 * CacheHeader(32_000, 2048, 64, 2.0).bytes_per_block / 2**30
    assert f"not there yet; 64 words for each token of 16,000 blocks take {cached:.2f} GiB on disk" in out
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("-c", "mixtral-8x7b/recover-full", "--run_dir", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "3 epochs on 1 x auto, 65,536 tokens a step" in out and "173.98 GiB in float32" in out
    drop, full = table(out)
    assert [drop[0], number(drop[1])] == ["0", LAYER_DROP]
    assert [number(cell) for cell in full[1:3]] == [LAYER_DROP, LAYER_DROP]
    assert abs(number(full[5]) - 16 * LAYER_DROP / 2**30) < 0.06
    assert "learning rate 8e-06, the model's, warm-up 13" in out


def test_the_published_settings_of_the_fine_tuning() -> None:
    options = yaml.safe_load(find_config("mixtral-8x7b/recover-full").read_text())
    assert options["trainer"]["max_epochs"] == 3 and options["model"]["learning_rate"] == 8e-6
    assert options["data"]["batch_size"] * options["trainer"]["accumulate_grad_batches"] == 32
    epochs, blocks = 3, 4700
    assert options["model"]["warmup_steps"] == round(0.03 * epochs * blocks / 32)


def test_the_cache_is_of_the_text_of_the_run() -> None:
    run, cache = (
        yaml.safe_load(find_config(f"mixtral-8x7b/{name}").read_text()) for name in ("recover-lora", "cache-logits")
    )
    assert cache["data"] == run["data"]
    assert cache["steps"] == run["trainer"]["max_steps"]
    assert cache["accumulate_grad_batches"] == run["trainer"]["accumulate_grad_batches"]
    stages = [item["init_args"] for item in run["trainer"]["callbacks"] if "teacher" in item.get("init_args", {})]
    assert len(stages) == 2
    for stage in stages:
        assert (stage["teacher"], stage["temperature"]) == (cache["output"], cache["temperature"])
    with pytest.raises(SystemExit) as leaving:
        main(["cache-logits", "-c", "mixtral-8x7b/cache-logits", "--model", "m", "--print_config"])
    assert leaving.value.code == 0


CHAIN = "mixtral-8x7b/recover-lora"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.strategy", "fsdp"], ["Compress", "FSDPStrategy", "shards"]),
        (["--trainer.strategy", "deepspeed_stage_3"], ["Compress", "DeepSpeedStrategy"]),
        (["--trainer.max_steps", "150"], ["RouterDistillation", "beyond the run", "150 steps"]),
        (["--data.calibration", "100"], ["128 calibration batches of 1 blocks", "--data.calibration is 100"]),
        (["--ckpt_path", "last"], ["--dry_run", "leave --ckpt_path out"]),
        (["--trainer.callbacks+=RouterDistillation", "--trainer.callbacks.at_step=100"], ["RouterDistillation", "100"]),
        (["--trainer.callbacks+=NoviceTuning", "--trainer.callbacks.at_step=500"], ["NoviceTuning", "no novices"]),
    ],
)
def test_what_a_run_would_find(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("-c", CHAIN, "--run_dir", str(tmp_path / "run"), *arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_what_would_not_fit_in_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = yaml.safe_load((SIZES / "recover-lora.yaml").read_text())
    last = [item for item in options["trainer"]["callbacks"] if item["class_path"] == "Compress"][-1]
    last["init_args"]["methods"] = [{"class_path": "BlockDrop", "init_args": {"count": 32}}]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(options))
    assert fit("-c", str(tmp_path / "wrong.yaml")) == 2
    written = capsys.readouterr()
    assert "Compress at the end: " in written.err and "parameters" not in written.out


def test_devices_and_stretches_without_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = yaml.safe_load((SIZES / "recover-lora.yaml").read_text())
    kept = [item for item in options["trainer"]["callbacks"] if item["class_path"] == "RouterDistillation"]
    kept[0]["init_args"] |= {"at_step": 50, "teacher": None, "alpha": 0.0}
    options["trainer"]["callbacks"] = kept
    (tmp_path / "gaps.yaml").write_text(yaml.safe_dump(options))
    arguments = ["--trainer.devices", "4", "--trainer.strategy", "ddp", "--model.learning_rate", "0.5"]
    assert fit("-c", str(tmp_path / "gaps.yaml"), *arguments) == 0
    out = capsys.readouterr().out
    assert "1,000 steps on 4 x gpu, 131,072 tokens a step: 2 blocks of 2048 x 4 processes x 8 batches" in out
    rows = table(out)
    assert [(row[0], number(row[2]), number(row[3])) for row in rows] == [
        ("0", BASE, 50),
        ("50", LAYERS * EXPERTS * HIDDEN, 200),
        ("250", BASE, 750),
    ]
    assert out.count("no stage: everything trains, learning rate 0.5, the model's") == 2


def test_damaged_weights_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((SIZES / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert fit("-c", CHAIN, "--data.tokenizer", "its-own", model=tmp_path) == 2
    assert "damaged or cut short" in capsys.readouterr().err
    assert fit("-c", CHAIN, model=tmp_path / "nothing") == 2
    assert "there is no checkpoint folder" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert fit("-c", CHAIN, model=tmp_path / "other") == 2
    assert "model.checkpoint=" in capsys.readouterr().err


def test_the_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--dry_run" in text and "neither weights nor text are looked at" in text
    options = ("LoRARecovery", "RouterDistillation", "NoviceTuning", "FullFineTuning")
    for stage in options:
        with pytest.raises(SystemExit):
            main(["fit", f"--trainer.callbacks.help={stage}"])
        told = capsys.readouterr().out
        wanted = ["at_step", "steps", "learning_rate", "warmup_steps", "teacher", "alpha", "temperature"]
        wanted += ["hidden_weight", "load_balancing_coefficient"]
        wanted += ["rank", "lora_alpha", "targets", "merge", "requantize"] if stage == "LoRARecovery" else []
        for option in wanted:
            assert re.search(rf"--trainer\.callbacks(\.init_args)?\.{option}\b", told), f"{stage}: {option}"
