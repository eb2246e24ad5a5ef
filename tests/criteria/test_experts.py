"""Every criterion against its formula, computed in numpy from what an untouched model's experts did."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.statistics import CRITERIA, criterion_named
from tests.models import random_batches
from tests.reference import LayerRecord, record, untouched


def deviations(outputs: np.ndarray) -> np.ndarray:
    """``sqrt(var(E))`` of each dimension, unbiased; nothing is known of an expert with one token."""
    return np.std(outputs, axis=0, ddof=1) if len(outputs) > 1 else np.zeros(outputs.shape[1])


def residual(g: np.ndarray, outputs: np.ndarray, tokens: int) -> float:
    """``min_v E[g^2 ||E - v||^2 I]``, at its minimiser."""
    best = (g[:, None] ** 2 * outputs).sum(0) / (g**2).sum()
    return float((g**2 * ((outputs - best) ** 2).sum(1)).sum() / tokens)


def norms(outputs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(outputs, axis=1)


# g, E, p (full softmax of all tokens), I (which of them chose the expert), T
Formula = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], float]
FORMULAS: dict[str, Formula] = {
    "frequency": lambda g, e, p, i, tokens: len(g) / tokens,
    "routing_score": lambda g, e, p, i, tokens: g.sum(),
    "soft_routing": lambda g, e, p, i, tokens: float(p.mean()),
    "topk_mass": lambda g, e, p, i, tokens: float((p * i).mean()),
    "variance": lambda g, e, p, i, tokens: float(np.linalg.norm(deviations(e))),
    "variance_l1": lambda g, e, p, i, tokens: float(np.abs(deviations(e)).sum()),
    "mone": lambda g, e, p, i, tokens: np.linalg.norm(deviations(e)) * g.sum() / tokens,
    "mone_l1": lambda g, e, p, i, tokens: deviations(e).sum() * g.sum() / tokens,
    "mone_paper": lambda g, e, p, i, tokens: np.linalg.norm(deviations(e)) * g.mean(),
    "mone_paper_l1": lambda g, e, p, i, tokens: deviations(e).sum() * g.mean(),
    "residual": lambda g, e, p, i, tokens: residual(g, e, tokens),
    "ean": lambda g, e, p, i, tokens: norms(e).sum(),
    "man": lambda g, e, p, i, tokens: norms(e).mean(),
    "msan": lambda g, e, p, i, tokens: (norms(e) ** 2).mean(),
    "reap": lambda g, e, p, i, tokens: (g * norms(e)).mean(),
}
ELSEWHERE = {"random", "interventional", "naee", "naee_dense"}


def family(alpha: int, beta: int, over: float) -> Formula:
    return lambda g, e, p, i, tokens: float(len(g) ** -over * (g**alpha * norms(e) ** beta).sum())


def in_numpy(formula: Formula, layers: list[LayerRecord], dead: float = 0.0) -> np.ndarray:
    """Score every expert; one that no token picked gets ``dead`` unless the formula needs no tokens of its own."""
    score = np.zeros((len(layers), layers[0].gate.shape[1]))
    for row, layer in enumerate(layers):
        for expert in range(score.shape[1]):
            members = layer.chosen[:, expert]
            own = layer.gate[members, expert], layer.output[members, expert]
            arguments = (*own, layer.probability[:, expert], members)
            alive = members.any() or formula is FORMULAS["soft_routing"]
            score[row, expert] = formula(*arguments, len(members)) if alive else dead
    return score


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


@pytest.fixture(scope="module")
def statistics(model: Any) -> ml.Statistics:
    return ml.collect(model, random_batches(), progress=False)


def observed_equals(model: Any, name: str, formula: Formula, tokens: tuple[int, int, int]) -> None:
    batches = random_batches(*tokens)
    layers = record(model, batches)
    statistics = ml.collect(model, batches, criterion_named(name).needs, progress=False)
    score = statistics.score(name)
    assert score.dtype == torch.float64 and score.shape == (len(layers), layers[0].gate.shape[1])
    # A residual is a difference: of one token nothing but rounding is left.
    np.testing.assert_allclose(score.numpy(), in_numpy(formula, layers), rtol=1e-9, atol=1e-12)


def test_the_criteria_are_those_that_the_tests_know() -> None:
    assert set(CRITERIA) == FORMULAS.keys() | ELSEWHERE
    assert all(criterion.source for criterion in CRITERIA.values())
    assert {name for name, criterion in CRITERIA.items() if criterion.selector} == {"naee", "naee_dense"}


TOKENS = pytest.mark.parametrize("tokens", [(3, 2, 11), (1, 1, 4), (1, 1, 1)], ids=["many", "few", "one"])


@pytest.mark.parametrize("name", FORMULAS)
@TOKENS
def test_equals_the_formula(model: Any, name: str, tokens: tuple[int, int, int]) -> None:
    observed_equals(model, name, FORMULAS[name], tokens)
    if tokens[2] < 11:
        layers = record(model, random_batches(*tokens))
        assert any(not layer.chosen.any(0).all() for layer in layers), "no expert is dead"


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula_on_other_shapes(name: str) -> None:
    """One layer whose router picks all of its experts."""
    shape = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 2}
    observed_equals(untouched(seed=1, **shape), name, FORMULAS[name], (2, 1, 5))


@pytest.mark.parametrize("over", ["0", "1", "0.5"])
@pytest.mark.parametrize("beta", [0, 1, 2])
@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_the_family_by_exponents(model: Any, alpha: int, beta: int, over: str) -> None:
    observed_equals(model, f"power:{alpha},{beta},{over}", family(alpha, beta, float(over)), (1, 2, 7))


def test_names_of_the_family_that_have_a_name_of_their_own(statistics: ml.Statistics) -> None:
    for name, other in {
        "power:1,0,0": "routing_score",
        "power:0,1,0": "ean",
        "power: 0, 1, 1": "man",
        "power:0,2,1": "msan",
        "power:1,1,1.0": "reap",
    }.items():
        torch.testing.assert_close(statistics.score(name), statistics.score(other), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name", ["power:3,1,1", "power:1,-1,0", "power:1,1", "power:1,1,nan", "power:1,1,1,1", "power:"]
)
def test_exponents_without_a_sum_are_an_error_that_says_which_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'.*ALPHA and BETA in 0, 1, 2 and any number B"):
        criterion_named(name)


def test_the_residual_of_a_rank_reads_the_errors_that_were_measured() -> None:
    statistics = ml.Statistics.synthetic(architecture_of(untouched()).shape(untouched()))
    error = torch.rand(3, 6, 5, dtype=torch.float64)
    statistics.tensors["low_rank_error"] = error
    assert criterion_named("residual:2").needs == {"low_rank"}
    for rank in range(5):
        assert torch.equal(statistics.score(f"residual:{rank}"), error[:, :, rank])
    with pytest.raises(ValueError, match="'residual:5': errors are measured up to rank 4: use residual:4"):
        statistics.score("residual:5")
    for name in ("residual:", "residual:-1", "residual:2.5", "residual:x"):
        with pytest.raises(ValueError, match=f"'{name}' is none of residual:RANK"):
            criterion_named(name)


def test_interventional_reads_the_divergence_that_was_measured() -> None:
    statistics = ml.Statistics.synthetic(architecture_of(untouched()).shape(untouched()))
    divergence = torch.rand(3, 6, dtype=torch.float64)
    statistics.tensors["expert_divergence"] = divergence
    assert criterion_named("interventional").needs == {"interventions"}
    assert torch.equal(statistics.score("interventional"), divergence)


def test_naee_gives_no_scores(statistics: ml.Statistics) -> None:
    with pytest.raises(ValueError, match="'naee' chooses whole sets of experts and gives no scores"):
        statistics.score("naee")


def test_experts_with_equal_weights_tie() -> None:
    """Two experts that are one, in a router that picks all: whatever they score, they score alike."""
    twin = untouched(num_experts_per_tok=6)
    with torch.no_grad():
        for layer in twin.model.layers:
            for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
                tensor[1] = tensor[4]
    statistics = ml.collect(twin, random_batches(1), progress=False)
    for name in [*FORMULAS, "power:2,1,1"]:
        score = statistics.score(name)
        torch.testing.assert_close(score[:, 1], score[:, 4], rtol=1e-10, atol=1e-15)
        assert name == "frequency" or not torch.allclose(score[:, 1], score[:, 2], rtol=1e-3, atol=0), name


def test_dead_experts_score_lowest(model: Any) -> None:
    statistics = ml.collect(model, random_batches(1, 1, 3), progress=False)
    dead = statistics["count"] == 0
    assert dead.any()
    for name in [*FORMULAS.keys() - {"soft_routing"}, "power:0,0,0", "power:1,1,1", "power:2,2,-1"]:
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
    for name in [*FORMULAS, "random", "power:1,1,1"]:
        assert torch.equal(statistics.score(name), statistics.score(name)), name
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.tensors.items())


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(model: Any) -> None:
    statistics = ml.collect(model, random_batches(1), progress=False)
    with pytest.raises(ValueError, match=r"unknown criterion 'magic'.*mone_paper.*soft_routing.*power:ALPHA,BETA,B"):
        statistics.score("magic")
    with pytest.raises(ValueError, match=r"unknown criterion 'power' \(power:ALPHA,BETA,B needs its numbers\)"):
        statistics.score("power")
    with pytest.raises(ValueError, match="unknown criterion 'mone:3'"):
        statistics.score("mone:3")
