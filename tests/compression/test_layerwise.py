"""Slimming layer by layer: what methods see, what is stored, and what is said of it."""

import contextlib
import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.compression import calibration_bytes, check_methods, made_bytes
from moe_lightning.compression.layerwise import SlimmingReport
from moe_lightning.experts import WeightStack
from moe_lightning.plan import Edit
from moe_lightning.slimming.pruners import Magnitude, Wanda
from moe_lightning.slimming.quantizers import GPTQ, RTN
from moe_lightning.slimming.view import LayerView, SlimmedLayer
from moe_lightning.statistics.moment_memory import SOLVING, layer_input_bytes
from tests.compression.rounding_method import BATCHES, LAYERS, Rounding, compress, rounded
from tests.compression.test_compress import Snapshot
from tests.layer_reference import HIDDEN, Seen, close, expected, moments
from tests.models import tiny_mixtral
from tests.reference import untouched


def check_by_hand(seen: dict[tuple[int, str], Tensor], gated: bool, propagate: str, attention: bool) -> None:
    """Go through an untouched model, and round its weights one after another as they are measured."""
    model = untouched()
    for number, layer in enumerate(model.model.layers):
        if attention:
            rows = Seen(model, BATCHES)[number, "q_proj"]
            for name in ("q_proj", "k_proj", "v_proj"):
                close(seen[number, name], moments(rows, HIDDEN, "full")[None])
            if propagate == "compressed":
                for name in ("q_proj", "k_proj", "v_proj"):
                    linear = getattr(layer.self_attn, name)
                    linear.weight.data = rounded(linear.weight.data)
            rows = Seen(model, BATCHES)[number, "o_proj"]
            close(seen[number, "o_proj"], moments(rows, HIDDEN, "full")[None])
            if propagate == "compressed":
                layer.self_attn.o_proj.weight.data = rounded(layer.self_attn.o_proj.weight.data)
        experts = layer.mlp.experts
        now = Seen(model, BATCHES)
        close(seen[number, "gate_up_proj"], expected(now, number, None, "full", gated))
        if propagate == "compressed":
            experts.gate_up_proj.data = rounded(experts.gate_up_proj.data)
        close(seen[number, "down_proj"], expected(now, number, experts.gate_up_proj, "full", gated))
        if propagate == "compressed":
            experts.down_proj.data = rounded(experts.down_proj.data)


@pytest.mark.parametrize(
    ("targets", "propagate", "gated"),
    [
        ("experts", "compressed", True),
        ("experts", "original", False),
        ("experts+attention", "compressed", False),
        ("experts+attention", "original", True),
    ],
)
def test_every_matrix_is_measured_as_those_before_it_leave_it(targets: str, propagate: str, gated: bool) -> None:
    model = untouched()
    method = Rounding(targets=targets, propagate=propagate, gated=gated)
    compress(model, method)
    check_by_hand(method.seen, gated, propagate, "attention" in targets)
    # What is stored is what was rounded.
    plain = untouched()
    for number, layer in enumerate(plain.model.layers):
        stack = model.model.layers[number].mlp.experts.storage.down_proj
        assert torch.equal(stack.dense(), rounded(layer.mlp.experts.down_proj.data))


@pytest.mark.parametrize("limit", [1, HIDDEN * HIDDEN * 8 * (2 + SOLVING), 2**40])
def test_the_memory_for_moments_does_not_change_them(limit: int) -> None:
    methods = [Rounding(), Rounding()]
    compress(untouched(), methods[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ml.compress(untouched(), BATCHES, methods[1], progress=False, max_moment_bytes=limit, min_tokens=0)
    for key, found in methods[0].seen.items():
        torch.testing.assert_close(methods[1].seen[key], found, rtol=1e-12, atol=1e-12)
    said = [str(item.message) for item in caught if "max_moment_bytes" in str(item.message)]
    # Two matrices of 32 inputs fit, but none of 48: the third limit alone holds everything.
    assert len(said) == (1 if limit < 2**40 else 0)
    assert all("one matrix at a time" in message for message in said)
    sizes = {name: [len(slots) for slots in methods[1].views[0].groups(name, "full")] for name in ("gate_up_proj",)}
    assert sizes["gate_up_proj"] == {1: [1] * 6, HIDDEN * HIDDEN * 8 * (2 + SOLVING): [2, 2, 2], 2**40: [6]}[limit]


def test_methods_that_measure_nothing_neither_need_batches_nor_run_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the model ran")

    for method in (Rounding(None, "experts+attention"), RTN(group_size=16), Magnitude(sparsity=0.5)):
        model = tiny_mixtral()
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model), "forward", run)
            for batches in (None, []):
                live = copy.deepcopy(model)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    result = ml.compress(live, batches, method, progress=False, starved="error")
                assert result.plan and result.statistics is None
    for method in (Rounding(), GPTQ(group_size=16)):
        model = tiny_mixtral()
        before = Snapshot(model)
        for batches in (None, []):
            with pytest.raises(ValueError, match="no calibration batches"):
                compress(model, method, batches)
        before.check()


