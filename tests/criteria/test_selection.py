"""Who stays: exact counts, floors, rounding, ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.criteria import kept_experts

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
