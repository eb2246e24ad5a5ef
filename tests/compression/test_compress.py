"""The driver: all or nothing, one pass for each method, numbers that agree."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.compression.sensitivity import layer_divergence
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.surgery import plan_of
from tests.models import random_batches, tiny_mixtral

BATCHES = random_batches(2, 2, 9)


def compress(model: Any, methods: Any = None, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


class Snapshot:
    """Everything of a model that a failed compression must leave alone."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.structure = self.look()

    def look(self) -> dict[str, Any]:
        model = self.model
        return {
            "class": type(model),
            "config": model.config.to_dict(),
            "config object": id(model.config),
            "configs": [
                (name, id(module.config)) for name, module in model.named_modules() if hasattr(module, "config")
            ],
            "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad, p.dtype, p.shape) for name, p in model.named_parameters()],
            "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
            "counts": [(layer.mlp.gate.num_experts, layer.mlp.gate.top_k) for layer in model.model.layers],
            "hooks": [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
            "repr": repr(model),
        }

    def check(self) -> None:
        after = self.look()
        for key, value in self.structure.items():
            assert after[key] == value, key
        state = self.model.state_dict()
        assert state.keys() == self.values.keys()
        for name, tensor in self.values.items():
            assert torch.equal(state[name], tensor), name


@dataclasses.dataclass
class FailsInFill(ml.Novices):
    def fill(self, edit: Edit, statistics: Statistics, weights: Any = None) -> dict[str, Tensor]:
        if edit.layer == 1:
            raise OSError("no memory left")
        return super().fill(edit, statistics)


@dataclasses.dataclass
class FillsNaN(ml.Novices):
    def fill(self, edit: Edit, statistics: Statistics, weights: Any = None) -> dict[str, Tensor]:
        values = super().fill(edit, statistics)["novices"]
        values[-1, 3] = torch.nan if edit.layer == 2 else 0
        return {"novices": values}


@dataclasses.dataclass
class OverflowsInTheTypeOfTheModel(ml.Novices):
    def fill(self, edit: Edit, statistics: Statistics, weights: Any = None) -> dict[str, Tensor]:
        return {"novices": super().fill(edit, statistics)["novices"] + 1e39}


@dataclasses.dataclass
class FailsInPropose(ml.Novices):
    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        if not statistics.info.get("synthetic"):
            raise ArithmeticError("no idea")
        return super().propose(shape, statistics)


@dataclasses.dataclass
class ProposesNonsense(ml.Novices):
    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        edits = super().propose(shape, statistics)
        return edits if statistics.info.get("synthetic") else (*edits, ml.KeepExperts(2, (0, 99)))


@dataclasses.dataclass
class Interrupted(ml.Novices):
    def fill(self, edit: Edit, statistics: Statistics, weights: Any = None) -> dict[str, Tensor]:
        raise KeyboardInterrupt


FAILURES: dict[str, tuple[Callable[..., Method], type[BaseException]]] = {
    "fill": (FailsInFill, OSError),
    "NaN": (FillsNaN, RuntimeError),
    "overflow": (OverflowsInTheTypeOfTheModel, RuntimeError),
    "propose": (FailsInPropose, ArithmeticError),
    "nonsense": (ProposesNonsense, ValueError),
    "interrupt": (Interrupted, KeyboardInterrupt),
}
FIRST = {
    "alone": [],
    "after novices": [ml.Novices(keep=4)],
    "after a drop": [ml.ExpertDrop(keep=5)],
    "after both": [ml.ExpertDrop(keep=5), ml.Novices(keep=4)],
}


@pytest.mark.parametrize(("method", "error"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("compressed", [False, True])
def test_all_or_nothing(
    method: Callable[..., Method], error: type[BaseException], first: list[Method], compressed: bool
) -> None:
    model = tiny_mixtral()
    if compressed:
        compress(model, [ml.ExpertDrop(keep=5, criterion="reap"), ml.Novices(keep=4)])
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    before = Snapshot(model)
    with pytest.raises(error):
        compress(model, [*first, method(keep=3)])
    before.check()


def test_a_calibration_that_breaks_off_leaves_the_model_alone() -> None:
    model = tiny_mixtral().train()
    before = Snapshot(model)

    class Broken:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield BATCHES[0]
            if self.passes == 2:
                raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        compress(model, [ml.Novices(keep=4), ml.ExpertDrop(keep=4)], batches=Broken())
    before.check()


def test_a_model_whose_outputs_overflow_is_left_alone() -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:] = torch.inf
    before = Snapshot(model)
    with pytest.raises(ValueError, match="not finite in layers"):
        compress(model, ml.Novices(ratio=0.5))
    before.check()


def test_a_failed_compression_can_be_repeated_without_the_failure() -> None:
    model = tiny_mixtral()
    other = copy.deepcopy(model)
    with pytest.raises(OSError):
        compress(model, [ml.ExpertDrop(keep=5), FailsInFill(keep=3)])
    for each in (model, other):
        compress(each, [ml.ExpertDrop(keep=5), ml.Novices(keep=3)])
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


METHODS = {
    "novices": [ml.Novices(ratio=0.5)],
    "drop": [ml.ExpertDrop(keep=4, scope="global", criterion="mone")],
    "both": [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=4, criterion="mone")],
    "all novices dropped again": [ml.Novices(keep=3), ml.ExpertDrop(keep=3, criterion="mone")],
    "random": [ml.Novices(ratio=0.5, criterion="random", novice="zero")],
}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_touched_equals_claimed_equals_counted(methods: list[Method]) -> None:
    model = tiny_mixtral()
    before = sum(parameter.numel() for parameter in model.parameters())
    result = compress(model, methods)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert result.model is model
    assert result.touched == result.claimed > 0
    assert result.size_before.parameters == before and result.size_after.parameters == after
    assert result.shape_before.parameters == before and result.shape_after.parameters == after
    assert result.size_after == ml.measure(model)
    assert plan_of(model) == result.plan
    layouts = zip(result.shape_before.layouts, result.shape_after.layouts, strict=True)
    expert_parameters = 3 * 32 * 48
    gone = sum(
        (len(a.real) - len(b.real)) * expert_parameters + (len(a.router) - len(b.router)) * 32 for a, b in layouts
    )
    assert before - after == gone - 32 * sum(len(layout.novices) for layout in result.shape_after.layouts)


def test_touched_counts_what_goes_and_what_comes() -> None:
    expert, vector = 3 * 32 * 48, 32
    assert compress(tiny_mixtral(), ml.Novices(keep=4)).touched == 3 * 2 * (expert + vector)
    assert compress(tiny_mixtral(), ml.ExpertDrop(keep=4)).touched == 3 * 2 * (expert + vector)
    # Novices come, and go again with their router rows.
    again = [ml.Novices(keep=4), ml.ExpertDrop(keep=4, criterion="mone")]
    assert compress(tiny_mixtral(), again).touched == 3 * 2 * (expert + vector + vector + vector)


def test_statuses_name_every_changed_module_and_count_its_tokens() -> None:
    model = tiny_mixtral()
    statistics = ml.collect(model, BATCHES, progress=False)
    plan = ml.CompressionPlan(
        (ml.NoviceExperts(0, (1, 4), "mean"), ml.NoviceExperts(0, (5,), "zero"), ml.KeepExperts(2, (0, 1, 5)))
    )
    result = compress(model, plan=plan)
    assert {name: module.status for name, module in result.modules.items()} == {
        "model.layers.0.mlp.experts": "3 of 6 experts real, 3 novices (mean, zero)",
        "model.layers.2.mlp.experts": "3 of 6 experts real, 3 dropped with their router rows",
    }
    tokens = result.modules["model.layers.0.mlp.experts"].tokens
    assert tokens == {expert: int(statistics["count"][0, expert]) for expert in range(6)}
    modules = dict(model.named_modules())
    assert all(name in modules for name in result.modules)
    summary = result.summary()
    assert summary["touched_parameters"] == result.touched
    assert summary["parameters_after"] == sum(parameter.numel() for parameter in model.parameters())
    assert f"{result.size_after.parameters:,} parameters" in str(result)


@pytest.mark.parametrize("methods", [METHODS["novices"], METHODS["both"]], ids=["one", "two"])
def test_a_generator_gives_what_a_list_gives(methods: list[Method]) -> None:
    one, other = tiny_mixtral(), tiny_mixtral()
    compress(one, methods)
    compress(other, methods, batches=(batch for batch in BATCHES))
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_generator_serves_a_replay_of_two_steps_too() -> None:
    one, other = tiny_mixtral(), tiny_mixtral()
    result = compress(one, [ml.Novices(keep=4), ml.Novices(keep=2)])
    compress(other, plan=result.plan, batches=(batch for batch in BATCHES))
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_methods_one_after_the_other_equal_a_list() -> None:
    one, other = tiny_mixtral(), tiny_mixtral()
    first, second = ml.ExpertDrop(keep=5), ml.Novices(keep=3)
    together = compress(one, [first, second])
    compress(other, first)
    apart = compress(other, second)
    assert together.plan == apart.plan
    assert [step["method"] for step in together.plan.origin["history"]] == ["ExpertDrop", "Novices"]
    assert together.plan.origin == apart.plan.origin
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_the_statistics_are_those_of_the_model_before() -> None:
    model = tiny_mixtral()
    before = ml.collect(model, BATCHES, {"routing"}, progress=False)
    result = compress(model, [ml.ExpertDrop(keep=4), ml.Novices(keep=2)])
    assert result.statistics is not None
    for name, tensor in before.tensors.items():
        assert torch.equal(result.statistics[name], tensor), name
    nothing = compress(tiny_mixtral(), METHODS["random"])
    assert nothing.statistics is None


def test_either_methods_or_a_plan() -> None:
    plan = ml.CompressionPlan((ml.KeepExperts(0, (0, 1)),))
    for options in ({}, {"methods": ml.Novices(ratio=0.5), "plan": plan}):
        with pytest.raises(ValueError, match="either methods or a plan"):
            compress(tiny_mixtral(), **options)


def test_other_things_are_no_methods() -> None:
    for methods in (["mone"], [ml.Novices], [None]):
        with pytest.raises(TypeError, match=r"not a compression method.*Novices\("):
            compress(tiny_mixtral(), methods)


def test_a_plan_on_a_compressed_model_is_an_error() -> None:
    model = tiny_mixtral()
    result = compress(model, ml.ExpertDrop(keep=4))
    before = Snapshot(model)
    with pytest.raises(ValueError, match="compressed already"):
        compress(model, plan=result.plan)
    before.check()


def test_no_calibration_data_is_an_error() -> None:
    model = tiny_mixtral()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="no calibration batches"):
        compress(model, ml.Novices(ratio=0.5), batches=[])
    before.check()


