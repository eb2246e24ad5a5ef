"""The fused decoder layer of compressed models: what goes through it, and that everybody sees what they saw before."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralSparseMoeBlock, MixtralTopKRouter

pytest.importorskip("triton", reason="these are tests of the way to Triton kernels, and triton is not installed")

import moe_lightning as ml
from moe_lightning.architectures.mixtral_layer import KNOWS_TRANSFORMERS_LAYER, CompressedMixtralDecoderLayer
from moe_lightning.experts.kernel_path import Use, use_kernels
from moe_lightning.plan import CompressionPlan, KeepExperts, NoviceExperts, Quantize
from moe_lightning.surgery import apply_plan, build
from tests.architectures.compressed_models import ALL_MODELS, DEVICE, MODELS, SIZES, by_kernels, make_model, tokens
from tests.kernels.triton.problems import relative_error
from tests.models import tiny_mixtral
from tests.packed import packed_mixtral


@torch.no_grad()
def outputs(model: Any, **options: Any) -> Any:
    return model(input_ids=tokens(), use_cache=False, **options)


def by_torch(model: Any, **options: Any) -> Any:
    with use_kernels("off"):
        return outputs(model, **options)


def test_transformers_layer_is_the_one_that_was_said_again() -> None:
    """In every version that is supported: else the fused path is never taken."""
    assert KNOWS_TRANSFORMERS_LAYER


@ALL_MODELS
def test_says_what_torch_says(name: str) -> None:
    model = make_model(name)
    want = by_torch(model)
    blocks = sum(isinstance(layer.mlp, MixtralSparseMoeBlock) for layer in model.model.layers)
    with by_kernels() as found:
        got = outputs(model)
    assert found == ["block"] * blocks
    assert relative_error(got.logits, want.logits) <= 1e-5


def test_nothing_changes_where_the_kernels_are_off() -> None:
    model = make_model("novices")
    stock = copy.deepcopy(model)
    for layer in stock.model.layers:
        layer.__class__ = MixtralDecoderLayer
    assert torch.equal(by_torch(model).logits, by_torch(stock).logits)


@pytest.mark.parametrize("name", ["novices", "dropped"])
def test_transformers_records_what_it_is_asked_for(name: str) -> None:
    """Its hooks stay on the router afterwards, which then is called as a module."""
    model = make_model(name)
    options = {"output_router_logits": True, "output_hidden_states": True}
    want = by_torch(copy.deepcopy(model), **options)
    with by_kernels() as found:
        outputs(model)
        assert set(found) == {"block"}
        del found[:]
        got = outputs(model, **options)
        assert found == ["sum"] * len(want.router_logits)
        again = outputs(model)
    assert again.router_logits is None and relative_error(again.logits, want.logits) <= 1e-5
    assert relative_error(got.aux_loss, want.aux_loss) <= 1e-5
    for field in ("router_logits", "hidden_states"):
        pairs = list(zip(got[field], want[field], strict=True))
        assert all(a.shape == b.shape and relative_error(a, b) <= 1e-5 for a, b in pairs)


def first(model: Any) -> Any:
    return model.model.layers[0].mlp


def hooked(part: Callable[[Any], nn.Module], kind: str = "register_forward_hook") -> Callable[[Any, list[Any]], Any]:
    return lambda model, seen: getattr(part(model), kind)(lambda module, *_: seen.append(module))


def another_forward(part: Callable[[Any], nn.Module]) -> Callable[[Any, list[Any]], Any]:
    """As accelerate does, and our observers."""

    def put(model: Any, seen: list[Any]) -> None:
        module = part(model)
        before = module.forward
        module.forward = lambda *inputs: (seen.append(module), before(*inputs))[1]  # type: ignore[method-assign]

    return put


def everywhere_hooked(_: Any, seen: list[Any]) -> Any:
    return register_module_forward_hook(lambda module, *_: seen.append(module))


WATCHERS: dict[str, tuple[Callable[[Any, list[Any]], Any], Callable[[Any], nn.Module], str | None]] = {
    # How somebody watches, what they then must see, and what of the layer goes through the kernels.
    "block": (hooked(first), first, "experts"),
    "before the block": (hooked(first, "register_forward_pre_hook"), first, "experts"),
    "experts": (hooked(lambda model: first(model).experts), lambda model: first(model).experts, "experts"),
    "router": (hooked(lambda model: first(model).gate), lambda model: first(model).gate, "sum"),
    "before the router": (
        hooked(lambda model: first(model).gate, "register_forward_pre_hook"),
        lambda model: first(model).gate,
        "sum",
    ),
    "everything": (everywhere_hooked, lambda model: first(model).gate, "experts"),
    "another block": (another_forward(first), first, "experts"),
    "another router": (another_forward(lambda model: first(model).gate), lambda model: first(model).gate, "sum"),
    "other experts": (another_forward(lambda m: first(m).experts), lambda m: first(m).experts, "experts"),
    "norm": (
        hooked(lambda model: model.model.layers[0].post_attention_layernorm),
        lambda model: model.model.layers[0].post_attention_layernorm,
        "block",
    ),
    "attention": (
        hooked(lambda model: model.model.layers[0].self_attn),
        lambda model: model.model.layers[0].self_attn,
        "block",
    ),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_whoever_watches_a_part_sees_it(watcher: str) -> None:
    watch, watched, way = WATCHERS[watcher]
    model = make_model("novices")
    want, seen = by_torch(model), []
    handle = watch(model, seen)
    try:
        with by_kernels() as found:
            got = outputs(model)
    finally:
        if handle is not None:
            handle.remove()
    assert relative_error(got.logits, want.logits) <= 1e-5
    assert sum(module is watched(model) for module in seen) == 1
    assert found[0] == way


def test_a_router_of_another_class_routes() -> None:
    class Reversed(MixtralTopKRouter):
        def forward(self, hidden_states):
            logits, weight, index = super().forward(hidden_states)
            return logits, weight, self.num_experts - 1 - index

    model = make_model("dense")
    first(model).gate.__class__ = Reversed
    with by_kernels() as found:
        got = outputs(model)
    assert found == ["sum", "block", "block"]
    assert relative_error(got.logits, by_torch(model).logits) <= 1e-5


def test_noise_gradients_and_other_types_go_the_way_of_torch() -> None:
    model = make_model("novices", router_jitter_noise=0.1).train()
    with by_kernels() as found:
        outputs(model)
        assert "block" not in found
        outputs(model.eval())
        assert found[-3:] == ["block"] * 3
        del found[:]
        with torch.enable_grad():
            model(input_ids=tokens()).logits.sum().backward()
        assert "block" not in found and "sum" not in found
        model.requires_grad_(False)
        with torch.enable_grad():
            model(input_ids=tokens())
        assert found[-3:] == ["block"] * 3
        del found[:]
        model.set_experts_implementation("eager")  # for layer 1, which transformers' grouped products cannot compute
        outputs(model.double())
        assert not found


def test_whoever_asks_for_an_implementation_of_stock_experts_gets_it() -> None:
    model = make_model("dense")
    for name, ways in (("batched_mm", ["block"] * 3), ("moe_kernels", ["block"] * 3), ("eager", ["block"] * 2)):
        model.set_experts_implementation(name)
        with by_kernels() as found:
            got = outputs(model)
        assert found == ways and relative_error(got.logits, by_torch(model).logits) <= 1e-5


@pytest.mark.parametrize("edit", [Quantize(0, bits=8, group_size=64), Quantize(0, group_size=16)], ids=str)
def test_weights_that_the_kernels_do_not_know(edit: Quantize) -> None:
    model = packed_mixtral([edit], **SIZES).to(DEVICE)
    with by_kernels() as found:
        got = outputs(model)
    assert found == ["block"] * 2 and relative_error(got.logits, by_torch(model).logits) <= 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model("novices").train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        ids = tokens()
        with use_kernels("off"):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, want in gradients[0].items():
        if want is not None and want.numel():
            # The first pass of a reentrant checkpoint wants no gradient: it takes products that round otherwise.
            tolerance = 1e-5 * float(want.abs().max()) if use_reentrant else 0.0
            torch.testing.assert_close(gradients[1][name], want, rtol=0, atol=tolerance)


def layers_of(model: Any) -> list[type]:
    return [type(layer) for layer in model.model.layers]


def test_surgery_gives_the_class_and_takes_it_back() -> None:
    model = tiny_mixtral(**SIZES)
    names, whole = list(model.state_dict()), set(model._no_split_modules)
    assert apply_plan(model, CompressionPlan()).replaced == [] and layers_of(model) == [MixtralDecoderLayer] * 3
    surgery = apply_plan(model, CompressionPlan((KeepExperts(1, (0, 1)),)))
    assert layers_of(model) == [CompressedMixtralDecoderLayer] * 3
    assert whole | {"CompressedMixtralDecoderLayer"} == model._no_split_modules == model.model._no_split_modules
    surgery.undo()
    assert layers_of(model) == [MixtralDecoderLayer] * 3 and list(model.state_dict()) == names
    assert model._no_split_modules == whole


@pytest.mark.parametrize("name", ["novices", "dropped"])
def test_the_class_is_there_wherever_the_model_comes_from(name: str, tmp_path: Any) -> None:
    model = make_model(name)
    want = by_torch(model).logits
    ml.save_pretrained(model, tmp_path)
    for other in (
        ml.from_pretrained(tmp_path).to(DEVICE),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert set(layers_of(other)) == {CompressedMixtralDecoderLayer}
        with by_kernels() as found:
            got = outputs(other).logits
        assert set(found) == {"block"} and relative_error(got, want) <= 1e-5
    assert set(layers_of(build(model.config))) == {CompressedMixtralDecoderLayer}


def test_statistics_are_those_of_the_way_of_torch() -> None:
    batches = [{"input_ids": tokens(9, seed=seed)} for seed in range(2)]
    found = {}
    uses: tuple[Use, ...] = ("off", "always")
    for use in uses:
        with use_kernels(use):
            found[use] = ml.collect(make_model("novices"), batches, ["routing", "outputs"])
    for criterion in ("frequency", "mone"):
        got, want = (found[use].score(criterion) for use in ("always", "off"))
        known = ~torch.isnan(want)
        assert torch.equal(torch.isnan(got), ~known)
        assert relative_error(got[known], want[known]) <= 1e-6


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None]


def test_is_traced_as_one_graph() -> None:
    """int4 after a first pass: to change the form of weights is nothing that a graph could hold."""
    edits = NoviceExperts(0, (0, 1, 4), "low_rank", (3, 0, 1)), Quantize(0, group_size=64)
    model = packed_mixtral(edits, **{**SIZES, "num_hidden_layers": 2}).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), use_kernels("always"):
        model(input_ids=tokens(1), use_cache=False)
        for number in (3, 5):
            ids = tokens(number)
            got = compiled(input_ids=ids, position_ids=positions(ids), use_cache=False)
            assert relative_error(got.logits, model(input_ids=ids, use_cache=False).logits) <= 1e-5


@pytest.mark.parametrize(("name", "cache"), [*((name, None) for name in MODELS), ("novices", "static")])
def test_generates_the_same_tokens(name: str, cache: str | None) -> None:
    model, ids = make_model(name), tokens(2)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    options |= {"cache_implementation": cache} if cache else {}
    with use_kernels("off"):
        want = model.generate(ids, **options)
    with by_kernels() as found:
        assert torch.equal(model.generate(ids, **options), want)
    assert set(found) == {"block"}