def test_the_model_computes_with_what_is_stored() -> None:
    model, plain = tiny_mixtral(), tiny_mixtral()
    compress(model, Rounding(targets="experts+attention"))
    for layer in plain.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.weight.data = rounded(linear.weight.data)
        layer.mlp.experts.gate_up_proj.data = rounded(layer.mlp.experts.gate_up_proj.data)
        layer.mlp.experts.down_proj.data = rounded(layer.mlp.experts.down_proj.data)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCHES[0]).logits, plain(**BATCHES[0]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("novices", [False, True])
def test_rescaling_by_powers_of_two_changes_nothing(novices: bool) -> None:
    models = [tiny_mixtral(), tiny_mixtral()]
    before = [ml.Novices(keep=4, novice="low_rank", rank=2)] if novices else []
    methods = [Rounding(targets="experts+attention", factor=factor) for factor in (1.0, 4.0)]
    for model, method in zip(models, methods, strict=True):
        compress(model, [*before, method])
    with torch.no_grad():
        torch.testing.assert_close(*(model(**BATCHES[0]).logits for model in models), rtol=1e-5, atol=1e-5)
    norms = [model.model.layers[1].post_attention_layernorm.weight for model in models]
    assert torch.equal(norms[0], 4 * norms[1])
    gates = [model.model.layers[1].mlp.gate.weight for model in models]
    assert torch.equal(4 * gates[0], gates[1])
    for key, found in methods[0].seen.items():
        torch.testing.assert_close(found, methods[1].seen[key], rtol=1e-4, atol=1e-4)


def test_views_show_the_layer_as_it_is() -> None:
    model = tiny_mixtral()
    compress(model, [ml.Novices(keep=4, novice="low_rank", rank=2), Wanda(sparsity=0.5)])
    keep = model.model.layers[0].mlp.experts.storage.gate_up_proj.zeros_kept()

    @dataclasses.dataclass
    class Looking(Rounding):
        def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
            assert view.layer == edit.layer and view.target == edit.target
            architecture = architecture_of(model)
            decoder_layer = model.model.layers[edit.layer]
            if view.target == "attention":
                assert view.matrices == ("q_proj", "k_proj", "v_proj", "o_proj")
                assert view.router_weight is None and view.novice_in is None
                assert torch.equal(view.norm_weight, decoder_layer.input_layernorm.weight)
                assert view.tokens.tolist() == [54]
                assert tuple(view.weight("k_proj").shape) == (1, 16, 32)
                assert view.groups("q_proj", "full") == [[0]]
                assert view.keep("q_proj") is None
            else:
                assert view.matrices == ("gate_up_proj", "down_proj")
                assert torch.equal(view.norm_weight, decoder_layer.post_attention_layernorm.weight)
                assert view.router_weight is not None and view.novice_in is not None
                assert torch.equal(view.router_weight, decoder_layer.mlp.gate.weight)
                assert torch.equal(view.novice_in, decoder_layer.mlp.experts.novice_in)
                opened = architecture.open_experts(architecture.moe_layers(model)[edit.layer])
                assert torch.equal(view.weight("down_proj"), opened.down_proj)
                mask = view.keep("gate_up_proj")
                assert mask is not None and (edit.layer != 0 or torch.equal(mask, keep))
                assert not view.weight("gate_up_proj").requires_grad
                assert len(view.tokens) == 4 and not view.use_fallback
                assert torch.equal(view.starved, view.tokens < 7)
            return super().slim(edit, view)

    looking = Looking(targets="experts+attention")
    compress(model, looking, min_tokens=7)
    assert len(looking.views) == 2 * LAYERS
    # Zeros stay zeros among the integers.
    assert not model.model.layers[0].mlp.experts.storage.gate_up_proj.dense()[~keep].any()


def test_autocast_around_the_compression_changes_no_sum_and_no_method() -> None:
    models = [tiny_mixtral(), tiny_mixtral()]
    compress(models[0], GPTQ(group_size=16))
    first = models[0].model.layers[0].mlp.experts.storage.gate_up_proj.dense()

    @dataclasses.dataclass
    class Checking(GPTQ):
        def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
            assert not torch.is_autocast_enabled("cpu")
            assert view.moments("gate_up_proj", "full", [0]).dtype == torch.float32
            return super().slim(edit, view)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        compress(models[1], Checking(group_size=16))
    second = models[1].model.layers[0].mlp.experts.storage.gate_up_proj.dense()
    # The model itself ran in another type: weights differ by few steps, not by much.
    assert float((first - second).norm() / first.norm()) < 0.1


@pytest.mark.parametrize("how", ["high", "medium", "cuda", "none"])
@pytest.mark.parametrize("fails", [False, True])
def test_products_are_in_full_fp32_whatever_was_asked_for_training(how: str, fails: bool) -> None:
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    seen: list[Any] = []

    @dataclasses.dataclass
    class Looking(Rounding):
        def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
            seen.append((torch.get_float32_matmul_precision(), *(backend.fp32_precision for backend in backends)))
            return super().slim(edit, view)

    try:
        if how == "cuda":
            backends[0].fp32_precision = "tf32"
        elif how != "none":
            torch.set_float32_matmul_precision(how)
        during = [backend.fp32_precision for backend in backends]
        with pytest.raises(OSError) if fails else contextlib.nullcontext():
            compress(tiny_mixtral(), Looking(fail_in=2 if fails else None))
        assert set(seen) == {("highest", "ieee", "ieee")}
        assert [backend.fp32_precision for backend in backends] == during
        if how in ("high", "medium"):
            assert torch.get_float32_matmul_precision() == how
    finally:
        torch.set_float32_matmul_precision("highest")
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def test_an_error_is_that_of_the_last_method() -> None:
    """In units of the weights that it found: what the method before took away is none."""
    report = SlimmingReport({0: {"0.a": "sparsegpt", "1.a": "sparsegpt"}}, {0: {"0.a": 0.5, "1.a": 0.25}})
    report.merge(SlimmingReport({0: {"0.a": "gptq"}, 1: {"0.a": "gptq"}}, {0: {"0.a": 0.125}, 1: {"0.a": 0.0625}}))
    assert report.errors == {0: {"0.a": 0.125, "1.a": 0.25}, 1: {"0.a": 0.0625}}
    report.merge(SlimmingReport({0: {"0.a": "rtn", "1.a": "rtn"}}))
    assert report.errors == {0: {}, 1: {"0.a": 0.0625}}, "a method that measured nothing says nothing"
    assert report.matrices[0] == {"0.a": "sparsegpt, then gptq, then rtn", "1.a": "sparsegpt, then rtn"}


def test_statuses_name_matrices_by_original_numbers_and_count_their_tokens() -> None:
    model = tiny_mixtral()
    methods = [ml.ExpertDrop(keep=4), ml.Novices(keep=3), GPTQ(group_size=16, targets="experts+attention")]
    before = tiny_mixtral()
    compress(before, methods[:2])
    counts = ml.collect(before, BATCHES, {"routing"}, progress=False)["count"]
    result = compress(model, methods)
    shape = architecture_of(model).shape(model)
    modules = dict(model.named_modules())
    assert set(result.modules) <= set(modules)
    for number, layout in enumerate(shape.layouts):
        status = result.modules[f"model.layers.{number}.mlp.experts"]
        assert status.status.startswith("3 of 6 experts real, 1 novices (mean), 2 dropped with their router rows, int4")
        names = [f"{expert}.{name}" for name in ("gate_up_proj", "down_proj") for expert in layout.real]
        assert sorted(status.matrices) == sorted(status.errors) == sorted(names)
        assert all(said.startswith("gptq") for said in status.matrices.values())
        assert all(0 < error < 0.1 for error in status.errors.values())
        assert status.tokens.keys() >= set(layout.real)
        attention = result.modules[f"model.layers.{number}.self_attn"]
        assert attention.status == "int4, group 16, asymmetric"
        assert list(attention.matrices) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    alone = compress(before, GPTQ(group_size=16))
    for number, layout in enumerate(shape.layouts):
        tokens = alone.modules[f"model.layers.{number}.mlp.experts"].tokens
        assert list(tokens) == list(layout.real)
        if number == 0:  # later layers are routed by the compressed ones before them
            assert tokens == {expert: int(counts[number, expert]) for expert in layout.real}
    summary = result.summary()
    assert summary["matrices"]["model.layers.0.self_attn"]["o_proj"] == "gptq"
    assert summary["tokens"]["model.layers.0.mlp.experts"]
    assert summary["errors"]["model.layers.1.mlp.experts"]


def test_experts_that_go_later_have_no_status() -> None:
    result = compress(tiny_mixtral(), [RTN(group_size=16), ml.ExpertDrop(keep=4), ml.BlockDrop(count=1)])
    layouts = {layout.layer: layout for layout in result.shape_after.layouts}
    for number in range(LAYERS):
        if number not in layouts:
            assert not result.modules[f"model.layers.{number}"].matrices
            continue
        status = result.modules[f"model.layers.{number}.mlp.experts"]
        assert {key.partition(".")[0] for key in status.matrices} == set(map(str, layouts[number].real))


def test_a_method_that_would_change_nothing_is_refused_before_anything_runs() -> None:
    shape = architecture_of(tiny_mixtral()).shape(tiny_mixtral())
    with pytest.raises(ValueError, match=r"stored as 2:4 already"):
        check_methods(shape, [Magnitude(pattern="2:4"), Wanda(pattern="2:4")])
    check_methods(shape, [Magnitude(sparsity=0.25), Wanda(sparsity=0.5), GPTQ(group_size=16)])


@pytest.mark.parametrize("original", [False, True])
def test_the_memory_stated_covers_what_is_kept(original: bool) -> None:
    model = tiny_mixtral()
    shape = architecture_of(model).shape(model)
    tokens = sum(batch["input_ids"].numel() for batch in BATCHES)
    kept = layer_input_bytes(tokens, HIDDEN, 2, 4, ahead=original)
    method = Rounding(propagate="original" if original else "compressed")
    assert calibration_bytes(shape, [method], 18, tokens) == kept + (6 + SOLVING) * 48 * 48 * 4
    assert calibration_bytes(shape, [method], 18, tokens, max_moment_bytes=60_000) == kept + 60_000
    assert calibration_bytes(shape, [method], 18, tokens, max_moment_bytes=5) == kept + (1 + SOLVING) * 48 * 48 * 4
    assert calibration_bytes(shape, [RTN(group_size=16)], 18, tokens) == 0
    diagonal = Rounding("diagonal")
    assert calibration_bytes(shape, [RTN(group_size=16), ml.Novices(keep=3)], 18, tokens) > 0
    assert calibration_bytes(shape, [diagonal], 54) == layer_input_bytes(54, HIDDEN, 2, 4) + 6 * 48 * 4


MADE: dict[str, list[Any]] = {
    "int4": [RTN(group_size=16)],
    "2:4, attention too": [Magnitude(pattern="2:4", targets="experts+attention")],
    "masked": [Magnitude(sparsity=0.5)],
    "masked, then int8": [Magnitude(sparsity=0.5), RTN(bits=8, group_size="channel", targets="experts+attention")],
}


@pytest.mark.parametrize("name", MADE)
def test_the_memory_stated_covers_what_is_made_beside_the_weights(name: str) -> None:
    """Counted in the stacks that there are after each method: none of them goes before the last method is done."""
    model = tiny_mixtral()
    stated = made_bytes(architecture_of(model).shape(model), MADE[name])
    found = 0
    for method in MADE[name]:
        compress(model, method, None)
        stacks = [module for module in model.modules() if isinstance(module, WeightStack)]
        tensors = [tensor for stack in stacks for tensor in (*stack.parameters(), *stack.buffers())]
        found += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    routers = len(MADE[name]) * LAYERS * 6 * HIDDEN * 4
    assert stated == found + routers
    if name == "masked":
        assert stated > sum(layer.mlp.experts.storage.down_proj.num_weights * 12 for layer in model.model.layers)
