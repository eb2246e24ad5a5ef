"""NAEE: sums of pairs against the error of every subset, computed token by token."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.criteria.naee import SubsetRanking, best_subset, check_subsets, pair_errors
from moe_lightning.trimming import novice_values
from tests.models import random_batches, tiny_mixtral
from tests.reference import LayerRecord, record, untouched

BATCHES = random_batches(3, 2, 11)


def error_by_hand(layer: LayerRecord, gone: tuple[int, ...], constants: np.ndarray | None) -> float:
    """Squared change of the layer's output, token by token, when experts give way to constants."""
    total = 0.0
    for token in range(len(layer.gate)):
        change = np.zeros(layer.output.shape[2])
        for expert in gone:
            if layer.chosen[token, expert]:
                stands = constants[expert] if constants is not None else 0.0
                change += layer.gate[token, expert] * (layer.output[token, expert] - stands)
        total += float((change**2).sum())
    return total


def observed(batches: Any = BATCHES, **changes: Any) -> tuple[ml.Statistics, list[LayerRecord]]:
    model = untouched(**changes)
    layers = record(model, batches)
    statistics = ml.collect(model, batches, needs={"routing", "outputs", "pairs"}, progress=False)
    return statistics, layers


@pytest.mark.parametrize("kind", ["zero", "mean", "gate2_mean"])
@pytest.mark.parametrize("top_k", [2, 4])
def test_the_pairs_add_up_to_the_error_of_every_set(kind: str, top_k: int) -> None:
    """With four of six chosen, a token loses several experts at once: the cross terms count."""
    statistics, layers = observed(num_experts_per_tok=top_k)
    experts = (0, 2, 3, 5)
    for row, layer in enumerate(layers):
        constants = None if kind == "zero" else novice_values(kind, statistics, row, tuple(range(6)))
        picked = None if constants is None else constants[list(experts)]
        errors = pair_errors(statistics, row, experts, picked)
        torch.testing.assert_close(errors, errors.T, rtol=1e-12, atol=1e-12)
        for size in range(5):
            for places in itertools.combinations(range(4), size):
                gone = tuple(experts[place] for place in places)
                expected = error_by_hand(layer, gone, None if constants is None else constants.numpy())
                got = float(errors[list(places)][:, list(places)].sum())
                assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        ml.Novices(keep=3, criterion="naee", novice="zero"),
        ml.Novices(keep=4, criterion="naee"),
        ml.Novices(keep=2, criterion="naee", novice="gate2_mean"),
        ml.ExpertDrop(keep=3, criterion="naee", router="keep"),
        ml.ExpertDrop(keep=4, criterion="naee"),
    ],
)
def test_the_set_with_the_smallest_error_goes(method: Any) -> None:
    statistics, layers = observed(num_experts_per_tok=3)
    assert method.needs <= statistics.groups
    kind = getattr(method, "novice", "zero")
    by_scores = dataclasses.replace(method, criterion="frequency")
    edits = method.propose(statistics.shape, statistics)
    differs = False
    for row, (edit, layer) in enumerate(zip(edits, layers, strict=True)):
        gone = edit.experts if isinstance(method, ml.Novices) else tuple(sorted({*range(6)} - {*edit.experts}))
        constants = None if kind == "zero" else novice_values(kind, statistics, row, tuple(range(6))).numpy()
        best = min(itertools.combinations(range(6), len(gone)), key=lambda s: error_by_hand(layer, s, constants))
        assert gone == best
        differs |= edit != by_scores.propose(statistics.shape, statistics)[row]
    assert differs, "the criterion is not heard"


