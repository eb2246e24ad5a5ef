"""What holds for every method, run over all rows of ``method_settings.py``."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.experts import WeightStack
from moe_lightning.experts.stacks import Masked
from moe_lightning.surgery import apply_plan, build, carry_optimizer, parameter_groups
from tests.method_settings import SETTINGS
from tests.models import random_batches, tiny_mixtral
from tests.reference import emulated, untouched
from tests.stand_ins import stand_ins, take_over_the_rest

ROOT = Path(__file__).resolve().parents[1]
ANY_SETTING = pytest.mark.parametrize("name", SETTINGS)
BATCHES = random_batches(3, 2, 11)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]


def compress(model: Any, name: str | None = None, **options: Any) -> ml.CompressionResult:
    methods = SETTINGS[name].make() if name else None
    return ml.compress(model, BATCHES, methods, progress=False, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def assert_same_weights(model: Any, other: Any) -> None:
    state, expected = other.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@ANY_SETTING
def test_equals_the_untouched_model_with_masks_and_stand_ins(name: str) -> None:
    """A deleted expert is masked with minus infinity; a novice adds its routing weight times what stands for it."""
    model = untouched()
    original = copy.deepcopy(model)
    shape = compress(model, name).shape_after
    before = logits(original)
    take_over_the_rest(original, model, shape)
    dropped = {layout.layer: set(range(6)) - set(layout.router) for layout in shape.layouts}
    silent = set(shape.blocks) - set(shape.moe_layers)
    skipped = set(range(3)) - set(shape.blocks)
    with emulated(original, dropped, stand_ins(model, shape), silent, skipped):
        expected = logits(original)
    if not SETTINGS[name].neutral:
        assert (before - expected).abs().max() > 1e-3, "nothing was compressed"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


@ANY_SETTING
def test_a_plan_replayed_gives_the_same_weights(name: str) -> None:
    model, other = tiny_mixtral(), tiny_mixtral()
    result = compress(model, name)
    again = compress(other, plan=ml.CompressionPlan.from_json(result.plan.to_json()))
    assert again.plan == result.plan
    assert type(other) is type(model)
    assert_same_weights(model, other)
    assert (again.touched, again.claimed) == (result.touched, result.claimed)
    third = tiny_mixtral()
    compress(third, plan=again.plan)  # a plan of a replay
    assert_same_weights(model, third)


@ANY_SETTING
def test_same_result_twice(name: str) -> None:
    model, other = tiny_mixtral(), tiny_mixtral()
    assert compress(model, name).plan == compress(other, name).plan
    assert_same_weights(model, other)


@ANY_SETTING
def test_the_structure_built_from_the_plan_takes_the_weights(name: str) -> None:
    model = tiny_mixtral()
    plan = compress(model, name).plan
    with torch.device("meta"):
        empty = build(tiny_mixtral().config, plan)
        assert {n: p.shape for n, p in build(model.config).named_parameters()} == {
            n: p.shape for n, p in empty.named_parameters()
        }
    assert type(empty) is type(model)
    layers = (*model.model.layers, *empty.model.layers)
    for router in (layer.mlp.gate for layer in layers if hasattr(layer.mlp, "gate")):
        assert router.num_experts == len(router.weight)
    filled = build(tiny_mixtral().config, plan).eval()
    filled.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(filled), logits(model))


@ANY_SETTING
def test_touched_equals_claimed_and_sizes_equal_those_counted(name: str) -> None:
    model = tiny_mixtral()
    result = compress(model, name)
    assert result.touched == result.claimed > 0
    size = ml.measure(model)
    assert result.size_after == size
    stacks = [module for module in model.modules() if isinstance(module, WeightStack)]
    inside = {id(parameter) for stack in stacks for parameter in stack.parameters()}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    assert size.parameters == plain + sum(stack.slots * stack.outputs * stack.inputs for stack in stacks)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert result.shape_after.bytes == stored
    assert stored < result.size_before.bytes or SETTINGS[name].neutral
    # In memory zeros anywhere are no gain: there are as many weights as before, and the mask.
    assert size.bytes == stored or any(isinstance(stack, Masked) for stack in stacks)
    assert size.parameters < result.size_before.parameters or stacks or SETTINGS[name].neutral
    assert architecture_of(model).shape(model) == result.shape_after
    assert result.shape_after.parameters == size.parameters


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Save the outcome of every row, load all in one fresh process: parameters and logits before and after."""
    folder = tmp_path_factory.mktemp("folders")
    before = {}
    for name in SETTINGS:
        model = tiny_mixtral()
        compress(model, name)
        before[name] = (model.state_dict(), logits(model))
        ml.save_pretrained(model, folder / name)
    torch.save(INPUTS, folder / "inputs.pt")
    subprocess.run([sys.executable, "-m", "tests.fresh_process", str(folder)], check=True, cwd=ROOT)
    return before, torch.load(folder / "logits.pt"), folder


