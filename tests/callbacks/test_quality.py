"""Quality around compressions: equal to measuring by hand with two models, and training does not notice it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks import Compress, LastCheckpoint, QualityEvaluation, RandomState, last_checkpoint
from moe_lightning.callbacks.quality import measuring
from moe_lightning.evaluation.records import QualityMoment, QualityRecord
from tests.callbacks.recovery.stage_runs import stage, state_of
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import random_batches

CALIBRATION = random_batches(2, batch=2, sequence=16, seed=5)
HELD_OUT = batches(3, seed=8, padded=True)


def compress(at_step: Any, *methods: Any) -> Compress:
    return Compress(list(methods), at_step=at_step, batches=CALIBRATION, min_tokens=1, max_fallback=1.0)


def quality(**options: Any) -> QualityEvaluation:
    """Four of six blocks are compared, two of them also in their hidden states."""
    given = {"divergence_tokens": 64, "layer_tokens": 32, "speed": False, "batches": HELD_OUT}
    return QualityEvaluation(**{**given, **options})


def record(folder: Path) -> QualityRecord:
    return QualityRecord.load(folder / "results" / "quality.json")


class Keep(Callback):
    """Keep copies of the model at the moments that are measured."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Any] = {}

    def _keep(self, name: str, module: Any) -> None:
        self.models[name] = copy.deepcopy(module.model).eval()

    def before_compression(self, trainer: Any, module: Any) -> None:
        if not self.models:
            self._keep("before", module)

    def after_compression(self, trainer: Any, module: Any) -> None:
        self._keep(f"compressed-{len(self.models)}" if len(self.models) > 1 else "compressed", module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._keep("end", pl_module)


def by_hand(model: Any, before: Any) -> dict[str, list[float]]:
    """Return the sums of each block from the full logits of both models, token by token in float64."""
    found: dict[str, list[float]] = {"nats": [], "divergence": [], "agreement": []}
    for batch in HELD_OUT:
        with torch.no_grad():
            now, then = (
                item(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits.double()
                .log_softmax(-1)
                .numpy()
                for item in (model, before)
            )
        labels = batch["labels"].numpy()
        for row in range(2):
            places = [place for place in range(15) if labels[row, place + 1] != -100]
            found["nats"].append(-sum(now[row, place, labels[row, place + 1]] for place in places))
            found["divergence"].append(
                sum(float((np.exp(then[row, place]) * (then[row, place] - now[row, place])).sum()) for place in places)
            )
            found["agreement"].append(sum(now[row, place].argmax() == then[row, place].argmax() for place in places))
    return found


def errors_by_hand(model: Any, before: Any) -> dict[int, float]:
    """Return the errors of what leaves the blocks of the first batch, by hooks of torch alone."""

    def states(item: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _m, _i, output: seen.append(output)) for layer in item.model.layers
        ]
        with torch.no_grad():
            item(input_ids=HELD_OUT[0]["input_ids"], attention_mask=HELD_OUT[0]["attention_mask"])
        for handle in handles:
            handle.remove()
        keep = HELD_OUT[0]["attention_mask"].bool()
        return [state[keep].double() for state in seen]

    old = states(before)
    blocks = architecture_of(model).shape(model).blocks
    return {
        number: float((new - old[number]).square().sum() / old[number].square().sum())
        for number, new in zip(blocks, states(model), strict=True)
    }


def assert_measured(moment: QualityMoment, model: Any, before: Any) -> None:
    scores, wanted = moment.texts["test"].scores, by_hand(model, before)
    assert scores.nats.tolist() == pytest.approx(wanted["nats"], rel=1e-5)
    assert scores.tokens.tolist() == [11, 15] * 3
    assert scores.divergence[:4].tolist() == pytest.approx(wanted["divergence"][:4], abs=2e-5)
    assert scores.agreement[:4].tolist() == wanted["agreement"][:4]
    assert scores.divergence[4:].isnan().all() and scores.agreement[4:].isnan().all()
    assert moment.layer_errors == pytest.approx(errors_by_hand(model, before), rel=1e-4, abs=1e-10)
    assert (moment.parameters, moment.bytes) == (ml.measure(model).parameters, ml.measure(model).bytes)
    assert moment.bytes_on_disk == architecture_of(model).shape(model).bytes
    assert moment.flops <= ml.measure(model, 16).flops


def test_equals_measuring_by_hand_with_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep, callback = Keep(), quality(speed=True)
    acts = [compress(2, ml.Novices(keep=4)), compress(4, ml.RTN(group_size=16), ml.BlockDrop(count=1))]
    fit(tiny_module(), tmp_path, [callback, *acts, stage("NoviceTuning", 4), keep], steps=6)
    found = record(tmp_path)
    names = ["before", "compressed", "compressed-2", "end"]
    assert [moment.name for moment in found.moments] == names == list(keep.models)
    assert [moment.step for moment in found.moments] == [2, 2, 4, 6]
    assert [moment.to_dict() for moment in found.moments] == [moment.to_dict() for moment in callback.moments]
    for moment in found.moments:
        assert_measured(moment, keep.models[moment.name], keep.models["before"])
        text = moment.texts["test"]
        assert text.calibrated is None and text.fingerprint == found.moments[0].texts["test"].fingerprint
        assert {name: (rate.batch, rate.context) for name, rate in moment.speed.items()} == {
            "prefill": (2, 16),
            "decode": (1, 8),
        }
        assert all(0 < rate.low <= rate.median <= rate.high for rate in moment.speed.values())
    assert sum(found.moments[3].texts["test"].scores.divergence[:4].tolist()) > 0.01
    routing = found.moments[1].routing
    assert routing is not None and all(len(novices) == 2 for novices in routing.novices)
    assert [moment.what for moment in found.moments] == [
        "2 steps of training",
        "Novices(keep=4)",
        "RTN(group_size=16), BlockDrop(count=1)",
        "2 steps of training (NoviceTuning)",
    ]
    assert found.context["reference"]["file"] == "quality/reference.safetensors"
    assert found.context["precision"] == "32-true" and found.context["device"] == "cpu"
    lines = [line for line in capsys.readouterr().out.splitlines() if ": quality " in line]
    assert [line.partition(": perplexity")[0] for line in lines] == [
        f"step {moment.step}: quality {moment.name}" for moment in found.moments
    ]
    ratio = math.exp(
        sum(by_hand(keep.models["end"], keep.models["before"])["nats"]) / 78
        - sum(by_hand(keep.models["before"], keep.models["before"])["nats"]) / 78
    )
    assert f" on test, {ratio:.3f} [" in lines[3] and "times that before, KL " in lines[3]
    assert all(" tokens/s; " in line and "tokens/s (" not in line for line in lines)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    logged = [event.value for event in events.Scalars("quality/perplexity_ratio")]
    assert len(logged) == 3 and logged[-1] == pytest.approx(ratio, rel=1e-5)
    tags = {
        "perplexity",
        "divergence",
        "agreement",
        "parameters",
        "bytes",
        "bytes_on_disk",
        "flops",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "novice_mass",
        "layer_error/layer_0",
    }
    assert {f"quality/{tag}" for tag in tags} <= set(events.Tags()["scalars"])


def test_a_compression_that_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_module(), tmp_path, [quality(), compress(2, ml.ExpertDrop(keep=6))], steps=3)
    before, compressed, _ = record(tmp_path).moments
    text = compressed.texts["test"].scores
    assert torch.equal(text.nats, before.texts["test"].scores.nats)
    assert text.divergence[:4].tolist() == [0.0] * 4 and torch.equal(text.agreement[:4], text.tokens[:4].double())
    assert compressed.layer_errors == {0: 0.0, 1: 0.0, 2: 0.0}
    line = next(line for line in capsys.readouterr().out.splitlines() if "quality compressed" in line)
    assert ", 1.000 [1.000, 1.000] times that before, KL 0 nats a token, 100.0% agree" in line


