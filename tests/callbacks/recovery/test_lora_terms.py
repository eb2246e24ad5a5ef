"""Which terms LoRARecovery adds, trains and folds in where there are some already, and what a resume may change."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import moe_lightning as ml
from moe_lightning.callbacks import LoRARecovery
from moe_lightning.plan import AddLora, MergeLora
from moe_lightning.surgery import plan_of
from tests.callbacks.recovery.stage_runs import Behind, moved, stage, state_of, train_batches
from tests.callbacks.small_fit import fit, loader, tiny_module


def terms(names: Any) -> set[str]:
    """Say beside what the low-rank terms among some names stand."""
    return {"attention" if ".self_attn." in name else "experts" for name in names if "lora_" in name}


def ranks(module: Any) -> dict[str, set[int]]:
    """Return the ranks of the terms."""
    found: dict[str, set[int]] = {}
    for name, value in module.named_parameters():
        if name.endswith("lora_A"):
            found.setdefault(min(terms([name])), set()).add(value.shape[1])
    return found


def test_a_second_stage_adds_and_trains_its_own_terms(tmp_path: Path) -> None:
    """Those of another target stay as they are, with a rank of their own, and are not folded in with the others."""
    module, behind = tiny_module(), Behind()
    given = [
        stage("LoRARecovery", 0, steps=2, targets="attention", merge=False),
        stage("LoRARecovery", 2, steps=2, targets="experts", rank=3),
        behind,
    ]
    fit(module, tmp_path, given, steps=5, train=train_batches(5))
    assert [terms(names) for names in behind.training[:4]] == [{"attention"}] * 2 + [{"experts"}] * 2
    assert terms(behind.states[3]) == {"attention", "experts"}
    trained = moved(behind.states[2], behind.states[3])
    assert terms(trained) == {"experts"} and all("lora_" in name for name in trained)
    assert ranks(module) == {"attention": {2}}
    assert {edit.target for edit in plan_of(module.model).edits if isinstance(edit, MergeLora)} == {"experts"}


def test_what_is_missing_is_added_and_the_rest_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, behind = tiny_module(), Behind()
    given = [
        stage("LoRARecovery", 0, steps=2, targets="attention", merge=False),
        stage("LoRARecovery", 2, targets="experts+attention"),
        behind,
    ]
    fit(module, tmp_path, given, steps=4, train=train_batches(4))
    assert terms(behind.training[2]) == terms(moved(behind.states[2], behind.states[3])) == {"experts", "attention"}
    before = [name for name in behind.states[1] if "lora_B" in name]
    assert all(behind.states[2][name].any() for name in before), "the terms of the first stage were thrown away"
    kinds = [type(edit) for edit in plan_of(module.model).edits]
    assert kinds == [AddLora] * 6 + [MergeLora] * 6 and not ranks(module)
    assert "step 2: LoRARecovery goes on with terms that are there already" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"rank": 4}, {"lora_alpha": 1.0}])
def test_terms_of_another_kind_are_refused_before_the_run(options: Any, tmp_path: Path) -> None:
    module, behind = tiny_module(), Behind()
    module.configure_model()
    ml.compress(module.model, None, [ml.LoRA(rank=2, targets="attention")], progress=False)
    message = r"LoRARecovery at step 1.*: layer 0: its attention has low-rank terms already, of rank 2 and alpha 4, not"
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, [stage("LoRARecovery", 1, **options), behind], steps=3)
    assert not behind.states
    # Beside other matrices it may have what it wants.
    given = [stage("LoRARecovery", 1, targets="experts", merge=False, **options)]
    fit(module, tmp_path, given, steps=3)
    assert ranks(module) == {"attention": {2}, "experts": {options.get("rank", 2)}}


class Save(Callback):
    """Write a checkpoint after two steps, and at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in (2, 4):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


BEGUN: dict[str, Any] = {"rank": 2, "targets": "attention", "requantize": "rtn", "lora_alpha": 4.0, "merge": True}


def go_on(folder: Path, options: dict[str, Any], name: str | None, steps: int = 5) -> tuple[Any, Any]:
    module, callback = tiny_module(), LoRARecovery(1, steps=3, learning_rate=0.02, **options)
    trainer = Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback] if name else [callback, Save(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = folder / name if name else None
    trainer.fit(module, loader(train_batches(1) * steps), ckpt_path=path, weights_only=True)
    return module, callback


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    go_on(folder, BEGUN, None)
    return folder


@pytest.mark.parametrize(
    "change",
    [{"rank": 8}, {"lora_alpha": 1.0}, {"targets": "experts"}, {"merge": False}, {"requantize": None}],
)
def test_other_options_in_mid_stage_are_refused(change: dict[str, Any], begun: Path) -> None:
    name, value = next(iter(change.items()))
    words = (
        rf"the middle of the stage with {name}={BEGUN[name]}: go on with the same options, and not with {name}={value},"
    )
    with pytest.raises(ValueError, match=words):
        go_on(begun, {**BEGUN, **change}, "2.ckpt")


def test_other_options_behind_the_stage_are_told(begun: Path) -> None:
    with pytest.warns(UserWarning, match="the stage is over, with rank=2, and the model stays as it is: rank=8 is not"):
        module, callback = go_on(begun, {**BEGUN, "rank": 8}, "4.ckpt")
    assert not ranks(module)
    # What was done is what the next checkpoint knows.
    assert callback.state_dict()["options"] == BEGUN


def test_the_same_options_in_other_words_go_on(begun: Path) -> None:
    whole, _ = go_on(begun / "whole", {**BEGUN, "lora_alpha": None}, None)
    for name in ("2.ckpt", "4.ckpt"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="LoRARecovery.*")
            module, _ = go_on(begun, {**BEGUN, "lora_alpha": None}, name)
        states = state_of(whole), state_of(module)
        assert all(torch.equal(states[0][entry], states[1][entry]) for entry in states[0])
