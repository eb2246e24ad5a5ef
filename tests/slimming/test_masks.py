"""Exact counts, ties by index, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.slimming import Selection, keep_mask
from tests.slimming.problems import weights


def kept_by_sorting(scores: list[float], keep: int) -> list[bool]:
    best = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:keep]
    return [place in best for place in range(len(scores))]


@pytest.mark.parametrize(("pattern", "zeros", "size"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_patterns_have_exact_counts_and_ties_go_by_index(pattern: str, zeros: int, size: int, levels: int) -> None:
    """With 1:4 a quarter is zero, not three quarters."""
    scores = (weights(2, 3, 16).abs() * 10).round() % levels
    keep = keep_mask(scores, Selection(pattern=pattern))
    for score, kept in zip(scores.reshape(-1, size).tolist(), keep.reshape(-1, size).tolist(), strict=True):
        assert kept == kept_by_sorting(score, size - zeros)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=24),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.99]),
    st.integers(1, 3),
)
def test_shares_are_exact_under_ties(row: list[int], sparsity: float, rows: int) -> None:
    scores = torch.tensor([[row] * rows, [row[::-1]] * rows], dtype=torch.float32)
    by_row = keep_mask(scores, Selection(sparsity=sparsity))
    keep = len(row) - int(sparsity * len(row) + 0.5)
    assert by_row[0, 0].tolist() == kept_by_sorting(row, keep)
    assert by_row[1, -1].tolist() == kept_by_sorting(row[::-1], keep)
    whole = keep_mask(scores, Selection(sparsity=sparsity, scope="matrix"))
    everything = row * rows
    keep = len(everything) - int(sparsity * len(everything) + 0.5)
    assert whole[0].flatten().tolist() == kept_by_sorting(everything, keep)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either"),
        ({"pattern": 124}, "quotes"),
        ({"pattern": "3:4"}, "none of 2:4"),
        ({"sparsity": 1.0}, "share of zeros"),
        ({"sparsity": float("nan")}, "share of zeros"),
        ({"sparsity": 0.5, "scope": "column"}, "scope"),
    ],
)
def test_refused_selections(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Selection(**options)


def test_refused_scores() -> None:
    with pytest.raises(ValueError, match="divisible by 8, got 12"):
        keep_mask(torch.ones(1, 1, 12), Selection(pattern="4:8"))
    with pytest.raises(ValueError, match="not finite"):
        keep_mask(torch.full((1, 1, 4), torch.nan), Selection(sparsity=0.5))