def test_an_exact_target_takes_the_extra_expert_where_the_error_grows_least() -> None:
    statistics, layers = observed(num_experts_per_tok=3)
    shape = statistics.shape
    one = shape.expert_parameters - shape.hidden_size
    method = ml.Novices(parameters=shape.parameters - 4 * one, criterion="naee", novice="zero")
    edits = method.propose(shape, statistics)
    growth = []
    for layer in layers:
        best = [min(error_by_hand(layer, s, None) for s in itertools.combinations(range(6), n)) for n in (1, 2)]
        growth.append(best[1] - best[0])
    assert [len(edit.experts) for edit in edits] == [2 if row == int(np.argmin(growth)) else 1 for row in range(3)]


def test_equal_sets_go_by_the_first_numbers() -> None:
    assert best_subset(torch.ones(5, 5, dtype=torch.float64), 3)[0] == (0, 1, 2)
    errors = torch.diag(torch.tensor([3.0, 1, 1, 1, 9], dtype=torch.float64))
    assert best_subset(errors, 2) == ((1, 2), 2.0)
    assert best_subset(errors, 0) == ((), 0.0)
    noise = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-16
    assert best_subset(torch.ones(5, 5, dtype=torch.float64) + noise, 2)[0] == (0, 1), "rounding decided"


def test_cross_terms_decide() -> None:
    """Two experts that cancel each other: alone each costs most, together nothing."""
    errors = torch.tensor([[4.0, -4, 0], [-4, 4, 0], [0, 0, 1]], dtype=torch.float64)
    assert best_subset(errors, 1)[0] == (2,)
    assert best_subset(errors, 2)[0] == (0, 1)
    ranking = SubsetRanking([errors], [(3, 5, 6)])
    assert ranking.lowest(0, 2) == (3, 5)
    assert ranking.next_cost(0) == [1.0] and ranking.next_cost(1) == [-1.0] and ranking.next_cost(3) == [math.inf]


def test_too_many_sets_are_refused_before_calibration() -> None:
    check_subsets([19], [9])
    with pytest.raises(ValueError, match="10 of 20 experts are 184,756"):
        check_subsets([20], [10])

    class Untouchable:
        def __iter__(self) -> Any:
            raise AssertionError("calibration began before the options were checked")

    model = tiny_mixtral(num_local_experts=20)
    for kind in (ml.Novices, ml.ExpertDrop):
        with pytest.raises(ValueError, match=f"{kind.__name__}: criterion=naee tries out all subsets, and 10 of 20"):
            ml.compress(model, Untouchable(), kind(ratio=0.5, criterion="naee"), progress=False)
    shape = architecture_of(model).shape(model)
    target = shape.parameters - 30 * shape.expert_parameters
    with pytest.raises(ValueError, match="ExpertDrop: criterion=naee tries out all"):
        ml.compress(model, Untouchable(), ml.ExpertDrop(parameters=target, criterion="naee"), progress=False)


def test_naee_is_for_one_layer_at_a_time_and_for_constants() -> None:
    for scope in ("global", "sensitivity"):
        with pytest.raises(ValueError, match=f"ExpertDrop: criterion=naee .*set scope=layer, got scope={scope}"):
            ml.ExpertDrop(keep=3, criterion="naee", scope=scope)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Novices: criterion=naee knows the error of constants only"):
        ml.Novices(keep=3, criterion="naee", novice="low_rank")
    assert ml.Novices(keep=3, criterion="naee", novice="zero").needs == {"routing", "outputs"}
    assert ml.Novices(keep=3, criterion="naee").needs == {"routing", "outputs", "pairs"}


def test_dead_experts_go_first_and_numbers_that_are_none_are_an_error() -> None:
    statistics, layers = observed(random_batches(1, 1, 3))
    edits = ml.Novices(keep=5, criterion="naee").propose(statistics.shape, statistics)
    for edit, layer in zip(edits, layers, strict=True):
        dead = np.flatnonzero(~layer.chosen.any(0))
        assert edit.experts == (dead[0],)
    statistics.tensors["output_gram"][0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="criterion=naee: the sums of the experts' outputs are not finite"):
        ml.Novices(keep=5, criterion="naee").propose(statistics.shape, statistics)
