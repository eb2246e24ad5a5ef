"""Rounding to nearest, and GPTQ against a naive one, column by column in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lightning.slimming import Quantized, Scheme, dequantize, output_error, round_by_gptq, round_to_nearest
from tests.slimming.problems import damped, hessian_of, inputs_of, weights

SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (4, 8)
    for group, symmetric in ((8, False), (4, True), ("channel", False), ("channel", True))
]


def naive_grid(group: np.ndarray, scheme: Scheme) -> tuple[float, float]:
    if scheme.symmetric:
        return 2 * np.abs(group).max() / (2**scheme.bits - 1), 2 ** (scheme.bits - 1)
    low, high = min(group.min(), 0), max(group.max(), 0)
    scale = (high - low) / (2**scheme.bits - 1)
    return scale, np.round(-low / scale)


def naive_code(value: float, grid: tuple[float, float], bits: int) -> float:
    return np.clip(np.round(value / grid[0]) + grid[1], 0, 2**bits - 1)


def naive_rtn(weight: Tensor, scheme: Scheme) -> np.ndarray:
    result = weight.numpy().copy()
    size = scheme.group_of(result.shape[1])
    for row in result:
        for first in range(0, len(row), size):
            grid = naive_grid(row[first : first + size], scheme)
            for place in range(first, first + size):
                row[place] = (naive_code(row[place], grid, scheme.bits) - grid[1]) * grid[0]
    return result


def naive_gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, order: list[int], static: bool) -> np.ndarray:
    """Feed errors back with the inverse of what is free computed anew for every column."""
    weight, hessian = weight.numpy().copy(), damped(hessian).numpy()
    result, original = np.zeros_like(weight), weight.copy()
    size = scheme.group_of(weight.shape[1])
    grids: dict[tuple[int, int], tuple[float, float]] = {}
    for step, column in enumerate(order):
        free = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(free, free)])
        first = column // size * size
        for row in range(len(weight)):
            if (row, first) not in grids:
                source = original if static else weight
                grids[row, first] = naive_grid(source[row, first : first + size], scheme)
            grid = grids[row, first]
            value = (naive_code(weight[row, column], grid, scheme.bits) - grid[1]) * grid[0]
            weight[row, free] -= (weight[row, column] - value) / inverse[0, 0] * inverse[0]
            result[row, column] = value
    return result


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_to_nearest(scheme: Scheme) -> None:
    weight = weights(3, 5, 16) + 0.3
    quantized = round_to_nearest(weight, scheme)
    back = dequantize(quantized)
    for slot in range(3):
        np.testing.assert_allclose(back[slot].numpy(), naive_rtn(weight[slot], scheme), rtol=1e-12)
    step = quantized.scale.repeat_interleave(16 // quantized.scale.shape[-1], -1)
    assert ((back - weight).abs() <= 0.5 * step * (1 + 1e-9) + (0 if scheme.symmetric else 0.5) * step).all()
    assert quantized.codes.dtype == quantized.zero.dtype == torch.uint8
    assert quantized.codes.max() <= scheme.max_code
    # Which matrices there are makes no difference to the others.
    assert torch.equal(back[[2, 0]], dequantize(round_to_nearest(weight[[2, 0]], scheme)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("columns", "desc_act", "static"), [(8, False, False), (8, True, True), (40, False, True)])
def test_gptq(scheme: Scheme, columns: int, desc_act: bool, static: bool) -> None:
    weight, hessian = weights(2, 3, columns), hessian_of(inputs_of(2, 60, columns))
    result = round_by_gptq(weight, hessian, scheme, desc_act=desc_act, static_groups=static)
    back = dequantize(result.quantized).numpy()
    for slot in range(2):
        order = list(range(columns))
        if desc_act:
            order.sort(key=lambda column: -float(hessian[slot, column, column]))
        expected = naive_gptq(weight[slot], hessian[slot], scheme, order, static)
        np.testing.assert_allclose(back[slot], expected, rtol=1e-9, atol=1e-12)
    assert result.status == ("gptq", "gptq")


def test_gptq_on_four_columns_in_groups_of_any_size() -> None:
    for columns, group in ((4, 2), (4, "channel"), (18, 6), (33, 11), (300, 150)):
        weight, hessian = weights(1, 2, columns), hessian_of(inputs_of(1, 400, columns))
        got = dequantize(round_by_gptq(weight, hessian, Scheme(4, group)).quantized)[0].numpy()
        if columns < 50:
            expected = naive_gptq(weight[0], hessian[0], Scheme(4, group), list(range(columns)), False)
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_starved_experts(scheme: Scheme, desc_act: bool) -> None:
    """No token: rounded to nearest; one token: finite and close. Never all zeros."""
    weight, tokens = weights(3, 6, 16).float(), inputs_of(3, 1, 16).float()
    tokens[0] = 0
    tokens[2, 0, :15] = 0
    hessian = hessian_of(tokens)
    result = round_by_gptq(weight, hessian, scheme, desc_act=desc_act)
    back, nearest = dequantize(result.quantized), dequantize(round_to_nearest(weight, scheme))
    torch.testing.assert_close(back[0], nearest[0], rtol=0, atol=0)
    assert result.status == ("rtn fallback: no input reached it", "gptq", "gptq")
    assert back.isfinite().all()
    assert (back.count_nonzero((1, 2)) > 48).all()
    error = output_error(weight, back, hessian)
    assert error[1] < output_error(weight, nearest, hessian)[1]


@pytest.mark.parametrize("desc_act", [False, True])
def test_all_at_once_is_one_after_another(desc_act: bool) -> None:
    weight, hessian = weights(4, 6, 48), hessian_of(inputs_of(4, 60, 48))
    together = round_by_gptq(weight, hessian, Scheme(4, 16), desc_act=desc_act).quantized
    for slot in range(4):
        one = slice(slot, slot + 1)
        alone = round_by_gptq(weight[one], hessian[one], Scheme(4, 16), desc_act=desc_act).quantized
        assert torch.equal(together.codes[one], alone.codes)
        torch.testing.assert_close(together.scale[one], alone.scale)


def test_gptq_beats_rounding_on_average() -> None:
    """No theorem for one matrix, so summed over many; fp32 does as well as float64."""
    weight, hessian = weights(24, 32, 64), hessian_of(inputs_of(24, 200, 64))
    whole = output_error(weight, 0 * weight, hessian)

    def total(back: Tensor) -> float:
        return float((output_error(weight, back.double(), hessian) / whole).sum())

    scheme = Scheme(4, 32)
    nearest = total(dequantize(round_to_nearest(weight, scheme)))
    for desc_act in (False, True):
        exact = total(dequantize(round_by_gptq(weight, hessian, scheme, desc_act=desc_act).quantized))
        assert exact < 0.9 * nearest
        single = round_by_gptq(weight.float(), hessian, scheme, desc_act=desc_act).quantized
        assert total(dequantize(single)) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_codes_belong_to_the_scales_that_are_kept(symmetric: bool, scale_dtype: torch.dtype) -> None:
    """Scales are rounded before the codes are taken, and what comes back is exact in fp32."""
    weight = weights(2, 4, 64).float()
    scheme = Scheme(4, 32, symmetric, scale_dtype)
    for quantized in (
        round_to_nearest(weight, scheme),
        round_by_gptq(weight, hessian_of(inputs_of(2, 100, 64)).float(), scheme).quantized,
    ):
        assert quantized.scale.dtype == scale_dtype
        wide = Quantized(quantized.codes, quantized.scale.double(), quantized.zero)
        assert torch.equal(dequantize(quantized).double(), dequantize(wide))
    first = round_to_nearest(weight, scheme)
    steps = (weight.double() / first.scale.double().repeat_interleave(32, -1)).round()
    nearest = (steps + first.zero.double().repeat_interleave(32, -1)).clamp(0, 15)
    assert torch.equal(first.codes.double(), nearest)


def test_zeros_stay_zeros() -> None:
    """A pruned weight is on every grid, and a group of zeros has one."""
    weight = weights(2, 4, 32)
    weight[:, :, ::2] = 0
    weight[0, 0] = 0
    for scheme in (Scheme(4, 16), Scheme(4, 16, symmetric=True), Scheme(8, "channel")):
        quantized = round_to_nearest(weight, scheme)
        back = dequantize(quantized)
        assert (quantized.scale > 0).all()
        assert (back[weight == 0] == 0).all()
        assert back.isfinite().all()


def test_group_sizes() -> None:
    assert [Scheme(group_size="auto").group_of(columns) for columns in (256, 192, 96)] == [128, 64, 32]
    assert Scheme(group_size="channel").group_of(77) == 77
    for scheme, columns in ((Scheme(), 64), (Scheme(group_size="auto"), 48)):
        with pytest.raises(ValueError, match=rf"divides? the input size {columns}"):
            scheme.group_of(columns)


@pytest.mark.parametrize("options", [{"bits": 3}, {"group_size": 0}, {"group_size": "row"}])
def test_refused_schemes(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Scheme(**options)


def test_refusals() -> None:
    weight, hessian = weights(1, 2, 8), hessian_of(inputs_of(1, 20, 8))
    with pytest.raises(ValueError, match="static_groups"):
        round_by_gptq(weight, hessian, Scheme(4, 4), desc_act=True, static_groups=False)
    with pytest.raises(ValueError, match="not finite"):
        round_by_gptq(weight, hessian * torch.nan, Scheme(4, 4))
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(weight * torch.inf, Scheme(4, 4))
    with pytest.raises(ValueError, match="floating-point"):
        round_to_nearest(weight[0], Scheme(4, 4))
