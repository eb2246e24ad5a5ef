"""Only the intended tensors move: every other one of the state dict is compared bit by bit, packed ones included."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks import FullFineTuning, LoRARecovery, NoviceTuning, RecoveryStage, RouterDistillation
from moe_lightning.experts import Masked
from moe_lightning.recovery.selections import Everything
from tests.callbacks.recovery.stage_runs import (
    KINDS,
    Before,
    Behind,
    compressed_module,
    moved,
    stage,
    state_of,
    train_batches,
    trains,
)
from tests.callbacks.small_fit import fit

STAGES = ("RouterDistillation", "NoviceTuning", "LoRARecovery", "FullFineTuning")
WITH_NOVICES = ("constant novices", "low-rank novices", "mixture")
CASES = [(name, kind) for name in STAGES for kind in KINDS if name != "NoviceTuning" or kind in WITH_NOVICES]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_only_what_is_intended_moves(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, before, behind = compressed_module(kind), Before(), Behind()
    start = state_of(module)
    masks = {item: stack.zeros_kept() for item, stack in module.named_modules() if isinstance(stack, Masked)}
    fit(module, tmp_path, [before, stage(name, steps=3), behind], steps=3, train=train_batches(3))
    # Entering changes nothing that was there; beside terms, experts that were transformers' own stand in a storage.
    entered = {entry.replace(".experts.storage.", ".experts."): value for entry, value in behind.states[0].items()}
    for entry, value in start.items():
        assert torch.equal(entered[entry.replace(".experts.storage.", ".experts.")], value)
    expected = {entry for entry in behind.states[0] if trains(name, entry)}
    assert expected and moved(behind.states[0], before.states[-1]) == expected
    said = next(line for line in capsys.readouterr().out.splitlines() if f"{name} trains" in line)
    # A state dict holds neither the zeros of masked matrices nor integers as such: they are counted apart.
    zeros = sum(int((~kept).sum()) for item, kept in masks.items() if name == "FullFineTuning")
    assert f": {sum(behind.states[0][entry].numel() for entry in expected) + zeros:,} of " in said
    # Behind the stage everything trains, and what was pruned is zero.
    assert all(parameter.requires_grad for parameter in module.parameters())
    for item, kept in masks.items():
        assert not module.get_submodule(item).dense()[~kept].any()


def test_folding_in_touches_the_matrices_alone(tmp_path: Path) -> None:
    """What LoRARecovery leaves differs from the model before in the matrices that had terms, and nowhere else."""
    module = compressed_module("mixture")
    start = state_of(module)
    fit(module, tmp_path, [stage("LoRARecovery", steps=2, targets="experts")], steps=2, train=train_batches(2))
    changed = moved(start, state_of(module))
    assert changed and all(".experts.storage." in name for name in changed)
    assert any(name.endswith("words") for name in changed)


@pytest.mark.parametrize("kind", ["whole", "int4"])
def test_no_novices_are_found_before_the_run(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there will be no novices to train: put a Compress with Novices before it"):
        fit(compressed_module(kind), tmp_path, [stage("NoviceTuning")], steps=2)


def test_what_was_frozen_before_counts_where_it_stays_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FullFineTuning lets it be; together with what trains it is all that the shape claims, or something is wrong."""
    module = compressed_module("mixture")
    whole = Everything().claimed(architecture_of(module.model).shape(module.model))
    embedding = module.model.model.embed_tokens.weight.requires_grad_(False)
    fit(module, tmp_path, [stage("FullFineTuning")], steps=1)
    assert f"that can move: {whole - embedding.numel():,} of " in capsys.readouterr().out
    monkeypatch.setattr(Everything, "claimed", lambda self, shape: whole + 1)
    with pytest.raises(
        RuntimeError, match=f"there are {whole:,} parameters, but the model's shape claims {whole + 1:,}"
    ):
        fit(compressed_module("mixture"), tmp_path, [stage("FullFineTuning")], steps=1)


KINDS_OF_STAGES = (RouterDistillation, NoviceTuning, LoRARecovery, FullFineTuning)


@pytest.mark.parametrize("kind", KINDS_OF_STAGES)
def test_only_the_first_step_has_no_name(kind: Any) -> None:
    """The others had different orders in different stages."""
    parameters = list(inspect.signature(kind).parameters.values())
    assert parameters[0].name == "at_step" and all(item.kind is item.KEYWORD_ONLY for item in parameters[1:])
    with pytest.raises(TypeError, match="positional argument"):
        kind(10, 20)


@pytest.mark.parametrize("kind", KINDS_OF_STAGES)
def test_a_yaml_file_names_the_options(kind: Any) -> None:
    options: dict[str, Any] = {"at_step": 3, "steps": 4, "learning_rate": 0.5, "warmup_steps": 1}
    options |= {"teacher": "before", "alpha": 0.25, "temperature": 3.0, "load_balancing_coefficient": 0.125}
    parser = ArgumentParser()
    parser.add_subclass_arguments(RecoveryStage, "stage")
    path = f"moe_lightning.callbacks.{kind.__name__}"
    given = parser.parse_object({"stage": {"class_path": path, "init_args": options}})
    made = parser.instantiate_classes(given).stage
    assert type(made) is kind
    assert (made.at_step, made.steps, made.learning_rate, made.warmup_steps) == (3, 4, 0.5, 1)
    assert made.source.name == "before"
    objective = {"alpha": 0.25, "temperature": 3.0, "hidden_weight": 0.0, "load_balancing_coefficient": 0.125}
    assert made._objective_options == objective


def test_full_fine_tuning_distils_as_its_source_does() -> None:
    """2507.00390: alpha 0.5 and temperature 2."""
    options = FullFineTuning(0)._objective_options
    assert (options["alpha"], options["temperature"]) == (0.5, 2.0)
