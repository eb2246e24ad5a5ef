"""Expert Drop and novices: who goes, what the vectors are, and bad input. What the model computes: test_methods.py."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.statistics import Statistics
from moe_lightning.trimming import novice_values
from tests.models import random_batches, tiny_mixtral
from tests.reference import LayerRecord, record, untouched

BATCHES = random_batches(3, 2, 11)


def compress(model: Any, methods: Any = None, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in random_batches(2, 2, 9, seed=5)])


def novices_of(model: Any) -> dict[tuple[int, int], Tensor]:
    """Return the constants of a compressed model by (layer, expert)."""
    shape = architecture_of(model).shape(model)
    return {
        (layout.layer, expert): model.model.layers[layout.layer].mlp.experts.novices[number].detach()
        for layout in shape.layouts
        for number, expert in enumerate(layout.novices)
    }


@pytest.mark.parametrize(
    "method", [ml.Novices(ratio=0.0), ml.ExpertDrop(ratio=0.0), ml.Novices(keep=6), ml.ExpertDrop(keep=6)]
)
def test_drop_nothing(method: Any) -> None:
    model = tiny_mixtral()
    before, cls, config = logits(model), type(model), model.config.to_dict()
    result = compress(model, method)
    assert torch.equal(logits(model), before)
    assert (result.touched, result.claimed, result.modules) == (0, 0, {})
    assert type(model) is cls and model.config.to_dict() == config
    assert not result.plan


def test_the_survivors_are_the_original_tensors() -> None:
    model = tiny_mixtral()
    original = copy.deepcopy(model)
    result = compress(model, [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=4, criterion="frequency")])
    for layer, old, layout in zip(model.model.layers, original.model.layers, result.shape_after.layouts, strict=True):
        assert torch.equal(layer.mlp.gate.weight, old.mlp.gate.weight[list(layout.router)])
        assert torch.equal(layer.mlp.experts.storage.gate_up_proj, old.mlp.experts.gate_up_proj[list(layout.real)])
        assert torch.equal(layer.mlp.experts.storage.down_proj, old.mlp.experts.down_proj[list(layout.real)])


@pytest.mark.parametrize("second", [ml.Novices(keep=2, novice="zero"), ml.ExpertDrop(keep=5, criterion="frequency")])
def test_old_novices_keep_their_vectors(second: Any) -> None:
    """New novices stand before and between them, or some of them are deleted."""
    model = untouched()
    compress(model, ml.Novices(keep=4, novice="gate2_mean"))
    before = novices_of(model)
    compress(model, second)
    after = novices_of(model)
    assert len({tuple(vector.tolist()) for vector in before.values()}) == len(before) == 6
    survivors = before.keys() & after.keys()
    assert len(survivors) > 1 and before.keys() != after.keys()
    for name, vector in after.items():
        assert torch.equal(vector, before.get(name, torch.zeros_like(vector))), name


# Which experts go, against a ranking done here.


def reference_score(criterion: str, layers: list[LayerRecord]) -> np.ndarray:
    """Score experts by formulas that need no model: two are enough to see that the option is heard."""
    score = {
        "frequency": lambda layer: layer.chosen.mean(0),
        "soft_routing": lambda layer: layer.probability.mean(0),
    }[criterion]
    return np.stack([score(layer) for layer in layers])


@pytest.mark.parametrize("criterion", ["frequency", "soft_routing"])
@pytest.mark.parametrize("kind", [ml.Novices, ml.ExpertDrop])
def test_the_lowest_of_each_layer_go(kind: Any, criterion: str) -> None:
    model = untouched()
    score = reference_score(criterion, record(copy.deepcopy(model), BATCHES))
    result = compress(model, kind(ratio=0.5, criterion=criterion))
    for row, layout in enumerate(result.shape_after.layouts):
        ranked = sorted(range(6), key=lambda expert: (round(score[row, expert], 12), expert))
        assert layout.real == tuple(sorted(ranked[3:]))


@pytest.mark.parametrize("kind", [ml.Novices, ml.ExpertDrop])
def test_the_lowest_of_all_layers_go_under_global(kind: Any) -> None:
    model = untouched()
    score = reference_score("soft_routing", record(copy.deepcopy(model), BATCHES))
    result = compress(model, kind(keep=3.5, criterion="soft_routing", scope="global"))
    floor = 2 if kind is ml.ExpertDrop else 0
    left, gone = [6] * 3, set()
    for _, row, expert in sorted((score[row, expert], row, expert) for row in range(3) for expert in range(6)):
        if len(gone) < 8 and left[row] > floor:  # round((6 - 3.5) * 3) with the half up
            gone.add((row, expert))
            left[row] -= 1
    kept = [tuple(e for e in range(6) if (row, e) not in gone) for row in range(3)]
    assert [layout.real for layout in result.shape_after.layouts] == kept
    assert len({len(stay) for stay in kept}) > 1, "the layers do not differ: the test shows nothing"


def test_random_follows_its_seed() -> None:
    def plan(seed: int) -> Any:
        return compress(tiny_mixtral(), ml.Novices(ratio=0.5, criterion="random", seed=seed)).plan

    assert plan(3) == plan(3) != plan(4)


def test_expert_drop_leaves_every_layer_the_experts_that_the_router_picks() -> None:
    model = tiny_mixtral()
    result = compress(model, ml.ExpertDrop(keep=2.34, scope="global", criterion="mone"))
    counts = [len(layout.router) for layout in result.shape_after.layouts]
    assert min(counts) >= 2 and sum(counts) == 7


# Novices' vectors.


@pytest.mark.parametrize("kind", ["mean", "gate2_mean", "zero"])
def test_vectors_equal_the_formulas(kind: str) -> None:
    model = untouched()
    layers = record(copy.deepcopy(model), BATCHES)
    compress(model, ml.Novices(keep=0, novice=kind))
    for (number, expert), vector in novices_of(model).items():
        layer = layers[number]
        members = layer.chosen[:, expert]
        outputs, g2 = layer.output[members, expert], layer.gate[members, expert] ** 2
        expected = {
            "mean": lambda outputs=outputs: outputs.mean(0),
            "gate2_mean": lambda outputs=outputs, g2=g2: (g2[:, None] * outputs).sum(0) / g2.sum(),
            "zero": lambda outputs=outputs: np.zeros(outputs.shape[1]),
        }[kind]()
        np.testing.assert_allclose(vector.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def observed() -> tuple[Statistics, list[LayerRecord]]:
    model = untouched()
    return ml.collect(model, BATCHES, progress=False), record(model, BATCHES)


@settings(max_examples=60, deadline=None)
@given(layer=st.integers(0, 2), expert=st.integers(0, 5), size=st.floats(1e-4, 3), seed=st.integers(0, 10_000))
def test_no_other_constant_has_a_smaller_error(
    observed: tuple[Statistics, list[LayerRecord]], layer: int, expert: int, size: float, seed: int
) -> None:
    """``R_i <= E[g^2 ||E - v||^2 I]`` for every v, and equal at ``gate2_mean``."""
    statistics, layers = observed
    seen = layers[layer]
    members = seen.chosen[:, expert]
    outputs, g = seen.output[members, expert], seen.gate[members, expert]

    def error(vector: np.ndarray) -> float:
        return float((g**2 * ((outputs - vector) ** 2).sum(1)).sum() / len(members))

    best = novice_values("gate2_mean", statistics, layer, (expert,))[0].numpy()
    residual = float(statistics.score("residual")[layer, expert])
    assert residual == pytest.approx(error(best), rel=1e-8, abs=1e-15)
    other = best + size * np.random.default_rng(seed).standard_normal(best.shape)
    assert residual < error(other)
    assert residual <= error(novice_values("mean", statistics, layer, (expert,))[0].numpy()) + 1e-15


@pytest.mark.parametrize("kind", ["mean", "gate2_mean"])
def test_experts_with_a_constant_output_that_is_not_zero(kind: str) -> None:
    """One token repeated: every expert that it reaches gives one vector, and its novice changes nothing."""
    # transformers' eager softmax is fp32: its weights add up to 1 within 1e-7 only, so that positions would differ.
    model = untouched(attn_implementation="sdpa")
    batch = {"input_ids": torch.full((2, 7), 9)}
    with torch.no_grad():
        before = model(**batch).logits
    layers = record(model, [batch])
    edits = tuple(
        ml.NoviceExperts(number, tuple(np.flatnonzero(layer.chosen.any(0)).tolist()), kind)
        for number, layer in enumerate(layers)
    )
    assert all(len(edit.experts) == 2 for edit in edits)
    compress(model, plan=ml.CompressionPlan(edits), batches=[batch])
    assert all(vector.norm() > 0.1 for vector in novices_of(model).values())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["mean", "gate2_mean"])
def test_an_expert_that_no_token_reached_becomes_zeros_with_a_warning(kind: str) -> None:
    model = untouched()
    batch = {"input_ids": torch.full((1, 4), 9)}
    reached = np.flatnonzero(record(model, [batch])[1].chosen.any(0)).tolist()
    others = [expert for expert in range(6) if expert not in reached]
    plan = ml.CompressionPlan((ml.NoviceExperts(1, tuple(sorted([*others, reached[0]])), kind),))
    named = ", ".join(map(str, others))
    with pytest.warns(UserWarning, match=rf"layer 1: no calibration token reached experts \[{named}\].*More"):
        compress(model, plan=plan, batches=[batch])
    vectors = novices_of(model)
    assert all(not vectors[1, expert].any() for expert in others)
    assert vectors[1, reached[0]].norm() > 0.1


def test_zero_novices_need_no_warning_and_no_tokens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(tiny_mixtral(), ml.Novices(keep=1, novice="zero", criterion="random"), batches=[])


def test_a_ratio_that_leaves_a_layer_without_real_experts_works() -> None:
    model = untouched()
    result = compress(model, ml.Novices(ratio=0.95))
    assert all(layout.real == () for layout in result.shape_after.layouts)
    assert torch.isfinite(logits(model)).all()


# Bad input, before anything is measured.


class Untouchable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("calibration began before the options were checked")


@pytest.mark.parametrize("kind", [ml.Novices, ml.ExpertDrop])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio, keep, parameters and bytes"),
        ({"ratio": 0.5, "keep": 3}, "exactly one of ratio, keep, parameters and bytes"),
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, r"ratio must lie in \[0, 1\)"),
        ({"ratio": float("nan")}, "ratio must lie"),
        ({"keep": -1}, "keep must not be negative"),
        ({"keep": 2.5}, "keep must be a whole number with scope=layer"),
        ({"keep": float("nan")}, "keep"),
        ({"keep": float("inf")}, "keep"),
        ({"ratio": 0.5, "criterion": "magic"}, "unknown criterion 'magic'.*mone"),
        ({"ratio": 0.5, "scope": "block"}, "unknown scope 'block': choose one of layer, global, sensitivity"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{message}"):
        kind(**options)


def test_unknown_novice() -> None:
    with pytest.raises(ValueError, match=r"Novices: unknown novice 'median'.*gate2_mean"):
        ml.Novices(ratio=0.5, novice="median")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (ml.ExpertDrop(ratio=0.9), r"ExpertDrop: layer 0 would keep 1 expert.*picks 2.*keep to at least 2"),
        (ml.ExpertDrop(keep=1), "ExpertDrop: layer 0 would keep 1"),
        (ml.ExpertDrop(ratio=0.8, scope="global"), "ExpertDrop.*on average.*ratio"),
        (ml.Novices(keep=7), "keep=7"),
        (ml.Novices(keep=6.5, scope="global"), "keep=6.5"),
        ([ml.ExpertDrop(keep=3), ml.ExpertDrop(keep=4)], "keep=4 is more than the 3"),
        ([ml.ExpertDrop(keep=3), ml.ExpertDrop(ratio=0.5)], "ExpertDrop: layer 0 would keep 1"),
        ([], "nothing to do"),
    ],
)
def test_budgets_that_do_not_fit_are_found_before_calibration(methods: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny_mixtral(), methods, batches=Untouchable())


@pytest.mark.parametrize("experts", [3, 5, 6, 7])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_ratio_that_an_error_advises_is_one_that_works(experts: int, scope: Any) -> None:
    model = tiny_mixtral(num_local_experts=experts)
    with pytest.raises(ValueError, match="ratio to at most") as caught:
        compress(model, ml.ExpertDrop(ratio=0.9, scope=scope))
    compress(model, ml.ExpertDrop(ratio=float(str(caught.value).rsplit(" ", 1)[-1]), scope=scope))
    assert {len(layout.router) for layout in architecture_of(model).shape(model).layouts} == {2}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((ml.KeepExperts(0, (1,)),), "layer 0 would keep 1"),
        ((ml.KeepExperts(9, (1, 2)),), "layer 9 is not an MoE layer"),
        ((ml.NoviceExperts(0, (8,)),), "cannot replace by novices experts"),
        ((ml.NoviceExperts(0, (1,), "median"),), "unknown novices.*median"),
    ],
)
def test_plans_that_do_not_fit_are_found_before_calibration(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny_mixtral(), plan=ml.CompressionPlan(plan), batches=Untouchable())


def test_a_decision_can_be_made_on_saved_statistics_without_a_model(tmp_path: Any) -> None:
    model = tiny_mixtral()
    ml.collect(model, BATCHES, progress=False).save(tmp_path / "statistics.safetensors")
    statistics = ml.Statistics.load(tmp_path / "statistics.safetensors")
    method = ml.Novices(ratio=0.5)
    edits = method.propose(statistics.shape, statistics)
    assert edits == compress(model, method).plan.edits