def test_training_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimizer and random numbers are those of a run without it, whatever it measures."""
    timed = measuring.prefill_rate

    def draws_numbers(*args: Any, **options: Any) -> Any:
        torch.rand(2), np.random.rand(2)
        return timed(*args, **options)

    monkeypatch.setattr(measuring, "prefill_rate", draws_numbers)
    states = []
    # A loader draws a number when it begins.
    for name, more in (("with", [quality(speed=True, batches=loader(HELD_OUT))]), ("without", [])):
        module = tiny_module()
        np.random.seed(3)
        module.hparams["model"]["attention_dropout"] = 0.3
        acts = [
            compress(2, ml.ExpertDrop(keep=4)),
            compress(4, ml.RTN(group_size=16)),
            stage("LoRARecovery", 4, steps=2),
        ]
        trainer = fit(module, tmp_path / name, [*more, *acts], steps=7)
        assert module.model.training and module.model.model.layers[0].training
        moments = {
            (number, key): value
            for number, state in trainer.optimizers[0].state_dict()["state"].items()
            for key, value in state.items()
        }
        states.append((state_of(module), moments, torch.rand(3), np.random.rand()))
    (first, moments, numbers, number), (second, other_moments, others, other) = states
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert moments.keys() == other_moments.keys() and moments
    assert all(torch.equal(moments[key], other_moments[key]) for key in moments)
    assert torch.equal(numbers, others) and number == other
    assert not any(parameter.is_inference() for parameter in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_measured_in_the_precision_of_the_trainer(precision: Any, tmp_path: Path) -> None:
    keep = Keep()
    given = [quality(), compress(1, ml.ExpertDrop(keep=4)), keep]
    fit(tiny_module(), tmp_path, given, steps=2, precision=precision)
    scores = record(tmp_path).moments[1].texts["test"].scores
    for mixed in (precision == "bf16-mixed", False):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            wanted = by_hand(keep.models["compressed"], keep.models["before"])
        same = scores.nats.tolist() == pytest.approx(wanted["nats"], rel=1e-6)
        assert same == (mixed or precision == "bf16-true")
        if same:
            assert scores.divergence[:4].tolist() == pytest.approx(wanted["divergence"][:4], abs=2e-5)


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("place", [0, 1])
def test_a_compression_at_the_end_comes_before_the_end(place: int, tmp_path: Path) -> None:
    keep, acts = Keep(), [compress("end", ml.ExpertDrop(keep=2))]
    acts.insert(place, quality())  # type: ignore[arg-type]
    fit(tiny_module(), tmp_path, [*acts, keep], steps=3)
    found = record(tmp_path)
    assert [moment.name for moment in found.moments] == ["before", "compressed", "end"]
    assert [moment.step for moment in found.moments] == [3, 3, 3]
    assert found.moments[2].what == "nothing since compressed"
    for moment in found.moments:
        assert_measured(moment, keep.models[moment.name], keep.models["before"])


def test_without_a_compression_there_is_the_end_alone(tmp_path: Path) -> None:
    module = tiny_module()
    fit(module, tmp_path, [quality()], steps=2)
    (end,) = record(tmp_path).moments
    assert (end.name, end.step, end.what, end.layer_errors) == ("end", 2, "2 steps of training", {})
    assert end.texts["test"].scores.divergence.isnan().all()
    model = module.model.eval()
    assert end.texts["test"].scores.nats.tolist() == pytest.approx(by_hand(model, model)["nats"], rel=1e-5)
    assert not (tmp_path / "quality").exists()


class UseUp(Callback):
    """Let the time be up after the second step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            next(item for item in trainer.callbacks if isinstance(item, Timer))._duration = 0.0


