"""Low-rank maps against weighted least squares on explicit token matrices, in numpy."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from moe_lightning.architectures import architecture_of
from moe_lightning.statistics import low_rank
from moe_lightning.statistics.low_rank import (
    LowRankFit,
    WeightedRegression,
    collect_low_rank,
    collect_low_rank_error,
    fit_low_rank,
    low_rank_error,
)
from moe_lightning.statistics.second_moments import FoldMoments, SecondMoments, second_moment_bytes
from tests.models import random_batches, tiny_mixtral
from tests.reference import untouched

HIDDEN = 12
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw(count: int, seed: int = 0, rank: int = HIDDEN, noise: float = 0.3, hidden: int = HIDDEN) -> Tokens:
    """Return inputs with unequal directions and a mean, noisy affine outputs, and gates."""
    generator = np.random.default_rng(seed)
    true = np.random.default_rng(99)
    spread = np.geomspace(2.0, 0.2, hidden)
    mixing = np.linalg.qr(true.normal(size=(hidden, hidden)))[0]
    matrix = true.normal(size=(hidden, rank)) @ true.normal(size=(rank, hidden)) / np.sqrt(rank)
    shift_x, shift_y = true.normal(size=hidden), true.normal(size=hidden)
    x = generator.normal(size=(count, hidden)) * spread @ mixing + shift_x
    y = x @ matrix + shift_y + noise * generator.normal(size=(count, hidden))
    return x, y, generator.uniform(0.1, 0.9, size=count)


def sums_of(tokens: Tokens, unreached: int = 0) -> FoldMoments:
    x, y, gate = (torch.from_numpy(array) for array in tokens)
    sums = FoldMoments.zeros(x.shape[1])
    sums.add(len(gate) + unreached, x, y, gate)
    return sums


def folds_of(*folds: Tokens) -> SecondMoments:
    return tuple(sums_of(tokens, 3 + number) for number, tokens in enumerate(folds))


def unreached(folds: int) -> int:
    """Return how many tokens of the folds that :func:`folds_of` makes do not reach the expert."""
    return sum(3 + number for number in range(folds))


def joined(*folds: Tokens) -> Tokens:
    x, y, gate = (np.concatenate(pair) for pair in zip(*folds, strict=True))
    return x, y, gate


def cross_validated(folds: tuple[Tokens, ...], ridge: float, rank: int) -> float:
    """Return the sum over folds of the error there of the map of all others."""
    total = 0.0
    for number, held_out in enumerate(folds):
        others = joined(*(tokens for fold, tokens in enumerate(folds) if fold != number))
        total += error_by_hand(held_out, *ridge_by_hand(others, ridge, rank))
    return total


def ridge_by_hand(tokens: Tokens, ridge: float, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return matrix and constant by stacking the ridge below the data: no normal equations, no moments."""
    x, y, gate = tokens
    share = gate**2 / (gate**2).sum()
    mean_x, mean_y = share @ x, share @ y
    root_x, root_y = gate[:, None] * (x - mean_x), gate[:, None] * (y - mean_y)
    penalty = np.sqrt(ridge * (root_x**2).sum(0).mean()) * np.eye(x.shape[1])
    stacked_x = np.concatenate([root_x, penalty])
    stacked_y = np.concatenate([root_y, np.zeros_like(penalty)])
    matrix = np.linalg.lstsq(stacked_x, stacked_y, rcond=None)[0]
    if rank is not None:
        directions = np.linalg.svd(stacked_x @ matrix, full_matrices=False)[2][:rank]
        matrix = matrix @ directions.T @ directions
    return matrix, mean_y - mean_x @ matrix


def error_by_hand(tokens: Tokens, matrix: np.ndarray, constant: np.ndarray) -> float:
    x, y, gate = tokens
    return float((gate**2 * ((y - constant - x @ matrix) ** 2).sum(1)).sum())


def matrix_of(fit: LowRankFit) -> np.ndarray:
    return (fit.novice_in.T @ fit.novice_out).numpy()


