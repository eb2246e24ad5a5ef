"""Statistics of one streaming pass against a two-pass float64 reference on the untouched eager model."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_lightning as ml
from moe_lightning.statistics import DEFAULT_GROUPS, GROUPS, merge_statistics
from tests.models import random_batches, tiny_mixtral
from tests.reference import assert_sums_equal, record, reference_sums, untouched

LENGTHS = (1, 2, 3, 5, 8, 1, 4)
STREAMED = {"routing", "outputs", "pairs", "channels", "layers", "blocks", "similarity"}
"""All groups that one pass measures."""


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, 64, (length,), generator=draw) for length in LENGTHS]


def alone(sequences: list[Tensor]) -> list[dict[str, Tensor]]:
    """One sequence a batch."""
    return [{"input_ids": sequence[None]} for sequence in sequences]


def padded(sequences: list[Tensor], left: bool = False, length: int | None = None) -> dict[str, Tensor]:
    """Put sequences into one batch; what stands in the padding is an ordinary token."""
    length = length or max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), 5)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def expected(model: Any, sequences: list[Tensor]) -> dict[str, np.ndarray]:
    return reference_sums(record(model, alone(sequences)))


def observe(model: Any, batches: Any, **options: Any) -> Any:
    return ml.collect(model, batches, progress=False, **options)


def test_every_sum_equals_the_two_pass_reference(model: Any, sequences: list[Tensor], expected: dict) -> None:
    statistics = observe(model, alone(sequences), needs=STREAMED)
    assert set(statistics.tensors) == set(expected) == {name for group in STREAMED for name in GROUPS[group]}
    assert_sums_equal(statistics.tensors, expected)
    assert statistics.groups == STREAMED


def test_what_is_measured_where_nothing_is_asked_for(model: Any, sequences: list[Tensor]) -> None:
    statistics = observe(model, alone(sequences))
    assert statistics.groups == DEFAULT_GROUPS == {"routing", "outputs", "layers", "blocks"}


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_any_top_k(top_k: int) -> None:
    model = untouched(num_experts_per_tok=top_k)
    batches = random_batches(2, 2, 6)
    assert_sums_equal(observe(model, batches, needs=STREAMED).tensors, reference_sums(record(model, batches)))


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(LENGTHS))), cuts=st.sets(st.integers(1, len(LENGTHS) - 1)), extra=st.integers(0, 3)
)
def test_any_split_into_right_padded_batches_in_any_order(
    model: Any, sequences: list[Tensor], expected: dict, order: list[int], cuts: set[int], extra: int
) -> None:
    ends = [0, *sorted(cuts), len(order)]
    batches = []
    for start, end in itertools.pairwise(ends):
        members = [sequences[number] for number in order[start:end]]
        batches.append(padded(members, length=max(map(len, members)) + extra))
    assert_sums_equal(observe(model, batches, needs=STREAMED).tensors, expected)


def test_left_padding_is_left_out(sequences: list[Tensor]) -> None:
    # transformers' eager attention gives NaN in float64 where a row is masked from its beginning.
    model = untouched(attn_implementation="sdpa")
    batches = [padded(sequences[:4], left=True), padded(sequences[4:], left=True)]
    assert_sums_equal(observe(model, batches, needs=STREAMED).tensors, reference_sums(record(model, batches)))


def test_what_stands_in_the_padding_does_not_matter(model: Any, sequences: list[Tensor]) -> None:
    batch = padded(sequences)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 40)}
    assert_sums_equal(observe(model, [other]).tensors, reference_sums(record(model, [batch])))


def test_batches_without_a_token_add_nothing(model: Any, sequences: list[Tensor], expected: dict) -> None:
    nothing = padded([sequences[2][:0], sequences[3][:0]], length=4)
    assert_sums_equal(observe(model, [nothing, *alone(sequences), nothing], needs=STREAMED).tensors, expected)


def test_masks_of_any_type(model: Any, sequences: list[Tensor], expected: dict) -> None:
    batch = padded(sequences)
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert_sums_equal(
            observe(model, [{**batch, "attention_mask": batch["attention_mask"].to(dtype)}]).tensors, expected
        )


def test_experts_with_no_and_with_one_token(model: Any) -> None:
    batches = [{"input_ids": torch.tensor([[9]])}]
    statistics = observe(model, batches, needs=STREAMED)
    assert_sums_equal(statistics.tensors, reference_sums(record(model, batches)))
    assert sorted(statistics["count"][0].tolist()) == [0, 0, 0, 0, 1, 1]
    assert not statistics["output_m2"].any()
    assert torch.isfinite(statistics.score("mone")).all()


@pytest.mark.parametrize("needs", [{"routing"}, {"outputs"}, ["routing", "outputs"], {"similarity"}, {"layers"}])
def test_only_what_is_needed_is_measured(model: Any, sequences: list[Tensor], expected: dict, needs: Any) -> None:
    statistics = observe(model, alone(sequences), needs=needs)
    assert set(statistics.tensors) == {name for group in needs for name in GROUPS[group]}
    assert_sums_equal(statistics.tensors, expected)
    if "outputs" not in needs:
        with pytest.raises(KeyError, match="outputs"):
            statistics["output_m2"]
        with pytest.raises(ValueError, match="outputs"):
            statistics.score("mone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_types_and_the_grouped_path_agree_up_to_their_rounding(dtype: torch.dtype) -> None:
    """What a low precision model does, summed in float64: the reference sees the same low precision outputs."""
    model, batches = tiny_mixtral(dtype=dtype, num_hidden_layers=1), random_batches(2, 2, 16)
    reference = untouched(dtype, num_hidden_layers=1)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    want = reference_sums(record(reference, batches))
    got = observe(model, batches).tensors
    assert_sums_equal({name: got[name] for name in ("tokens", "count", "coactivation")}, want, 0)
    loose = {name: tensor for name, tensor in got.items() if name not in ("output_gram", "output_mean")}
    assert_sums_equal(loose, want, tolerance * 3)


def test_a_mean_a_thousand_times_the_spread_does_not_cancel() -> None:
    model = untouched(num_hidden_layers=1)
    with torch.no_grad():
        # Nearly the same input for every token, so nearly the same output.
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding[:1] + 1e-3 * embedding)
    batches = random_batches(20, 1, 3)
    records = record(model, batches)
    want = reference_sums(records)
    mean, deviation = want["output_mean"], np.sqrt(want["output_m2"] / np.maximum(want["count"], 1)[..., None])
    seen = want["count"] > 10
    assert np.median(np.abs(mean[seen]) / deviation[seen]) > 300
    statistics = observe(model, batches)
    assert_sums_equal(statistics.tensors, want)
    # The residual is a difference of numbers a million times larger.
    layer = records[0]
    for expert in np.flatnonzero(seen[0]):
        g = layer.gate[layer.chosen[:, expert], expert][:, None]
        e = layer.output[layer.chosen[:, expert], expert]
        best = (g**2 * e).sum(0) / (g**2).sum()
        exact = (g**2 * (e - best) ** 2).sum() / len(layer.gate)
        assert float(statistics.score("residual")[0, expert]) == pytest.approx(exact, rel=1e-7)


def test_merged_parts_equal_the_whole(model: Any, sequences: list[Tensor], expected: dict) -> None:
    parts = [
        observe(model, alone(sequences[start : start + 2]), needs=STREAMED) for start in range(0, len(sequences), 2)
    ]
    before = copy.deepcopy(parts[0].tensors)
    for order in (parts, parts[::-1], iter(parts)):
        merged = merge_statistics(order)
        assert_sums_equal(merged.tensors, expected)
    for name, tensor in before.items():
        assert torch.equal(parts[0].tensors[name], tensor), f"{name} of a part was changed"
    assert merge_statistics(parts).info["batches"] == len(sequences)


def test_parts_that_do_not_belong_together_are_an_error(model: Any, sequences: list[Tensor]) -> None:
    part = observe(model, alone(sequences[:1]))
    with pytest.raises(ValueError, match="at least one"):
        merge_statistics([])
    with pytest.raises(ValueError, match="same"):
        merge_statistics([part, observe(model, alone(sequences[:1]), needs={"routing"})])
    with pytest.raises(ValueError, match="same"):
        merge_statistics([part, observe(untouched(num_hidden_layers=2), alone(sequences[:1]))])


def test_the_model_is_left_as_it_was(sequences: list[Tensor]) -> None:
    model = untouched()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[1].mlp.gate.train()
    wrapped = model.model.layers[0].mlp.experts
    original = wrapped.forward
    wrapped.forward = lambda *args: original(*args)  # as accelerate does
    own = wrapped.__dict__["forward"]
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    config, cls = model.config.to_dict(), type(model)
    state = torch.get_rng_state()
    observe(model, alone(sequences), needs=STREAMED | {"interventions"})
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert (model.config.to_dict(), type(model)) == (config, cls)
    assert wrapped.__dict__["forward"] is own
    assert_nothing_attached(model, wrapped)


def assert_nothing_attached(model: Any, *wrapped: Any) -> None:
    for module in model.modules():
        assert "forward" not in module.__dict__ or module in wrapped
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_exception_in_the_middle(sequences: list[Tensor]) -> None:
    model = untouched().train()

    def batches() -> Any:
        yield from alone(sequences[:2])
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        observe(model, batches(), needs=STREAMED)
    assert_nothing_attached(model)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    with pytest.raises(IndexError):
        observe(model, [{"input_ids": torch.tensor([[9, 64]])}])  # beyond the vocabulary
    assert_nothing_attached(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_gradient_mode(model: Any, sequences: list[Tensor], expected: dict, mode: Any) -> None:
    with mode():
        statistics = observe(model, alone(sequences), needs=STREAMED)
    assert_sums_equal(merge_statistics([statistics]).tensors, expected)
    assert not any(tensor.requires_grad for tensor in statistics.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", [None, ml.Novices(ratio=0.5), ml.ExpertDrop(keep=4)])
def test_the_output_during_observation_is_the_plain_output(dtype: torch.dtype, method: Any) -> None:
    # transformers' grouped product takes no float64.
    implementation = "eager" if dtype == torch.float64 else "grouped_mm"
    model, batches = tiny_mixtral(dtype=dtype, experts_implementation=implementation), random_batches(2, 2, 6)
    if method is not None:
        ml.compress(model, batches, method, progress=False)
    plain = [model.model(**batch).last_hidden_state for batch in batches]
    seen = []
    handle = model.model.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state))
    observe(model, batches, needs=STREAMED)
    handle.remove()
    for got, want in zip(seen, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol={torch.float64: 1e-12, torch.float32: 1e-5}[dtype])


def test_a_compressed_model_is_seen_with_the_numbers_of_the_original() -> None:
    """Deleted experts are NaN, novices are constants, all the rest as on the emulated untouched model."""
    model, batches = untouched(), random_batches(2, 2, 8)
    original = copy.deepcopy(model)
    plan = ml.CompressionPlan(
        (
            ml.KeepExperts(0, (0, 2, 4, 5)),
            ml.NoviceExperts(1, (1, 3)),
            ml.NoviceExperts(2, (0, 5)),
            ml.KeepExperts(2, (0, 1, 4, 5)),
        )
    )
    ml.compress(model, batches, plan=plan, progress=False)
    layers = model.model.layers
    constants = {
        (1, 1): layers[1].mlp.experts.novices[0],
        (1, 3): layers[1].mlp.experts.novices[1],
        (2, 0): layers[2].mlp.experts.novices[0],
        (2, 5): layers[2].mlp.experts.novices[1],
    }
    dropped = {0: (1, 3), 2: (2, 3)}
    want = reference_sums(record(original, batches, dropped, constants))
    gone = np.zeros((3, 6), bool)
    for layer, experts in dropped.items():
        gone[layer, list(experts)] = True
    statistics = observe(model, batches)
    m2 = statistics.tensors["output_m2"]
    for layer, expert in constants:
        count = float(statistics["count"][layer, expert])
        assert count > 1
        vector = constants[layer, expert].detach()
        torch.testing.assert_close(statistics["output_mean"][layer, expert], vector, rtol=1e-12, atol=0)
        assert float(m2[layer, expert].max()) < 1e-20
        m2[layer, expert] = 0
        want["output_m2"][layer, expert] = 0
        assert float(statistics["norm_sum"][layer, expert]) == pytest.approx(count * float(vector.norm()))
    assert_sums_equal(statistics.tensors, want, gone=gone)
    assert np.array_equal(np.isnan(statistics.score("mone").numpy()), gone)
    merged = merge_statistics([statistics, statistics])
    assert np.array_equal(np.isnan(merged["output_m2"][..., 0].numpy()), gone)


def test_bad_input(model: Any, sequences: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="no calibration batches"):
        observe(model, [])
    with pytest.raises(ValueError, match="input_ids"):
        observe(model, [{"tokens": sequences[0]}])
    with pytest.raises(ValueError, match=r"unknown statistics \['hessian'\]"):
        observe(model, [], needs={"hessian"})
    with pytest.raises(ValueError, match="padding"):
        observe(model, [padded([sequences[0][:0]], length=3)])
    with pytest.raises(ValueError, match="not a transformers model"):
        observe(torch.nn.Linear(2, 2), alone(sequences))


def test_a_model_that_overflows_is_an_error() -> None:
    model = untouched()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:] = torch.inf
    with pytest.raises(ValueError, match=r"not finite in layers \[1, 2\]"):
        observe(model, random_batches(1))
