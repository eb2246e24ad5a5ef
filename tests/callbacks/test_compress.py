"""Compress, NoviceTuning and Export in mid-run: when they act, on what, and what trains afterwards."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, NoviceTuning
from moe_lightning.callbacks.strategies import check_strategy
from moe_lightning.plan import CompressionPlan
from moe_lightning.surgery import plan_of
from tests.callbacks.small_fit import batches, fit, tiny_module
from tests.models import random_batches, tiny_mixtral
from tests.small_runs import write_texts

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION = random_batches(3, batch=2, sequence=16, seed=5)


def compress(at_step: Any = 3, *methods: Any) -> Compress:
    return Compress(list(methods) or [ml.Novices(ratio=0.5)], at_step=at_step, batches=CALIBRATION)


class Watch(Callback):
    """Note the weights before each batch and how often the optimizer ran by then."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []
        self.steps: list[int] = []
        self.learning_rates: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.steps.append(trainer.global_step)
        self.learning_rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_equals_compressing_the_model_by_hand(tmp_path: Path) -> None:
    """Until the step nothing differs from a run without it; at the step the model is what ml.compress makes."""
    watch, alone = Watch(), Watch()
    callback = compress(3)
    module, other = tiny_module(), tiny_module()
    fit(module, tmp_path / "one", [callback, watch], steps=6)
    trainer = fit(other, tmp_path / "two", [alone, Stop(3)], steps=6)
    assert trainer.global_step == 3
    for step in range(3):
        assert not changed(alone.weights[step], watch.weights[step])
    result = ml.compress(other.model, CALIBRATION, ml.Novices(ratio=0.5), progress=False)
    assert callback.result is not None and result.plan == callback.result.plan == plan_of(module.model)
    by_hand = {f"model.{name}": value for name, value in other.model.named_parameters()}
    assert by_hand.keys() == watch.weights[3].keys() and not changed(by_hand, watch.weights[3])
    # Everything that is left trains on, the new parameters included.
    assert changed(watch.weights[3], watch.weights[-1]) == set(watch.weights[3])
    assert module.model.training
    assert CompressionPlan.from_dict(module.hparams["plan"]) == result.plan


