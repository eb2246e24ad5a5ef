"""The optimizer lives through surgery: the same object, sliced moments, everything trains, the order of a fresh one."""

import copy
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.plan import CompressionPlan, KeepExperts, NoviceExperts
from moe_lightning.surgery import apply_plan, carry_optimizer, parameter_groups
from tests.models import random_batches, tiny_mixtral

PLAN = CompressionPlan((KeepExperts(0, (1, 2, 5)), NoviceExperts(1, (0, 3)), NoviceExperts(2, (1,))))


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    batch = random_batches(seed=seed)[0]
    optimizer.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()


def trained(groups: bool = True) -> tuple[Any, torch.optim.AdamW]:
    model = tiny_mixtral()
    parameters = parameter_groups(model, 0.1) if groups else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, optimizer


def test_groups_hold_every_parameter_once() -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    groups = parameter_groups(model, 0.1)
    assert [group["name"] for group in groups] == ["decay", "no_decay", "novices", "adapters"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.0]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in groups[1]["params"])
    assert [names[id(parameter)] for parameter in groups[2]["params"]] == [
        "model.layers.1.mlp.experts.novices",
        "model.layers.2.mlp.experts.novices",
    ]


def test_moments_are_sliced_like_their_parameters() -> None:
    model, optimizer = trained()
    old = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    old = {name: {key: value.clone() for key, value in state.items()} for name, state in old.items()}
    carry_optimizer(optimizer, model, apply_plan(model, PLAN).replaced)
    new = {name: optimizer.state.get(parameter) for name, parameter in model.named_parameters()}
    layer = "model.layers.{}.mlp."
    slices = {
        layer.format(0) + "gate.weight": (layer.format(0) + "gate.weight", [1, 2, 5]),
        layer.format(0) + "experts.storage.gate_up_proj": (layer.format(0) + "experts.gate_up_proj", [1, 2, 5]),
        layer.format(1) + "experts.storage.down_proj": (layer.format(1) + "experts.down_proj", [1, 2, 4, 5]),
        layer.format(2) + "experts.storage.gate_up_proj": (layer.format(2) + "experts.gate_up_proj", [0, 2, 3, 4, 5]),
        layer.format(1) + "gate.weight": (layer.format(1) + "gate.weight", [0, 1, 2, 3, 4, 5]),
        "model.embed_tokens.weight": ("model.embed_tokens.weight", list(range(64))),
    }
    for name, (source, rows) in slices.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert old[source][moment].abs().sum() > 0
            assert torch.equal(new[name][moment], old[source][moment][rows])
        assert new[name]["step"] == 3
    assert new["model.layers.1.mlp.experts.novices"] is None


def test_every_parameter_still_trains() -> None:
    model, optimizer = trained()
    carry_optimizer(optimizer, model, apply_plan(model, PLAN).replaced)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for seed in range(4):
        step(model, optimizer, seed)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_order_is_that_of_a_fresh_optimizer() -> None:
    model, optimizer = trained()
    carry_optimizer(optimizer, model, apply_plan(model, PLAN).replaced)
    fresh = parameter_groups(model, 0.1)
    for group, expected in zip(optimizer.param_groups, fresh, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(p) for p in expected["params"]]
    # So a saved state loads into an optimizer made anew, and both go on alike.
    twin = tiny_mixtral()
    apply_plan(twin, PLAN)
    twin.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else both share the moments
    step(model, optimizer, 9)
    step(twin, other, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_with_one_group_works_too() -> None:
    model, optimizer = trained(groups=False)
    carry_optimizer(optimizer, model, apply_plan(model, PLAN).replaced)
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]


