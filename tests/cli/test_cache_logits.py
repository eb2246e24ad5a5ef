"""moe-lightning cache-logits: which blocks, what is said before, what goes on, and a run that learns from it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import RouterDistillation
from moe_lightning.callbacks.recovery.blocks_to_come import batches_of
from moe_lightning.cli import main
from moe_lightning.recovery.logit_cache import LogitCache, block_hashes
from moe_lightning.statistics.fingerprint import fingerprint
from tests.small_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts, a checkpoint, and a config file with the options of the data."""
    path = tmp_path_factory.mktemp("cache")
    data = write_checkpoint(path)
    data["tokenizer"] = str(path / "hub")
    (path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    return path


def data_of(folder: Path, **changes: Any) -> ml.TextDataModule:
    return ml.TextDataModule(**{**yaml.safe_load((folder / "data.yaml").read_text())["data"], **changes})


def run(folder: Path, output: Path, *options: str, steps: int = 3) -> int:
    model = ["--model", str(folder / "hub"), "--output", str(output), "--steps", str(steps)]
    return main(["cache-logits", "-c", str(folder / "data.yaml"), *model, *options])


class Blocks(Callback):
    """Keeps the hashes of the blocks that a run trains on, by optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, set[bytes]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seen = self.steps.setdefault(trainer.global_step, set())
        seen |= {row.tobytes() for row in block_hashes(batch["input_ids"])}


def fit(folder: Path, run_dir: Path, callbacks: list[Any], **options: Any) -> Trainer:
    torch.manual_seed(0)
    module = ml.MixtralModule(checkpoint=str(folder / "hub"), learning_rate=1e-3, warmup_steps=0)
    flags = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    trainer = Trainer(
        default_root_dir=run_dir,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **{**dict.fromkeys(flags, False), **options},
    )
    trainer.fit(module, datamodule=data_of(folder))
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_exactly_the_blocks_that_a_run_sees(folder: Path, tmp_path: Path, accumulate: int) -> None:
    more = ["--accumulate_grad_batches", str(accumulate), "--from_step", "2"]
    assert run(folder, tmp_path / "cache", *more, steps=3) == 0
    blocks = Blocks()
    fit(folder, tmp_path, [blocks], max_steps=6, accumulate_grad_batches=accumulate)
    wanted = set().union(*(blocks.steps[step] for step in (2, 3, 4)))
    assert len(wanted) == 3 * 2 * accumulate
    cached = {row.tobytes() for shard in LogitCache(tmp_path / "cache")._shards for row in shard["hash"].numpy()}
    assert cached == wanted


def test_of_several_processes_together(folder: Path, tmp_path: Path) -> None:
    """Two processes with batches of two take what one takes with batches of four."""
    assert run(folder, tmp_path / "two", "--devices", "2") == 0
    assert run(folder, tmp_path / "one", "--data.batch_size", "4", "--batch_size", "1") == 0
    stream = data_of(folder).prepare().train_dataloader()
    hashes = set()
    for rank in range(2):
        mine = type(stream)(stream.blocks, 2, seed=0, rank=rank, world_size=2)
        for index in range(3):
            hashes |= {row.tobytes() for row in block_hashes(mine.batch(index)["input_ids"])}
    for name in ("one", "two"):
        cache = LogitCache(tmp_path / name)
        assert {row.tobytes() for shard in cache._shards for row in shard["hash"].numpy()} == hashes


def test_another_seed_is_another_order(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "cache", "--data.seed", "5") == 0
    cache, stream = LogitCache(tmp_path / "cache"), data_of(folder, seed=5).prepare().train_dataloader()
    assert all(cache.holds(stream.batch(index)["input_ids"]).all() for index in range(3))
    assert cache.header.data["seed"] == 5


def test_what_it_says_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path / "cache", "--top_k", "8", "--temperature", "2.0") == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines]
    assert words == ["model", "data", "size", "output", "time", "kept", "wrote"]
    header = json.loads((tmp_path / "cache" / "cache.json").read_text())
    each = 16 * (8 * 4 + 8) + 16
    assert f"{each:,} bytes a block" in lines[2] and header["bytes_per_block"] == each
    assert re.fullmatch(r"time     about [\d,]+ s, by the first batch", lines[4])
    assert "6 blocks" in lines[1] and "6 blocks" in lines[6]
    model = ml.from_pretrained(folder / "hub")
    assert (header["blocks"], header["top_k"], header["temperature"]) == (6, 8, 2.0)
    assert header["teacher"] == {"folder": str(folder / "hub"), "fingerprint": fingerprint(model)}
    batch = data_of(folder).prepare().train_dataloader().batch(1)
    got = LogitCache(tmp_path / "cache").look_up(batch["input_ids"])
    with torch.no_grad():
        log = (model(batch["input_ids"]).logits / 2).log_softmax(-1)
    assert torch.equal(got.words, log.topk(8).indices)
    with torch.no_grad():
        every = [data_of(folder).prepare().train_dataloader().batch(index)["input_ids"] for index in range(3)]
        mass = (model(torch.cat(every)).logits / 2).softmax(-1).topk(8).values.sum(-1).mean()
    assert header["kept_mass"] == pytest.approx(float(mass), rel=1e-3) and mass < 0.5
    said = f"the 8 likeliest words cover {mass:.0%}".replace("%", " %")
    assert lines[5] == f"kept     {said} of the teacher's probability on average: a larger --top_k covers more"
    torch.testing.assert_close(got.log_probability, log.topk(8).values, rtol=0, atol=4e-3)


def test_it_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path / "cache", steps=2) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("*.safetensors")}
    assert run(folder, tmp_path / "cache", steps=4) == 0
    assert "found    4 of these blocks" in capsys.readouterr().out
    assert all((tmp_path / "cache" / name).read_bytes() == content for name, content in first.items())
    assert len(LogitCache(tmp_path / "cache")) == 8
    mass = LogitCache(tmp_path / "cache").header.kept_mass
    assert run(folder, tmp_path / "anew", steps=4) == 0
    assert mass == pytest.approx(LogitCache(tmp_path / "anew").header.kept_mass, rel=1e-6)
    assert run(folder, tmp_path / "cache", steps=3) == 0
    assert len(LogitCache(tmp_path / "cache")) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ["--steps", "1 or more"]),
        (["--from_step", "-1"], ["--from_step"]),
        (["--top_k", "100000"], ["top_k", "vocabulary"]),
        (["--temperature", "0"], ["temperature"]),
        (["--storage", "bfloat16"], ["--storage", "float32"]),
        (["--model", "nowhere"], ["nowhere"]),
        (["--data.block_size", "1024"], ["--data.block_size", "longest sequence"]),
        (["--top_k", "3"], ["top_k 64, not 3", "overwrite"]),
        (["--output", "TEXTS"], ["no cache"]),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert run(folder, tmp_path / "cache", steps=1) == 0
    before = (tmp_path / "cache" / "cache.json").read_bytes()
    capsys.readouterr()
    given = [str(folder / "texts") if option == "TEXTS" else option for option in options]
    try:
        status = run(folder, tmp_path / "cache", *given)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    assert status == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert all(word in line for word in words), line
    assert (tmp_path / "cache" / "cache.json").read_bytes() == before


def test_overwrite(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "cache") == 0
    assert run(folder, tmp_path / "cache", "--top_k", "3", "--overwrite", steps=1) == 0
    cache = LogitCache(tmp_path / "cache")
    assert (len(cache), cache.header.top_k) == (2, 3)


def test_a_run_config_gives_its_blocks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load((folder / "data.yaml").read_text())["data"] | {"order_seed": 3, "seed": 0}
    trainer = {"max_steps": 5, "accumulate_grad_batches": 2, "devices": 1, "callbacks": [{"class_path": "Export"}]}
    config = tmp_path / "fit.yaml"
    config.write_text(yaml.safe_dump({"model": {"learning_rate": 0.1}, "data": data, "trainer": trainer}))
    given = ["--model", str(folder / "hub"), "--run", str(config)]
    assert main(["cache-logits", *given, "--output", str(tmp_path / "run"), "--from_step", "2"]) == 0
    options = ["--data.order_seed", "3", "--accumulate_grad_batches", "2", "--from_step", "2"]
    assert run(folder, tmp_path / "typed", *options, steps=3) == 0
    held = []
    for name in ("run", "typed"):
        cache = LogitCache(tmp_path / name)
        held.append({row.tobytes() for shard in cache._shards for row in shard["hash"].numpy()})
    assert held[0] == held[1] and len(held[0]) == 3 * 2 * 2
    # What is given beside it wins, in a file as on the command line.
    both = ["-c", str(folder / "data.yaml"), "--data.order_seed", "0", "--steps", "1", "--accumulate_grad_batches", "1"]
    assert main(["cache-logits", *both, *given, "--output", str(tmp_path / "one")]) == 0
    assert LogitCache(tmp_path / "one").holds(data_of(folder).prepare().train_dataloader().batch(0)["input_ids"]).all()
    assert len(LogitCache(tmp_path / "one")) == 2
    capsys.readouterr()
    output = ["--model", str(folder / "hub"), "--output", str(tmp_path / "no")]
    for wrong, words in (
        (["-c", str(config)], f"give it by --run {config}"),
        (["--run", "nowhere"], "--run nowhere: there is no such file"),
        (["-c", str(folder / "data.yaml")], "--steps is missing"),
    ):
        assert main(["cache-logits", *wrong, *output]) == 2
        assert words in capsys.readouterr().err


# ------------------------------------------------------------ a run that learns from it


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        names = ("train/kl", "train/loss", "train/perplexity", "train/aux_loss")
        self.values.append({name: float(trainer.logged_metrics.get(name, torch.nan)) for name in names})


def test_a_cached_teacher_is_as_good_as_a_live_one(folder: Path, tmp_path: Path) -> None:
    """The routers of a smaller model learn the same, to what half precision leaves of the predictions."""
    teacher = ml.from_pretrained(folder / "hub")
    vocabulary = str(teacher.config.vocab_size)
    assert run(folder, tmp_path / "cache", "--from_step", "1", "--top_k", vocabulary, steps=4) == 0
    curves, weights = [], []
    for name in (folder / "hub", tmp_path / "cache"):
        losses = Losses()
        drop = ml.callbacks.Compress([ml.ExpertDrop(ratio=0.5)], at_step=1, calibration_batches=2)
        stage = RouterDistillation(1, teacher=str(name), learning_rate=1e-2)
        trainer = fit(folder, tmp_path / "run", [drop, stage, losses], max_steps=5)
        curves.append([value["train/kl"] for value in losses.values[1:]])
        weights.append({key: value.clone() for key, value in trainer.lightning_module.state_dict().items()})
    live, cached = curves
    assert min(live) > 1e-2
    assert cached == pytest.approx(live, rel=2e-4)
    moved = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert all(name.endswith("gate.weight") for name in moved)
    for name in moved:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-3)


def test_a_cache_that_is_too_small_is_found_before_the_run(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "cache", "--from_step", "1", steps=3) == 0
    stage = RouterDistillation(1, teacher=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"2 of the 8 blocks .* not among its 6: .*--from_step 1"):
        fit(folder, tmp_path, [stage, blocks := Blocks()], max_steps=5)
    assert not blocks.steps
    with pytest.raises(ValueError) as error:
        fit(folder, tmp_path, [RouterDistillation(1, steps=4, teacher=str(tmp_path / "cache"))], max_steps=7)
    words = shlex.split(re.search(r"'moe-lightning (.*?)', where CONFIG", str(error.value))[1])  # type: ignore[index]
    given = dict(zip(words[1::2], words[2::2], strict=True))
    wanted = {"from_step": 1, "steps": 4, "accumulate_grad_batches": 1, "devices": 1, "top_k": 64, "temperature": 1}
    assert {f"--{name}": str(value) for name, value in wanted.items()}.items() <= given.items()
    # The command does what it says.
    data = {"data": yaml.safe_load((folder / "data.yaml").read_text())["data"], "trainer": {"max_steps": 7}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(data))
    more = [str(tmp_path / "more") if word == str(tmp_path / "cache") else word for word in words]
    assert main([str(tmp_path / "fit.yaml") if word == "CONFIG" else word for word in more]) == 0
    fit(folder, tmp_path, [RouterDistillation(1, steps=4, teacher=str(tmp_path / "more"))], max_steps=7)
    # Up to where it reaches it is enough.
    stage = RouterDistillation(1, steps=3, teacher=str(tmp_path / "cache"))
    fit(folder, tmp_path, [stage], max_steps=5)
    other = RouterDistillation(1, steps=3, teacher=str(tmp_path / "cache"), temperature=2.0)
    with pytest.raises(ValueError, match="temperature"):
        fit(folder, tmp_path, [other], max_steps=5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7},
        {"max_steps": 7, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 5},
        {"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_epochs": 4, "max_steps": 7, "limit_train_batches": 5, "accumulate_grad_batches": 2},
    ],
)
def test_the_batches_of_a_step_are_known_before(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    blocks = Blocks()
    trainer = fit(folder, tmp_path, [blocks], **options)
    stream = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    assert len(blocks.steps) == trainer.global_step > 5
    for step, seen in blocks.steps.items():
        indices = list(batches_of(trainer, len(stream), step, step + 1))
        known = {row.tobytes() for index in indices for row in block_hashes(stream.batch(index)["input_ids"])}
        assert known == seen
    assert not list(batches_of(trainer, len(stream), trainer.global_step, float("inf")))


def test_a_default_module_learns_the_text_as_before(folder: Path, tmp_path: Path) -> None:
    """Without a stage the loss is transformers' own cross-entropy, and the balancing loss with its weight."""
    losses, batches = Losses(), []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                batches.append(float(pl_module.model(batch["input_ids"], labels=batch["labels"]).loss))

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            values = losses.values[-1]
            expected = values["train/loss"] + pl_module.load_balancing_coefficient * values["train/aux_loss"]
            assert float(outputs["loss"]) == pytest.approx(expected, rel=1e-6)

    fit(folder, tmp_path, [losses, Keep()], max_steps=3)
    assert [values["train/loss"] for values in losses.values] == pytest.approx(batches, rel=1e-5)
    assert all(values["train/kl"] != values["train/kl"] for values in losses.values)