def test_not_a_mixtral_is_an_error() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match=r"'llama' is not supported.*mixtral"):
        compress(LlamaForCausalLM(config), ml.Novices(ratio=0.5))
    with pytest.raises(ValueError, match="with its language head"):
        compress(tiny_mixtral().model, ml.Novices(ratio=0.5))


def test_the_origin_says_where_the_decision_comes_from() -> None:
    method = ml.Novices(ratio=0.5, criterion="reap")
    result = compress(tiny_mixtral(), method, origin={"data": {"files": ("a.txt",)}, "seed": 3})
    (step,) = result.plan.origin["history"]
    assert step["method"] == "Novices" and step["ratio"] == 0.5 and step["criterion"] == "reap"
    assert step["calibration"] == {"data": {"files": ["a.txt"]}, "seed": 3}
    assert step["versions"].keys() >= {"moe-lightning", "torch", "transformers", "python"}
    assert ml.CompressionPlan.from_json(result.plan.to_json()).origin == result.plan.origin


def test_modes_and_devices_of_the_new_parameters_follow_the_old() -> None:
    model = tiny_mixtral(dtype=torch.bfloat16).train()
    model.model.layers[1].mlp.experts.requires_grad_(False)
    compress(model, ml.Novices(keep=3))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        assert all(parameter.dtype == torch.bfloat16 for parameter in experts.parameters())
        assert all(module.training for module in experts.modules())
    assert not model.model.layers[1].mlp.experts.storage.gate_up_proj.requires_grad
    assert model.model.layers[0].mlp.experts.storage.gate_up_proj.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_compressed_without_gradients_can_be_trained(mode: Any) -> None:
    model = tiny_mixtral()
    with mode():
        compress(model, ml.Novices(keep=3))
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_given_statistics_are_not_changed_and_serve_the_first_step_only() -> None:
    model = tiny_mixtral()
    given = ml.collect(model, BATCHES, progress=False)
    info, names = dict(given.info), set(given.tensors)
    drop = ml.ExpertDrop(keep=5, criterion="mone")
    twice = compress(model, [drop, drop, ml.ExpertDrop(keep=4, scope="sensitivity")], statistics=given)
    assert given.info == info and set(given.tensors) == names
    other = tiny_mixtral()
    again = compress(
        other,
        [
            ml.ExpertDrop(keep=5, criterion="mone"),
            ml.ExpertDrop(keep=5, criterion="mone"),
            ml.ExpertDrop(keep=4, scope="sensitivity"),
        ],
    )
    assert twice.plan == again.plan


