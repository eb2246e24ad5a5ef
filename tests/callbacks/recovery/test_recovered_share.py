"""How much of the lost loss came back: measured apart, without disturbing the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

import moe_lightning as ml
from moe_lightning.callbacks import Compress, RandomState, RecoveredShare
from moe_lightning.cli.run_callbacks import recovered_share
from tests.callbacks.recovery.stage_runs import compressed_module, stage, state_of
from tests.callbacks.small_fit import batches, fit, tiny_module
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


def test_equals_measuring_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last, share = ByHand(), ByHand(), RecoveredShare(num_batches=3)
    given = [first, *callbacks(), share, last]
    fit(tiny_module(), tmp_path, given, steps=9, validation=VALIDATION, val_check_interval=3)
    before = first.found["start", 2]
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
    assert json.loads((tmp_path / "results" / "recovery.json").read_text())["boundaries"] == share.boundaries
    lines = [line for line in capsys.readouterr().out.splitlines() if "nats per token" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 7", "step 9"]
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
    assert [type(item) for item in recovered_share([cutting], 0.05)] == [RecoveredShare]
    for given, validation in (([cutting], 0), ([], 0.05), ([cutting, own], 0.05)):
        assert recovered_share(given, validation) == []
