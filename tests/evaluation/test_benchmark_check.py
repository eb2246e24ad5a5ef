"""Nothing is timed that was not compared, and what is wrong does not pass the comparison."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lightning.evaluation import benchmark_check
from moe_lightning.evaluation.benchmark import _seconds
from moe_lightning.evaluation.benchmark_check import CheckedModel, Mismatch, checked
from moe_lightning.evaluation.benchmark_reference import Reference
from moe_lightning.experts import CompressedExperts
from moe_lightning.experts.kernel_path import use_kernels
from moe_lightning.plan import DropBlock, DropMoE, KeepChannels, KeepExperts, NoviceExperts, Quantize, Sparsify
from tests.lora import adapted_mixtral
from tests.models import tiny_mixtral
from tests.packed import apply_filled, everywhere

STEPS = 5
QUANTIZED = everywhere(Quantize(0, group_size=16))
COMPRESSED: dict[str, Callable[[], list[Any]]] = {
    "novices, int4, a dropped block": lambda: [
        *everywhere(NoviceExperts(0, (1, 4), "mean", (0, 3))),
        *QUANTIZED,
        DropBlock(1),
    ],
    "fewer experts, attention of integers, a layer without MoE": lambda: [
        KeepExperts(0, (0, 2, 5)),
        KeepExperts(2, (1, 3), router="keep"),
        DropMoE(1),
        Quantize(0, "attention", bits=8, group_size=16),
    ],
    "channels and zeros": lambda: [
        *everywhere(KeepChannels(0, 32)),
        Sparsify(0, pattern="2:4"),
        Sparsify(2, sparsity=0.3),
    ],
}


def tokens(batch: int = 3, length: int = 24) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def compressed(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_mixtral(dtype=dtype)
    for edit in COMPRESSED[name]():
        apply_filled(model, [edit])
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, CompressedExperts):
            for values in (module.novices, module.novice_in, module.novice_out, module.storage.bias):
                if values is not None:
                    values.data = torch.randn(values.shape, generator=generator).to(dtype) / 3
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moe_kernels"])
def test_transformers_implementations_pass(dtype: torch.dtype, implementation: str) -> None:
    if (dtype, implementation) == (torch.float64, "grouped_mm"):
        pytest.skip("torch has no grouped product in float64")
    model = tiny_mixtral(dtype=dtype, experts_implementation=implementation)
    ids = tokens()
    found = checked(model, ids, STEPS)
    most = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert all(0 < comparison.relative_error < most for comparison in found.comparisons.values())
    assert found.comparisons["prefill"].tokens == 2 * (24 - STEPS)  # the first sequence and the last one
    assert found.comparisons["decode"].tokens == 2 * 24
    assert all(comparison.agreement > 0.9 for comparison in found.comparisons.values())


@pytest.mark.parametrize("sliding_window", [None, 6])
def test_the_reference_says_what_transformers_says(sliding_window: int | None) -> None:
    """All layers one after the other, in float64, against the eager model."""
    model = tiny_mixtral(dtype=torch.float64, experts_implementation="eager", sliding_window=sliding_window)
    ids, reference = tokens(), Reference(model)
    with torch.no_grad():
        hidden = reference.embedded(ids)
        for place in range(reference.num_layers):
            hidden = reference.layer(place, hidden, 0.0).output
        # The router computes in float32.
        torch.testing.assert_close(reference.logits(hidden), model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_models_pass(name: str, dtype: torch.dtype) -> None:
    found = checked(compressed(name, dtype), tokens(), STEPS)
    most = 3e-6 if dtype == torch.float32 else 3e-2
    assert all(0 < comparison.relative_error < most for comparison in found.comparisons.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels were not imported for the interpreter")
def test_the_kernels_pass() -> None:
    """Also where a layer runs as one operation: what is watched does not change its way."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_mixtral(num_hidden_layers=1, intermediate_size=32)
    apply_filled(model, [NoviceExperts(0, (1, 4))])
    with use_kernels("always"):
        assert checked(model, tokens(1, 6), 2).comparisons["decode"].relative_error < 1e-5


@pytest.mark.parametrize("base", ["dense", "int4", "2:4", "int4 of 2:4"])
def test_low_rank_terms_pass(base: str) -> None:
    assert checked(adapted_mixtral(base), tokens(), STEPS).comparisons["decode"].relative_error < 3e-6


def wrong_experts(model: Any, factor: float = 1.02) -> None:
    experts = model.model.layers[1].mlp.experts
    forward = experts.forward
    experts.forward = lambda *arguments: factor * forward(*arguments)


def wrong_novice(model: Any) -> None:
    """The layer computes with other novices than those that it holds."""
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward

    def other(*arguments: Tensor) -> Tensor:
        held, experts.novices = experts.novices, nn.Parameter(experts.novices.flip(0))
        result = forward(*arguments)
        experts.novices = held
        return result

    experts.forward = other


def wrong_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _m, _a, output: output.roll(1, -1))


def wrong_embedding(model: Any) -> None:
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: 1.1 * output)


