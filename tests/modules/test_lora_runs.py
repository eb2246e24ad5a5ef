"""Checkpoints with low-rank terms, and runs that go on from one of before there were terms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export
from moe_lightning.experts.lora import lora_stacks
from moe_lightning.plan import AddLora
from tests.callbacks.small_fit import batches, loader, tiny_module

STEPS = 8


def trainer_of(folder: Path, steps: int, callbacks: list[Any]) -> Trainer:
    return Trainer(
        max_steps=steps,
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def run(folder: Path, stop: int, callbacks: list[Any], resume: Path | None = None) -> Any:
    module = tiny_module()
    trainer = trainer_of(folder, stop, callbacks)
    # The same schedule whenever the run stops.
    module.learning_rate_factor = lambda step: 1.0 - step / 20  # type: ignore[method-assign]
    trainer.fit(module, loader(batches(STEPS)), ckpt_path=resume)
    assert trainer.global_step == stop
    return trainer, module


def test_a_checkpoint_with_three_groups_is_resumed_its_schedule_too(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, 4, [])
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    (optimizer,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    assert optimizer["param_groups"].pop()["name"] == "adapters"
    for name, value in schedule.items():  # as it was with three groups
        if isinstance(value, list) and len(value) == 4:
            schedule[name] = value[:3]
    assert len(schedule["base_lrs"]) == len(schedule["_last_lr"]) == 3
    torch.save(checkpoint, tmp_path / "old.ckpt")
    states = []
    for name in ("new", "old"):
        second, module = run(tmp_path, STEPS, [], tmp_path / f"{name}.ckpt")
        states.append(module.state_dict())
        assert [group["lr"] for group in second.optimizers[0].param_groups] == [pytest.approx(6e-3)] * 4
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # Terms that come afterwards train.
    add = Compress([ml.LoRA(rank=2, targets="experts")], at_step=5, batches=[])
    _, adapted = run(tmp_path, STEPS, [add], tmp_path / "old.ckpt")
    assert all(bool(stack.lora_B.any()) for stack in lora_stacks(adapted).values())


def test_a_checkpoint_says_what_terms_there_are(tmp_path: Path) -> None:
    trainer, module = run(tmp_path, 4, [Compress([ml.LoRA(rank=2)], at_step=2, batches=[])])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    loaded = ml.MixtralModule.load_from_checkpoint(tmp_path / "half.ckpt")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in module.state_dict().items())
    plan = torch.load(tmp_path / "half.ckpt", weights_only=True)["hyper_parameters"]["plan"]
    assert {edit["kind"] for edit in plan["edits"]} == {AddLora.kind}


def test_a_plain_export_of_terms_that_are_not_merged_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    add = Compress([ml.LoRA(rank=2)], at_step=2, batches=[])
    export = Export("plain", format="transformers")
    module = tiny_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"Export 'plain' at the end: after .* have low-rank terms that are not merged"
    ):
        trainer_of(tmp_path, 4, [add, export]).fit(module, loader(batches(4)))
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    merge = Compress([ml.MergeLoRA()], at_step=3, batches=[])
    run(tmp_path, 4, [add, merge, export])
    assert '"model_type": "mixtral"' in (tmp_path / "models" / "plain" / "config.json").read_text()
