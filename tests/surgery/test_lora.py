"""Low-rank terms in a live model: structure from plain data, undo, optimizers, folders, checkpoints of a run."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_lightning as ml
from moe_lightning.compression.adapters import places_of
from moe_lightning.experts import CompressedExperts, LoraLinear, PackedLinear, WeightStack
from moe_lightning.plan import AddLora, CompressionPlan, DropBlock, Edit, KeepExperts, MergeLora, NoviceExperts
from moe_lightning.surgery import (
    add_missing_groups,
    apply_plan,
    build,
    carry_optimizer,
    parameter_groups,
    plan_of,
    rebuild,
)
from tests.lora import BASES, adapted_mixtral, fill_terms, kept_weights
from tests.models import random_batches, tiny_config, tiny_mixtral
from tests.packed import apply_filled
from tests.stand_ins import unpacked

ROOT = Path(__file__).resolve().parents[2]
ANY_BASE = pytest.mark.parametrize("base", BASES)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]
ALL = ml.LoRA(rank=3, alpha=5.0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def shapes(model: Any) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def merged(model: Any, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, None, ml.MergeLoRA(**options), progress=False)


@ANY_BASE
@pytest.mark.parametrize("end", ["terms", "merged", "dequantized"])
def test_the_structure_built_from_the_plan_is_that_of_the_live_model(base: str, end: str) -> None:
    model = adapted_mixtral(base)
    if end != "terms":
        merged(model, dequantize=end == "dequantized")
    plan = CompressionPlan.from_json(plan_of(model).to_json())
    built = build(tiny_config(), plan).eval()
    assert shapes(built) == shapes(model)
    assert [type(module) for module in built.modules()] == [type(module) for module in model.modules()]
    built.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(logits(built), logits(model), rtol=0, atol=0)
    other = tiny_mixtral()
    rebuild(other, plan)
    assert shapes(other) == shapes(model)


def test_plain_layers_keep_or_get_back_the_class_and_the_names_of_the_family() -> None:
    model = tiny_mixtral()
    names = set(model.state_dict())
    plan = CompressionPlan((AddLora(1, "experts", 2, 2.0), AddLora(2, "attention", 2, 2.0)))
    apply_plan(model, plan)
    layers = model.model.layers
    assert [type(layer.mlp.experts) for layer in layers] == [MixtralExperts, CompressedExperts, MixtralExperts]
    assert type(layers[0].self_attn.q_proj) is torch.nn.Linear and type(layers[2].self_attn.q_proj) is LoraLinear
    added = {
        *(f"model.layers.1.mlp.experts.storage.{name}_lora.lora_{x}" for name in ("gate_up", "down") for x in "AB"),
        *(f"model.layers.2.self_attn.{name}_proj.lora.lora_{x}" for name in "qkvo" for x in "AB"),
    }
    moved = {name.replace("layers.1.mlp.experts.", "layers.1.mlp.experts.storage.") for name in names}
    assert set(model.state_dict()) == moved | added
    apply_plan(model, plan.extended([MergeLora(1), MergeLora(2, "attention")]))
    assert set(model.state_dict()) == names
    assert type(model.model.layers[1].mlp.experts) is MixtralExperts
    assert type(model.model.layers[2].self_attn.q_proj) is torch.nn.Linear


def test_weights_stay_the_same_parameters_and_the_terms_are_new() -> None:
    model = tiny_mixtral()
    before = {id(parameter) for parameter in model.parameters()}
    result = ml.compress(model, None, ALL, progress=False)
    new = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    assert {id(parameter) for parameter in model.parameters()} == before | new
    assert result.touched == result.claimed == sum(p.numel() for p in model.parameters() if id(p) in new)
    assert result.size_after.parameters - result.size_before.parameters == result.touched


@ANY_BASE
def test_undone_the_model_is_as_it_was(base: str) -> None:
    model = tiny_mixtral()
    apply_filled(model, BASES[base])
    config, kind, state = model.config, type(model), copy.deepcopy(model.state_dict())
    modules, before = [id(module) for module in model.modules()], logits(model)
    first = ml.compress(model, None, ALL, progress=False, reversible=True)
    fill_terms(model)
    with_terms, terms = logits(model), copy.deepcopy(model.state_dict())
    assert (with_terms - before).abs().max() > 1e-3
    second = ml.compress(model, None, ml.MergeLoRA(), progress=False, reversible=True)
    assert second.touched == second.claimed > 0
    second.undo()
    torch.testing.assert_close(logits(model), with_terms, rtol=0, atol=0)
    assert model.state_dict().keys() == terms.keys()
    assert all(torch.equal(tensor, terms[name]) for name, tensor in model.state_dict().items())
    first.undo()
    assert model.config is config and type(model) is kind
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = random_batches(1, 4, 16, seed=seed)[0]
    optimizer.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("base", ["dense", "int4", "2:4", "unstructured", "everything"])
def test_an_optimizer_takes_the_terms_in_keeps_all_else_and_lets_them_go(base: str) -> None:
    model = tiny_mixtral().train()
    apply_filled(model, BASES[base])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    step(model, optimizer, 0)
    held = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step] * 4)
    ml.compress(model, None, ALL, optimizers=[optimizer], progress=False)
    adapters = next(group for group in optimizer.param_groups if group["name"] == "adapters")
    wanted = [id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")]
    assert [id(p) for p in adapters["params"]] == wanted and adapters["weight_decay"] == 0.0
    for name, parameter in model.named_parameters():
        old = name.replace(".storage.", ".") if name.replace(".storage.", ".") in held else name
        if "lora_" in name:
            assert parameter not in optimizer.state
        else:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], held[old]), name
    for seed in (1, 2):
        step(model, optimizer, seed)
        scheduler.step()
    assert all(bool((parameter.abs() > 0).any()) for parameter in adapters["params"])
    state = copy.deepcopy(optimizer.state_dict())
    # Saved by position, it fits an optimizer of a model that got its structure from the plan.
    twin = tiny_mixtral().train()
    rebuild(twin, plan_of(model))
    twin.load_state_dict(model.state_dict(), strict=True)
    fresh = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=1e-2)
    fresh.load_state_dict(state)
    step(model, optimizer, 3)
    step(twin, fresh, 3)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())
    merged_result = ml.compress(model, None, ml.MergeLoRA(), optimizers=[optimizer], progress=False)
    assert merged_result.touched == merged_result.claimed
    assert not adapters["params"] and set(optimizer.state) <= set(model.parameters())
    for group, expected in zip(optimizer.param_groups, parameter_groups(model, 0.1), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
    for seed in (4, 5):
        step(model, optimizer, seed)
        scheduler.step()


def test_terms_beside_other_changes_keep_the_order_of_a_fresh_optimizer() -> None:
    model = tiny_mixtral()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    plan = CompressionPlan()
    edits: tuple[Edit, ...] = (
        AddLora(2, "attention", 2, 2.0),
        NoviceExperts(1, (1, 3)),
        AddLora(1, "experts", 2, 2.0),
        AddLora(0, "experts", 2, 2.0),
        KeepExperts(2, (0, 1, 2)),
        DropBlock(0),
        AddLora(2, "experts", 2, 2.0),
        MergeLora(2, "attention"),
    )
    for edit in edits:
        plan = plan.extended([edit])
        surgery = apply_plan(model, plan)
        assert surgery.touched == surgery.claimed > 0
        carry_optimizer(optimizer, model, surgery.replaced)
        for group, expected in zip(optimizer.param_groups, parameter_groups(model, 0.1), strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]], (edit, group["name"])


def test_an_optimizer_without_our_groups_trains_the_terms_too() -> None:
    model = tiny_mixtral().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer, 0)
    ml.compress(model, None, ALL, optimizers=[optimizer], progress=False)
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_optimizers_saved_before_there_were_terms_are_read() -> None:
    model = tiny_mixtral().train()
    old = torch.optim.AdamW(parameter_groups(model, 0.1)[:3], lr=1e-2)
    step(model, old, 0)
    state = copy.deepcopy(old.state_dict())
    add_missing_groups(state)
    assert [group["name"] for group in state["param_groups"]] == ["decay", "no_decay", "novices", "adapters"]
    assert state["param_groups"][3]["params"] == [] and state["param_groups"][3]["lr"] == 1e-2
    again = copy.deepcopy(state)
    add_missing_groups(again)
    assert again["param_groups"] == state["param_groups"]
    twin = copy.deepcopy(model)
    new = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=1e-2)
    new.load_state_dict(state)
    step(model, old, 1)
    step(twin, new, 1)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())
    other = torch.optim.AdamW(model.parameters()).state_dict()  # somebody else's groups
    untouched = copy.deepcopy(other)
    add_missing_groups(other)
    assert other["param_groups"] == untouched["param_groups"]


FRESH = """
import sys, torch
import moe_lightning as ml
for folder in sys.argv[2:]:
    model = ml.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.load(sys.argv[1])).logits
    torch.save((logits, model.state_dict()), folder + "/said.pt")
