"""Packed matrices in a live model: counts, undo, structures from plain data, and what an optimizer keeps."""

import copy
import dataclasses
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.experts import CompressedExperts, Masked, Packed, PackedLinear, Sparse24, WeightStack
from moe_lightning.plan import (
    CompressionPlan,
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    NoviceExperts,
    Quantize,
    Sparsify,
)
from moe_lightning.surgery import apply_plan, build, carry_optimizer, parameter_groups, plan_of, rebuild
from moe_lightning.surgery.optimizer import is_novice
from moe_lightning.surgery.packed import open_stacks
from tests.models import random_batches, tiny_config, tiny_mixtral
from tests.packed import EDITS, apply_filled, filled_stacks, live_matrices, packed_mixtral

ANY_EDITS = pytest.mark.parametrize("name", EDITS)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]

POOL: tuple[Edit, ...] = (
    KeepExperts(0, (0, 1, 3, 5)),
    KeepExperts(0, (1, 3), router="keep"),
    KeepExperts(1, (1, 2, 4)),
    NoviceExperts(0, (1,), "low_rank", (3,)),
    NoviceExperts(1, (2, 4)),
    NoviceExperts(1, (0, 1, 3, 5)),
    MergeExperts(1, ((0, 1, 2), (3, 4, 5))),
    KeepChannels(0, 32),
    KeepChannels(1, 16),
    DropMoE(1),
    DropMoE(2),
    DropBlock(0),
    DropBlock(2),
    Sparsify(0, pattern="2:4"),
    Sparsify(0, sparsity=0.3),
    Sparsify(0, sparsity=0.6, scope="matrix"),
    Sparsify(1, pattern="1:4"),
    Sparsify(2, pattern="4:8"),
    Sparsify(0, "attention", pattern="2:4"),
    Sparsify(2, "attention", sparsity=0.5),
    Quantize(0, group_size=16),
    Quantize(1, group_size="channel", symmetric=True),
    Quantize(2, bits=8, group_size=8),
    Quantize(0, "attention", group_size=32),
    Quantize(2, "attention", bits=8, group_size="channel"),
)


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    """Draw edits that trim and edits that slim, as they come, and leave out those that do not fit."""
    shape = architecture_of(tiny := tiny_mixtral()).shape(tiny)
    edits: list[Edit] = []
    for edit in draw(st.permutations(POOL))[: draw(st.integers(1, 16))]:
        try:
            shape = edit.apply(shape)
        except ValueError:
            continue
        edits.append(edit)
    return CompressionPlan(tuple(edits))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def assert_counts(model: Any) -> None:
    """Compare what the shape says with the tensors, in the form that is written."""
    shape = architecture_of(model).shape(model)
    size = ml.measure(model)
    assert shape.parameters == size.parameters == model.num_parameters()
    tensors = model.state_dict().values()
    assert shape.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    stacks = [module for module in model.modules() if isinstance(module, WeightStack)]
    # Open masks stand for more bytes in memory than on disk; nothing else does.
    masks = [stack for stack in stacks if isinstance(stack, Masked)]
    hidden = sum(stack.num_weights - stack.slots * stack.format.kept(stack.outputs, stack.inputs) for stack in masks)
    assert size.bytes == shape.bytes + 4 * hidden


@settings(max_examples=15, deadline=None)
@given(plan=plans())
def test_trimming_and_slimming_in_any_order(plan: CompressionPlan) -> None:
    model = tiny_mixtral()
    whole = copy.deepcopy(model)
    config, state = model.config, copy.deepcopy(model.state_dict())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = logits(model)
    at_once = apply_plan(whole, plan)
    assert at_once.touched == at_once.claimed
    surgeries = apply_filled(model, plan.edits)
    for surgery in surgeries:
        assert surgery.touched == surgery.claimed > 0 or isinstance(plan.edits[-1], KeepExperts)
    assert plan_of(model) == plan
    assert_counts(model)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    # Steps and the whole lead to the same structure, which takes the weights.
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    whole.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(whole), expected)
    fresh = build(tiny_config(), plan).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=2e-6)
    for surgery in reversed(surgeries):
        surgery.undo()
    assert (type(model), model.config) == (MixtralForCausalLM, config)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