def wrong_last_sequence(model: Any) -> None:
    def forward(_module: Any, _arguments: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[-1, 3] *= 1.1  # a single token
        return output

    model.model.layers[2].register_forward_hook(forward)


@pytest.mark.parametrize(
    ("break_it", "where"),
    [
        (wrong_experts, r"prefill is wrong: layer 1: off by 1\..e-02"),
        (wrong_head, "prefill is wrong: the logits: off"),
        (wrong_embedding, "prefill is wrong: what enters layer 0: off by 1.0e-01"),
        (wrong_last_sequence, "layer 2: off by .* (largest of 38 tokens)"),
    ],
)
def test_what_is_wrong_does_not_pass(break_it: Callable[[Any], None], where: str) -> None:
    model = tiny_mixtral()
    break_it(model)
    with pytest.raises(Mismatch, match=where.replace("(", r"\(").replace(")", r"\)") if "largest" in where else where):
        checked(model, tokens(), STEPS)


def test_wrong_novices_do_not_pass() -> None:
    model = compressed("novices, int4, a dropped block")
    wrong_novice(model)
    with pytest.raises(Mismatch, match="prefill is wrong: layer 0"):
        checked(model, tokens(), STEPS)


def test_a_factor_that_bf16_does_not_hide() -> None:
    model = tiny_mixtral(dtype=torch.bfloat16)
    wrong_experts(model, 1.08)
    with pytest.raises(Mismatch, match="prefill is wrong: layer 1"):
        checked(model, tokens(), STEPS)


def test_decoding_that_is_wrong_alone_does_not_pass() -> None:
    """A dropped block without new numbers for the cache: two layers would share one."""
    model = compressed("novices, int4, a dropped block")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(Mismatch, match="decode is wrong: layer 0: off"):
        checked(model, tokens(), STEPS)


def test_a_cache_that_forgets_does_not_pass() -> None:
    model = tiny_mixtral()

    def one_place_too_early(_module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        if options.get("use_cache") and options["past_key_values"] is not None:
            length = options["past_key_values"].get_seq_length()
            options["position_ids"] = torch.full_like(options["input_ids"], length - 1)
        return arguments, options

    model.register_forward_pre_hook(one_place_too_early, with_kwargs=True)
    with pytest.raises(Mismatch, match="decode is wrong"):
        checked(model, tokens(), STEPS)


def test_not_a_number_does_not_pass() -> None:
    model = tiny_mixtral()
    model.model.layers[0].register_forward_hook(lambda _m, _a, output: output * torch.nan)
    with pytest.raises(Mismatch, match="layer 0: off by inf"):
        checked(model, tokens(), STEPS)


def test_a_layer_that_does_nothing_does_not_pass() -> None:
    model = tiny_mixtral()
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(Mismatch, match="layer 1: off by"):
        checked(model, tokens(), STEPS)


@pytest.mark.parametrize("equally_good", [True, False])
@pytest.mark.parametrize("taken", [[0, 2], [2, 1]])
def test_experts_that_are_equally_good(equally_good: bool, taken: list[int]) -> None:
    """A router that takes another expert where both are equally good to a hair is right; elsewhere it is wrong."""
    model = tiny_mixtral()
    router = model.model.layers[1].mlp.gate
    router.weight.data[1:3] = router.weight.data[0] * (1 + 1e-6)
    changed = []

    def another(_module: Any, _arguments: Any, output: Any) -> Any:
        ranked = output[0].softmax(-1).sort(-1, descending=True)
        near = ranked.values[:, 0] - ranked.values[:, 2] < 1e-5
        changed.append(int(near.sum()))
        weight, index = ranked.values[:, :2].clone(), ranked.indices[:, :2].clone()
        chosen = (near == equally_good).nonzero()
        weight[chosen, [0, 1]], index[chosen, [0, 1]] = ranked.values[chosen, taken], ranked.indices[chosen, taken]
        return output[0], weight / weight.sum(-1, keepdim=True), index

    router.register_forward_hook(another)
    if equally_good:
        assert checked(model, tokens(), STEPS).comparisons["prefill"].relative_error < 1e-5
        assert sum(changed) > 10
    else:
        with pytest.raises(Mismatch, match="layer 1: off"):
            checked(model, tokens(), STEPS)


def test_only_the_comparison_makes_a_checked_model() -> None:
    model = tiny_mixtral()
    with pytest.raises(TypeError, match="timed only after its output was compared"):
        CheckedModel(object(), model, {}, {})
    with pytest.raises(TypeError, match="MixtralForCausalLM was not compared"):
        _seconds(model, "prefill")
    assert _seconds(checked(model, tokens(), STEPS), "decode") > 0


def test_what_is_timed_is_what_was_compared() -> None:
    """The same tokens, and the implementation of then, whatever somebody chose since."""
    model = tiny_mixtral(experts_implementation="eager")
    ids = tokens()
    found = checked(model, ids, STEPS)
    model.set_experts_implementation("grouped_mm")
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _m, _a, options: seen.append(options["input_ids"]), with_kwargs=True)
    _seconds(found, "decode")
    assert model.config._experts_implementation == "eager"
    assert torch.equal(torch.cat(seen, 1), ids)


def test_tokens_that_do_not_do() -> None:
    with pytest.raises(ValueError, match="5 tokens do not hold a context and 5 steps"):
        checked(tiny_mixtral(), tokens(2, 5), 5)
    assert benchmark_check.TOLERANCES.keys() == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
