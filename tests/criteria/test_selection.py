"""Who stays: exact counts, floors, rounding, ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.criteria import kept_experts
from moe_lightning.criteria.counts import even_counts
from moe_lightning.criteria.selection import ScoreRanking, layer_weights

LAYERS, EXPERTS = 3, 6
EVERYONE = [tuple(range(EXPERTS))] * LAYERS

# Few different numbers, so that there are many ties.
scores = st.lists(
    st.lists(st.integers(0, 3).map(float), min_size=EXPERTS, max_size=EXPERTS), min_size=LAYERS, max_size=LAYERS
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
candidate_sets = st.lists(
    st.sets(st.integers(0, EXPERTS - 1), min_size=2).map(lambda s: tuple(sorted(s))), min_size=LAYERS, max_size=LAYERS
)
ratios = st.integers(0, 59).map(lambda number: number / 60)


def half_up(value: float) -> int:
    return math.floor(value + 0.5)


def dropped(kept: list[tuple[int, ...]], candidates: list[tuple[int, ...]]) -> list[set[int]]:
    for stay, experts in zip(kept, candidates, strict=True):
        assert stay == tuple(sorted(set(stay))) and set(stay) <= set(experts)
    return [set(experts) - set(stay) for stay, experts in zip(kept, candidates, strict=True)]


@settings(max_examples=100, deadline=None)
@given(score=scores, candidates=candidate_sets, ratio=ratios)
def test_layer_scope_drops_the_lowest_of_each_layer(
    score: torch.Tensor, candidates: list[tuple[int, ...]], ratio: float
) -> None:
    kept = kept_experts(score, candidates, ratio=ratio)
    for row, (gone, experts) in enumerate(zip(dropped(kept, candidates), candidates, strict=True)):
        ranked = sorted(experts, key=lambda expert: (float(score[row, expert]), expert))
        assert gone == set(ranked[: half_up(ratio * len(experts))])
    assert kept == kept_experts(score.clone(), candidates, ratio=ratio)


@settings(max_examples=100, deadline=None)
@given(score=scores, candidates=candidate_sets, ratio=ratios, floor=st.integers(0, 2))
def test_global_scope_drops_the_lowest_of_all_down_to_the_floor(
    score: torch.Tensor, candidates: list[tuple[int, ...]], ratio: float, floor: int
) -> None:
    total = sum(map(len, candidates))
    number = half_up(ratio * total)
    if total - number < floor * LAYERS:
        with pytest.raises(ValueError, match=f"every layer must keep {floor}"):
            kept_experts(score, candidates, ratio=ratio, scope="global", floor=floor)
        return
    kept = kept_experts(score, candidates, ratio=ratio, scope="global", floor=floor)
    gone = dropped(kept, candidates)
    assert sum(map(len, gone)) == number
    assert all(len(stay) >= floor for stay in kept)
    # Nobody who stayed could have gone instead of somebody who scored higher.
    for row, stay in enumerate(kept):
        for expert in stay:
            for other, members in enumerate(gone):
                for victim in members:
                    if (float(score[row, expert]), row, expert) < (float(score[other, victim]), other, victim):
                        assert row != other and len(stay) == floor


@pytest.mark.parametrize(
    ("ratio", "keeps"),
    [(0.0, 6), (0.08, 6), (0.0834, 5), (0.25, 4), (0.24, 5), (0.4, 4), (0.42, 3), (0.5, 3), (0.9, 1)],
)
def test_halves_are_rounded_up(ratio: float, keeps: int) -> None:
    """0.25 of 6 is 1.5: two go. Python's own rounding would let halves alternate."""
    kept = kept_experts(torch.rand(LAYERS, EXPERTS), EVERYONE, ratio=ratio)
    assert [len(stay) for stay in kept] == [keeps] * LAYERS


@pytest.mark.parametrize("experts", range(1, 40))
@pytest.mark.parametrize("ratio", [0.1, 0.125, 0.25, 0.5, 0.75])
def test_counts_for_any_number_of_experts(experts: int, ratio: float) -> None:
    kept = kept_experts(torch.zeros(1, experts), [tuple(range(experts))], ratio=ratio)
    assert len(kept[0]) == experts - half_up(ratio * experts)


