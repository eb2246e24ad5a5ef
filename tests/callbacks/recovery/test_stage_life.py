"""When stages begin and end, one after the other, what happens at the boundaries, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, LastCheckpoint, LoRARecovery, NoviceTuning, RecoveryStage
from moe_lightning.callbacks.recovery.holding import HeldRate
from moe_lightning.plan import AddLora, MergeLora, NoviceExperts
from moe_lightning.surgery import plan_of
from tests.callbacks.recovery.stage_runs import Behind, compressed_module, load_checkpoint, moved, stage, train_batches
from tests.callbacks.recovery.stage_runs import trains as trains_by_name
from tests.callbacks.small_fit import fit, loader, tiny_module
from tests.models import random_batches

CALIBRATION = random_batches(2, batch=2, sequence=16, seed=5)


def compress(at_step: Any, *methods: Any) -> Compress:
    return Compress(list(methods), at_step=at_step, batches=CALIBRATION, min_tokens=1, max_fallback=1.0)


def chain() -> list[Any]:
    """Steps 1: compress, 1 to 3: routers, 3 to 5: novices, 5 to 8: low-rank terms, then everything."""
    return [
        stage("LoRARecovery", 5, steps=3),
        compress(1, ml.Novices(keep=4, novice="low_rank", rank=2), ml.RTN(group_size=16)),
        stage("NoviceTuning", 3),
        stage("RouterDistillation", 1),
    ]


def names_of(trained: set[str]) -> str:
    kinds = ("RouterDistillation", "NoviceTuning", "LoRARecovery")
    found = [kind for kind in kinds if trained and all(trains_by_name(kind, name) for name in trained)]
    return found[0] if found else "everything"


def test_one_stage_after_the_other_in_any_order_of_the_list(tmp_path: Path) -> None:
    module, behind = tiny_module(), Behind()
    callbacks = chain()
    fit(module, tmp_path, [*callbacks, behind], steps=10, train=train_batches(10))
    trained = [
        names_of(moved(*pair)) for pair in zip(behind.states[:8], behind.states[1:8], strict=False) if same(*pair)
    ]
    assert [names_of(names) for names in behind.training] == [
        "everything",
        *["RouterDistillation"] * 2,
        *["NoviceTuning"] * 2,
        *["LoRARecovery"] * 3,
        *["everything"] * 2,
    ]
    assert trained == [*["RouterDistillation"] * 2, "NoviceTuning", *["LoRARecovery"] * 2]
    kinds = [type(edit) for edit in plan_of(module.model).edits]
    assert kinds.count(AddLora) == kinds.count(MergeLora) == 6 and NoviceExperts in kinds
    assert module.hparams["plan"]["edits"] == plan_of(module.model).to_dict()["edits"]
    assert [item.left for item in callbacks if isinstance(item, RecoveryStage)] == [True] * 3
    for item in behind.objectives[1:8]:
        assert item.load_balancing_coefficient == 0.0 or item.load_balancing_coefficient is None
    assert behind.objectives[8].load_balancing_coefficient is None
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"lora-5.json", "merge-8.json", "merge-8.plan.json"} <= names


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return {name: value.shape for name, value in first.items()} == {n: value.shape for n, value in second.items()}


def test_moments_at_the_boundaries(tmp_path: Path) -> None:
    """Those of what does not train are forgotten when a stage begins; those of what trains on are kept."""
    behind = Behind()
    callbacks = [*chain(), stage("FullFineTuning", 8), behind]
    fit(tiny_module(), tmp_path, callbacks, steps=10, train=train_batches(10))
    whole = set(behind.moments[1])
    assert all(trains_by_name("RouterDistillation", name) for name in whole)  # step 1: only the routers' are left
    assert {int(item["step"]) for item in behind.moments[1].values()} == {1}
    assert {int(item["step"]) for item in behind.moments[2].values()} == {2}
    # New in its stage: no moments before its first step.
    for first, kind in ((3, "NoviceTuning"), (5, "LoRARecovery")):
        assert not behind.moments[first]
        assert all(trains_by_name(kind, name) for name in behind.moments[first + 1])
        assert {int(item["step"]) for item in behind.moments[first + 1].values()} == {1}
    assert not behind.moments[8]  # the terms are gone
    assert {int(item["step"]) for item in behind.moments[9].values()} == {1} and len(behind.moments[9]) > 20


def test_learning_rates(tmp_path: Path) -> None:
    behind = Behind()
    module = tiny_module()
    callbacks = [
        compress(1, ml.Novices(keep=4)),
        stage("RouterDistillation", 2, steps=4, learning_rate=0.5, warmup_steps=2),
        stage("NoviceTuning", 6, steps=2, learning_rate=None),
        behind,
    ]
    fit(module, tmp_path, callbacks, steps=10, train=train_batches(10))
    own = [0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, step - 1) / 9))) for step in range(10)]
    peak = [0.5 * 0.5, 0.5, 0.5, 0.5 * (0.1 + 0.9 * 0.5)]
    expected = [own[0], own[1], *peak, *own[6:]]
    assert [rates.pop() for rates in behind.rates if len(rates) == 1] == pytest.approx(expected)
    logged = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("train/learning_rate")
    assert [event.value for event in logged] == pytest.approx(expected)


def test_a_schedule_that_goes_on_from_the_learning_rate_is_not_disturbed() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizers = [torch.optim.SGD([weight], lr=1.0) for _ in range(2)]
    schedules = [torch.optim.lr_scheduler.MultiplicativeLR(item, lambda _: 0.5) for item in optimizers]
    held = HeldRate()
    rates = []
    for step in range(5):
        if step in (1, 2, 3):
            held.set(optimizers[:1], 7.0)
            held.set(optimizers[:1], 8.0)  # a second batch of the same step
            assert optimizers[0].param_groups[0]["lr"] == 8.0
        if step == 4:
            held.release()
        weight.grad = torch.zeros(2)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            if step != 2:  # a step that is left out
                optimizer.step()
            schedule.step()
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    assert rates[2][0] == 4.0, "nothing was stepped: the schedule went on from what it found"
    assert [pair[1] for pair in rates] == [0.5**number for number in range(1, 6)]
    assert [rates[number][0] for number in (0, 1)] == [0.5, 0.25]


def test_accumulation(tmp_path: Path) -> None:
    behind = Behind()
    callbacks = [stage("LoRARecovery", 1, steps=2), behind]
    fit(compressed_module("int4"), tmp_path, callbacks, 4, train_batches(12), accumulate_grad_batches=3)
    with_terms = [any("lora" in name for name in state) for state in behind.states]
    assert with_terms == [1 <= step < 3 for step in behind.steps]
    assert behind.steps[:12] == [batch // 3 for batch in range(12)]
    rates = [next(iter(rates)) for rates in behind.rates]
    assert rates[3:6] == [0.02] * 3 and len(set(rates[6:9])) == 1


def test_compressing_in_mid_stage(tmp_path: Path) -> None:
    """What a gradual schedule makes is frozen, or trains, as the stage says; moments stay with what they belong to."""
    behind = Behind()
    pruning = ml.Wanda(sparsity=ml.SparsitySchedule(0.0, 0.5, steps=4, every=2))
    callbacks = [
        stage("NoviceTuning", 1),
        compress(0, ml.Novices(keep=5)),
        compress(1, pruning),
        compress(3, ml.Novices(keep=4)),
        behind,
    ]
    fit(tiny_module(), tmp_path, callbacks, steps=7, train=train_batches(7))
    for first, second in zip(behind.states[1:-1], behind.states[2:], strict=True):
        if same(first, second):
            assert names_of(moved(first, second)) == "NoviceTuning"
    assert all(names_of(names) == "NoviceTuning" for names in behind.training[1:])
    assert all(names_of(set(item)) == "NoviceTuning" for item in behind.moments[2:])
    shapes = {tuple(state["model.model.layers.0.mlp.experts.novices"].shape) for state in behind.states}
    assert shapes == {(1, 32), (2, 32)}


def test_what_is_new_in_mid_stage_does_not_train(tmp_path: Path) -> None:
    behind = Behind()
    callbacks = [stage("RouterDistillation", 1), compress(3, ml.Novices(keep=4), ml.RTN(group_size=16)), behind]
    fit(tiny_module(), tmp_path, callbacks, steps=6, train=train_batches(6))
    assert any(name.endswith("novices") for name in behind.states[3])
    assert all(names_of(names) == "RouterDistillation" for names in behind.training[1:])
    assert names_of(moved(behind.states[3], behind.states[5])) == "RouterDistillation"
    # What trains on keeps its moments.
    assert {int(item["step"]) for item in behind.moments[4].values()} == {4}


def test_what_was_frozen_stays_frozen(tmp_path: Path) -> None:
    module, behind = compressed_module("low-rank novices"), Behind()
    module.model.model.embed_tokens.weight.requires_grad_(False)
    module.model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    callbacks = [stage("RouterDistillation", 1, steps=2), stage("FullFineTuning", 3, steps=2), behind]
    fit(module, tmp_path, callbacks, steps=6, train=train_batches(6))
    everything = {name for name, _ in module.named_parameters()}
    assert all(name.endswith("gate.weight") for name in behind.training[1]) and len(behind.training[1]) == 3
    for step in (0, 3, 4, 5):
        assert behind.training[step] == everything - frozen
    assert {name for name, parameter in module.named_parameters() if not parameter.requires_grad} == frozen


class Break(Callback):
    """Raise at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise OSError("the disk is gone")


