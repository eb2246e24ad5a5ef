"""Predictions from statistics against the tensors themselves."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import DropMoE, KeepExperts, NoviceExperts
from moe_lightning.surgery import apply_plan
from moe_lightning.sweep.agreement import agreements, kendall_tau
from moe_lightning.sweep.what_if import constant_errors, flops_of, predictions
from moe_lightning.trimming import novice_values
from tests.method_settings import SETTINGS
from tests.models import random_batches, tiny_mixtral

LAYER, EXPERTS = 1, (0, 2, 5)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_mixtral()


@pytest.fixture(scope="module")
def statistics(model: Any) -> ml.Statistics:
    needs = {"routing", "outputs", "pairs"}
    return ml.collect(model, random_batches(), needs, progress=False)


@torch.no_grad()
def routed(model: Any) -> list[tuple[Tensor, list[tuple[int, float, Tensor]]]]:
    """Return for every token of the layer its output and (expert, gate, expert's output), by loops on the weights."""
    block = model.model.layers[LAYER].mlp
    inputs: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    for batch in random_batches():
        model(batch["input_ids"])
    handle.remove()
    found = []
    for hidden in torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double():
        scores = torch.softmax(block.gate.weight.double() @ hidden, 0)
        weight, index = scores.topk(2)
        weight = weight / weight.sum()
        experts = []
        for gate, expert in zip(weight.tolist(), index.tolist(), strict=True):
            up = block.experts.gate_up_proj[expert].double() @ hidden
            first, second = up.chunk(2)
            inner = torch.nn.functional.silu(first) * second
            experts.append((expert, gate, block.experts.down_proj[expert].double() @ inner))
        found.append((sum(gate * output for _, gate, output in experts), experts))
    return found


@pytest.mark.parametrize("novice", ["mean", "zero", "gate2_mean"])
def test_predicted_errors_equal_loops_over_tokens(model: Any, statistics: ml.Statistics, novice: str) -> None:
    tokens = routed(model)
    constants = dict(zip(EXPERTS, novice_values(novice, statistics, LAYER, EXPERTS), strict=True))
    alone = joint = output = 0.0
    for y, experts in tokens:
        change = torch.zeros_like(y)
        for expert, gate, value in experts:
            if expert in EXPERTS:
                difference = gate * (value - constants[expert])
                alone += float(difference.square().sum())
                change += difference
        joint += float(change.square().sum())
        output += float(y.square().sum())
    (found,) = predictions([NoviceExperts(LAYER, EXPERTS, novice)], statistics)
    assert found.error == pytest.approx(alone / len(tokens), rel=1e-4)
    assert found.joint_error == pytest.approx(joint / len(tokens), rel=1e-4)
    assert found.relative(found.error) == pytest.approx(alone / output, rel=1e-4)


def test_the_best_constant_is_never_beaten(statistics: ml.Statistics) -> None:
    best = novice_values("gate2_mean", statistics, LAYER, EXPERTS)
    least = constant_errors(statistics, LAYER, EXPERTS, best)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 3.0):
        other = best + scale * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert (constant_errors(statistics, LAYER, EXPERTS, other) >= least).all()


def test_deletion_is_told_as_zero_and_what_is_not_there_is_said(statistics: ml.Statistics) -> None:
    kept = tuple(expert for expert in range(6) if expert not in EXPERTS)
    zero, sliced, row_kept, gone = predictions(
        [
            NoviceExperts(LAYER, EXPERTS, "zero"),
            KeepExperts(LAYER, kept),
            KeepExperts(LAYER, kept, router="keep"),
            DropMoE(LAYER),
        ],
        statistics,
    )
    assert zero.error == sliced.error == row_kept.error
    assert "approximate" in sliced.note
    assert not row_kept.note
    assert gone.relative(gone.error) == 1.0
    little = dataclasses.replace(statistics, tensors={"tokens": statistics["tokens"]})
    assert all(item.error is None and item.note for item in predictions([NoviceExperts(LAYER, (0,))], little))
    (low_rank,) = predictions([NoviceExperts(LAYER, EXPERTS, "low_rank", (2, 2, 2))], statistics)
    assert low_rank.error is None
    assert low_rank.note == "low-rank fit not in the file"


def test_low_rank_errors_come_from_the_file(model: Any) -> None:
    statistics = ml.collect(model, random_batches(8), {"routing", "outputs", "low_rank"}, progress=False)
    (found,) = predictions([NoviceExperts(LAYER, EXPERTS, "low_rank", (1, 2, 1))], statistics)
    curve = statistics["low_rank_error"][LAYER]
    assert found.error == pytest.approx(float(curve[0, 1] + curve[2, 2] + curve[5, 1]))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_flops_of_a_shape_are_those_of_the_tensors(name: str) -> None:
    model = tiny_mixtral()
    result = ml.compress(model, random_batches(4), SETTINGS[name].make(), progress=False)
    assert flops_of(result.shape_before, 64) == ml.measure(tiny_mixtral(), 64).flops
    assert flops_of(result.shape_after, 64) == ml.measure(model, 64).flops


def test_flops_do_not_count_embeddings_twice() -> None:
    model = tiny_mixtral(tie_word_embeddings=True)
    assert flops_of(architecture_of(model).shape(model), 8) == ml.measure(model, 8).flops
    apply_plan(model, ml.CompressionPlan((DropMoE(1),)))
    assert flops_of(architecture_of(model).shape(model), 8) == ml.measure(model, 8).flops


def test_kendall_equals_scipy_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 16):
        one = torch.randint(0, 4, (size,), generator=generator).double()
        other = torch.randint(0, 4, (size,), generator=generator).double()
        expected = float(stats.kendalltau(one.numpy(), other.numpy()).statistic)
        assert kendall_tau(one, other) == pytest.approx(expected, nan_ok=True)
        assert kendall_tau(one, -one) == pytest.approx(-1.0, nan_ok=True)


def test_agreement_counts_who_stays() -> None:
    scores = {
        "a": torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]),
        "b": torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]),
        "c": torch.tensor([[1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]]),
    }
    found = agreements(scores, [(0, 1, 2, 3), (0, 1, 2, 3)], [2, 4])
    # The second layer keeps everyone, so only the first counts for the overlap.
    assert found["a", "b"] == (0.0, 0.0)
    assert found["a", "c"] == (pytest.approx(1 / 3), 0.5)
    assert set(found) == set(itertools.combinations(scores, 2))