"""


def test_folders_with_terms_say_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for base in BASES:
        for end in ("terms", "merged"):
            model = adapted_mixtral(base)
            if end == "merged":
                merged(model)
            folder = ml.save_pretrained(model, tmp_path / f"{base} {end}".replace(":", ""), format="native")
            expected[folder] = (logits(model), model.state_dict())
    torch.save(INPUTS, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "inputs.pt"), *map(str, expected)]
    subprocess.run(command, check=True, cwd=ROOT)
    for folder, (said, state) in expected.items():
        found, loaded = torch.load(folder / "said.pt")
        torch.testing.assert_close(found, said, rtol=0, atol=2e-6, msg=str(folder))
        assert loaded.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_a_plain_folder_holds_no_terms_and_holds_them_merged(tmp_path: Path) -> None:
    model = adapted_mixtral()
    with pytest.raises(ValueError, match="have low-rank terms that are not merged"):
        ml.save_pretrained(model, tmp_path / "terms", format="transformers")
    ml.save_pretrained(model, tmp_path / "auto")
    assert '"model_type": "moe_lightning_mixtral"' in (tmp_path / "auto" / "config.json").read_text()
    merged(model)
    folder = ml.save_pretrained(model, tmp_path / "merged")
    plain = MixtralForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-6)


def test_layers_that_were_packed_train_again_when_they_are_spelled_out() -> None:
    model = adapted_mixtral("everything")
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    merged(model, dequantize=True)
    assert not any(isinstance(module, WeightStack | PackedLinear | LoraLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_gradients_of_the_whole_model_are_those_of_its_dense_twin(base: str) -> None:
    """A plain model in float64 with every matrix spelled out, ``W + kept * alpha / R B A``, and torch's autograd."""
    loops: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = adapted_mixtral(base, dtype=torch.float64, **loops)
    plain = tiny_mixtral(dtype=torch.float64, **loops)
    leaves: dict[str, Tensor] = {}
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    for layer, target in ((layer, target) for layer in range(3) for target in ("experts", "attention")):
        for name, place in places_of(model, layer, target).items():
            assert place.lora is not None
            weight = unpacked(place.weight).double()
            weight = weight if weight.ndim == 3 else weight[None]
            first, second = (
                tensor.detach().clone().requires_grad_() for tensor in (place.lora.lora_A, place.lora.lora_B)
            )
            leaves[f"{layer}.{name}.lora_A"], leaves[f"{layer}.{name}.lora_B"] = first, second
            whole = weight + kept_weights(place.weight, weight) * (5.0 / 3 * torch.matmul(second, first))
            module = f"model.layers.{layer}."
            if target == "experts":
                state[f"{module}mlp.experts.{name}"] = whole
            else:
                state[f"{module}self_attn.{name}.weight"] = whole[0]
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)]
    for name in routers:
        state[name] = leaves[name] = state[name].clone().requires_grad_()
    said = torch.func.functional_call(plain, state, kwargs={"input_ids": INPUTS}).logits
    ours = model(input_ids=INPUTS).logits
    torch.testing.assert_close(ours, said, rtol=0, atol=1e-10)
    probe = torch.randn(said.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    said.backward(probe)
    ours.backward(probe)
    found = {name: model.get_parameter(name).grad for name in routers}
    for layer, target in ((layer, target) for layer in range(3) for target in ("experts", "attention")):
        for name, place in places_of(model, layer, target).items():
            assert place.lora is not None
            found[f"{layer}.{name}.lora_A"] = place.lora.lora_A.grad
            found[f"{layer}.{name}.lora_B"] = place.lora.lora_B.grad
    assert found.keys() == leaves.keys()
    for name, gradient in found.items():
        expected = leaves[name].grad
        assert gradient is not None and expected is not None and expected.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10, msg=name)
