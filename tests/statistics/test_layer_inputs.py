"""Inputs and moments of one layer after another, against hooks on the untouched eager model and loops over tokens."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from moe_kernels.cpu_dense import cpu_grouped_linear
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.statistics.layer_inputs import LayerInputs
from moe_lightning.statistics.moment_memory import layer_input_bytes, moment_bytes, slot_groups
from tests.layer_reference import CHANNELS, EXPERTS, HIDDEN, Seen, close, expected, moments, padded
from tests.models import random_batches, tiny_mixtral
from tests.reference import untouched

LAYERS = 3
ALL = list(range(EXPERTS))


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


def sequences() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=draw) for length in (1, 9, 4, 12, 7, 2)]


def alone() -> list[dict[str, Tensor]]:
    return [{"input_ids": sequence[None]} for sequence in sequences()]


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("gated", [False, True])
def test_moments_of_experts_equal_loops_over_tokens(model: Any, kind: Any, gated: bool) -> None:
    batches = random_batches(3, 2, 7)
    seen = Seen(model, batches)
    inputs = LayerInputs(model, batches)
    for number in range(LAYERS):
        experts = model.model.layers[number].mlp.experts
        index = seen[number, "experts.index"]
        assert inputs.expert_tokens().tolist() == [int((index == expert).sum()) for expert in ALL]
        for name, gate_up in (("gate_up_proj", None), ("down_proj", experts.gate_up_proj)):
            want = expected(seen, number, gate_up, kind, gated)
            close(inputs.expert_moments(name, kind, ALL, gated=gated), want)
            close(inputs.expert_moments(name, kind, [4, 1], gated=gated), want[[4, 1]])
        inputs.advance()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_moments_of_attention_equal_loops_over_tokens(model: Any, kind: Any) -> None:
    batches = random_batches(3, 2, 7)
    seen = Seen(model, batches)
    inputs = LayerInputs(model, batches)
    assert inputs.all_tokens().tolist() == [42]
    for number in range(LAYERS):
        for name, like in (("q_proj", "q_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("o_proj", "o_proj")):
            rows = seen[number, like]
            close(inputs.attention_moments(name, kind), moments(rows, rows.shape[1], kind)[None])
        inputs.advance()


SPLITS = {
    "one by one": alone(),
    "all together": [padded(sequences(), 12)],
    "padded further": [padded(sequences(), 15, filler=9)],
    "two and four": [padded(sequences()[:2], 9), padded(sequences()[2:], 14)],
    "with a batch of padding": [padded(sequences(), 12), padded([torch.ones(0, dtype=torch.int64)], 5)],
}


@pytest.mark.parametrize("batches", SPLITS.values(), ids=SPLITS)
def test_neither_padding_nor_the_split_into_batches_matters(model: Any, batches: Any) -> None:
    seen = Seen(model, alone())
    inputs = LayerInputs(model, batches)
    for number in range(LAYERS):
        index = seen[number, "experts.index"]
        assert inputs.expert_tokens().tolist() == [int((index == expert).sum()) for expert in ALL]
        close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, number, None, "full", False))
        gate_up = model.model.layers[number].mlp.experts.gate_up_proj
        close(
            inputs.expert_moments("down_proj", "diagonal", ALL, gated=True),
            expected(seen, number, gate_up, "diagonal", True),
        )
        rows = seen[number, "o_proj"]
        close(inputs.attention_moments("o_proj", "full"), moments(rows, HIDDEN, "full")[None])
        inputs.advance()
    assert inputs.num_tokens == inputs.all_tokens().item() == sum(map(len, sequences()))


def test_padding_on_the_left() -> None:
    # Eager attention makes NaN of it in float64: a row without any key is minus infinity everywhere.
    live = tiny_mixtral()
    batches = [padded(sequences(), 15, left=True)]
    seen = Seen(live, batches)
    inputs = LayerInputs(live, batches)
    inputs.advance()
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 1, None, "full", False), 1e-5)


def test_a_layer_in_the_middle_can_be_the_first(model: Any) -> None:
    batches = random_batches(2, 2, 7)
    seen = Seen(model, batches)
    inputs = LayerInputs(model, batches, place=2)
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 2, None, "full", False))


def scaled(model: Any, layer: int, part: str) -> Any:
    """Return a copy with the weights of one layer changed."""
    other = copy.deepcopy(model)
    block = other.model.layers[layer]
    with torch.no_grad():
        for parameter in (block.self_attn if part == "attention" else block.mlp.experts).parameters():
            parameter *= 0.7
    return other


@pytest.mark.parametrize("part", ["attention", "experts"])
def test_later_layers_see_the_layer_as_it_is_when_left(model: Any, part: str) -> None:
    batches = random_batches(2, 2, 7)
    live = copy.deepcopy(model)
    inputs = LayerInputs(live, batches)
    inputs.advance()
    changed = scaled(model, 1, part)
    live.load_state_dict(changed.state_dict())
    inputs.advance()
    seen = Seen(changed, batches)
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 2, None, "full", False))


@pytest.mark.parametrize("part", ["attention", "experts"])
def test_running_ahead_shows_later_layers_the_original(model: Any, part: str) -> None:
    batches = random_batches(2, 2, 7)
    live = copy.deepcopy(model)
    inputs = LayerInputs(live, batches)
    inputs.advance()
    inputs.expert_inputs()
    inputs.run_ahead()
    live.load_state_dict(scaled(model, 1, part).state_dict())
    seen = Seen(model, batches)
    # The experts of the layer itself too, whose attention was changed.
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 1, None, "full", False))
    inputs.advance()
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 2, None, "full", False))


def test_weights_that_stand_in_make_the_inputs_of_later_matrices(model: Any) -> None:
    batches = random_batches(2, 2, 7)
    inputs = LayerInputs(model, batches)
    inputs.advance()
    gate_up = model.model.layers[1].mlp.experts.gate_up_proj.detach() * 0.5
    inputs.replace("gate_up_proj", gate_up.float())  # a method may work in another type
    seen = Seen(model, batches)
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 1, None, "full", False))
    want = expected(seen, 1, gate_up.float(), "full", False)
    close(inputs.expert_moments("down_proj", "full", ALL), want)
    inputs.changed()
    own = model.model.layers[1].mlp.experts.gate_up_proj
    close(inputs.expert_moments("down_proj", "full", ALL), expected(seen, 1, own, "full", False))


def test_attention_that_stands_in_makes_the_input_of_its_output_matrix(model: Any) -> None:
    batches = [padded(sequences(), 12)]
    inputs = LayerInputs(model, batches)
    changed = copy.deepcopy(model)
    for name in ("q_proj", "v_proj"):
        weight = getattr(changed.model.layers[0].self_attn, name).weight
        weight.data *= 0.6
        inputs.replace(name, weight.data[None])
    rows = Seen(changed, batches)[0, "o_proj"]
    close(inputs.attention_moments("o_proj", "full"), moments(rows, HIDDEN, "full")[None])
    rows = Seen(model, batches)[0, "q_proj"]
    close(inputs.attention_moments("k_proj", "full"), moments(rows, HIDDEN, "full")[None])
    # The next layer is another one.
    inputs.advance()
    rows = Seen(model, batches)[1, "o_proj"]
    close(inputs.attention_moments("o_proj", "full"), moments(rows, HIDDEN, "full")[None])


def test_experts_that_share_weights_count_a_token_once_and_add_its_routing_weights(model: Any) -> None:
    batches = random_batches(3, 2, 7)
    groups = ((0, 2, 5), (1,), (3, 4))
    merged = copy.deepcopy(model)
    plan = ml.CompressionPlan((ml.MergeExperts(0, groups),))
    ml.compress(merged, batches, plan=plan, progress=False)
    seen = Seen(model, batches)  # the first layer's inputs are the same
    hidden, index, weight = (seen[0, f"experts{name}"] for name in ("", ".index", ".weight"))
    twice = sum(len(set(chosen) & set(group)) == 2 for chosen in index for group in groups)
    assert twice > 0
    inputs = LayerInputs(merged, batches)
    for gated in (False, True):
        want, counts = [], []
        for group in groups:
            rows = []
            for x, chosen, gates in zip(hidden, index, weight, strict=True):
                gate = sum(g for expert, g in zip(chosen, gates, strict=True) if expert in group)
                if set(chosen) & set(group):
                    rows.append(x * gate if gated else x)
            want.append(moments(rows, HIDDEN, "full"))
            counts.append(len(rows))
        close(inputs.expert_moments("gate_up_proj", "full", [0, 1, 2], gated=gated), np.stack(want))
        assert inputs.expert_tokens().tolist() == counts


def test_novices_absent_and_deleted_experts_have_no_slot(model: Any) -> None:
    batches = random_batches(3, 2, 7)
    plan = ml.CompressionPlan((ml.NoviceExperts(0, (1, 4)), ml.KeepExperts(1, (0, 1, 5), router="keep")))
    live = copy.deepcopy(model)
    ml.compress(live, batches, plan=plan, progress=False)
    seen = Seen(model, batches)
    inputs = LayerInputs(live, batches)
    want = expected(seen, 0, None, "full", False)
    close(inputs.expert_moments("gate_up_proj", "full", [0, 1, 2, 3]), want[[0, 2, 3, 5]])
    inputs.advance()
    assert inputs.expert_tokens().shape == (3,)
    seen = Seen(live, batches)
    index = seen[1, "experts.index"]
    assert inputs.expert_tokens().tolist() == [int((index == expert).sum()) for expert in (0, 1, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_fp32_of_the_inputs_as_they_are(dtype: torch.dtype) -> None:
    model = tiny_mixtral(dtype=dtype)
    batches = random_batches(3, 2, 7)
    seen = Seen(model, batches)
    inputs = LayerInputs(model, batches)
    close(inputs.expert_moments("gate_up_proj", "full", ALL), expected(seen, 0, None, "full", False), 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = inputs.expert_moments("gate_up_proj", "full", ALL)
    close(got, expected(seen, 0, None, "full", False), 1e-5)
    rows = seen[0, "q_proj"]
    close(inputs.attention_moments("q_proj", "full"), moments(rows, HIDDEN, "full")[None], 1e-5)


def hooks(model: Any) -> list[str]:
    found = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return found + [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_the_model_is_left_as_it_was(model: Any) -> None:
    live = copy.deepcopy(model).train()
    live.model.layers[1].eval()
    before = {name: module.training for name, module in live.named_modules()}
    state = {name: value.clone() for name, value in live.state_dict().items()}

    def check() -> None:
        assert not hooks(live)
        assert {name: module.training for name, module in live.named_modules()} == before
        assert all(torch.equal(value, state[name]) for name, value in live.state_dict().items())
        assert all(parameter.grad is None for parameter in live.parameters())

    inputs = LayerInputs(live, random_batches(2, 2, 5))
    check()
    inputs.replace("q_proj", live.model.layers[0].self_attn.q_proj.weight[None])
    inputs.attention_moments("o_proj", "full")
    inputs.expert_moments("down_proj", "full", ALL)
    inputs.advance()
    check()
    assert not any(tensor.requires_grad for tensor in (inputs.expert_moments("down_proj", "full", ALL),))

    def broken() -> Any:
        yield random_batches(1, 2, 5)[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        LayerInputs(live, broken())
    check()
    with pytest.raises(ValueError, match="batch 0 has no 'input_ids'"):
        LayerInputs(live, [{"labels": torch.zeros(1, 2)}])
    check()

    def fail(_module: Any, _arguments: Any) -> None:
        raise ArithmeticError

    handle = live.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        inputs.advance()
    handle.remove()
    check()


def test_an_error_between_the_batches_leaves_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = copy.deepcopy(model).train()
    inputs = LayerInputs(live, random_batches(2, 2, 5))

    def fail(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lightning.statistics.layer_inputs._add", fail)
    inputs.replace("q_proj", live.model.layers[0].self_attn.q_proj.weight[None])
    # The error itself keeps every frame alive that it came through.
    for measure in (
        lambda: inputs.attention_moments("o_proj", "full"),
        lambda: inputs.expert_moments("gate_up_proj", "full", ALL),
    ):
        with pytest.raises(KeyboardInterrupt) as caught:
            measure()
        assert torch.is_grad_enabled() and not hooks(live) and caught
        assert all(module.training for module in live.modules())


def test_no_batches_and_no_tokens_are_errors(model: Any) -> None:
    with pytest.raises(ValueError, match="no calibration batches"):
        LayerInputs(model, [])
    with pytest.raises(ValueError, match="no token outside the padding"):
        LayerInputs(model, [padded([torch.ones(0, dtype=torch.int64)], 5)])


def test_inputs_that_are_not_finite_are_an_error(model: Any) -> None:
    live = copy.deepcopy(model)
    with torch.no_grad():
        live.model.layers[0].mlp.experts.down_proj[:] = torch.inf
    inputs = LayerInputs(live, random_batches(2, 2, 5))
    inputs.advance()
    with pytest.raises(ValueError, match=r"inputs of q_proj in decoder layer 1 are not finite.*overflow"):
        inputs.attention_moments("q_proj", "diagonal")


def test_an_expert_that_no_token_reaches_has_zeros(model: Any) -> None:
    inputs = LayerInputs(model, [{"input_ids": torch.tensor([[5]])}])
    tokens = inputs.expert_tokens()
    assert sorted(tokens.tolist()) == [0, 0, 0, 0, 1, 1]
    got = inputs.expert_moments("down_proj", "full", ALL)
    assert torch.equal(got.flatten(1).any(1), tokens > 0)


def test_the_memory_is_what_was_stated(model: Any) -> None:
    batches = [padded(sequences(), 12), *random_batches(2, 3, 12)]
    live = tiny_mixtral()
    tokens = 6 * 12 + 2 * 3 * 12
    inputs = LayerInputs(live, batches)
    assert inputs.kept_bytes == layer_input_bytes(tokens, HIDDEN, 2, 4, experts=False)
    inputs.run_ahead()
    assert inputs.kept_bytes == layer_input_bytes(tokens, HIDDEN, 2, 4, experts=False, ahead=True)
    inputs.advance()
    inputs.expert_inputs()
    # The claim counts padding as well.
    padding = tokens - inputs.num_tokens
    assert inputs.kept_bytes == layer_input_bytes(tokens, HIDDEN, 2, 4) - padding * (HIDDEN * 4 + 2 * 12)
    for name, size in (("gate_up_proj", HIDDEN), ("down_proj", CHANNELS)):
        for kind in ("diagonal", "full"):
            found = inputs.expert_moments(name, kind, [3])
            assert found.numel() * found.element_size() == moment_bytes(size, kind)
    # Masks and positions of batches of one shape are held once.
    options = [batch.options for batch in inputs._batches[1:]]
    assert options[0]["position_embeddings"][0] is options[1]["position_embeddings"][0]


def test_slots_in_groups_that_fit() -> None:
    assert slot_groups(5, 10, 20) == [[0, 1], [2, 3], [4]]
    assert slot_groups(5, 10, 1000) == [[0, 1, 2, 3, 4]]
    assert slot_groups(3, 10, 9) == [[0], [1], [2]]
    assert moment_bytes(4096, "full") == 2**26
    assert moment_bytes(4096, "diagonal", 2) == 2**14
    assert moment_bytes(8, "full", 8) == 512


def test_a_model_without_its_moe_sub_layers(model: Any) -> None:
    live = copy.deepcopy(model)
    batches = random_batches(2, 2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.compress(live, batches, plan=ml.CompressionPlan((ml.DropMoE(0), ml.DropBlock(1))), progress=False)
    inputs = LayerInputs(live, batches)
    inputs.attention_moments("q_proj", "full")
    inputs.advance()
    assert architecture_of(live).shape(live).blocks == (0, 2)
    seen = Seen(live, batches) if hasattr(live.model.layers[0].mlp, "experts") else None
    assert seen is None
    assert inputs.expert_tokens().sum() == 2 * 2 * 2 * 7


def test_layers_that_attend_in_different_ways_are_refused() -> None:
    model = tiny_mixtral()
    model.config.layer_types = ["sliding_attention"] * LAYERS
    LayerInputs(model, random_batches(1))
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"different ways \(full_attention, sliding_attention in config.*RTN"):
        LayerInputs(model, random_batches(1))


def test_products_on_a_cpu_that_emulates_bf16_take_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixtral(dtype=torch.bfloat16)
    inputs = LayerInputs(model, random_batches(3, 2, 7))
    want = inputs.expert_moments("down_proj", "full", ALL)
    taken: list[int] = []

    def tiles(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        taken.append(len(rows))
        return cpu_grouped_linear(rows, weight, ends)

    monkeypatch.setattr("moe_kernels.experts.cpu_product_pays", lambda rows, weight: rows.dtype == torch.bfloat16)
    monkeypatch.setattr("moe_kernels.experts.cpu_grouped_linear", tiles)
    torch.testing.assert_close(inputs.expert_moments("down_proj", "full", ALL), want, rtol=0.02, atol=0.05)
    assert taken and sum(taken) == int(inputs.expert_tokens().sum())