def test_an_error_lets_everything_train_again(tmp_path: Path) -> None:
    module = compressed_module("low-rank novices")
    with pytest.raises(OSError, match="the disk is gone"):
        fit(module, tmp_path, [stage("RouterDistillation", 0), Break(2)], steps=4)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.objective.load_balancing_coefficient is None


class Stop(Callback):
    """End the run after a step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 3


def test_a_run_that_is_stopped_leaves_its_stage(tmp_path: Path) -> None:
    module = compressed_module("int4")
    fit(module, tmp_path, [LoRARecovery(1, rank=2), Stop(), Export("final")], steps=8)
    assert not any("lora" in name for name in module.state_dict())
    assert [type(edit) for edit in plan_of(ml.from_pretrained(tmp_path / "models" / "final")).edits][-1] is MergeLora


@pytest.mark.parametrize("merge", [True, False])
def test_a_longer_run_goes_on_in_its_last_stage(merge: bool, tmp_path: Path) -> None:
    """It had ended there, and a checkpoint of its end is resumed with more steps."""

    def callbacks() -> list[Any]:
        done = stage("RouterDistillation", 1, steps=1)
        return [done, LoRARecovery(2, rank=2, merge=merge), LastCheckpoint(every_n_train_steps=100)]

    batches = train_batches(8)
    go_on(compressed_module("low-rank novices"), tmp_path, callbacks(), 4, batches)
    path = tmp_path / "checkpoints" / "last.ckpt"
    saved = load_checkpoint(path)
    assert any("lora" in name for name in saved["state_dict"]) != merge
    assert saved["callbacks"]["LoRARecovery[at_step=2]"]["left_at"] == 4
    module, behind = compressed_module("low-rank novices"), Behind()
    go_on(module, tmp_path, [*callbacks(), behind], 6, batches, path)
    assert behind.steps == [4, 5]
    assert [names_of(names) for names in behind.training] == ["LoRARecovery"] * 2
    assert any("lora" in name for name in module.state_dict()) != merge
    # A stage that had its steps is over for good.
    module, behind = compressed_module("low-rank novices"), Behind()
    first = [stage("RouterDistillation", 1, steps=1), LoRARecovery(2, steps=2, rank=2, merge=merge)]
    go_on(module, tmp_path, [*first, behind], 6, batches, path)
    assert [names_of(names) for names in behind.training] == ["everything"] * 2


def go_on(
    module: Any, folder: Path, callbacks: list[Any], steps: int, batches: list[Any], path: Path | None = None
) -> None:
    """Train with checkpoints, from the beginning or from one of them."""
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder if path is None else folder / "resumed",
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(batches), ckpt_path=path, weights_only=True)


def test_integers_may_stay_in_floating_point_after_merging(tmp_path: Path) -> None:
    """Then a Compress at the end of the stage rounds them, wherever it stands in the list."""
    module = compressed_module("int4")
    callbacks = [compress(3, ml.GPTQ(group_size=16)), LoRARecovery(1, steps=2, rank=2, requantize=None)]
    fit(module, tmp_path, callbacks, steps=4)
    kinds = [type(edit).__name__ for edit in plan_of(module.model).edits]
    assert kinds[-3:] == ["Quantize"] * 3 and "MergeLora" in kinds
    names = set(module.state_dict())
    assert any("experts.storage.down_proj.words" in name for name in names)
    assert "model.model.layers.0.self_attn.q_proj.weight" in names


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda: [stage("RouterDistillation", 9)],
            "RouterDistillation: at_step=9 lies beyond .* steps: choose a smaller step, or give the run more",
        ),
        (
            lambda: [stage("RouterDistillation", 2, steps=7)],
            "lasts from step 2 to 9, beyond the run, which has 8 steps",
        ),
        (
            lambda: [stage("RouterDistillation", 2, steps=3), stage("FullFineTuning", 4)],
            r"FullFineTuning begins at step 4, in the middle of RouterDistillation \(steps 2 to 5\)",
        ),
        (lambda: [stage("FullFineTuning", 2), stage("LoRARecovery", 2)], "both begin at step 2: give one of them"),
        (lambda: [stage("RouterDistillation", 6, warmup_steps=2)], "warmup_steps=2 leaves nothing of the stage"),
        (
            lambda: [stage("LoRARecovery", 2, steps=3), compress(3, ml.RTN(group_size=16))],
            "Compress at step 3: .*low-rank terms",
        ),
        (
            lambda: [stage("LoRARecovery", 2, merge=False), compress("end", ml.RTN(group_size=16))],
            "Compress at the end: .* its experts have low-rank terms: .*'merge: true' of LoRARecovery or by MergeLoRA",
        ),
        (
            lambda: [stage("LoRARecovery", 2, steps=3, merge=False), stage("LoRARecovery", 5, rank=4)],
            "LoRARecovery at step 5: .* has low-rank terms already, of rank 2 and alpha 4, not of rank 4 and alpha 8",
        ),
        (
            lambda: [
                compress(1, ml.RTN(group_size=16)),
                stage("LoRARecovery", 2),
                compress("end", ml.RTN(group_size=16)),
            ],
            "their weights are int4",
        ),
        (lambda: [NoviceTuning(3, teacher="before", alpha=1.0)], "teacher=before: nothing is compressed before step 3"),
    ],
)
def test_what_cannot_work_is_found_before_the_first_step(callbacks: Any, message: str, tmp_path: Path) -> None:
    behind = Behind()
    with pytest.raises(ValueError, match=message):
        fit(compressed_module("constant novices"), tmp_path, [*callbacks(), behind], steps=8)
    assert not behind.states


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage("LoRARecovery", "end"), "LoRARecovery: at_step must be a step number"),
        (lambda: stage("LoRARecovery", -1), "LoRARecovery: at_step must be a step number"),
        (lambda: stage("FullFineTuning", 1, steps=0), "FullFineTuning: steps must be 1 or more"),
        (lambda: stage("FullFineTuning", 1, steps=True), "FullFineTuning: steps must be 1 or more"),
        (lambda: stage("RouterDistillation", 1, learning_rate=-1.0), "learning_rate must be positive"),
        (lambda: stage("RouterDistillation", 1, warmup_steps=-1), "warmup_steps must not be negative"),
        (lambda: stage("RouterDistillation", 1, steps=2, warmup_steps=2), "leaves nothing of steps=2"),
        (lambda: stage("RouterDistillation", 1, learning_rate=None, warmup_steps=2), "needs a learning_rate"),
        (lambda: stage("NoviceTuning", 1, alpha=0.5), "NoviceTuning: alpha and hidden_weight need a teacher"),
        (lambda: stage("NoviceTuning", 1, teacher="before", alpha=1.5), "NoviceTuning: alpha must lie between"),
        (lambda: LoRARecovery(1, rank=0), "LoRARecovery: rank must be"),
        (lambda: LoRARecovery(1, lora_alpha=-1.0), "LoRARecovery: lora_alpha must be positive"),
        (lambda: LoRARecovery(1, targets="all"), "LoRARecovery: targets must be one of"),  # type: ignore[arg-type]
        (lambda: LoRARecovery(1, requantize="gptq"), "requantize must be 'rtn' or None"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