class Stop(Callback):
    """End the run after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_never_inside_accumulation(tmp_path: Path) -> None:
    watch = Watch()
    fit(
        tiny_module(),
        tmp_path,
        [compress(2), watch],
        steps=4,
        train=batches(12),
        accumulate_grad_batches=3,
    )
    is_compressed = [any(name.endswith("novices") for name in weights) for weights in watch.weights]
    assert is_compressed == [step >= 2 for step in watch.steps]
    assert watch.steps[:12] == [batch // 3 for batch in range(12)]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_narrow_types(precision: str, tmp_path: Path) -> None:
    module = tiny_module()
    fit(module, tmp_path, [compress(2), NoviceTuning(4, learning_rate=0.1)], steps=6, precision=precision)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {expected}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def test_several_at_one_step_and_at_the_end(tmp_path: Path) -> None:
    module = tiny_module()
    last = compress("end", ml.ExpertDrop(keep=4))
    fit(module, tmp_path, [compress(3, ml.Novices(keep=4)), compress(3, ml.ExpertDrop(keep=5)), last], steps=5)
    kinds = [edit.to_dict()["kind"] for edit in plan_of(module.model).edits]
    assert len(kinds) == 9 and len(set(kinds[:3])) == len(set(kinds[3:])) == 1
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {
        f"compression-{place}.{what}"
        for place in ("3", "3-2", "end")
        for what in ("json", "plan.json", "statistics.safetensors")
    }
    plan = CompressionPlan.from_json((tmp_path / "results" / "compression-end.plan.json").read_text())
    assert plan == plan_of(module.model)


def test_what_is_logged(tmp_path: Path) -> None:
    callback = compress(3)
    fit(tiny_module(), tmp_path, [callback], steps=5)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert callback.result is not None
    for name in ("parameters", "bytes"):
        (event,) = events.Scalars(f"compression/{name}")
        assert (event.step, event.value) == (3, getattr(callback.result.size_after, name))
    assert "compression/plan/text_summary" in events.Tags()["tensors"]
    statistics = ml.Statistics.load(tmp_path / "results" / "compression-3.statistics.safetensors")
    assert torch.equal(statistics.score("mone"), callback.result.statistics.score("mone"))  # type: ignore[union-attr]


def test_a_failure_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """Calibration data that breaks in the middle: the error comes through and the model is whole."""

    def breaking() -> Any:
        yield CALIBRATION[0]
        raise OSError("the disk is gone")

    module = tiny_module()
    callback = Compress([ml.Novices(ratio=0.5)], at_step=2, batches=breaking())
    with pytest.raises(OSError, match="the disk is gone"):
        fit(module, tmp_path, [callback], steps=4)
    assert not plan_of(module.model) and not callback.done and module.model.training


def test_a_resumed_run_with_other_methods_is_warned(tmp_path: Path) -> None:
    done = compress(2)
    fit(tiny_module(), tmp_path, [done], steps=3)
    other = compress(2, ml.Novices(ratio=0.25))
    with pytest.warns(UserWarning, match=r"compressed by Novices\(ratio=0\.5.*ratio=0\.25.* is not applied"):
        other.load_state_dict(done.state_dict())
    assert other.state_key == done.state_key and other.state_dict() == done.state_dict()
    compress(2).load_state_dict(done.state_dict())  # the same: no warning
    compress(4, ml.Novices(ratio=0.25)).load_state_dict(compress(4).state_dict())  # not applied yet: the new one counts


# NoviceTuning


def test_only_the_novices_train(tmp_path: Path) -> None:
    watch = Watch()
    module = tiny_module()
    fit(module, tmp_path, [compress(2), NoviceTuning(4, learning_rate=0.5), watch], steps=9)
    everything = set(watch.weights[4])
    novices = {name for name in everything if name.endswith(".novices")}
    assert novices and changed(watch.weights[2], watch.weights[4]) == everything
    assert changed(watch.weights[4], watch.weights[-1]) == novices
    rates = [rates["novices"] for rates in watch.learning_rates[4:-1]]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True) and rates[-1] > 0.05
    assert all(parameter.requires_grad for parameter in module.parameters()), "free again after the run"


def test_compressing_after_novice_tuning_began(tmp_path: Path) -> None:
    """New novices train, what survives of the rest stays frozen."""
    watch = Watch()
    callbacks = [compress(1, ml.Novices(keep=4)), NoviceTuning(2), compress(4, ml.Novices(keep=3)), watch]
    fit(tiny_module(), tmp_path, callbacks, steps=7)
    assert all(name.endswith(".novices") for name in changed(watch.weights[4], watch.weights[-1]))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([NoviceTuning(2)], "there will be no novices to train: put a Compress with Novices before it"),
        ([NoviceTuning(2), compress(2)], "there will be no novices"),
        ([compress(2, ml.ExpertDrop(keep=4)), NoviceTuning(3)], "there will be no novices"),
        ([compress("end"), NoviceTuning(3)], "there will be no novices"),
        ([compress(8)], "which has 8 steps: choose a smaller step or 'end', or give the run more"),
        ([compress(2, ml.ExpertDrop(keep=3)), compress(4, ml.ExpertDrop(keep=4))], "keep=4 is more than the 3 experts"),
        ([compress(2, ml.ExpertDrop(keep=1))], "picks 2: .*set keep to at least 2"),
        (
            [Compress([ml.Novices(ratio=0.5)], at_step=2)],
            r"Compress needs calibration data: .*method calibration_batches\(n\)",
        ),
        ([compress(2), NoviceTuning(9)], "NoviceTuning: at_step=9 lies beyond the run"),
    ],
)
def test_what_cannot_work_is_found_before_the_first_step(
    callbacks: list[Callback], message: str, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        fit(tiny_module(), tmp_path, [*copy.copy(callbacks), watch])
    assert not watch.weights


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress(-1), "at_step must be a step number"),
        (lambda: compress("middle"), "at_step must be a step number"),
        (lambda: Compress([], at_step=2), "at least one method"),
        (lambda: Compress([ml.Novices(ratio=0.5)], at_step=2, calibration_batches=0), "calibration_batches must be 1"),
        (lambda: NoviceTuning("end"), "must be a step number"),  # type: ignore[arg-type]
        (lambda: NoviceTuning(3, learning_rate=0), "must be positive"),
        (lambda: Export("a/b"), "plain folder name"),
        (lambda: Export(".."), "plain folder name"),
        (lambda: Export(""), "plain folder name"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_strategies_that_shard_are_refused() -> None:
    class Sharded:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(ValueError, match=r"use --trainer\.strategy auto or ddp"):
        check_strategy(Sharded(), "Compress")  # type: ignore[arg-type]


# Export


def test_export_writes_the_model_of_its_moment(tmp_path: Path) -> None:
    module, watch = tiny_module(), Watch()
    fit(module, tmp_path, [Export("before", 3), compress(3), Export("after", 3), Export("final"), watch], steps=5)
    models = {name: ml.from_pretrained(tmp_path / "models" / name) for name in ("before", "after", "final")}
    assert not plan_of(models["before"]) and plan_of(models["after"]) == plan_of(models["final"])
    for name, step in (("after", 3), ("final", -1)):
        weights = {f"model.{key}": value for key, value in models[name].named_parameters()}
        assert not changed(weights, watch.weights[step])
    assert json.loads((tmp_path / "models" / "before" / "config.json").read_text())["model_type"] == "mixtral"


# Two processes


def test_two_processes_stay_equal(tmp_path: Path) -> None:
    """Each sees other batches; after the compressions and the freezing their gradients must still be added up."""
    write_texts(tmp_path / "texts", num_files=16)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.ddp_run", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and any("novices" in name for name in first)
    assert {name.rpartition(".")[2] for name in first} >= {"words", "scale", "zero", "values", "bits"}
    assert all(torch.equal(first[name], second[name]) for name in first)


class OwnModule(LightningModule):
    """A module that is not ours, with one group of parameters."""

    def __init__(self, trains: str = "") -> None:
        super().__init__()
        self.model = tiny_mixtral()
        self.other = torch.nn.Linear(2, 2)
        self.trains = trains

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss + self.other.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for name, p in self.named_parameters() if self.trains in name], lr=1e-2)


def novices_at(step: int) -> Compress:
    return Compress([ml.Novices(ratio=0.5)], at_step=step, batches=random_batches())


@pytest.mark.filterwarnings("ignore:.*has no set_plan")
@pytest.mark.parametrize("trains", ["", "lm_head"])
def test_novice_tuning_in_a_module_of_ones_own(trains: str, tmp_path: Path) -> None:
    module = OwnModule(trains)
    head, other = module.model.lm_head.weight.clone(), module.other.weight.clone()
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 0:
                seen.append({n: p.detach().clone() for n, p in pl_module.model.named_parameters()})

    fit(module, tmp_path, [novices_at(0), NoviceTuning(at_step=0), Look()], steps=3)
    moved = [n for n, p in module.model.named_parameters() if not torch.equal(p, seen[0][n])]
    assert moved == [f"model.layers.{layer}.mlp.experts.novices" for layer in range(3)]
    assert torch.equal(module.model.lm_head.weight, head)
    assert torch.equal(module.other.weight, other)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:.*has no set_plan")
def test_a_learning_rate_without_a_group_for_novices(tmp_path: Path) -> None:
    """All groups have it while the stage lasts, for nothing else trains; afterwards each has its own again."""
    module = OwnModule()
    rates: list[set[float]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    fit(module, tmp_path, [novices_at(0), NoviceTuning(1, steps=2, learning_rate=0.1), Look()], steps=4)
    assert rates[0] == rates[3] and [len(found) for found in rates] == [1] * 4
    assert rates[1] == {0.1} and rates[2].pop() == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))


def test_a_step_behind_the_last_epoch_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at_step=50 lies beyond the run, which has 4 steps"):
        fit(tiny_module(), tmp_path, [novices_at(50)], steps=100, train=batches(4), max_epochs=1)


def test_bf16_true_keeps_the_positions_of_the_exported_model(tmp_path: Path) -> None:
    module = tiny_module()
    fit(module, tmp_path, [Export("final")], steps=2, precision="bf16-true")
    again = ml.from_pretrained(tmp_path / "models" / "final")
    batch = batches(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(module.model.eval()(batch).logits, again(batch).logits)
