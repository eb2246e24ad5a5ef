"""What merging low-rank terms keeps in memory: weights as they were and as they are, and nothing else."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.compression import made_bytes
from moe_lightning.compression.adapters import apply_adapters
from moe_lightning.compression.memory import trial_edits
from moe_lightning.experts.lora import lora_stacks
from tests.lora import adapted_mixtral
from tests.models import tiny_mixtral

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
BASES = ["dense", "int4", "int8", "2:4", "unstructured", "int4 of 2:4"]


class Live(TorchDispatchMode):
    """Count the bytes of storages that operations make and that are there, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self.seen or storage._cdata in given:
                continue
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result


def shape_of(model: Any) -> Any:
    return architecture_of(model).shape(model)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_the_memory_stated_covers_the_peak(base: str, dequantize: bool) -> None:
    model = adapted_mixtral(base, **SIZES)
    method = ml.MergeLoRA(dequantize=dequantize)
    stated = made_bytes(shape_of(model), [method])
    edits, _ = trial_edits(shape_of(model), [method])
    with Live() as live:
        adapted = apply_adapters(model, method, edits)
    assert adapted.statuses and live.most <= stated
    assert live.most > 0.6 * stated, "the statement is far too large"


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_only_what_was_there_is_kept(base: str, dequantize: bool) -> None:
    """In place: the old storages themselves. Spelled out: they go with their modules; of the new ones none is kept."""
    model = adapted_mixtral(base, **SIZES)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    places = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    method = ml.MergeLoRA(dequantize=dequantize)
    adapted = apply_adapters(model, method, trial_edits(shape_of(model), [method])[0])
    kept = [
        argument
        for surgery in adapted.surgeries
        for step in surgery.change.undo_steps
        for argument in getattr(step, "args", ())
        if isinstance(argument, Tensor) and not isinstance(argument, torch.nn.Parameter)
    ]
    assert all(tensor.untyped_storage().data_ptr() in places for tensor in kept)
    # Of integers that are left in floating point nothing: here those of the experts, attention has none.
    assert kept and {tensor.ndim for tensor in kept} == ({2} if dequantize and base.startswith("int") else {2, 3})
    for surgery in reversed(adapted.surgeries):
        surgery.undo()
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(tensor, now[name]) for name, tensor in state.items())
    assert {id(tensor) for tensor in model.parameters()} <= held.keys()
    assert {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())} == places


def test_what_was_there_goes_when_all_is_done_and_parameters_stay_the_same_objects() -> None:
    model = adapted_mixtral(**SIZES)
    weight = model.model.layers[0].self_attn.q_proj.weight
    old = weakref.ref(weight.detach().untyped_storage())
    ml.compress(model, None, ml.MergeLoRA(), progress=False)
    gc.collect()
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    left = old()
    assert left is None or left._cdata != weight.untyped_storage()._cdata


def test_undone_on_another_type() -> None:
    """Whoever casts a model before undoing gets what was there in the type that it has now."""
    model = adapted_mixtral("2:4", **SIZES)
    expected = {name: tensor.bfloat16() for name, tensor in model.named_parameters()}
    result = ml.compress(model, None, ml.MergeLoRA(), progress=False, reversible=True)
    model.to(torch.bfloat16)
    result.undo()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("targets", ["experts", "attention", "experts+attention"])
def test_terms_that_come_are_all_that_is_made(targets: Any) -> None:
    model = tiny_mixtral(**SIZES)
    method = ml.LoRA(rank=4, targets=targets)
    stated = made_bytes(shape_of(model), [method])
    ml.compress(model, None, method, progress=False)
    tensors = [parameter for stack in lora_stacks(model).values() for parameter in stack.parameters()]
    assert stated == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
