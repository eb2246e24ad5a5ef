"""Scales that change nothing before rounding, and searches that never do worse than none."""

import pytest
import torch
from torch import Tensor

from moe_lightning.slimming import (
    Balanced,
    Scheme,
    dequantize,
    output_error,
    round_by_awq,
    round_to_nearest,
    scale_consumer,
    scale_producer,
)
from moe_lightning.slimming.awq import scale_moment, search_clip, search_scale
from tests.slimming.problems import hessian_of, inputs_of, weights

SCHEME = Scheme(4, 16)


def group_behind_a_norm(full: bool = True) -> tuple[list[Balanced], Tensor]:
    """Four experts with tokens of their own, and a router that sees them all."""
    tokens = inputs_of(1, 80, 32)[0].reshape(4, 20, 32)
    everything = tokens.reshape(1, 80, 32)
    moments = [hessian_of(tokens), hessian_of(everything)]
    if not full:
        moments = [moment.diagonal(dim1=1, dim2=2) for moment in moments]
    experts = Balanced(weights(4, 24, 32), moments[0], SCHEME)
    router = Balanced(weights(1, 4, 32, seed=1), moments[1], None)
    return [experts, router], tokens


@pytest.mark.parametrize("full", [True, False])
def test_nothing_changes_before_rounding(full: bool) -> None:
    """With powers of two to the last bit even in bf16: the router picks the same experts."""
    members, tokens = group_behind_a_norm(full)
    norm = weights(1, 1, 32, seed=2)[0, 0]
    scale = search_scale(members).scale
    assert scale.shape == (1, 32)
    assert not torch.allclose(scale, torch.ones_like(scale))
    for member in members:
        before = (tokens * norm) @ member.weight.mT
        after = (tokens * scale_producer(norm, scale)) @ scale_consumer(member.weight, scale).mT
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    exact = search_scale(members, power_of_two=True).scale
    assert not torch.allclose(exact, torch.ones_like(exact))
    for member in members:
        weight, short = member.weight.bfloat16(), norm.bfloat16()
        before = short * weight
        assert torch.equal(scale_producer(short, exact) * scale_consumer(weight, exact), before)


def test_between_up_and_down_every_expert_has_its_own() -> None:
    tokens, up = inputs_of(3, 40, 8), weights(3, 16, 8, seed=1)
    hidden = tokens @ up.mT
    down = Balanced(weights(3, 6, 16), hessian_of(hidden), SCHEME)
    found = search_scale([down], shared=False)
    assert found.scale.shape == (3, 16)
    after = (tokens @ scale_producer(up, found.scale).mT) @ scale_consumer(down.weight, found.scale).mT
    torch.testing.assert_close(after, hidden @ down.weight.mT, rtol=1e-10, atol=1e-10)
    for slot in range(3):
        one = slice(slot, slot + 1)
        alone = search_scale([Balanced(down.weight[one], down.moment[one], SCHEME)])
        torch.testing.assert_close(found.scale[one], alone.scale)
        torch.testing.assert_close(found.loss[one], alone.loss)


# A symmetric grid has the largest weight of a group half a step off, to the side that rounding errors choose: with full
# moments that decides over a cross term, so that no two implementations agree.
@pytest.mark.parametrize(("full", "symmetric"), [(True, False), (False, False), (False, True)])
def test_the_search_is_that_of_a_loop(full: bool, symmetric: bool) -> None:
    members, _ = group_behind_a_norm(full)
    scheme = Scheme(4, 16, symmetric)
    members[0] = members[0]._replace(scheme=scheme)
    found = search_scale(members)
    weight, moment = members[0].weight, members[0].moment
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
    found = search_scale([Balanced(weight, moment, SCHEME)])
    torch.testing.assert_close(found.scale, torch.ones_like(moment))
    exact = search_scale([Balanced(weight, moment, SCHEME)], power_of_two=True)
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