@pytest.mark.parametrize("rank", [1, 3, HIDDEN])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_the_map_is_reduced_rank_ridge_regression_on_all_folds(rank: int, ridge: float) -> None:
    folds = (draw(50, 1), draw(30, 2), draw(40, 3))
    fit = fit_low_rank(3, 5, folds_of(*folds), rank, ridges=(ridge,))
    matrix, constant = ridge_by_hand(joined(*folds), ridge, rank)
    np.testing.assert_allclose(matrix_of(fit), matrix, atol=1e-9)
    np.testing.assert_allclose(fit.constant.numpy(), constant, atol=1e-9)
    assert (fit.layer, fit.expert, fit.rank, fit.ridge, fit.tokens) == (3, 5, rank, ridge, 120)
    assert fit.novice_in.shape == fit.novice_out.shape == (rank, HIDDEN)
    assert fit.status == f"rank {rank}, ridge {ridge:g}"


def test_full_rank_is_ridge_regression() -> None:
    folds = (draw(60, 1), draw(20, 2))
    matrix, constant = ridge_by_hand(joined(*folds), 0.03)
    fit = fit_low_rank(0, 0, folds_of(*folds), HIDDEN, ridges=(0.03,))
    np.testing.assert_allclose(matrix_of(fit), matrix, atol=1e-9)
    np.testing.assert_allclose(fit.constant.numpy(), constant, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-5, 0.1, 10.0])
def test_the_held_out_curve_is_the_error_on_the_tokens(ridge: float) -> None:
    folds = (draw(40, 3), draw(25, 4), draw(30, 5), draw(1, 6))
    fit = fit_low_rank(0, 0, folds_of(*folds), HIDDEN, ridges=(ridge,))
    for rank in range(HIDDEN + 1):
        by_hand = cross_validated(folds, ridge, rank) / (96 + unreached(4))
        assert float(fit.held_out_error[rank]) == pytest.approx(by_hand, rel=1e-9)


