"""Scales that change nothing before rounding, and searches that never do worse than none."""

import pytest
import torch
from torch import Tensor

from moe_lightning.slimming import Scheme, dequantize, output_error, round_to_nearest
from moe_lightning.slimming.awq import (
    POINTS,
    Balance,
    best_scale,
    candidate_scales,
    column_sizes,
    diagonal_of,
    rounding_losses,
    scale_moment,
    search_clip,
)
from tests.slimming.problems import hessian_of, inputs_of, weights

SCHEME = Scheme(4, 16)


def search(weight: Tensor, moment: Tensor, scheme: Scheme, power_of_two: bool = False) -> Balance:
    """Find the scale that all matrices share."""
    square, size = diagonal_of(moment).sum(0, keepdim=True), column_sizes(weight, scheme).sum(0, keepdim=True)
    scales, ratios = candidate_scales(square, size, power_of_two=power_of_two, points=POINTS)
    return best_scale(scales, ratios, rounding_losses(scales, weight, moment, scheme).sum(1, keepdim=True))


# A symmetric grid has the largest weight of a group half a step off, to the side that rounding errors choose: with full
# moments that decides over a cross term, so that no two implementations agree.
@pytest.mark.parametrize(("full", "symmetric"), [(True, False), (False, False), (False, True)])
def test_the_search_is_that_of_a_loop(full: bool, symmetric: bool) -> None:
    scheme, weight = Scheme(4, 16, symmetric), weights(4, 24, 32)
    moment = hessian_of(inputs_of(1, 80, 32)[0].reshape(4, 20, 32))
    moment = moment if full else diagonal_of(moment)
    found = search(weight, moment, scheme)
    diagonal = moment.diagonal(dim1=1, dim2=2) if full else moment
    x = diagonal.sum(0).sqrt()
    groups = weight.abs().reshape(4, 24, 2, 16)
    w = (groups / groups.amax(-1, keepdim=True)).reshape(96, 32).mean(0)
    losses = []
    for ratio in [None, *torch.linspace(0, 1, 19, dtype=torch.float64).tolist()]:
        scale = torch.ones(32, dtype=torch.float64)
        if ratio is not None:
            scale = (x / x.mean()) ** ratio / (w / w.mean()) ** (1 - ratio)
            scale = scale / (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for slot in range(4):
            back = dequantize(round_to_nearest(weight[slot : slot + 1] * scale, scheme))[0] / scale
            change = back - weight[slot]
            matrix = moment[slot] if full else moment[slot].diag()
            loss += float((change @ matrix * change).sum())
        losses.append((loss, scale))
    best = min(losses, key=lambda pair: pair[0])
    assert float(found.loss) == pytest.approx(best[0], rel=1e-9)
    assert float(found.identity_loss) == pytest.approx(losses[0][0], rel=1e-9)
    assert best[0] < losses[0][0]
    torch.testing.assert_close(found.scale[0], best[1])


def test_uniform_inputs_and_columns_want_no_scale() -> None:
    row = weights(1, 1, 16)[0, 0]
    weight = torch.stack([row.roll(shift) for shift in range(16)])[None]
    moment = torch.full((1, 16), 7.0, dtype=torch.float64)
    found = search(weight, moment, SCHEME)
    torch.testing.assert_close(found.scale, torch.ones_like(moment))
    exact = search(weight, moment, SCHEME, power_of_two=True)
    assert torch.equal(exact.scale, torch.ones_like(moment))
    assert exact.ratio.isnan().all()


def test_clips_cover_the_best_share_of_each_group() -> None:
    weight, hessian = weights(2, 5, 32), hessian_of(inputs_of(2, 50, 32))
    weight[0, 0, 3] = 8
    for moment in (hessian, hessian.diagonal(dim1=1, dim2=2)):
        clip = search_clip(weight, moment, SCHEME)
        assert clip.shape == (2, 5, 2)
        assert clip.min() < 1
        assert ((clip > 0) & (clip <= 1)).all()
        for slot, row, group in ((0, 0, 0), (1, 4, 1), (1, 2, 0)):
            part = slice(16 * group, 16 * group + 16)
            one = weight[slot : slot + 1, row : row + 1, part]
            own = moment[slot : slot + 1, part] if moment.dim() == 2 else moment[slot : slot + 1, part, part]
            losses = {
                1 - step / 20: float(output_error(one, dequantize(round_to_nearest(one, SCHEME, 1 - step / 20)), own))
                for step in range(11)
            }
            assert losses[float(clip[slot, row, group])] == pytest.approx(min(losses.values()), rel=1e-9)


def test_moments_are_those_of_the_divided_inputs() -> None:
    tokens, scale = inputs_of(2, 10, 8), torch.rand(1, 8, dtype=torch.float64) + 0.5
    divided = tokens / scale
    torch.testing.assert_close(scale_moment(hessian_of(tokens), scale), hessian_of(divided))
    torch.testing.assert_close(scale_moment(tokens.square().sum(1), scale), divided.square().sum(1))


def test_scales_stay_near_one_another() -> None:
    """However far apart inputs are: else hot ones leave the others nothing of the grid."""
    square = torch.logspace(-12, 12, 32, dtype=torch.float64)[None]
    for power_of_two in (False, True):
        scales, _ = candidate_scales(square, torch.ones_like(square), power_of_two=power_of_two, points=POINTS)
        assert scales.min() == 1 / 16 and scales.max() == 16
