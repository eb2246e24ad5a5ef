"""Only the intended tensors move: every other one of the state dict is compared bit by bit, packed ones included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lightning.experts import Masked
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
