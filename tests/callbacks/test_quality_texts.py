"""Which texts a run is measured on, continuations of prompts, and two processes that share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, QualityEvaluation
from moe_lightning.callbacks.quality.texts import find_texts
from moe_lightning.evaluation import evaluate
from moe_lightning.evaluation.records import QualityRecord
from tests.callbacks.quality_ranks import measure
from tests.models import SIZES, random_batches
from tests.small_runs import write_texts

ROOT = Path(__file__).resolve().parents[2]


def data(folder: Path, **options: Any) -> ml.TextDataModule:
    """Two sources, the second of capital letters."""
    if not (folder / "small").is_dir():
        write_texts(folder / "small")
        (folder / "large").mkdir()
        for number, path in enumerate(sorted((folder / "small").iterdir())):
            (folder / "large" / path.name).write_text(f"{number} " + path.read_text().upper())
    given: dict[str, Any] = {
        "sources": [f"{folder}/small/*.txt", f"{folder}/large/*.txt"],
        "vocab_size": 300,
        "block_size": 16,
        "batch_size": 2,
        "validation": 4,
        "test": 0.2,
        "calibration": 4,
        "cache_dir": str(folder / "cache"),
    }
    return ml.TextDataModule(**{**given, **options})


def run(folder: Path, callback: QualityEvaluation, datamodule: Any) -> Any:
    torch.manual_seed(0)
    module = ml.MixtralModule(model={**SIZES, "vocab_size": 300}, warmup_steps=1, learning_rate=1e-2)
    compress = Compress([ml.ExpertDrop(keep=4)], at_step=1)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback, compress],
        logger=TensorBoardLogger(str(folder), name="logs", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=datamodule)
    return module


def test_sources_and_domains_are_texts_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datamodule = data(tmp_path)
    small, large = datamodule.options.sources
    prompts = ["abc bcd", "hgf"]
    callback = QualityEvaluation(
        num_batches=6,
        domains={"prose": ["python-topics"]},
        domain_blocks=5,
        prompts=prompts,
        new_tokens=3,
        speed=False,
        divergence_tokens=32,
    )
    module = run(tmp_path / "run", callback, datamodule)
    found = QualityRecord.load(tmp_path / "run" / "results" / "quality.json")
    end = found.moments[2]
    texts = {name: (len(text.scores.nats), text.calibrated) for name, text in end.texts.items()}
    calibrated = {source: source in datamodule.sources_in("calibration") for source in (small, large)}
    assert any(calibrated.values())
    assert texts == {
        "test": (12, True),
        small: (5, calibrated[small]),
        large: (5, calibrated[large]),
        "prose": (5, False),
    }
    for text in end.texts.values():
        assert text.scores.divergence.isnan().tolist() == [False] * 2 + [True] * (len(text.scores.nats) - 2)
    wanted = {
        "test": list(datamodule.test_dataloader())[:6],
        large: datamodule.test_batches_of(large),
        "prose": datamodule.domain_batches("python-topics", 5),
    }
    for name, loader in wanted.items():
        known = evaluate(module.model, loader, progress=False)
        scores, count = end.texts[name].scores, len(end.texts[name].scores.nats)
        torch.testing.assert_close(scores.nats, known.nats[:count], rtol=1e-6, atol=0)
        assert torch.equal(scores.bytes, known.bytes[:count])
    assert found.context["data"]["sources"] == [small, large]
    assert [sample.prompt for sample in end.samples] == prompts
    tokenizer = datamodule.tokenizer
    for sample in end.samples:  # greedily, one token after the other
        ids = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(3):
                ids.append(int(module.model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == sample.continuation
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    assert {"quality/prose/perplexity_ratio", "quality/bits_per_byte", "quality/prose/agreement"} <= set(
        events.Tags()["scalars"]
    )
    shown = events.Tensors("quality/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert [shown.count(word) for word in ("#### Prompt", "**before**", "**compressed**", "**end**")] == [2] * 4
    lines = capsys.readouterr().out.splitlines()
    assert f"quality is measured on test (12 blocks), {small} (5 blocks), {large} (5 blocks), prose (5 blocks)" in (
        next(line for line in lines if line.startswith("quality is measured"))
    )
    assert " times on prose; " in next(line for line in lines if "quality end" in line)


def test_calibrated_is_what_the_calibration_split_holds(tmp_path: Path) -> None:
    def calibrated(stage: str, *callbacks: Any, **options: Any) -> dict[str, bool | None]:
        datamodule = data(tmp_path, **options)
        trainer: Any = SimpleNamespace(
            datamodule=datamodule, callbacks=list(callbacks), state=SimpleNamespace(fn=stage), world_size=1
        )
        domains: dict[str, str | list[str]] = {"prose": "python-topics", "both": ["python-topics", f"{tmp_path}/x.txt"]}
        domains["mine"] = ["python-topics", datamodule.options.sources[-1]]
        return {text.name: text.calibrated for text in find_texts(trainer, "test", 2, domains, 2, None)}

    (tmp_path / "x.txt").write_text("another one " * 99)
    one: dict[str, Any] = {"sources": f"{tmp_path}/small/*.txt"}
    data(tmp_path)  # writes the texts
    measuring, drop = Compress([ml.ExpertDrop(keep=4)], at_step=1), ml.ExpertDrop(keep=4)
    told = {"test": True, "prose": False, "both": False, "mine": True}
    assert calibrated("fit", measuring, **one) == calibrated("test", **one) == told
    nothing = dict.fromkeys(told)
    assert calibrated("fit", **one) == nothing  # nothing is compressed
    assert calibrated("test", calibration=0, **one) == nothing
    assert calibrated("fit", Compress([ml.RTN()], at_step=1), **one) == nothing  # nor does this one calibrate
    own = Compress([drop], at_step=2, batches=random_batches(1, sequence=16))
    assert calibrated("fit", measuring, own, **one) == nothing  # and of those nobody knows


def test_prompts_are_pieces_of_the_split_by_default(tmp_path: Path) -> None:
    datamodule = data(tmp_path, sources=f"{tmp_path}/small/*.txt")
    run(tmp_path / "run", QualityEvaluation(new_tokens=2, num_batches=2, speed=False), datamodule)
    found = QualityRecord.load(tmp_path / "run" / "results" / "quality.json")
    prompts = [[sample.prompt for sample in moment.samples] for moment in found.moments]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 4
    text = " ".join(path.read_text() for path in sorted((tmp_path / "small").iterdir()))
    assert all(prompt in text for prompt in prompts[0])
    assert list(found.moments[0].texts) == ["test"]


def test_mistakes_are_found_before_training(tmp_path: Path) -> None:
    def fails(match: str, datamodule: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run(tmp_path / "run", QualityEvaluation(speed=False, **options), datamodule)

    fails("QualityEvaluation: there is no test split: --data.test is 0", data(tmp_path, test=0))
    fails("num_batches=99, but the validation split has 2 batches", data(tmp_path), split="validation", num_batches=99)
    fails(r"domains 'x' \(domain_blocks 32\): .*nothing", data(tmp_path), domains={"x": f"{tmp_path}/nothing/*.txt"})
    fails("two texts are called 'test'", data(tmp_path), domains={"test": "python-topics"})
    fails("the prompt '' has no token", data(tmp_path), prompts=["good", ""])
    assert not (tmp_path / "run" / "results").exists()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """They share the blocks; only the first one reads and writes the reference."""
    write_texts(tmp_path / "texts")
    measure(tmp_path / "one", tmp_path, 1)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.quality_ranks", str(tmp_path / "two"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / "two" / f"moments-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    one, two = (QualityRecord.load(tmp_path / name / "results" / "quality.json") for name in ("one", "two"))
    assert two.context["processes"] == 2 and [moment.name for moment in two.moments] == ["before", "compressed", "end"]
    assert [moment.to_dict() for moment in two.moments] == ranks[0]
    # What comes later was trained on other batches.
    for alone, shared in zip(one.moments[:2], two.moments[:2], strict=True):
        for name, text in alone.texts.items():
            other = shared.texts[name]
            assert other.fingerprint == text.fingerprint and len(text.scores.nats) == (13 if name == "test" else 3)
            for values in ("nats", "tokens", "bytes", "divergence", "agreement"):
                torch.testing.assert_close(
                    getattr(other.scores, values), getattr(text.scores, values), rtol=1e-5, atol=1e-6, equal_nan=True
                )
        assert shared.layer_errors == pytest.approx(alone.layer_errors)
        assert shared.routing is not None and alone.routing is not None
        for row, expected in zip(shared.routing.mass, alone.routing.mass, strict=True):
            assert [value or 0.0 for value in row] == pytest.approx([value or 0.0 for value in expected])
        assert shared.samples == alone.samples
