"""How much of the lost loss came back: measured apart, without disturbing the training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

import moe_lightning as ml
from moe_lightning.callbacks import Compress, LastCheckpoint, RandomState, RecoveredShare, TimeSpent, last_checkpoint
from moe_lightning.cli.run_callbacks import usual_measurements
from tests.callbacks.recovery.stage_runs import compressed_module, stage, state_of
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import random_batches

CALIBRATION = random_batches(2, batch=2, sequence=16, seed=5)
VALIDATION = batches(4, seed=8, padded=True)


def compress(at_step: Any, *methods: Any) -> Compress:
    return Compress(list(methods), at_step=at_step, batches=CALIBRATION, min_tokens=1, max_fallback=1.0)


def callbacks() -> list[Any]:
    return [
        compress(2, ml.ExpertDrop(keep=4)),
        compress(4, ml.RTN(group_size=16)),
        stage("LoRARecovery", 4, steps=3),
        stage("RouterDistillation", 7),
    ]


def mean_loss(model: Any, count: int) -> float:
    """Return the mean over all tokens that count, each with the same weight."""
    nats, tokens = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in VALIDATION[:count]:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["labels"][:, 1:].reshape(-1)
            flat = logits[:, :-1].reshape(-1, logits.shape[-1]).double()
            nats += float(functional.cross_entropy(flat, targets, ignore_index=-100, reduction="sum"))
            tokens += int((targets != -100).sum())
    model.train(training)
    return nats / tokens


class ByHand(Callback):
    """Measure around everything, with no code of the library; stands at an end of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], float] = {}

    def _note(self, what: str, trainer: Any, module: Any) -> None:
        self.found[what, trainer.global_step] = mean_loss(module.model, 3)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._note("start", trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._note("end", trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("validation", trainer, pl_module)


def test_equals_measuring_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # These models know so little that what they lose is noise, which is not the point here.
    monkeypatch.setattr(RecoveredShare, "lost_interval", None)
    first, last, share = ByHand(), ByHand(), RecoveredShare(num_batches=3)
    given = [first, *callbacks(), share, last]
    fit(tiny_module(), tmp_path, given, steps=9, validation=VALIDATION, val_check_interval=3)
    before = first.found["start", 2]
    assert share.before is not None
    lost = last.found["start", 2] - before + (last.found["start", 4] - first.found["start", 4])
    assert share.before == pytest.approx(before) and share.lost == pytest.approx(lost, abs=1e-6)
    assert share.compressed == pytest.approx(before + lost)
    expected = [
        (2, "compressed", last.found["start", 2]),
        (4, "compressed", last.found["start", 4]),
        (7, "LoRARecovery", last.found["end", 7]),
        (9, "RouterDistillation", last.found["end", 9]),
    ]
    assert [(item["step"], item["event"]) for item in share.boundaries] == [item[:2] for item in expected]
    for item, (step, _, loss) in zip(share.boundaries, expected, strict=True):
        assert item["loss"] == pytest.approx(loss)
        # At the first compression only that was lost which it took itself. It is little in a model that knows little.
        so_far = share.lost if step > 2 else item["loss"] - share.before
        assert item["recovered_share"] == pytest.approx((share.before + so_far - item["loss"]) / so_far)
    assert share.boundaries[0]["recovered_share"] == 0 and share.lost > 0
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    logged = {event.step: event.value for event in events.Scalars("recovery/loss")}
    assert set(logged) == {2, 3, 4, 6, 7, 9}
    assert logged[6] == pytest.approx(last.found["validation", 6])
    written = json.loads((tmp_path / "results" / "recovery.json").read_text())
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in VALIDATION[:3])
    assert written["boundaries"] == share.boundaries and written["tokens"] == tokens == share.boundaries[0]["tokens"]
    assert sum(item.get("added", 0) for item in share.boundaries) == pytest.approx(share.lost)
    lines = [line for line in capsys.readouterr().out.splitlines() if "nats per token" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 7", "step 9"]
    assert all(f"({tokens} tokens)" in line for line in lines)
    assert "after LoRARecovery" in lines[2] and f"{share.before:.4f} before any compression" in lines[2]


class Stop(Callback):
    """End the run after a step, before a validation behind it."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 3


@pytest.mark.parametrize("place", [0, 3])
def test_what_a_stage_leaves_is_measured_anew(place: int, tmp_path: Path) -> None:
    """A validation of the same step saw the terms beside integers, which the end of the stage rounds."""
    last, share = ByHand(), RecoveredShare(num_batches=3)
    given: list[Any] = [compress(1, ml.RTN(bits=4, group_size=16)), stage("LoRARecovery", 1, learning_rate=0.3), Stop()]
    given.insert(place, share)
    module = tiny_module()
    fit(module, tmp_path, [*given, last], steps=8, validation=VALIDATION, val_check_interval=3)
    ends = [item for item in share.boundaries if item["event"] == "LoRARecovery"]
    assert [item["step"] for item in ends] == [3]
    left = mean_loss(module.model, 3)
    assert abs(left - last.found["validation", 3]) > 2e-5
    assert ends[0]["loss"] == pytest.approx(left)
    assert share.boundaries[-1] == ends[0]


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    """Weights, optimizer and random numbers are those of a run without it."""
    states = []
    for name, more in (("with", [RecoveredShare(num_batches=2)]), ("without", [])):
        module = tiny_module()
        module.hparams["model"]["attention_dropout"] = 0.3
        given = [RandomState(), *callbacks(), *more]
        trainer = fit(module, tmp_path / name, given, steps=9, validation=VALIDATION, val_check_interval=3)
        assert module.model.training
        moments = {
            (number, key): value
            for number, state in trainer.optimizers[0].state_dict()["state"].items()
            for key, value in state.items()
        }
        states.append((state_of(module), moments, torch.rand(3)))
    (first, moments, numbers), (second, other_moments, others) = states
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert moments.keys() == other_moments.keys() and moments
    assert all(torch.equal(moments[key], other_moments[key]) for key in moments)
    assert torch.equal(numbers, others)


def test_nothing_lost_is_no_share() -> None:
    share = RecoveredShare()
    assert share.share(1.0) is None and share.compressed is None
    share.before, share.lost = 2.0, 0.5
    assert (share.share(2.5), share.share(2.0), share.share(2.25), share.share(2.6)) == pytest.approx((0, 1, 0.5, -0.2))
    share.lost = -0.1
    assert share.share(2.0) is None
    again = RecoveredShare()
    again.load_state_dict(share.state_dict())
    assert (again.before, again.lost, again.boundaries) == (2.0, -0.1, [])


def test_without_validation_data_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RecoveredShare measures on validation batches, and there are none"):
        fit(tiny_module(), tmp_path, [RecoveredShare()], steps=2)
    fit(compressed_module("int4"), tmp_path, [RecoveredShare(batches=VALIDATION), stage("LoRARecovery")], steps=1)
    with pytest.raises(ValueError, match="num_batches must be 1 or more"):
        RecoveredShare(num_batches=0)


def test_a_fit_that_compresses_has_one() -> None:
    own = RecoveredShare(2)
    cutting = compress(1, ml.ExpertDrop(keep=4))
    assert [type(item) for item in usual_measurements([cutting], 0.05)] == [TimeSpent, RecoveredShare]
    for given, validation in (([cutting], 0), ([], 0.05), ([cutting, own], 0.05)):
        assert [type(item) for item in usual_measurements(given, validation)] == [TimeSpent]
    assert usual_measurements([cutting, own, TimeSpent()], 0.05) == []


class Measured(RecoveredShare):
    """Nats of each block that are given instead of measured."""

    def __init__(self, *nats: list[float]) -> None:
        super().__init__()
        self.given = [torch.tensor(item, dtype=torch.float64) for item in nats]
        self._tokens_B, self.tokens = torch.full((4,), 10), 40

    def _measure_blocks(self, trainer: Any, module: Any) -> torch.Tensor:
        if self._known is None:
            self._known = 0, self.given.pop(0)
        return self._known[1]


def acted(share: RecoveredShare, folder: Path, times: int = 1) -> None:
    trainer: Any = SimpleNamespace(
        global_step=0,
        loggers=[],
        is_global_zero=True,
        progress_bar_callback=None,
        default_root_dir=str(folder),
    )
    for _ in range(times):
        share.before_compression(trainer, None)  # type: ignore[arg-type]
        share.after_compression(trainer, None)  # type: ignore[arg-type]


def test_what_is_lost_within_the_noise_is_no_share(tmp_path: Path) -> None:
    """The same mean is lost: by every block, or by one block, where a draw without it has lost nothing."""
    start = [50.0, 20.0, 30.0, 40.0]
    sure = Measured(start, [51.0, 21.0, 31.0, 41.0])
    acted(sure, tmp_path)
    assert sure.lost == pytest.approx(0.1) and sure.share(3.55) == pytest.approx(0.5)
    unsure = Measured(start, [54.0, 20.0, 30.0, 40.0])
    acted(unsure, tmp_path)
    assert unsure.lost == pytest.approx(0.1) and unsure.share(3.55) is None
    assert unsure._in_words(None) == "too little was lost to give a share"
    numbers = json.loads((tmp_path / "results" / "recovery.json").read_text())
    assert numbers["lost_interval"][0] == 0 < numbers["lost"] < numbers["lost_interval"][1]


def test_an_act_that_lowers_the_loss_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = Measured([50.0, 20.0, 30.0, 40.0], [54.0, 24.0, 34.0, 44.0], [53.0, 23.0, 33.0, 43.0])
    acted(share, tmp_path, times=2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if "after compressing" in line)
    assert "lowered" not in first
    assert second.endswith(
        "3.9000 before: it lowered the loss by 0.1000, which counts against what other compressions lost"
    )
    assert [item["added"] for item in share.boundaries] == pytest.approx([0.4, -0.1]) and share.lost == pytest.approx(
        0.3
    )


def go(
    folder: Path, share: RecoveredShare, *more: Any, steps: int, path: Path | None = None, **options: Any
) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[share, *more, LastCheckpoint(100)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(tiny_module(), loader(batches(6)), ckpt_path=path, weights_only=True)
    return trainer


def test_other_blocks_after_a_resume_are_no_share(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    saved = last_checkpoint(tmp_path)
    first = RecoveredShare(3, batches=VALIDATION)
    go(tmp_path, first, compress(1, ml.ExpertDrop(keep=2)), steps=2)
    others = batches(4, seed=9)
    second = RecoveredShare(3, batches=others)
    with pytest.warns(UserWarning, match="the validation blocks are not those on which"):
        go(tmp_path, second, compress(1, ml.ExpertDrop(keep=2)), steps=3, path=saved)
    last = second.boundaries[-1]
    assert last["event"] == "end" and last["recovered_share"] is None
    assert last["tokens"] == 90 != first.boundaries[-1]["tokens"] and second.share(1.0) is None
    assert (second.before, second.lost) == (first.before, first.lost)
    # With the first ones again all is well; not if something was lost on others.
    recwarn.clear()
    third = RecoveredShare(3, batches=VALIDATION)
    go(tmp_path, third, compress(1, ml.ExpertDrop(keep=2)), steps=4, path=saved)
    assert not third._other_blocks and not any("validation blocks" in str(item.message) for item in recwarn)
    more = [compress(1, ml.ExpertDrop(keep=2)), compress(4, ml.RTN(group_size=16))]
    fourth = RecoveredShare(3, batches=others)
    with pytest.warns(UserWarning, match="the validation blocks are not those on which"):
        go(tmp_path, fourth, *more, steps=5, path=saved)
    assert fourth.lost == first.lost and fourth.boundaries[-2]["event"] == "compressed"
    with pytest.warns(UserWarning, match="the validation blocks are not those on which"):
        go(tmp_path, RecoveredShare(3, batches=VALIDATION), *more, steps=6, path=saved)


class UseUp(Callback):
    """Let the time be up after the second step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            next(item for item in trainer.callbacks if isinstance(item, Timer))._duration = 0.0


def test_where_only_the_time_was_up_there_is_no_end(tmp_path: Path) -> None:
    share = RecoveredShare(2, batches=VALIDATION)
    trainer = go(tmp_path, share, compress(1, ml.ExpertDrop(keep=2)), UseUp(), steps=6, max_time="01:00:00:00")
    assert trainer.global_step == 2
    assert [item["event"] for item in share.boundaries] == ["compressed"]
    again = RecoveredShare(2, batches=VALIDATION)
    go(tmp_path, again, compress(1, ml.ExpertDrop(keep=2)), steps=3, path=last_checkpoint(tmp_path))
    assert [item["event"] for item in again.boundaries] == ["compressed", "end"]


def test_a_compression_at_the_end_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = RecoveredShare(3, batches=VALIDATION)
    go(tmp_path, share, compress("end", ml.ExpertDrop(keep=2)), steps=2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("in all: ")]
    last = share.boundaries[-1]
    assert last["event"] == "compressed" and len(said) == 1
    assert said[0].startswith(
        f"in all: loss {share.before:.4f} nats per token before any compression, {share.compressed:.4f} with all that "
        f"compressions cost, {last['loss']:.4f} now: "
    )
    assert said[0].endswith("(78 tokens)")
    go(tmp_path / "other", RecoveredShare(3, batches=VALIDATION), compress(1, ml.ExpertDrop(keep=2)), steps=2)
    assert "in all" not in capsys.readouterr().out