@ANY_SETTING
def test_saved_and_loaded_in_a_fresh_process(name: str, loaded: Any) -> None:
    before, after, folder = loaded
    (state, expected), (loaded_state, got) = before[name], after[name]
    if not SETTINGS[name].plain:  # a plain one has the names of the plain class
        assert state.keys() == loaded_state.keys()
        assert all(torch.equal(tensor, loaded_state[key]) for key, tensor in state.items())
    # Where in memory a file's tensors lie may change the last bit of a product.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    config = (folder / name / "config.json").read_text()
    assert ('"model_type": "mixtral"' in config) == SETTINGS[name].plain


@ANY_SETTING
def test_the_optimizer_still_trains_every_parameter(name: str) -> None:
    model = tiny_mixtral().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)

    def step(seed: int) -> None:
        batch = random_batches(1, 4, 16, seed=seed)[0]
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()

    step(1)
    compress(model, name, optimizers=[optimizer])
    fresh = parameter_groups(model, 0.1)
    for group, expected in zip(optimizer.param_groups, fresh, strict=True):
        assert group["name"] == expected["name"]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
    assert set(optimizer.state) <= set(model.parameters())
    for parameter_name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter)
        if "novice" in parameter_name or parameter_name.endswith((".bias", ".lora_A", ".lora_B")):
            assert moments is None or moments["exp_avg"].shape == parameter.shape
        else:
            assert moments is not None and moments["exp_avg"].shape == parameter.shape, parameter_name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for seed in (2, 3):
        step(seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel():
            moved = (parameter != before[parameter_name]).reshape(len(parameter), -1).any(1)
            assert moved.all() or ("embed" in parameter_name and moved.any()), parameter_name


def test_groups_are_in_the_order_of_the_model_when_earlier_layers_get_novices_later() -> None:
    """An optimizer's state is saved by position: a resumed run makes its groups from the model."""
    model = tiny_mixtral()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    plan = ml.CompressionPlan()
    for layer in (2, 0, 1):
        plan = plan.extended([ml.NoviceExperts(layer, (1, 3))])
        carry_optimizer(optimizer, model, apply_plan(model, plan).replaced)
    for group, expected in zip(optimizer.param_groups, parameter_groups(model, 0.1), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]], group["name"]


@ANY_SETTING
def test_generation_with_the_cache_equals_generation_without(name: str) -> None:
    model = untouched()
    compress(model, name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": 63}
    prompt = INPUTS[:, :4]
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    by_hand = prompt
    for _ in range(cached.shape[1] - 4):
        with torch.no_grad():
            by_hand = torch.cat([by_hand, model(input_ids=by_hand).logits[:, -1:].argmax(-1)], dim=1)
    ended = (by_hand == 63).cumsum(1) > 0
    assert torch.equal(by_hand[~ended], cached[~ended])


@ANY_SETTING
def test_a_copy_is_independent(name: str) -> None:
    model = tiny_mixtral()
    compress(model, name)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(logits(model), before)


def test_every_public_method_has_a_row() -> None:
    from moe_lightning.method import Method

    used = {type(method) for setting in SETTINGS.values() for method in setting.make()}
    public = {getattr(ml, name) for name in ml.__all__ if name[0].isupper()}
    methods = {item for item in public if isinstance(item, type) and issubclass(item, Method)}
    assert used == methods


def test_all_rows_differ() -> None:
    plans = {name: compress(tiny_mixtral(), name).plan for name in SETTINGS}
    for (one, first), (other, second) in itertools.combinations(plans.items(), 2):
        assert first != second, f"{one} and {other} do the same"
