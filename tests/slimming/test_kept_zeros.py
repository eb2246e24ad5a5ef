"""Weights that are gone already: they go first, stay zero, and counts stay exact."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lightning.slimming import (
    Scheme,
    Selection,
    dequantize,
    keep_mask,
    output_error,
    prune_by_magnitude,
    prune_by_sparse_gpt,
    prune_by_wanda,
    round_by_gptq,
    round_to_nearest,
)
from moe_lightning.slimming.masks import keep_largest
from tests.slimming.problems import damped, hessian_of, inputs_of, weights
from tests.slimming.test_rounding import naive_code, naive_grid

STEPS = [
    (Selection(sparsity=0.3), Selection(sparsity=0.6)),
    (Selection(sparsity=0.3, scope="matrix"), Selection(sparsity=0.6, scope="matrix")),
    (Selection(sparsity=0.3), Selection(sparsity=0.5, scope="matrix")),
    (Selection(pattern="1:4"), Selection(pattern="2:4")),
    (Selection(pattern="2:4"), Selection(pattern="4:8")),
]


def problem(columns: int = 40) -> tuple[Tensor, Tensor]:
    return weights(3, 6, columns), hessian_of(inputs_of(3, 100, columns))


def prune(name: str, weight: Tensor, hessian: Tensor, selection: Selection, keep: Tensor | None, block: int = 16):
    if name == "magnitude":
        return prune_by_magnitude(weight, selection, keep)
    if name == "wanda":
        return prune_by_wanda(weight, hessian.diagonal(dim1=1, dim2=2).sqrt(), selection, keep)
    return prune_by_sparse_gpt(weight, hessian, selection, keep, block=block)


def zeros_of(selection: Selection, outputs: int, columns: int) -> int:
    if selection.counts is not None:
        return outputs * columns * selection.counts[0] // selection.counts[1]
    if selection.scope == "row":
        return outputs * int(selection.sparsity * columns + 0.5)
    return int(selection.sparsity * outputs * columns + 0.5)


@pytest.mark.parametrize(("first", "then"), STEPS, ids=str)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
def test_masks_are_nested_and_counts_exact(name: str, start: str, first: Selection, then: Selection) -> None:
    """Blocks of columns with more zeros than their share leave fewer to the others."""
    weight, hessian = problem()
    old = prune(start, weight, hessian, first, None)
    # Training in between moves what is left.
    moved = (old.weight + 0.3 * weights(3, 6, 40, seed=7)) * old.keep
    new = prune(name, moved, hessian, then, old.keep)
    assert not (new.keep & ~old.keep).any()
    assert ((~new.keep).sum((1, 2)) == zeros_of(then, 6, 40)).all()
    assert torch.equal(new.weight == 0, ~new.keep)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_a_large_weight_that_is_live_goes_after_those_that_are_gone(name: str) -> None:
    """A weight that training brought to zero is not one that is gone."""
    weight, hessian = problem(8)
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, :, :4] = False
    weight = weight * keep
    weight[:, :, 4] = 0
    new = prune(name, weight, hessian, Selection(sparsity=0.5), keep)
    assert torch.equal(new.keep, keep)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("then", [Selection(sparsity=0.25), Selection(pattern="1:4"), Selection(0.25, scope="matrix")])
def test_more_zeros_than_are_asked_for_stay(name: str, then: Selection) -> None:
    weight, hessian = problem()
    old = prune("wanda", weight, hessian, Selection(sparsity=0.6, scope="matrix"), None)
    new = prune(name, old.weight, hessian, then, old.keep)
    assert (new.weight[~old.keep] == 0).all()
    assert ((~new.keep).sum((1, 2)) == zeros_of(then, 6, 40)).all()
    assert new.weight.isfinite().all()


def test_what_is_left_makes_up_for_what_goes_next() -> None:
    """The second step of SparseGPT is optimal brain surgery in which the places of old zeros are not free."""
    weight, hessian = problem(8)
    old = prune_by_sparse_gpt(weight, hessian, Selection(pattern="1:4"))
    new = prune_by_sparse_gpt(old.weight, hessian, Selection(pattern="2:4"), old.keep)
    for slot in range(3):
        expected, matrix = old.weight[slot].clone(), damped(hessian[slot])
        for column in range(8):
            inverse = torch.linalg.inv(matrix[column:, column:])
            if column % 4 == 0:
                price = torch.stack([torch.linalg.inv(matrix[at:, at:])[0, 0] for at in range(column, column + 4)])
                cost = expected[:, column : column + 4] ** 2 / price
                cost[~old.keep[slot, :, column : column + 4]] = -1
                keep = keep_mask(cost[None], Selection(pattern="2:4"))[0]
            for row in range(6):
                if not keep[row, column % 4]:
                    expected[row, column:] -= expected[row, column] / inverse[0, 0] * inverse[0]
                    expected[row, column] = 0
        torch.testing.assert_close(new.weight[slot], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_zeros(bits: int, desc_act: bool, symmetric: bool) -> None:
    weight, hessian = problem()
    pruned = prune_by_sparse_gpt(weight, hessian, Selection(pattern="2:4"))
    scheme = Scheme(bits, 8, symmetric)
    result = round_by_gptq(pruned.weight, hessian, scheme, pruned.keep, desc_act=desc_act)
    back = dequantize(result.quantized)
    assert (back[~pruned.keep] == 0).all()
    nearest = dequantize(round_to_nearest(pruned.weight, scheme))
    assert (nearest[~pruned.keep] == 0).all()
    total = [output_error(pruned.weight, other, hessian).sum() for other in (back, nearest)]
    assert total[0] < 0.9 * total[1]
    # Without the mask the errors of other columns would fill the zeros again.
    free = dequantize(round_by_gptq(pruned.weight, hessian, scheme, desc_act=desc_act).quantized)
    assert (free[~pruned.keep] != 0).any()


def test_gptq_with_zeros_is_a_naive_one() -> None:
    weight, hessian = problem(16)
    keep = prune_by_magnitude(weight, Selection(sparsity=0.5)).keep
    scheme = Scheme(4, 8)
    back = dequantize(round_by_gptq(weight, hessian, scheme, keep).quantized)
    for slot in range(3):
        left, matrix = (weight * keep)[slot].numpy().copy(), damped(hessian[slot]).numpy()
        mask = keep[slot].numpy()
        expected = np.zeros_like(left)
        for column in range(16):
            inverse = np.linalg.inv(matrix[column:, column:])
            first = column // 8 * 8
            if column == first:
                part = slice(first, first + 8)
                grids = [naive_grid(left[row, part] * mask[row, part], scheme) for row in range(6)]
            for row, grid in enumerate(grids):
                code = naive_code(left[row, column], grid, 4) if mask[row, column] else grid[1]
                expected[row, column] = (code - grid[1]) * grid[0]
                left[row, column:] -= (left[row, column] - expected[row, column]) / inverse[0, 0] * inverse[0]
        np.testing.assert_allclose(back[slot].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_counts_of_their_own_for_every_row() -> None:
    score = (weights(2, 5, 9) * 3).round()  # with ties
    keep = torch.tensor([[0, 1, 4, 8, 9], [9, 3, 0, 2, 5]])
    found = keep_largest(score, keep)
    for slot in range(2):
        for row in range(5):
            expected = keep_largest(score[slot, row], int(keep[slot, row]))
            assert torch.equal(found[slot, row], expected)


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_portions_make_no_difference(at_once: int | None) -> None:
    weight, hessian = problem()
    keep = prune_by_magnitude(weight, Selection(sparsity=0.25)).keep
    whole = prune_by_sparse_gpt(weight, hessian, Selection(sparsity=0.5), keep, at_once=3)
    parts = prune_by_sparse_gpt(weight, hessian, Selection(sparsity=0.5), keep, at_once=at_once)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-9, atol=1e-11)
    assert torch.equal(whole.keep, parts.keep)
    assert whole.status == parts.status
    rounded = [round_by_gptq(weight, hessian, Scheme(4, 8), keep, at_once=n).quantized.codes for n in (3, at_once)]
    assert torch.equal(*rounded)


def test_refusals() -> None:
    weight, hessian = problem()
    with pytest.raises(ValueError, match=r"keep .* does not fit"):
        prune_by_magnitude(weight, Selection(sparsity=0.5), torch.ones(3, 6, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keep .* does not fit"):
        round_by_gptq(weight, hessian, Scheme(4, 8), torch.ones(3, 6, 40))
    with pytest.raises(ValueError, match="at_once"):
        round_by_gptq(weight, hessian, Scheme(4, 8), at_once=0)
