"""Slimming layer by layer: nothing is left of a failure, and what is made can be trained."""

import dataclasses
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.method import Method
from moe_lightning.plan import Edit
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.pruners import Magnitude, SparseGPT, Wanda
from moe_lightning.slimming.pruning import Pruned
from moe_lightning.slimming.rounding import Quantized
from moe_lightning.slimming.view import LayerView, SlimmedLayer
from tests.compression.rounding_method import BATCHES, Rounding, compress
from tests.compression.test_compress import Snapshot
from tests.layer_reference import HIDDEN
from tests.models import tiny_mixtral

FAILURES: dict[str, tuple[Any, type[BaseException], str]] = {
    "slim": (Rounding(fail_in=1), OSError, "no memory left"),
    "slim, original": (Rounding(fail_in=2, propagate="original"), OSError, "no memory left"),
    "slim, attention": (Rounding(fail_in=1, targets="experts+attention", factor=2.0), OSError, "no memory left"),
}


@pytest.mark.parametrize("method", [value[0] for value in FAILURES.values()], ids=FAILURES)
@pytest.mark.parametrize("first", ["nothing", "novices", "attention"])
@pytest.mark.parametrize("compressed", [False, True])
def test_all_or_nothing(method: Rounding, first: str, compressed: bool) -> None:
    before_it: list[Method] = {"nothing": [], "novices": [ml.Novices(keep=4)], "attention": []}[first]
    if first == "attention" and method.targets == "experts":
        before_it = [Rounding(targets="attention", factor=2.0)]
    model = tiny_mixtral()
    if compressed:
        compress(model, [ml.ExpertDrop(keep=5, criterion="reap"), ml.Novices(keep=4)])
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    before = Snapshot(model)
    with pytest.raises(OSError, match="no memory left"):
        compress(model, [*before_it, method])
    before.check()


@dataclasses.dataclass
class Spoiled(Rounding):
    """Gives back something that cannot be stored."""

    how: str = ""

    def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
        done = super().slim(edit, view)
        if edit.layer != 1:
            return done
        matrix = done.matrices["down_proj"]
        assert isinstance(matrix, Quantized)
        if self.how == "scale":
            matrix.scale[-1, -1, -1] = torch.nan
        elif self.how == "norm":
            done.rescale = [("norm", torch.full((HIDDEN,), 1e39, dtype=torch.float64))]
        elif self.how == "place":
            done.rescale = [("novice_in", torch.ones(HIDDEN))]
        elif self.how == "missing":
            del done.matrices["down_proj"]
        elif self.how == "shape":
            done.matrices["down_proj"] = Quantized(*(table[:-1] for table in matrix))
        elif self.how == "kind":
            weight = view.weight("down_proj")
            done.matrices["down_proj"] = Pruned(weight, torch.ones_like(weight, dtype=torch.bool), ("", ""))
        elif self.how == "interrupt":
            raise KeyboardInterrupt
        return done


SPOILED = {
    "scale": "down_proj made by .* is not finite",
    "norm": "norm rescaled by .* is not finite",
    "place": "no 'novice_in' to rescale",
    "missing": r"gave matrices \['gate_up_proj'\] for layer 1",
    "shape": "made down_proj of the shape",
    "kind": "down_proj was pruned, but the edit says int8",
    "interrupt": "^$",
}


@pytest.mark.parametrize(("how", "message"), SPOILED.items(), ids=SPOILED)
def test_what_cannot_be_stored_is_found_and_undone(how: str, message: str) -> None:
    model = tiny_mixtral().train()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else RuntimeError, match=message):
        compress(model, [ml.ExpertDrop(keep=5), Spoiled(how=how)])
    before.check()


def test_an_overflow_in_the_type_of_the_model_is_found_and_undone() -> None:
    @dataclasses.dataclass
    class Large(Magnitude):
        def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
            done = super().slim(edit, view)
            matrix = done.matrices["down_proj"]
            assert isinstance(matrix, Pruned)
            done.matrices["down_proj"] = matrix._replace(weight=matrix.weight.double() * 1e39)
            return done

    model = tiny_mixtral()
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match=r"down_proj made by .* is not finite"):
        compress(model, Large(pattern="2:4"))
    before.check()


def test_pruned_weights_must_not_come_back() -> None:
    model = tiny_mixtral()
    compress(model, Magnitude(sparsity=0.5))

    @dataclasses.dataclass
    class Careless(Rounding):
        def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
            done = super().slim(edit, view)
            matrix = done.matrices["down_proj"]
            assert isinstance(matrix, Quantized)
            matrix.codes[0, 0] = 255
            return done

    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="pruned weights of down_proj came back"):
        compress(model, Careless())
    before.check()


def test_undo_puts_back_every_bit() -> None:
    model = tiny_mixtral()
    before = Snapshot(model)
    methods = [ml.Novices(keep=4), AWQ(group_size=16, targets="experts+attention"), ml.BlockDrop(count=1)]
    result = compress(model, methods, reversible=True)
    assert result.touched == result.claimed > 0
    result.undo()
    before.check()


def test_optimizers_train_what_is_left() -> None:
    model = tiny_mixtral().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    optimizer.step()
    old = model.model.layers[0].mlp.experts.down_proj
    moment = optimizer.state[old]["exp_avg"].clone()
    methods = [SparseGPT(pattern="2:4"), Rounding(targets="attention", factor=2.0)]
    compress(model, methods, optimizers=[optimizer])
    inside = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == inside
    stack = model.model.layers[0].mlp.experts.storage.down_proj
    assert torch.equal(optimizer.state[stack.values]["exp_avg"], moment.gather(-1, stack.places))
    kept = stack.zeros_kept().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in held)
        optimizer.step()
    assert torch.equal(stack.dense() != 0, kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_slimmed_without_gradients_can_be_trained(mode: Any) -> None:
    model = tiny_mixtral()
    with mode():
        compress(model, [Wanda(sparsity=0.5), AWQ(group_size=16)][:1])
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