def test_statistics_of_other_weights_are_refused() -> None:
    given = ml.collect(tiny_mixtral(seed=1), BATCHES, progress=False)
    with pytest.raises(ValueError, match="other weights"):
        compress(tiny_mixtral(), ml.Novices(keep=3), statistics=given)


def test_undo_puts_back_what_was_there_and_only_where_it_was_asked_for() -> None:
    model = tiny_mixtral()
    before = Snapshot(model)
    result = compress(model, [ml.BlockDrop(count=1), ml.Novices(keep=3, novice="low_rank", rank=2)], reversible=True)
    result.undo()
    before.check()
    with pytest.raises(RuntimeError, match="reversible=True"):
        result.undo()
    with pytest.raises(RuntimeError, match="reversible=True"):
        compress(model, ml.Novices(keep=3)).undo()


def test_optimizers_are_carried_over_all_or_none() -> None:
    class Odd(torch.optim.AdamW):
        """Keeps state that belongs to no row."""

    model = tiny_mixtral().train()
    first = torch.optim.AdamW(model.model.layers[0].parameters())
    second = Odd(model.model.layers[1].parameters())
    for optimizer in (first, second):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for parameter in second.state:
        second.state[parameter]["sketch"] = torch.zeros(7)
    members = [list(optimizer.param_groups[0]["params"]) for optimizer in (first, second)]
    with pytest.raises(RuntimeError, match="sketch"):
        compress(model, ml.ExpertDrop(keep=4), optimizers=[first, second])
    for optimizer, expected in zip((first, second), members, strict=True):
        assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], expected, strict=True))
    inside = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in inside for expected in members for parameter in expected)


