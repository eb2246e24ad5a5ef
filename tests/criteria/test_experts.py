"""Every criterion against its formula, computed in numpy from what an untouched model's experts did."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moe_lightning as ml
from moe_lightning.statistics import CRITERIA
from tests.models import random_batches
from tests.reference import LayerRecord, record, untouched

NAMES = {"mone", "mone_paper", "frequency", "residual", "reap", "soft_routing", "random"}


def deviation(outputs: np.ndarray) -> float:
    """``||sqrt(var(E))||_2``, unbiased; nothing is known of an expert with one token."""
    return float(np.linalg.norm(np.sqrt(np.var(outputs, axis=0, ddof=1)))) if len(outputs) > 1 else 0.0


def residual(g: np.ndarray, outputs: np.ndarray, tokens: int) -> float:
    """``min_v E[g^2 ||E - v||^2 I]``, at its minimiser."""
    best = (g[:, None] ** 2 * outputs).sum(0) / (g**2).sum()
    return float((g**2 * ((outputs - best) ** 2).sum(1)).sum() / tokens)


Formula = Callable[[np.ndarray, np.ndarray, np.ndarray, int], float]
FORMULAS: dict[str, Formula] = {
    "frequency": lambda g, e, p, tokens: len(g) / tokens,
    "soft_routing": lambda g, e, p, tokens: float(p.mean()),
    "mone": lambda g, e, p, tokens: deviation(e) * g.sum() / tokens,
    "mone_paper": lambda g, e, p, tokens: deviation(e) * g.sum() / len(g),
    "residual": lambda g, e, p, tokens: residual(g, e, tokens),
    "reap": lambda g, e, p, tokens: float((g * np.linalg.norm(e, axis=1)).sum() / len(g)),
}


def in_numpy(formula: Formula, layers: list[LayerRecord], dead: float = 0.0) -> np.ndarray:
    """Score every expert; one that no token picked gets ``dead`` unless the formula needs no tokens of its own."""
    score = np.zeros((len(layers), layers[0].gate.shape[1]))
    for row, layer in enumerate(layers):
        for expert in range(score.shape[1]):
            members = layer.chosen[:, expert]
            arguments = (layer.gate[members, expert], layer.output[members, expert], layer.probability[:, expert])
            alive = members.any() or formula is FORMULAS["soft_routing"]
            score[row, expert] = formula(*arguments, len(members)) if alive else dead
    return score


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


def test_the_criteria_are_those_that_the_tests_know() -> None:
    assert set(CRITERIA) == NAMES
    assert all(criterion.source for criterion in CRITERIA.values())


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("tokens", [(3, 2, 11), (1, 1, 4), (1, 1, 1)], ids=["many", "few", "one"])
def test_equals_the_formula(model: Any, name: str, tokens: tuple[int, int, int]) -> None:
    batches = random_batches(*tokens)
    layers = record(model, batches)
    statistics = ml.collect(model, batches, CRITERIA[name].needs, progress=False)
    score = statistics.score(name)
    assert score.dtype == torch.float64 and score.shape == (3, 6)
    expected = in_numpy(FORMULAS[name], layers)
    if tokens[2] < 11:
        assert any(not layer.chosen.any(0).all() for layer in layers), "no expert is dead"
    # A residual is a difference: of one token nothing but rounding is left.
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_dead_experts_score_lowest(model: Any) -> None:
    statistics = ml.collect(model, random_batches(1, 1, 3), progress=False)
    dead = statistics["count"] == 0
    assert dead.any()
    for name in FORMULAS.keys() - {"soft_routing"}:
        score = statistics.score(name)
        assert torch.isfinite(score).all()
        assert not score[dead].any() and (score >= 0).all(), name


def test_random_is_drawn_by_its_seed_and_by_nothing_else(model: Any) -> None:
    one = ml.collect(model, random_batches(1), progress=False)
    other = ml.collect(model, random_batches(2), progress=False)
    state = torch.get_rng_state()
    score = one.score("random", seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(score, other.score("random", seed=4))
    assert not torch.equal(score, one.score("random", seed=5))
    assert len(score.unique()) == score.numel()


def test_scoring_changes_nothing(model: Any) -> None:
    statistics = ml.collect(model, random_batches(1), progress=False)
    before = {name: tensor.clone() for name, tensor in statistics.tensors.items()}
    for name in NAMES:
        assert torch.equal(statistics.score(name), statistics.score(name)), name
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.tensors.items())


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(model: Any) -> None:
    statistics = ml.collect(model, random_batches(1), progress=False)
    with pytest.raises(ValueError, match=r"unknown criterion 'magic'.*mone_paper.*soft_routing"):
        statistics.score("magic")
