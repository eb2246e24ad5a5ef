"""Pruning against its formulas, column by column in float64."""

import pytest
import torch
from torch import Tensor

from moe_lightning.slimming import (
    Selection,
    keep_mask,
    output_error,
    prune_by_magnitude,
    prune_by_router_wanda,
    prune_by_sparse_gpt,
    prune_by_wanda,
)
from tests.slimming.problems import damped, hessian_of, inputs_of, weights

HALF = Selection(sparsity=0.5)
SELECTIONS = [
    HALF,
    Selection(sparsity=0.3),
    Selection(sparsity=0.5, scope="matrix"),
    Selection(pattern="2:4"),
    Selection(pattern="4:8"),
    Selection(pattern="1:4"),
]


def naive_sparse_gpt(weight: Tensor, hessian: Tensor, selection: Selection, block: int) -> Tensor:
    """Optimal brain surgery with the inverse of what is free computed anew for every column."""
    weight, hessian = weight.clone(), damped(hessian)
    outputs, columns = weight.shape
    keep = torch.ones_like(weight, dtype=torch.bool)
    width = block if selection.counts is None else selection.counts[1]
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(columns)]
    for column in range(columns):
        if column % width == 0:
            end = min(column + width, columns)
            price = torch.stack([inverses[place][0, 0] for place in range(column, end)])
            cost = weight[:, column:end] ** 2 / price
            if selection.counts is not None:
                keep[:, column:end] = keep_mask(cost[None], selection)[0]
            else:
                rows = cost if selection.scope == "row" else cost.reshape(1, -1)
                each = rows.shape[1] // (end - column)
                count = [int(selection.sparsity * each * place + 0.5) for place in (column, end)]
                chosen = torch.ones_like(rows, dtype=torch.bool)
                for row, mask in zip(rows, chosen, strict=True):
                    mask[row.argsort()[: count[1] - count[0]]] = False
                keep[:, column:end] = chosen.reshape(outputs, -1)
        for row in range(outputs):
            if not keep[row, column]:
                inverse = inverses[column]
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize(("columns", "block"), [(8, 128), (40, 16), (24, 8)])
def test_sparse_gpt_is_optimal_brain_surgery(selection: Selection, columns: int, block: int) -> None:
    weight, hessian = weights(3, 8, columns), hessian_of(inputs_of(3, 100, columns))
    pruned = prune_by_sparse_gpt(weight, hessian, selection, block=block)
    for slot in range(3):
        expected = naive_sparse_gpt(weight[slot], hessian[slot], selection, block)
        torch.testing.assert_close(pruned.weight[slot], expected, rtol=1e-8, atol=1e-10)
    assert pruned.status == ("sparsegpt",) * 3
    assert torch.equal(pruned.weight != 0, pruned.keep)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("columns", [8, 200])
def test_counts(selection: Selection, columns: int) -> None:
    """Blocks of columns share the zeros out so that their sum is exact, too."""
    weight, hessian = weights(2, 5, columns), hessian_of(inputs_of(2, 30, columns))
    norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
    for pruned in (
        prune_by_magnitude(weight, selection),
        prune_by_wanda(weight, norm, selection),
        prune_by_sparse_gpt(weight, hessian, selection),
    ):
        zero = pruned.weight == 0
        assert torch.equal(zero, ~pruned.keep)
        if selection.counts is not None:
            assert (zero.unflatten(-1, (-1, selection.counts[1])).sum(-1) == selection.counts[0]).all()
        elif selection.scope == "row":
            assert (zero.sum(-1) == int(selection.sparsity * columns + 0.5)).all()
        else:
            assert (zero.sum((1, 2)) == int(selection.sparsity * columns * 5 + 0.5)).all()


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_wanda_with_unit_inputs_is_magnitude(selection: Selection) -> None:
    weight = weights(3, 6, 16)
    expected = prune_by_magnitude(weight, selection).weight
    assert torch.equal(prune_by_wanda(weight, torch.ones(3, 16), selection).weight, expected)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_wanda_is_its_formula(selection: Selection) -> None:
    weight, tokens = weights(3, 6, 16), inputs_of(3, 20, 16)
    gate = torch.rand(3, 20, 1, dtype=torch.float64)
    for prune, seen in ((prune_by_wanda, tokens), (prune_by_router_wanda, gate * tokens)):
        norm = seen.norm(dim=1)
        keep = keep_mask(weight.abs() * norm[:, None, :], selection)
        pruned = prune(weight, norm, selection)
        assert torch.equal(pruned.weight, weight * keep)