def test_the_ridge_is_the_best_one_on_the_held_out_tokens() -> None:
    ridges = (1e-6, 1e-3, 0.1, 1.0, 30.0)
    chosen = set()
    for seed, noise, count in ((1, 0.01, 400), (2, 1.0, 60), (3, 3.0, 40), (4, 0.3, 30)):
        folds = tuple(draw(count // 2, seed + 50 * fold, noise=noise) for fold in range(3))
        errors = [cross_validated(folds, ridge, 4) for ridge in ridges]
        fit = fit_low_rank(0, 0, folds_of(*folds), 4, ridges=ridges)
        assert fit.ridge == ridges[int(np.argmin(errors))]
        chosen.add(fit.ridge)
    assert len(chosen) > 1


def test_an_affine_expert_of_the_rank_is_recovered() -> None:
    fit_tokens, held_out = draw(60, 1, rank=3, noise=0.0), draw(20, 2, rank=3, noise=0.0)
    fit = fit_low_rank(0, 0, folds_of(fit_tokens, held_out), 3, ridges=(1e-13, 1.0))
    x, y, _ = draw(50, 9, rank=3, noise=0.0)
    np.testing.assert_allclose(x @ matrix_of(fit) + fit.constant.numpy(), y, atol=1e-8)
    assert float(fit.held_out_error[3]) < 1e-9 * float(fit.held_out_error[0])
    assert float(fit.held_out_error[2]) > 1e-3 * float(fit.held_out_error[0])


def test_rank_zero_is_the_constant_of_least_error() -> None:
    fit_tokens, held_out = draw(40, 1), draw(13, 2)
    fit = fit_low_rank(0, 0, folds_of(fit_tokens, held_out), 0)
    _, y, gate = joined(fit_tokens, held_out)
    np.testing.assert_allclose(fit.constant.numpy(), (gate**2) @ y / (gate**2).sum(), rtol=1e-12)
    assert (fit.rank, fit.ridge, fit.novice_in.shape) == (0, None, (0, HIDDEN))


@pytest.mark.parametrize("ridge", [1e-12, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("count", [3, 10, 50])
def test_on_its_own_tokens_every_rank_is_at_least_as_good_as_the_one_before(ridge: float, count: int) -> None:
    sums = sums_of(draw(count, count))
    regression = WeightedRegression(sums)
    curve = regression.error_curve(*regression.directions(ridge, HIDDEN), sums)
    assert float(curve.diff().max()) <= 1e-9 * float(curve[0])


def test_no_other_map_of_the_rank_costs_less() -> None:
    tokens, ridge = draw(40, 5), 0.05
    x, _, gate = tokens
    share = gate**2 / (gate**2).sum()
    penalty = ridge * (gate[:, None] ** 2 * (x - share @ x) ** 2).sum(0).mean()
    regression = WeightedRegression(sums_of(tokens))
    columns, rows = (factor.numpy() for factor in regression.directions(ridge, 3))
    mean_x, mean_y = regression.mean_x.numpy(), regression.mean_y.numpy()

    def cost(left: np.ndarray, right: np.ndarray) -> float:
        matrix = left @ right
        return error_by_hand(tokens, matrix, mean_y - mean_x @ matrix) + penalty * (matrix**2).sum()

    generator = np.random.default_rng(0)
    best = cost(columns, rows)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(30):
            moved = (array + size * generator.normal(size=array.shape) for array in (columns, rows))
            assert cost(*moved) > best


def test_mean_inputs_and_outputs_a_thousand_times_their_spread() -> None:
    x, y, gate = draw(80, 1)
    far = (x + 1e3, y - 2e3, gate)
    near = WeightedRegression(sums_of((x, y, gate)))
    shifted = WeightedRegression(sums_of(far))
    curves = [
        fitted.error_curve(*fitted.directions(1e-3, 5), sums_of(tokens))
        for fitted, tokens in ((near, (x, y, gate)), (shifted, far))
    ]
    np.testing.assert_allclose(curves[1].numpy(), curves[0].numpy(), rtol=1e-5)


def test_too_few_tokens_give_the_constant_and_say_so() -> None:
    folds = folds_of(draw(11, 1), draw(4, 2))
    assert fit_low_rank(0, 0, folds, 4).status == "constant: 15 tokens are fewer than 4 x rank 4"
    assert fit_low_rank(0, 0, folds, 4, tokens_per_rank=8).rank == 0
    assert fit_low_rank(0, 0, folds, 3).status.startswith("rank 3, ridge")
    assert fit_low_rank(0, 0, folds, HIDDEN).rank == 0


def test_outputs_that_have_nothing_to_do_with_the_inputs_give_the_constant() -> None:
    generator = np.random.default_rng(0)
    fit_tokens, held_out = draw(40, 1), draw(20, 2)
    mixed_up = tuple((x, generator.normal(size=y.shape), gate) for x, y, gate in (fit_tokens, held_out))
    folds = folds_of(*mixed_up)
    fit = fit_low_rank(0, 0, folds, 4, ridges=(1e-4, 1e-2))
    assert fit.status == "constant: no map of rank 4 beats it on held-out tokens"
    assert fit.rank == 0
    assert not bool((low_rank_error(folds, 6, ridges=(1e-4, 1e-2)) > fit.held_out_error[0]).any())


def test_one_token_over_and_over_is_its_output() -> None:
    x, y, gate = draw(1, 1)
    fit_tokens, held_out = ((x.repeat(n, 0), y.repeat(n, 0), gate.repeat(n)) for n in (30, 10))
    folds = folds_of(fit_tokens, held_out)
    fit = fit_low_rank(0, 0, folds, 2)
    assert fit.rank == 0
    np.testing.assert_allclose(fit.constant.numpy(), y[0], rtol=1e-12)
    assert float(low_rank_error(folds, 4).max()) < 1e-12


def test_all_tokens_are_in_one_fold() -> None:
    nothing = tuple(array[:0] for array in draw(1))
    tokens = draw(40, 1)
    folds = folds_of(nothing, tokens, nothing)
    fit = fit_low_rank(0, 0, folds, 2)
    assert fit.status.startswith("constant: its 40 tokens are all in one of 3 folds")
    torch.testing.assert_close(fit.constant, folds[1].gate2_output / folds[1].gate2)
    # Nothing is known of it outside that fold, where it would have been zero.
    _, y, gate = tokens
    expected = (gate**2 @ (y**2).sum(1)) / (40 + unreached(3))
    np.testing.assert_allclose(low_rank_error(folds, 3).numpy(), expected)


def test_an_empty_fold_changes_nothing_but_the_number_of_tokens() -> None:
    nothing = tuple(array[:0] for array in draw(1))
    folds = (draw(30, 1), draw(20, 2))
    with_nothing, without = folds_of(*folds, nothing), folds_of(*folds)
    fits = [fit_low_rank(0, 0, moments, 3) for moments in (with_nothing, without)]
    assert torch.equal(fits[0].novice_in, fits[1].novice_in)
    share = (50 + unreached(2)) / (50 + unreached(3))
    torch.testing.assert_close(fits[0].held_out_error, fits[1].held_out_error * share)


def test_beyond_the_exact_sizes_directions_come_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = folds_of(*(draw(300, seed, hidden=80, rank=80) for seed in range(3)))
    exact = fit_low_rank(0, 0, folds, 4)
    monkeypatch.setattr(low_rank, "EXACT_HIDDEN_SIZE", 8)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(1), eigh(matrix))[1])
    iterated = fit_low_rank(0, 0, folds, 4)
    # One of every fold's inputs and one of all inputs, none for the ridges.
    assert len(calls) == 4
    assert iterated.status == exact.status
    np.testing.assert_allclose(iterated.held_out_error.numpy(), exact.held_out_error.numpy(), rtol=1e-6)
    np.testing.assert_allclose(matrix_of(iterated), matrix_of(exact), atol=1e-3)
    assert torch.equal(fit_low_rank(0, 0, folds, 4).novice_in, iterated.novice_in)
    identity = iterated.novice_out @ iterated.novice_out.T
    assert float((identity - identity.diagonal().diag()).abs().max()) < 1e-12


def test_an_expert_that_no_token_reached_is_zero() -> None:
    nothing = tuple(array[:0] for array in draw(1))
    fit = fit_low_rank(0, 0, folds_of(nothing, nothing), 4)
    assert fit.status == "constant: no calibration token reached it, so it is zero"
    assert not fit.constant.any()
    assert not low_rank_error(folds_of(nothing, nothing), 3).any()


def test_ties_between_directions_are_broken_the_same_way_every_time() -> None:
    x = np.concatenate([np.eye(HIDDEN), -np.eye(HIDDEN)]).repeat(5, 0)
    tokens = (x, x.copy(), np.full(len(x), 0.5))
    fits = [fit_low_rank(0, 0, folds_of(tokens, tokens), 3) for _ in range(2)]
    assert torch.equal(fits[0].novice_in, fits[1].novice_in)
    share = fits[0].held_out_error / fits[0].held_out_error[0]
    np.testing.assert_allclose(share.numpy(), 1 - np.arange(4) / HIDDEN, atol=1e-4)


def test_both_factors_have_the_same_size() -> None:
    fit = fit_low_rank(0, 0, folds_of(draw(60, 1), draw(20, 2)), 4)
    torch.testing.assert_close(fit.novice_in.norm(dim=1), fit.novice_out.norm(dim=1))


def test_the_estimate_for_each_rank_is_what_a_fit_of_that_rank_held_out() -> None:
    folds = folds_of(draw(30, 1, noise=1.0), draw(14, 2, noise=1.0))
    estimate = low_rank_error(folds, HIDDEN)
    for rank in range(HIDDEN + 1):
        fit = fit_low_rank(0, 0, folds, rank)
        expected = estimate[0] if fit.rank == 0 else fit.held_out_error[rank]
        assert float(estimate[rank]) == pytest.approx(float(expected), rel=1e-9)
    # 44 tokens: from rank 12 on there are too few.
    assert float(estimate[HIDDEN]) == float(estimate[0]) > float(estimate[HIDDEN - 1])


def test_options_without_sense_are_refused() -> None:
    folds = folds_of(draw(30, 1), draw(14, 2))
    for rank in (-1, HIDDEN + 1):
        with pytest.raises(ValueError, match="between 0 and the hidden size 12"):
            fit_low_rank(0, 0, folds, rank)
    for ridges in ((), (0.0, 1.0)):
        with pytest.raises(ValueError, match="ridges must be positive"):
            fit_low_rank(0, 0, folds, 2, ridges=ridges)
    with pytest.raises(ValueError, match="tokens_per_rank"):
        fit_low_rank(0, 0, folds, 2, tokens_per_rank=0.5)


# --- from the model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return untouched()


def test_maps_in_the_place_of_experts_come_closer_than_constants(model: Any) -> None:
    batches = random_batches(16, 4, 16)
    wants = {0: ((1, 4), (3, 0)), 2: ((5, 16),)}
    fits = collect_low_rank(model, batches, wants, progress=False)
    assert list(fits) == [(0, 1), (0, 3), (2, 5)]
    assert [fits[pair].rank for pair in fits] == [4, 0, 16]
    seen: dict[str, Any] = {}
    experts = model.model.layers[2].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0], index=args[1], weight=args[2]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            gate = (seen["weight"] * (seen["index"] == 5)).sum(1)
            gate_half, up_half = (seen["x"] @ experts.gate_up_proj[5].T).chunk(2, dim=-1)
            output = (torch.nn.functional.silu(gate_half) * up_half) @ experts.down_proj[5].T
            fit = fits[2, 5]
            mapped = fit.constant + seen["x"] @ fit.novice_in.T @ fit.novice_out
            seen["error"] = seen.get("error", 0) + (gate**2 * (output - mapped).square().sum(1)).sum()
            seen["square"] = seen.get("square", 0) + (gate**2 * output.square().sum(1)).sum()
    hook.remove()
    tokens = 16 * 4 * 16
    assert float(seen["error"]) / tokens < float(fits[2, 5].held_out_error[0])
    assert float(seen["error"]) < 0.9 * float(seen["square"])


def test_little_memory_gives_the_same_fits(model: Any) -> None:
    batches = random_batches(6, 2, 16)
    wants = {1: tuple((expert, 2) for expert in range(6)), 2: ((0, 3),)}
    whole = collect_low_rank(model, batches, wants, progress=False)
    pieces = collect_low_rank(model, batches, wants, progress=False, max_bytes=2 * second_moment_bytes(32, 1))
    assert whole.keys() == pieces.keys()
    for pair, fit in whole.items():
        other = pieces[pair]
        assert (fit.status, fit.tokens) == (other.status, other.tokens)
        torch.testing.assert_close(fit.constant, other.constant)
        torch.testing.assert_close(fit.novice_in.T @ fit.novice_out, other.novice_in.T @ other.novice_out)


def test_dead_experts_are_warned_about(model: Any) -> None:
    batches = [{"input_ids": torch.tensor([[9, 9]])}]
    wants = {layer: tuple((expert, 1) for expert in range(6)) for layer in range(3)}
    with pytest.warns(UserWarning) as caught:
        fits = collect_low_rank(model, batches, wants, progress=False)
    assert [str(warning.message).partition(" [")[0] for warning in caught] == [
        f"layer {layer}: no calibration token reached experts" for layer in range(3)
    ]
    dead = [fit for fit in fits.values() if not fit.tokens]
    assert len(dead) >= 3
    assert not any(fit.constant.any() for fit in dead)
    assert all(fit.rank == 0 for fit in fits.values())


def test_one_layer() -> None:
    model = tiny_mixtral(num_hidden_layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = collect_low_rank(model, random_batches(8, 2, 16), {0: ((2, 2),)}, progress=False)
    assert fits[0, 2].constant.dtype == torch.float64


def test_wants_without_sense_are_refused_before_the_pass(model: Any) -> None:
    with pytest.raises(ValueError, match="rank 33 of expert 1 in layer 2"):
        collect_low_rank(model, [], {2: ((1, 33),)}, progress=False)
    with pytest.raises(ValueError, match="named twice"):
        collect_low_rank(model, [], {2: ((1, 3), (1, 4))}, progress=False)
    assert collect_low_rank(model, [], {}, progress=False) == {}


def test_the_errors_of_all_experts_are_those_of_single_ones(model: Any) -> None:
    batches = random_batches(8, 2, 16)
    shape = architecture_of(model).shape(model)
    tensors = collect_low_rank_error(model, batches, shape, progress=False)
    assert tensors["low_rank_error"].shape == (3, 6, 33)
    assert torch.isfinite(tensors["low_rank_error"]).all()
    assert bool((tensors["low_rank_tokens"] == 8 * 2 * 16).all())
    fits = collect_low_rank(model, batches, {1: ((4, 3),)}, progress=False)
    error = tensors["low_rank_error"][1, 4]
    fit = fits[1, 4]
    assert float(error[0]) == pytest.approx(float(fit.held_out_error[0]), rel=1e-9)
    expected = float(fit.held_out_error[3]) if fit.rank else float(error[0])
    assert float(error[3]) == pytest.approx(expected, rel=1e-9)