def test_clips_are_sought_on_what_is_rounded() -> None:
    """On the weights times the scale, with the inputs divided by it."""
    members, tokens = group_behind_a_norm()
    result = round_by_awq(members)
    scale = result.balance.scale
    weight = members[0].weight * scale
    clip = search_clip(weight, hessian_of(tokens / scale), SCHEME)
    expected = round_to_nearest(weight, SCHEME, clip)
    assert clip.min() < 1
    for got, wanted in zip(result.quantized[0], expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_awq_beats_rounding(shared: bool, power_of_two: bool) -> None:
    """With a diagonal moment both searches measure the whole error, so that neither can do harm."""
    moment = inputs_of(12, 50, 64).square().sum(1)
    member = Balanced(weights(12, 16, 64), moment, Scheme(4, 32))
    result = round_by_awq([member], shared=shared, power_of_two=power_of_two)
    back = dequantize(result.quantized[0]) / result.balance.scale[:, None, :]
    error = output_error(member.weight, back, moment)
    total, identity = float(error.sum()), float(result.balance.identity_loss.sum())
    nearest = output_error(member.weight, dequantize(round_to_nearest(member.weight, member.scheme)), moment)
    assert identity == pytest.approx(float(nearest.sum()), rel=1e-9)
    assert total <= float(result.balance.loss.sum()) * (1 + 1e-9)
    assert total < 0.9 * identity
    if not shared:
        assert (error <= nearest * (1 + 1e-9)).all()
    plain = round_by_awq([member], shared=shared, power_of_two=power_of_two, clip=False)
    back = dequantize(plain.quantized[0]) / plain.balance.scale[:, None, :]
    torch.testing.assert_close(output_error(member.weight, back, moment).sum(), plain.balance.loss.sum())


def test_awq_beats_rounding_with_full_moments_on_average() -> None:
    hessian = hessian_of(inputs_of(24, 200, 64))
    member = Balanced(weights(24, 32, 64), hessian, Scheme(4, 32))
    result = round_by_awq([member], shared=False)
    back = dequantize(result.quantized[0]) / result.balance.scale[:, None, :]
    nearest = dequantize(round_to_nearest(member.weight, member.scheme))
    whole = output_error(member.weight, 0 * member.weight, hessian)
    errors = [float((output_error(member.weight, other, hessian) / whole).sum()) for other in (back, nearest)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_starved_experts(full: bool, shared: bool) -> None:
    tokens = inputs_of(3, 1, 32).float()
    tokens[0] = 0
    tokens[2, 0, :31] = 0
    moment = hessian_of(tokens) if full else tokens.square().sum(1)
    member = Balanced(weights(3, 8, 32).float(), moment, SCHEME)
    result = round_by_awq([member], shared=shared)
    assert result.status == (("rtn fallback: no input reached it", "awq", "awq"),)
    back = dequantize(result.quantized[0]) / result.balance.scale[:, None, :]
    assert back.isfinite().all()
    assert (back.count_nonzero((1, 2)) > 100).all()
    if not shared:
        assert torch.equal(back[:1], dequantize(round_to_nearest(member.weight[:1], SCHEME)))


def test_nobody_reached() -> None:
    member = Balanced(weights(2, 4, 32), torch.zeros(2, 32, dtype=torch.float64), SCHEME)
    result = round_by_awq([member])
    assert torch.equal(result.balance.scale, torch.ones(1, 32, dtype=torch.float64))
    assert torch.equal(result.quantized[0].codes, round_to_nearest(member.weight, SCHEME).codes)


def test_members_that_stay_have_a_say_in_nothing() -> None:
    members, _ = group_behind_a_norm()
    result = round_by_awq(members)
    assert result.quantized[1] is None
    assert result.status[1] == ("rescaled only",)
    torch.testing.assert_close(result.balance.scale, round_by_awq(members[:1]).balance.scale)


def test_moments_are_those_of_the_divided_inputs() -> None:
    tokens, scale = inputs_of(2, 10, 8), torch.rand(1, 8, dtype=torch.float64) + 0.5
    divided = tokens / scale
    torch.testing.assert_close(scale_moment(hessian_of(tokens), scale), hessian_of(divided))
    torch.testing.assert_close(scale_moment(tokens.square().sum(1), scale), divided.square().sum(1))


def test_refusals() -> None:
    members, _ = group_behind_a_norm()
    with pytest.raises(ValueError, match="all schemes are None"):
        search_scale(members[1:])
    with pytest.raises(ValueError, match="as many matrices"):
        search_scale(members, shared=False)
    with pytest.raises(ValueError, match="one input"):
        search_scale([*members, Balanced(weights(1, 4, 16), torch.ones(1, 16), None)])
    with pytest.raises(ValueError, match="do not fit"):
        search_scale([members[0]._replace(moment=torch.ones(3, 32))])
    with pytest.raises(ValueError, match="finite"):
        search_scale([members[0]._replace(moment=torch.full((4, 32), torch.nan))])
    with pytest.raises(ValueError, match="2 scales"):
        scale_producer(torch.ones(4), torch.ones(2, 4))