@ANY_EDITS
def test_a_model_with_the_same_weights_in_floating_point_gives_the_same(name: str) -> None:
    """Against transformers' own loop over experts and its linear layers, which know nothing of packing."""
    eager = {"experts_implementation": "eager", "attn_implementation": "eager"}
    model = packed_mixtral(EDITS[name], dtype=torch.float64, **eager)
    plain = tiny_mixtral(dtype=torch.float64, **eager)
    layers = plain.model.layers
    for (layer, matrix), weight in live_matrices(model).items():
        inner: Any = layers[layer].mlp.experts if matrix in ("gate_up_proj", "down_proj") else None
        if inner is not None:
            getattr(inner, matrix).data.copy_(weight)
        else:
            getattr(layers[layer].self_attn, matrix).weight.data.copy_(weight[0])
    assert (logits(plain) - logits(tiny_mixtral(dtype=torch.float64, **eager))).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-10)


@ANY_EDITS
def test_dropping_experts_before_or_after(name: str) -> None:
    """What each expert is packed to depends on nobody else."""
    trims = tuple(KeepExperts(layer, (1, 2, 4)) for layer in range(3))
    first = packed_mixtral((*trims, *EDITS[name])).state_dict()
    last = packed_mixtral((*EDITS[name], *trims)).state_dict()
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[key]) for key, tensor in first.items())


@ANY_EDITS
def test_built_from_plain_data(name: str) -> None:
    model = packed_mixtral(EDITS[name])
    for device in ("cpu", "meta"):
        with torch.device(device):
            built = build(tiny_config(), plan_of(model)) if device == "cpu" else build(model.config)
            found = {key: (tensor.shape, tensor.dtype) for key, tensor in built.state_dict().items()}
            assert found == {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
            assert {tensor.device.type for tensor in built.state_dict().values()} == {device}
            assert ml.measure(built).parameters == ml.measure(model).parameters
            closed = [module for module in built.modules() if isinstance(module, Masked)]
            assert all(stack.values is not None for stack in closed)


@ANY_EDITS
def test_weights_load_into_plain_open_and_closed(name: str) -> None:
    model = packed_mixtral(EDITS[name])
    plain, opened, closed = tiny_mixtral(1), packed_mixtral(EDITS[name], seed=1), build(model.config).eval()
    assert rebuild(plain, plan_of(model)) is not None
    assert rebuild(opened, plan_of(model)) is None
    for other in (plain, opened, closed):
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(logits(other), logits(model))
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


@ANY_EDITS
def test_modules_where_they_belong(name: str) -> None:
    model = packed_mixtral(EDITS[name]).train()
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    again = packed_mixtral(EDITS[name])
    assert not any(module.training for module in again.modules())
    for layer in architecture.moe_layers(model):
        format = shape.layout(layer.index).format
        assert isinstance(layer.experts, CompressedExperts) == (format is not None)
        if format is not None:
            storage = layer.experts.storage
            assert isinstance(storage, Packed) and storage.format == format
            assert architecture.open_experts(layer).packed
            assert architecture.open_experts(layer).num_slots == 6
    for block, decoder_layer in zip(shape.blocks, architecture.decoder_layers(model), strict=True):
        for linear in architecture.attention_linears(decoder_layer).values():
            format = shape.attention_format(block)
            assert isinstance(linear, PackedLinear) == (format is not None)
            assert format is None or linear.stack.format == format


@pytest.mark.parametrize("edit", [Sparsify(0, "attention", pattern="2:4"), Quantize(0, "attention", group_size=16)])
def test_attention_with_biases_is_refused_and_nothing_is_changed(edit: Edit) -> None:
    model = tiny_mixtral()
    model.model.layers[0].self_attn.v_proj.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match=r"layer 0: v_proj has a bias.*target the experts only"):
        apply_plan(model, CompressionPlan((edit,)))
    assert type(model) is MixtralForCausalLM
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_stacks_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    model = tiny_mixtral()
    edit = Sparsify(0, pattern="2:4")
    plan = CompressionPlan((edit,))
    shape = architecture_of(model).shape(model)
    stacks = filled_stacks(model, edit, plan.check(shape))
    with pytest.raises(ValueError, match=r"no place for the packed matrices \[\(1, 'down_proj'\)\]"):
        apply_plan(model, plan, stacks={**stacks, (1, "down_proj"): stacks[0, "down_proj"]})
    with pytest.raises(ValueError, match="does not fit the plan"):
        apply_plan(model, plan, stacks={**stacks, (0, "gate_up_proj"): stacks[0, "down_proj"]})
    with pytest.raises(ValueError, match="does not fit the plan"):
        apply_plan(model, plan, stacks={**stacks, (0, "down_proj"): stacks[0, "down_proj"].select((0, 1))})
    assert type(model) is MixtralForCausalLM and not plan_of(model)