def test_where_only_the_time_was_up_there_is_no_end(tmp_path: Path) -> None:
    go(tmp_path, quality(), compress(1, ml.ExpertDrop(keep=2)), UseUp(), steps=6, max_time="01:00:00:00")
    assert [moment.name for moment in record(tmp_path).moments] == ["before", "compressed"]
    go(tmp_path, quality(), compress(1, ml.ExpertDrop(keep=2)), steps=3, path=last_checkpoint(tmp_path))
    assert [(moment.name, moment.step) for moment in record(tmp_path).moments] == [
        ("before", 1),
        ("compressed", 1),
        ("end", 3),
    ]


# ---------------------------------------------------------------- resumed runs


def go(folder: Path, callback: Any, *more: Any, steps: int, path: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[RandomState(), callback, *more, LastCheckpoint(1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    # The same batch again and again: these loaders do not know where a resumed run was.
    trainer.fit(tiny_module(), loader(batches(1) * 8), ckpt_path=path, weights_only=True)
    return trainer


class Die(Callback):
    """Be interrupted after two steps."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            raise KeyboardInterrupt


def go_and_die(folder: Path) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        go(folder, quality(), *acts(), Die(), steps=5)


def acts() -> list[Compress]:
    return [compress(1, ml.ExpertDrop(keep=4)), compress(3, ml.RTN(group_size=16))]


def test_a_resumed_run_has_all_moments(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    go(whole, quality(), *acts(), steps=5)
    go_and_die(broken)
    assert [moment.name for moment in record(broken).moments] == ["before", "compressed"]
    go(broken, quality(), *acts(), steps=5, path=last_checkpoint(broken))
    found, wanted = record(broken), record(whole)
    assert [moment.to_dict() for moment in found.moments] == [moment.to_dict() for moment in wanted.moments]
    assert [moment.name for moment in found.moments] == ["before", "compressed", "compressed-2", "end"]
    assert float(found.moments[3].texts["test"].scores.divergence[0]) > 0


def test_more_steps_have_another_end(tmp_path: Path) -> None:
    go(tmp_path, quality(), *acts(), steps=4)
    first = record(tmp_path).moments
    again = quality()
    go(tmp_path, again, *acts(), steps=4, path=last_checkpoint(tmp_path))  # nothing is left to do
    assert [moment.to_dict() for moment in record(tmp_path).moments] == [moment.to_dict() for moment in first]
    go(tmp_path, quality(), *acts(), steps=6, path=last_checkpoint(tmp_path))
    second = record(tmp_path).moments
    assert [(moment.name, moment.step) for moment in second] == [
        ("before", 1),
        ("compressed", 1),
        ("compressed-2", 3),
        ("end", 6),
    ]
    assert second[3].what == "3 steps of training"
    assert [moment.to_dict() for moment in second[:3]] == [moment.to_dict() for moment in first[:3]]
    # Without that callback at first it measures the end of a run that has ended.
    other = tmp_path / "other"
    go(other, Callback(), compress(1, ml.ExpertDrop(keep=4)), steps=2)
    go(other, quality(), compress(1, ml.ExpertDrop(keep=4)), steps=2, path=last_checkpoint(other))
    assert [(moment.name, moment.step) for moment in record(other).moments] == [("end", 2)]


def test_a_lost_reference_is_said(tmp_path: Path) -> None:
    """Hours of training are worth more than a divergence: the run goes on, with what can still be known."""
    go_and_die(tmp_path)
    saved, path = last_checkpoint(tmp_path), tmp_path / "quality" / "reference.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.warns(UserWarning, match=r"there is no file .*reference.safetensors. It held what the model predicted"):
        go(tmp_path, quality(), *acts(), steps=4, path=saved)
    last = record(tmp_path).moments[-1]
    assert last.texts["test"].scores.divergence.isnan().all() and last.layer_errors == {}
    assert not last.texts["test"].scores.nats.isnan().any()
    # That of another run in its place.
    other = tmp_path / "other"
    fit(tiny_module(), other, [quality(), compress(2, ml.ExpertDrop(keep=4))], steps=3)
    path.write_bytes((other / "quality" / "reference.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="holds the predictions of another model than the one that this run"):
        go(tmp_path, quality(), *acts(), steps=5, path=last_checkpoint(tmp_path))
    assert record(tmp_path).moments[-1].texts["test"].scores.divergence.isnan().all()
    path.write_bytes(content)
    go(tmp_path, quality(), *acts(), steps=6, path=last_checkpoint(tmp_path))
    assert float(record(tmp_path).moments[-1].texts["test"].scores.divergence[0]) > 0


def test_other_blocks_after_a_resume_are_said(tmp_path: Path) -> None:
    go_and_die(tmp_path)
    with pytest.warns(UserWarning, match="the model was not measured on these blocks before its compression") as seen:
        go(tmp_path, quality(batches=batches(3, seed=9)), *acts(), steps=4, path=last_checkpoint(tmp_path))
    assert any("holds predictions of other blocks" in str(item.message) for item in seen)
    last = record(tmp_path).moments[-1]
    assert last.texts["test"].scores.divergence.isnan().all() and last.layer_errors == {}
    # Fewer batches of the same text: the reference holds, the ratio does not.
    with pytest.warns(UserWarning, match="the model was not measured on these blocks before its compression"):
        go(tmp_path, quality(num_batches=2), *acts(), steps=5, path=last_checkpoint(tmp_path))
    assert not record(tmp_path).moments[-1].texts["test"].scores.divergence.isnan().any()


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("moe_lightning.evaluation.reference_file.ReferenceWriter._write", fail)
    with pytest.warns(UserWarning, match=r"could not be written \(No space left on device\)"):
        fit(tiny_module(), tmp_path, [quality(), compress(1, ml.ExpertDrop(keep=4))], steps=2)
    found = record(tmp_path).moments
    assert [moment.name for moment in found] == ["before", "compressed", "end"]
    assert found[1].texts["test"].scores.divergence.isnan().all() and not found[1].layer_errors
    assert not list((tmp_path / "quality").iterdir())


# ---------------------------------------------------------------- test


def test_testing_adds_a_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, quality(), *acts(), steps=4)
    before = record(tmp_path)
    for _ in range(2):  # the second one takes the place of the first
        module = tiny_module()
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=[quality()],
            logger=TensorBoardLogger(str(tmp_path), name="logs", version=""),
            enable_progress_bar=False,
        )
        trainer.test(module, loader(HELD_OUT), ckpt_path=last_checkpoint(tmp_path), weights_only=True)
        found = record(tmp_path)
        assert [moment.name for moment in found.moments] == ["before", "compressed", "compressed-2", "end", "test"]
    assert found.moments[4].what.endswith("last.ckpt") and found.moments[4].step == 4
    end, test = found.moments[3].to_dict(), found.moments[4].to_dict()
    assert {name: end[name] for name in ("texts", "layer_errors", "routing", "bytes")} == {
        name: test[name] for name in ("texts", "layer_errors", "routing", "bytes")
    }
    assert {name: found.context[name] for name in before.context} == before.context
    assert "quality test: perplexity" in capsys.readouterr().out
    # The run goes on: the test is one of a model that it does not give any more.
    go(tmp_path, quality(), *acts(), steps=5, path=last_checkpoint(tmp_path))
    assert [moment.name for moment in record(tmp_path).moments] == ["before", "compressed", "compressed-2", "end"]


def test_testing_alone(tmp_path: Path) -> None:
    module = tiny_module()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[quality(batches=None)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.test(module, loader(HELD_OUT))
    (moment,) = record(tmp_path).moments
    assert moment.name == "test" and moment.what == "test"
    model = module.model.eval()
    assert moment.texts["test"].scores.nats.tolist() == pytest.approx(by_hand(model, model)["nats"], rel=1e-5)
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    path = tmp_path / "results" / "quality.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"quality.json is no record of a run's quality"):
        trainer.test(module, loader(HELD_OUT))


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(match: str, callback: QualityEvaluation, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            fit(tiny_module(), tmp_path, [callback, compress(1, ml.ExpertDrop(keep=4))], steps=2, **options)

    fails("measures on the test split, and there is none: .*pass batches=", quality(batches=None))
    fails("num_batches=9, but the test split has 3 batches", quality(num_batches=9))
    one = [{name: value[:1] for name, value in HELD_OUT[0].items()}]
    fails("the test split gives 1 block, and an interval needs at least 2", quality(batches=one))
    fails("domains need a TextDataModule", quality(domains={"prose": "python-topics"}))
    fails("prompts need a datamodule with a tokenizer", quality(prompts=["x"]))
    fails("batches must be dicts with 'input_ids', got dict", quality(batches=[{"x": torch.zeros(1)}]))
    words = 64 * (4 * 64 + 8)
    hidden = 32 * 32 * 4 * 3
    fails(
        r"64 tokens in 1 text\(s\), 64 words each; .*more than max_reference_bytes .*: set layer_tokens to 16, or "
        r"divergence_tokens to 48, or raise max_reference_bytes to \d+$",
        quality(max_reference_bytes=words + hidden - 1),
    )
    fails("set divergence_tokens to 0 and layer_tokens to 0, or raise", quality(max_reference_bytes=10))
    fit(
        tiny_module(),
        tmp_path / "fits",
        [quality(max_reference_bytes=words + hidden), compress(1, ml.ExpertDrop(keep=4))],
        steps=2,
    )
    size = (tmp_path / "fits" / "quality" / "reference.safetensors").stat().st_size
    assert 0 < size - words - hidden < 2000
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    fails("but only 100 B are free there", quality())
    assert not (tmp_path / "quality").exists() and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "train"}, "split must be 'test' or 'validation'"),
        ({"num_batches": 0}, "num_batches must be 1 or more, got 0"),
        ({"divergence_tokens": -1}, "divergence_tokens must be 0 or more"),
        ({"layer_tokens": -1}, "layer_tokens must be 0 or more"),
        ({"domain_blocks": 0}, "domain_blocks must be 1 or more"),
        ({"new_tokens": -1}, "new_tokens must be 0 or more"),
        ({"max_reference_bytes": -1}, "max_reference_bytes must be 0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QualityEvaluation(**options)


def test_the_validation_split_of_a_trainer(tmp_path: Path) -> None:
    """Somebody's own dataloaders, and nothing that is compared."""
    callback = quality(split="validation", batches=None, divergence_tokens=0, layer_tokens=0, num_batches=2)
    fit(tiny_module(), tmp_path, [callback, compress(1, ml.ExpertDrop(keep=4))], steps=2, validation=HELD_OUT)
    found = record(tmp_path).moments
    assert [list(moment.texts) for moment in found] == [["validation"]] * 3
    assert found[1].texts["validation"].scores.tokens.tolist() == [11, 15] * 2
    assert all(moment.texts["validation"].scores.divergence.isnan().all() for moment in found)
    assert not (tmp_path / "quality").exists() and found[0].routing is not None