def test_padding_has_no_part_in_the_sensitivity_of_layers() -> None:
    model = tiny_mixtral()
    method = ml.ExpertDrop(keep=4, criterion="frequency", scope="sensitivity")
    statistics = ml.collect(model, BATCHES, method.needs, progress=False)
    long, short = random_batches(1, 1, 9, seed=3)[0]["input_ids"], random_batches(1, 1, 4, seed=4)[0]["input_ids"]
    padded = torch.cat([long, torch.cat([short, torch.full((1, 5), 2)], dim=1)])
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    together = layer_divergence(model, [{"input_ids": padded, "attention_mask": mask}], method, statistics, False)
    apart = layer_divergence(model, [{"input_ids": long}, {"input_ids": short}], method, statistics, False)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-8)
    assert (together > 0).all()


@pytest.mark.parametrize(("given", "hint"), [(ml.GPTQ, r"give objects like GPTQ\(\)"), ("GPTQ", r"'GPTQ' is not a")])
def test_a_class_or_a_name_is_no_method(given: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        ml.compress(tiny_mixtral(), [], given)


def test_a_replay_under_another_policy_says_so() -> None:
    batches = random_batches(2, 3, 16)
    plan = ml.compress(tiny_mixtral(), batches, ml.GPTQ(group_size=16), min_tokens=3, max_fallback=1.0).plan
    with pytest.warns(UserWarning, match=r"made with max_fallback=1\.0, min_tokens=3, starved='warn'.*min_tokens=5"):
        ml.compress(tiny_mixtral(), batches, plan=plan, min_tokens=5, max_fallback=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*min_tokens=3, but.*")
        ml.compress(tiny_mixtral(), batches, plan=plan, min_tokens=3, max_fallback=1.0)


DRAWN = {"routing", "outputs", "layers", "blocks", "similarity"}


def passes(model: Any, *methods: Method, **options: Any) -> int:
    """Compress, and return how often the calibration batches went through the first layer."""
    seen: list[int] = []
    layer = model.model.layers[0]
    handle = layer.input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    compress(model, list(methods), min_tokens=1, max_fallback=1.0, **options)
    handle.remove()
    return len(seen)


@pytest.mark.parametrize("method", [ml.Novices(ratio=0.5), ml.LayerDrop(count=1)], ids=str)
def test_what_is_measured_for_pictures_changes_nothing(method: Method) -> None:
    plain, watched = tiny_mixtral(), tiny_mixtral()
    alone = passes(plain, method)
    result = compress(watched, [method, ml.RTN(group_size=16)], min_tokens=1, also=DRAWN)
    compress(plain, ml.RTN(group_size=16))
    assert result.statistics is not None and DRAWN | method.needs == result.statistics.groups
    assert passes(tiny_mixtral(), method, also=DRAWN) == alone == len(BATCHES)
    # Of the model as it was: an untouched one says the same.
    expected = ml.collect(tiny_mixtral(), BATCHES, DRAWN | method.needs, progress=False)
    for name, tensor in expected.tensors.items():
        assert torch.equal(result.statistics[name], tensor), name
    for name, tensor in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name


@pytest.mark.parametrize("method", [ml.Wanda(sparsity=0.5), ml.GPTQ(group_size=16), ml.RTN(group_size=16)], ids=str)
def test_no_pass_is_made_for_pictures_alone(method: Method) -> None:
    plain, watched = tiny_mixtral(), tiny_mixtral()
    assert passes(plain, method) == passes(watched, method, also=DRAWN)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name
    # Nor for the second method, whose model is another one.
    second = compress(tiny_mixtral(), [method, ml.ExpertDrop(keep=4)], min_tokens=1, max_fallback=1.0, also=DRAWN)
    assert second.statistics is None or not second.statistics.groups & {"similarity", "blocks"}