def test_rescaling_is_undone_with_the_rest() -> None:
    model = tiny_mixtral()
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        (surgery,) = apply_filled(model, (Quantize(1, group_size=16),))
        norm, router = model.model.layers[1].post_attention_layernorm.weight, model.model.layers[1].mlp.gate.weight
        factor = torch.linspace(0.5, 2.0, 32, dtype=torch.float64)
        surgery.rescale(norm, 1 / factor)
        surgery.rescale(router, factor)
    name = "model.layers.1.post_attention_layernorm.weight"
    assert model.get_parameter(name) is norm
    torch.testing.assert_close(norm.double(), state[name].double() / factor)
    torch.testing.assert_close(router.double(), state["model.layers.1.mlp.gate.weight"].double() * factor)
    surgery.undo()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["2:4", "unstructured", "attention 2:4 and unstructured"])
def test_what_comes_in_inference_mode_can_be_trained(name: str) -> None:
    model = tiny_mixtral()
    with torch.inference_mode():
        apply_filled(model, EDITS[name])
        apply_filled(model, [KeepExperts(0, (0, 1, 2))])
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    batch = random_batches(1, 4, 16, seed=seed)[0]
    optimizer.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()


def trained(kind: Any = torch.optim.AdamW) -> tuple[Any, Any]:
    model = tiny_mixtral().train()
    optimizer = kind(parameter_groups(model, 0.1), lr=1e-2)
    for seed in range(2):
        step(model, optimizer, seed)
    return model, optimizer


def change(model: Any, optimizer: Any, *edits: Edit) -> None:
    for edit in edits:
        (surgery,) = apply_filled(model, [edit])
        carry_optimizer(optimizer, model, surgery.replaced)


def moments(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: {key: value.clone().numpy() for key, value in state.items() if value.ndim}
        for parameter, state in optimizer.state.items()
    }


def test_moments_follow_the_weights_that_pruning_left() -> None:
    model, optimizer = trained()
    old = moments(model, optimizer)
    change(
        model, optimizer, Sparsify(0, pattern="2:4"), Sparsify(1, sparsity=0.4), Sparsify(2, "attention", sparsity=0.4)
    )
    change(model, optimizer, Sparsify(0, "attention", pattern="2:4"))
    new = moments(model, optimizer)
    layers = "model.layers."
    pairs = {
        f"{layers}0.mlp.experts.storage.down_proj.values": f"{layers}0.mlp.experts.down_proj",
        f"{layers}0.mlp.experts.storage.gate_up_proj.values": f"{layers}0.mlp.experts.gate_up_proj",
        f"{layers}1.mlp.experts.storage.gate_up_proj.weight": f"{layers}1.mlp.experts.gate_up_proj",
        f"{layers}2.self_attn.k_proj.stack.weight": f"{layers}2.self_attn.k_proj.weight",
        f"{layers}0.self_attn.o_proj.stack.values": f"{layers}0.self_attn.o_proj.weight",
    }
    for name, source in pairs.items():
        stack = model.get_submodule(name.rpartition(".")[0])
        for key in ("exp_avg", "exp_avg_sq"):
            before = old[source][key] if old[source][key].ndim == 3 else old[source][key][None]
            if isinstance(stack, Sparse24):
                expected = numpy.take_along_axis(before, stack.places.numpy(), -1)
            else:
                expected = numpy.where(stack.zeros_kept().numpy(), before, 0.0)
            assert numpy.abs(expected).sum() > 0
            assert numpy.array_equal(new[name][key], expected), name
    # Slices of what is packed, and more zeros.
    change(model, optimizer, KeepExperts(0, (1, 4)), Sparsify(1, sparsity=0.7), NoviceExperts(1, (0, 3)))
    last = moments(model, optimizer)
    name = f"{layers}0.mlp.experts.storage.down_proj.values"
    assert numpy.array_equal(last[name]["exp_avg"], new[name]["exp_avg"][[1, 4]])
    name = f"{layers}1.mlp.experts.storage.gate_up_proj.weight"
    kept = model.get_submodule(name.rpartition(".")[0]).zeros_kept().numpy()
    assert numpy.array_equal(last[name]["exp_avg"], numpy.where(kept, new[name]["exp_avg"][[1, 2, 4, 5]], 0.0))