@pytest.mark.parametrize("keep", [0, 1, 4, 6])
def test_exact_number_under_ties(keep: int) -> None:
    for scope in ("layer", "global"):
        kept = kept_experts(torch.zeros(LAYERS, EXPERTS), EVERYONE, keep=keep, scope=scope)
        assert sum(map(len, kept)) == keep * LAYERS
    kept = kept_experts(torch.zeros(LAYERS, EXPERTS), EVERYONE, keep=keep)
    assert [len(stay) for stay in kept] == [keep] * LAYERS


@pytest.mark.parametrize(("keep", "gone"), [(2, 12), (2.5, 11), (4 / 3, 14), (5.9, 0), (5.5, 2), (6, 0), (4.2, 5)])
def test_keep_is_a_mean_over_layers_under_global(keep: float, gone: int) -> None:
    """``round((M - n) * L)`` experts go in total, halves up."""
    assert gone == half_up((EXPERTS - keep) * LAYERS)
    kept = kept_experts(torch.rand(LAYERS, EXPERTS), EVERYONE, keep=keep, scope="global", floor=1)
    assert sum(map(len, kept)) == EXPERTS * LAYERS - gone


def test_floor_shifts_the_budget_to_other_layers() -> None:
    score = torch.tensor([[0.0, 1, 2, 3, 4, 5], [10.0, 11, 12, 13, 14, 15], [20.0, 21, 22, 23, 24, 25]])
    kept = kept_experts(score, EVERYONE, keep=3, scope="global", floor=2)
    assert kept == [(4, 5), (4, 5), (1, 2, 3, 4, 5)]


def test_keeping_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="keep=7"):
        kept_experts(torch.zeros(LAYERS, EXPERTS), EVERYONE, keep=7)
    with pytest.raises(ValueError, match=r"keep=6\.5"):
        kept_experts(torch.zeros(LAYERS, EXPERTS), EVERYONE, keep=6.5, scope="global")
    with pytest.raises(ValueError, match="keep=5"):
        kept_experts(torch.zeros(2, EXPERTS), [(0, 1, 2, 3, 4, 5), (0, 1)], keep=5)


def test_a_ratio_means_its_decimal_number() -> None:
    """0.29 * 50 is 14.499999999999998 in binary."""
    scores = torch.arange(50, dtype=torch.float64).unsqueeze(0)
    (kept,) = kept_experts(scores, [tuple(range(50))], ratio=0.29)
    assert kept == tuple(range(15, 50))


# Over all layers: the smallest sum, proved by trying everything.

small_scores = st.lists(
    st.lists(st.integers(-2, 4).map(lambda n: n / 2), min_size=3, max_size=3), min_size=3, max_size=3
)
small_weights = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=3, max_size=3)


@settings(max_examples=80, deadline=None)
@given(score=small_scores, weights=small_weights, removed=st.integers(0, 9), floor=st.integers(0, 2))
def test_sensitivity_scope_has_the_smallest_weighted_sum_of_all_choices(
    score: list[list[float]], weights: list[float], removed: int, floor: int
) -> None:
    cells = list(itertools.product(range(3), range(3)))
    choices = [
        choice
        for choice in itertools.combinations(cells, removed)
        if all(sum(row == layer for row, _ in choice) <= 3 - floor for layer in range(3))
    ]
    arguments = {"keep": 3 - removed / 3, "scope": "sensitivity", "floor": floor, "weights": weights}
    if not choices:
        with pytest.raises(ValueError, match="every layer must keep"):
            kept_experts(torch.tensor(score), [(0, 1, 2)] * 3, **arguments)
        return
    best = min(sum(weights[row] * score[row][expert] for row, expert in choice) for choice in choices)
    gone = dropped(kept_experts(torch.tensor(score), [(0, 1, 2)] * 3, **arguments), [(0, 1, 2)] * 3)
    assert sum(map(len, gone)) == removed and all(len(members) <= 3 - floor for members in gone)
    assert sum(weights[row] * score[row][expert] for row in range(3) for expert in gone[row]) == pytest.approx(best)