def test_training_goes_on_as_if_the_small_model_had_been_trained() -> None:
    """Experts that nobody routes to get no gradient: dropping them must not change the next step of the others."""
    model, optimizer = trained()
    dropped = (4, 5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[list(dropped)] = 0
        # A constant input direction whose logit is far below all others cannot be chosen.
    plan = CompressionPlan(tuple(KeepExperts(layer, (0, 1, 2, 3)) for layer in range(3)))
    masked, masked_optimizer = trained()
    masked.load_state_dict(model.state_dict())
    carry_optimizer(optimizer, model, apply_plan(model, plan).replaced)
    hooks = [layer.mlp.gate.register_forward_hook(mask_dropped) for layer in masked.model.layers]
    step(model, optimizer, 7)
    step(masked, masked_optimizer, 7)
    for hook in hooks:
        hook.remove()
    expected = dict(masked.named_parameters())
    for name, parameter in model.named_parameters():
        source = expected[name.replace(".storage", "")]
        reference = source[:4] if source.shape != parameter.shape else source
        torch.testing.assert_close(parameter, reference, rtol=1e-4, atol=1e-6)


def mask_dropped(module: Any, args: Any, output: Any) -> Any:
    """Return what the router gives when the last two experts' logits are minus infinity."""
    logits = output[0].clone()
    logits[:, 4:] = -torch.inf
    weight, index = torch.softmax(logits.float(), -1).topk(2, dim=-1)
    return logits, weight / weight.sum(-1, keepdim=True), index


def test_what_a_module_trains_beside_its_model_stays() -> None:
    model, optimizer = trained()
    other = torch.nn.Parameter(torch.zeros(2))
    optimizer.param_groups[1]["params"].insert(0, other)
    carry_optimizer(optimizer, model, apply_plan(model, PLAN).replaced)
    assert optimizer.param_groups[1]["params"][-1] is other


def test_old_novices_keep_their_moments_when_new_ones_come() -> None:
    model, optimizer = trained()
    first = CompressionPlan((NoviceExperts(0, (3,)),))
    carry_optimizer(optimizer, model, apply_plan(model, first).replaced)
    step(model, optimizer)
    old = optimizer.state[model.model.layers[0].mlp.experts.novices]["exp_avg"].clone()
    assert old.abs().sum() > 0
    surgery = apply_plan(model, first.extended([NoviceExperts(0, (1, 5)), KeepExperts(1, (0, 1))]))
    assert surgery.touched == surgery.claimed
    carry_optimizer(optimizer, model, surgery.replaced)
    new = optimizer.state[model.model.layers[0].mlp.experts.novices]["exp_avg"]  # of experts 1, 3, 5
    assert torch.equal(new[1], old[0])
    assert not new[[0, 2]].any()
    step(model, optimizer)


def test_an_optimizer_whose_state_cannot_be_sliced_is_refused_and_nothing_is_changed() -> None:
    model = tiny_mixtral()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    step(model, optimizer)
    odd = model.model.layers[2].mlp.experts.down_proj
    optimizer.state[odd]["odd"] = torch.zeros(5, 7)
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"state 'odd' of .*down_proj has the shape \(5, 7\)"):
        ml.compress(model, random_batches(), ml.Novices(ratio=0.5), optimizers=[optimizer], progress=False)
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == groups
    assert set(optimizer.state) == set(model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    del optimizer.state[odd]["odd"]
    ml.compress(model, random_batches(), ml.Novices(ratio=0.5), optimizers=[optimizer], progress=False)
    step(model, optimizer)


def test_factored_state_is_sliced_too() -> None:
    model = tiny_mixtral()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    step(model, optimizer)
    ml.compress(model, random_batches(), ml.Novices(ratio=0.5), optimizers=[optimizer], progress=False)
    step(model, optimizer)


def test_novices_find_an_optimizer_that_trains_only_the_head() -> None:
    model = tiny_mixtral()
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    ml.compress(model, random_batches(), ml.Novices(ratio=0.5), optimizers=[optimizer], progress=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    assert held == [f"model.layers.{layer}.mlp.experts.novices" for layer in range(3)] + ["lm_head.weight"]