ORDERS: dict[str, tuple[Edit, ...]] = {
    **EDITS,
    "grows": tuple(Sparsify(1, sparsity=share) for share in (0.2, 0.4, 0.6)),
    "prune, drop, round": (Sparsify(0, pattern="2:4"), KeepExperts(0, (0, 2, 3)), Quantize(0, group_size=16)),
    "round, then novices": (Quantize(0, group_size=16), NoviceExperts(0, (0, 2), "low_rank", (2, 2))),
    "channels, then prune": (KeepChannels(1, 32), Sparsify(1, pattern="4:8"), NoviceExperts(1, (3,))),
    "prune, then all novices": (Sparsify(1, sparsity=0.5), NoviceExperts(1, tuple(range(6)))),
    "half, then 2:4": (Sparsify(1, sparsity=0.5), Sparsify(1, pattern="2:4"), Sparsify(1, sparsity=0.75)),
    "blocks go": (Sparsify(1, "attention", pattern="2:4"), Sparsify(2, sparsity=0.5), DropBlock(0), DropMoE(1)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, torch.optim.AdamW) for name in ORDERS),
        *((name, torch.optim.Adafactor) for name in ("2:4", "attention 2:4 and unstructured", "half, then 2:4")),
        *((name, torch.optim.SGD) for name in ("everything", "blocks go")),
    ],
)
def test_the_optimizer_lives_on(name: str, kind: Any) -> None:
    model, optimizer = trained(kind)
    change(model, optimizer, *ORDERS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_novice(key):  # novices that are all alike give no gradient
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    for group, expected in zip(optimizer.param_groups, parameter_groups(model, 0.1), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]], group["name"]
    assert set(optimizer.state) <= set(model.parameters())
    twin = build(model.config)
    open_stacks(twin)
    twin.load_state_dict(model.state_dict())
    other = kind(parameter_groups(twin.train(), 0.1), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(key)), key
        if parameter.numel():
            assert not torch.equal(parameter, before[key]), key
    for stack in (module for module in model.modules() if isinstance(module, WeightStack)):
        kept = stack.zeros_kept()
        assert kept is None or not stack.dense().detach()[~kept].any()


def test_frozen_weights_stay_frozen() -> None:
    model = tiny_mixtral()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    apply_filled(model, (Sparsify(0, pattern="2:4"), Sparsify(1, "attention", sparsity=0.5), KeepExperts(0, (0, 1))))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_large_layers_are_noted_without_large_tensors() -> None:
    """Where 2:4 left the weights of a Mixtral-8x7B is 3 GiB of numbers a layer: only an optimizer with state asks."""
    model, optimizer = trained()
    (surgery,) = apply_filled(model, [Sparsify(0, pattern="2:4")])
    for item in surgery.replaced:
        tensors = [value for value in vars(item).values() if isinstance(value, Tensor)]
        small = [tensor for tensor in tensors if tensor is not item.old and tensor is not item.new]
        assert sum(tensor.numel() for tensor in small) <= 6
    carry_optimizer(optimizer, model, surgery.replaced)


def test_edits_of_one_layer_are_apart() -> None:
    """Experts and attention of a layer have formats of their own."""
    model = packed_mixtral((Quantize(1, "attention", group_size=16), Sparsify(1, pattern="2:4")))
    shape = architecture_of(model).shape(model)
    assert str(shape.attention_format(1)) == "int4, group 16, asymmetric"
    assert str(shape.layout(1).format) == "2:4"
    assert [block for block, _ in shape.attention] == [1]
    assert [dataclasses.replace(layout, format=None) for layout in shape.layouts] == list(shape.uncompressed().layouts)