def test_weights_move_the_budget_to_the_layers_where_it_costs_least() -> None:
    score = torch.arange(1.0, 7.0).repeat(3, 1)
    kept = kept_experts(score, EVERYONE, keep=3, scope="sensitivity", floor=1, weights=[100.0, 1.0, 1.0])
    assert [len(stay) for stay in kept] == [6, 1, 2]
    assert kept_experts(score, EVERYONE, keep=3, scope="sensitivity", weights=[2.0] * 3) == kept_experts(
        score, EVERYONE, keep=3, scope="global"
    )


def test_equal_costs_go_by_score_then_by_layer() -> None:
    score = torch.tensor([[5.0, 1, 1], [0, 0, 0], [0, 2, 9]])
    kept = kept_experts(score, [(0, 1, 2)] * 3, keep=5 / 3, scope="sensitivity", weights=[0.0, 0.0, 0.0])
    assert kept == [(0, 1, 2), (), (1, 2)]


def test_a_weight_is_the_loss_for_each_unit_of_removed_score() -> None:
    ranking = ScoreRanking(torch.tensor([[4.0, 1, 3], [0, 0, 2], [0, 0, 0], [-1, 0.5, 7]]), [(0, 1, 2)] * 4)
    trials = [ranking.trial_count(row, count, 3) for row, count in enumerate([2, 1, 1, 0])]
    # Dead experts teach nothing about the living: such a trial goes on until a score above zero is gone.
    assert trials == [2, 3, 3, 3]
    weights = layer_weights(ranking, trials, [8.0, 3.0, 0.7, 1.3])
    assert weights == pytest.approx([8 / (1 + 3), 3 / 2, 0.0, 1.3 / 6.5])
    assert ranking.trial_count(1, 1, 2) == 2, "the floor ends it"
    assert ranking.trial_count(1, 1, 0) == 0
    assert layer_weights(ranking, [2, 2, 2, 1], [8.0, 3.0, 0.7, 1.3])[1:] == [0.0, 0.0, 0.0]
    # What rounding makes negative is nothing, and a quotient beyond all numbers is the largest of them.
    assert layer_weights(ScoreRanking(torch.tensor([[1.0], [1e-300]]), [(0,)] * 2), [1, 1], [-1e-9, 1e300])[0] == 0.0
    assert math.isfinite(layer_weights(ScoreRanking(torch.full((1, 1), 1e-300).double(), [(0,)]), [1], [1e300])[0])
    with pytest.raises(ValueError, match="not finite"):
        layer_weights(ranking, trials, [math.nan, 1, 1, 1])


@settings(max_examples=60, deadline=None)
@given(
    score=scores,
    room=st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS),
    data=st.data(),
)
def test_even_counts_differ_by_one_and_the_extra_ones_cost_least(
    score: torch.Tensor, room: list[int], data: st.DataObject
) -> None:
    removed = data.draw(st.integers(0, sum(room)))
    ranking = ScoreRanking(score, EVERYONE)
    counts = even_counts(removed, room, ranking.next_cost)
    assert sum(counts) == removed and all(count <= space for count, space in zip(counts, room, strict=True))
    free = [count for count, space in zip(counts, room, strict=True) if count < space]
    assert not free or max(counts) - min(free) <= 1
    level = max(counts, default=0) - 1
    cost = np.sort(score.numpy(), axis=1)
    extra = [row for row in range(LAYERS) if counts[row] == level + 1]
    for row in range(LAYERS):
        if counts[row] == level < room[row]:  # it could have given one more
            assert all((cost[other, level], other) < (cost[row, level], row) for other in extra)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    score = torch.zeros(LAYERS, EXPERTS)
    score[1, 4] = math.nan
    with pytest.raises(ValueError, match=r"no finite score for experts \[4\] in row 1"):
        kept_experts(score, EVERYONE, keep=3)
    kept_experts(score, [(0, 1, 2, 3, 5)] * 3, keep=3)  # nobody asks for it


def test_negative_scores_are_scores() -> None:
    score = torch.tensor([[-1.0, 2, -3], [0, -2, 5]])
    assert kept_experts(score, [(0, 1, 2)] * 2, keep=1) == [(1,), (2,)]
    assert kept_experts(score, [(0, 1, 2)] * 2, keep=1.5, scope="global") == [(1,), (0, 2)]
