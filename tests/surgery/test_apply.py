"""Changing a live model's structure: exact slices, an exact undo, classes and configs that fit."""

import copy

import pytest
import torch
from transformers import MixtralForCausalLM

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, KeepExperts, NoviceExperts
from moe_lightning.surgery import CompressedMixtralForCausalLM, apply_plan, build, plan_of, rebuild
from tests.models import random_batches, tiny_config, tiny_mixtral

PLAN = CompressionPlan(
    (KeepExperts(0, (0, 2, 3)), NoviceExperts(1, (1, 4)), NoviceExperts(2, (0, 5)), KeepExperts(2, (0, 1, 2, 4)))
)


def test_survivors_are_exact_slices() -> None:
    model = tiny_mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_plan(model, PLAN)
    after = model.state_dict()
    layer = "model.layers.{}.mlp."
    real = {0: [0, 2, 3], 1: [0, 2, 3, 5], 2: [1, 2, 4]}
    router = {0: [0, 2, 3], 1: [0, 1, 2, 3, 4, 5], 2: [0, 1, 2, 4]}
    for index, kept in real.items():
        for name in ("gate_up_proj", "down_proj"):
            expected = before[layer.format(index) + f"experts.{name}"][kept]
            assert torch.equal(after[layer.format(index) + f"experts.storage.{name}"], expected)
        gate = layer.format(index) + "gate.weight"
        assert torch.equal(after[gate], before[gate][router[index]])
    assert after[layer.format(1) + "experts.novices"].shape == (2, 32)
    assert after[layer.format(2) + "experts.novices"].shape == (1, 32)
    untouched = [name for name in before if ".mlp." not in name]
    assert untouched
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_counts_what_it_touched() -> None:
    surgery = apply_plan(tiny_mixtral(), PLAN)
    expert = 3 * 32 * 48
    # 3 + 2 + 3 experts go; 3 + 2 router rows; novices of layers 1 (2) and 2 (1 is left after the drop) come.
    assert surgery.touched == surgery.claimed == 8 * expert + (3 + 0 + 2) * 32 + 3 * 32


def test_undo_restores_everything() -> None:
    model = tiny_mixtral()
    config, state = model.config, copy.deepcopy(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    logits = model(**random_batches()[0]).logits
    surgery = apply_plan(model, PLAN)
    assert type(model) is CompressedMixtralForCausalLM
    surgery.undo()
    assert type(model) is MixtralForCausalLM
    assert model.config is config
    assert model.config.model_type == "mixtral"
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**random_batches()[0]).logits, logits)
    assert model.model.layers[0].mlp.gate.num_experts == 6


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = tiny_mixtral()
    state = copy.deepcopy(model.state_dict())
    bad = CompressionPlan((KeepExperts(0, (0, 1)), KeepExperts(1, (0, 9))))
    with pytest.raises(ValueError, match=r"layer 1: cannot keep experts \[9\]"):
        apply_plan(model, bad)
    with pytest.raises(ValueError, match="router picks 2: keep at least 2"):
        apply_plan(model, CompressionPlan((KeepExperts(2, (3,)),)))
    with pytest.raises(ValueError, match="layer 7 is not an MoE layer"):
        apply_plan(model, CompressionPlan((KeepExperts(7, (0, 1)),)))
    assert type(model) is MixtralForCausalLM
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_steps_give_the_same_as_the_whole() -> None:
    whole, steps = tiny_mixtral(), tiny_mixtral()
    apply_plan(whole, PLAN)
    for end in range(1, len(PLAN.edits) + 1):
        apply_plan(steps, CompressionPlan(PLAN.edits[:end]))
    assert whole.state_dict().keys() == steps.state_dict().keys()
    assert all(torch.equal(tensor, steps.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert plan_of(steps) == PLAN


def test_rebuild_is_idempotent_and_refuses_another_plan() -> None:
    model = tiny_mixtral()
    assert rebuild(model, PLAN) is not None
    module = model.model.layers[0].mlp.experts
    assert rebuild(model, PLAN) is None
    assert model.model.layers[0].mlp.experts is module
    with pytest.raises(ValueError, match="not the beginning of this plan"):
        rebuild(model, CompressionPlan((NoviceExperts(0, (1,)),)))


def test_old_novices_keep_their_values_when_new_ones_come() -> None:
    model = tiny_mixtral()
    first = CompressionPlan((NoviceExperts(0, (3,)),))
    apply_plan(model, first)
    experts = model.model.layers[0].mlp.experts
    values = torch.arange(32.0)
    with torch.no_grad():
        experts.novices.copy_(values)
    apply_plan(model, first.extended([NoviceExperts(0, (1, 5))]))
    novices = model.model.layers[0].mlp.experts.novices  # experts 1, 3, 5
    assert torch.equal(novices[1], values)
    assert not novices[[0, 2]].any()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_build_gives_the_structure_of_apply(device: str) -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    with torch.device(device):
        built = build(tiny_config(), PLAN)
        again = build(built.config)
    for other in (built, again):
        assert type(other) is CompressedMixtralForCausalLM
        assert {name: tensor.shape for name, tensor in other.state_dict().items()} == {
            name: tensor.shape for name, tensor in model.state_dict().items()
        }
    if device == "cpu":
        built.load_state_dict(model.state_dict(), strict=True)
        batch = random_batches()[0]
        assert torch.equal(built.eval()(**batch).logits, model(**batch).logits)


def test_build_without_a_plan_is_a_plain_mixtral() -> None:
    model = build(tiny_config())
    assert type(model) is MixtralForCausalLM
    assert not plan_of(model)


def test_router_logits_and_balancing_loss_of_uneven_layers() -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    ids = random_batches()[0]["input_ids"]
    outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert [logits.shape[-1] for logits in outputs.router_logits] == [3, 6, 4]
    plain = model(input_ids=ids, labels=ids)
    coefficient = model.config.router_aux_loss_coef
    assert torch.allclose(outputs.loss, plain.loss + coefficient * outputs.aux_loss)
    assert torch.equal(outputs.logits, plain.logits)


def test_cached_generation_equals_uncached() -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    ids = random_batches()[0]["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 19)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_name_means_our_path(implementation: str) -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    batch = random_batches()[0]
    expected = model(**batch).logits
    model.set_experts_implementation(implementation)
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


def test_refuses_what_is_no_mixtral() -> None:
    with pytest.raises(ValueError, match="not a transformers model"):
        architecture_of(torch.nn.Linear(2, 2))
    inner = tiny_mixtral().model
    with pytest.raises(ValueError, match="MixtralForCausalLM"):
        architecture_of(inner)


def test_a_child_or_a_wrapper_is_refused_before_anything_is_measured() -> None:
    class Child(MixtralForCausalLM):
        pass

    def no_batches() -> object:
        raise AssertionError("the calibration began")
        yield

    for model in (Child(tiny_config()), torch.compile(tiny_mixtral())):
        with pytest.raises(ValueError, match=r"cannot compress a .*: pass the MixtralForCausalLM itself"):
            ml.compress(model, no_batches(), ml.Novices(ratio=0.5))  # type: ignore[arg-type]


def test_tuples_where_they_are_asked_for() -> None:
    model = tiny_mixtral()
    apply_plan(model, PLAN)
    ids = random_batches()[0]["input_ids"]
    found = model(input_ids=ids, labels=ids, output_router_logits=True, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], model(input_ids=ids, labels=ids, output_router_logits=True).loss)