def test_the_smallest_go() -> None:
    weight = torch.tensor([[[1.0, -4.0, 3.0, -2.0]]])
    assert prune_by_magnitude(weight, Selection(pattern="2:4")).weight.tolist() == [[[0, -4, 3, 0]]]
    norm = torch.tensor([[10.0, 1.0, 1.0, 1.0]])
    assert prune_by_wanda(weight, norm, Selection(pattern="2:4")).weight.tolist() == [[[1, -4, 0, 0]]]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_starved_experts(selection: Selection) -> None:
    """No token: magnitude, whatever is chosen among; one token: something sensible. Never all zeros, never NaN."""
    weight = weights(3, 6, 16).float()
    tokens = inputs_of(3, 1, 16).float()
    tokens[0] = 0
    tokens[2, 0, :15] = 0
    hessian = hessian_of(tokens)
    by_wanda = prune_by_wanda(weight, tokens.norm(dim=1), selection)
    by_surgery = prune_by_sparse_gpt(weight, hessian, selection)
    expected = prune_by_magnitude(weight, selection)
    assert torch.equal(by_wanda.weight[0], expected.weight[0])
    torch.testing.assert_close(by_surgery.weight[0], expected.weight[0], rtol=0, atol=0)
    assert by_wanda.status == ("magnitude fallback: no input reached it", "wanda", "wanda")
    assert by_surgery.status == ("magnitude fallback: no input reached it", "sparsegpt", "sparsegpt")
    for pruned in (by_wanda, by_surgery):
        assert pruned.weight.isfinite().all()
        assert (pruned.weight.count_nonzero((1, 2)) >= 48).all()


def test_inputs_that_no_token_used_go_first_and_the_small_ones_before_the_large() -> None:
    weight = torch.tensor([[[3.0, -1.0, 2.0, 0.5]]])
    norm = torch.tensor([[0.0, 0.0, 0.0, 0.1]])
    pruned = prune_by_wanda(weight, norm, Selection(pattern="2:4"))
    assert pruned.weight.tolist() == [[[3.0, 0, 0, 0.5]]]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_at_once_is_one_after_another(selection: Selection, dtype: torch.dtype) -> None:
    weight, hessian = weights(4, 6, 48).to(dtype), hessian_of(inputs_of(4, 60, 48)).to(dtype)
    together = prune_by_sparse_gpt(weight, hessian, selection)
    for slot in range(4):
        alone = prune_by_sparse_gpt(weight[slot : slot + 1], hessian[slot : slot + 1], selection)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(together.weight[slot], alone.weight[0], rtol=tolerance, atol=tolerance)


def test_the_order_that_averages_show() -> None:
    """No theorem for one matrix; summed over many, SparseGPT < Wanda < magnitude."""
    for selection in (HALF, Selection(pattern="2:4")):
        totals = []
        weight, hessian = weights(24, 32, 64), hessian_of(inputs_of(24, 200, 64))
        norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
        for pruned in (
            prune_by_sparse_gpt(weight, hessian, selection),
            prune_by_wanda(weight, norm, selection),
            prune_by_magnitude(weight, selection),
        ):
            relative = output_error(weight, pruned.weight, hessian) / output_error(weight, 0 * weight, hessian)
            totals.append(float(relative.sum()))
        assert totals[0] < 0.95 * totals[1] < 0.95**2 * totals[2]


def test_bf16_weights_stay_bf16() -> None:
    weight, hessian = weights(2, 4, 16).bfloat16(), hessian_of(inputs_of(2, 40, 16))
    for pruned in (prune_by_magnitude(weight, HALF), prune_by_sparse_gpt(weight, hessian, HALF)):
        assert pruned.weight.dtype == torch.bfloat16
        assert (pruned.weight == 0).sum() == weight.numel() / 2


def test_refusals() -> None:
    weight, hessian = weights(2, 4, 16), hessian_of(inputs_of(2, 40, 16))
    with pytest.raises(ValueError, match="do not fit"):
        prune_by_sparse_gpt(weight, hessian[:1], HALF)
    with pytest.raises(ValueError, match="do not fit"):
        prune_by_wanda(weight, torch.ones(2, 4), HALF)
    with pytest.raises(ValueError, match="at least 0"):
        prune_by_wanda(weight, -torch.ones(2, 16), HALF)
    with pytest.raises(ValueError, match="multiple of 8"):
        prune_by_sparse_gpt(weight, hessian, HALF, block=12)
    hessian[1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"matrices \[1\]"):
        prune_by_sparse_gpt(weight, hessian, HALF)
    weight[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"matrices \[0\]"):
        prune_by_magnitude(weight, HALF)
