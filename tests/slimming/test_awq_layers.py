"""AWQ on a whole layer: nothing changes before rounding, the router's choice included."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_lightning as ml
from moe_lightning.slimming import SlimmedLayer, balancing, dequantize, output_error
from moe_lightning.slimming.awq import diagonal_of, smoothed
from tests.slimming.views import LayerInMemory, attention_layer, experts_layer


class Exact(balancing._Work):
    """AWQ whose rounding does nothing: what is left is the rescaling."""

    def rounded(self, name: str, scale_ZI: Tensor, divided: tuple[int, Tensor] | None) -> Tensor:
        weight = self.view.weight(name) * scale_ZI[:, None, :].to(self.view.weight(name).dtype)
        if divided is not None:
            weight[:, divided[0] :] /= divided[1][:, :, None].to(weight.dtype)
        return weight


def slim(method: ml.AWQ, view: LayerInMemory) -> SlimmedLayer:
    return method.slim(method.edit(view.layer, view.target), view)


def factors(made: SlimmedLayer) -> dict[str, Tensor]:
    return dict(made.rescale)


def experts_by_hand(stacks: dict[str, Tensor], slot: int, x: Tensor) -> Tensor:
    gate, up = (x @ stacks["gate_up_proj"][slot].mT).chunk(2, -1)
    return (F.silu(gate) * up) @ stacks["down_proj"][slot].mT


@pytest.mark.parametrize("loss", ["full", "diagonal"])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_experts_router_and_maps_compute_what_they_did(
    power_of_two: bool, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancing, "_Work", Exact)
    view = experts_layer()
    made = slim(ml.AWQ(group_size=16, power_of_two=power_of_two, loss=loss), view)
    factor = factors(made)
    assert set(factor) == {"norm", "router", "novice_in"}
    if not power_of_two:  # else the powers of two bring nothing here
        assert not torch.allclose(factor["norm"], torch.ones_like(factor["norm"]))
    unit = torch.randn(20, 32, dtype=torch.float64)  # what the norm makes before its weight
    before, after = unit * view.norm_weight, unit * (view.norm_weight * factor["norm"])
    for name in ("router", "novice_in"):
        weight = view.router_weight if name == "router" else view.novice_in
        logits = before @ weight.mT
        torch.testing.assert_close(after @ (weight * factor[name]).mT, logits, rtol=1e-12, atol=1e-12)
    for slot in range(3):
        torch.testing.assert_close(
            experts_by_hand(made.matrices, slot, after), experts_by_hand(view.stacks, slot, before)
        )
    # Both balance groups have scales of their own.
    assert not torch.allclose(made.matrices["down_proj"], view.weight("down_proj"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_token_keeps_its_experts_to_the_last_bit(dtype: torch.dtype) -> None:
    view = experts_layer(dtype=dtype, slots=4)
    factor = factors(slim(ml.AWQ(group_size=16), view))
    unit = torch.randn(200, 32).to(dtype)
    before = (unit * view.norm_weight) @ view.router_weight.mT
    norm = (view.norm_weight * factor["norm"]).to(dtype)
    router = (view.router_weight * factor["router"]).to(dtype)
    assert not torch.equal(norm, view.norm_weight)
    after = (unit * norm) @ router.mT
    assert torch.equal(before, after)
    assert torch.equal(before.topk(2).indices, after.topk(2).indices)


@pytest.mark.parametrize("values", [32, 16])
def test_attention(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between v and o there is a scale only where each head of v is read by one head of o."""
    monkeypatch.setattr(balancing, "_Work", Exact)
    view = attention_layer(values=values)
    made = slim(ml.AWQ(group_size=16, power_of_two=False), view)
    factor = factors(made)
    assert set(factor) == {"norm"}
    unit = torch.randn(20, 32, dtype=torch.float64)
    before, after = unit * view.norm_weight, unit * (view.norm_weight * factor["norm"])
    for name in ("q_proj", "k_proj"):
        torch.testing.assert_close(after @ made.matrices[name][0].mT, before @ view.weight(name)[0].mT)
    inner = [states @ stacks["v_proj"][0].mT for states, stacks in ((before, view.stacks), (after, made.matrices))]
    out = [
        values_.repeat_interleave(32 // values, -1) @ stacks["o_proj"][0].mT
        for values_, stacks in zip(inner, (view.stacks, made.matrices), strict=True)
    ]
    torch.testing.assert_close(out[0], out[1])
    assert torch.equal(made.matrices["o_proj"], view.weight("o_proj")) == (values == 16)


@pytest.mark.parametrize("loss", ["full", "diagonal"])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("group_size", [8, 16])
def test_never_worse_than_rounding_to_nearest(group_size: int, power_of_two: bool, loss: str) -> None:
    """Scales and ranges are only taken where the loss that is counted is lower with them, cross terms or not."""
    options = {"group_size": group_size, "loss": loss}
    view = experts_layer(slots=6, tokens=60)
    nearest = slim(ml.AWQ(**options, points=1, clip=False), view)
    rtn = ml.RTN(group_size=group_size).slim(ml.RTN().edit(3, "experts"), view)
    for stack in view.matrices:
        assert torch.equal(nearest.matrices[stack].codes, rtn.matrices[stack].codes)
    assert torch.equal(factors(nearest)["norm"], torch.ones(32, dtype=torch.float64))
    made = slim(ml.AWQ(**options, power_of_two=power_of_two), view)
    for stack in view.matrices:
        moment = view.moments(stack, loss, range(6))
        whole = output_error(view.weight(stack), 0 * view.weight(stack), moment)
        total = [float((layer.errors[stack] * whole).sum()) for layer in (made, nearest)]
        assert total[0] < 0.97 * total[1]


def test_errors_are_those_of_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by the outputs, with the scales taken out again."""
    found = []

    class Recording(balancing._Work):
        def shorten(self, name: str, scale_ZI: Tensor | None) -> Tensor:
            found.append(super().shorten(name, scale_ZI))
            return found[-1]

    monkeypatch.setattr(balancing, "_Work", Recording)
    view = experts_layer()
    made = slim(ml.AWQ(group_size=16), view)
    _, own = found
    back = {name: dequantize(matrix).double() for name, matrix in made.matrices.items()}
    back["gate_up_proj"] *= factors(made)["norm"]
    back["gate_up_proj"][:, 16:] *= own[:, :, None]
    back["down_proj"] /= own[:, None, :]
    for name, weight in view.stacks.items():
        moment = view.moments(name, "full", range(3))
        expected = output_error(weight, back[name], moment) / output_error(weight, 0 * weight, moment)
        # Rows of up are divided after they were measured: their scales of 16 bits are rounded once more.
        tolerance = 0.05 if name == "gate_up_proj" else 1e-6
        torch.testing.assert_close(made.errors[name], expected, rtol=tolerance, atol=0)


def test_nobody_reached() -> None:
    view = experts_layer(counts=[0, 0, 0])
    made = slim(ml.AWQ(group_size=16), view)
    for _, factor in made.rescale:
        assert torch.equal(factor, torch.ones_like(factor))
    rtn = ml.RTN(group_size=16).slim(ml.RTN().edit(3, "experts"), view)
    for stack in view.matrices:
        assert torch.equal(made.matrices[stack].codes, rtn.matrices[stack].codes)
        assert made.statuses[stack] == ("rtn fallback: 0 tokens",) * 3


def test_whole_moments_are_measured_no_more_often_than_needed() -> None:
    """Once for all where they fit; else diagonals first, then twice behind the norm and once between up and down."""
    view = experts_layer()
    slim(ml.AWQ(group_size=16), view)
    everyone = (0, 1, 2)
    assert view.passes == [("gate_up_proj", everyone), ("down_proj", everyone)]
    view = experts_layer(at_once=1)
    slim(ml.AWQ(group_size=16), view)
    each = [(0,), (1,), (2,)]
    expected = {"gate_up_proj": [everyone, *each, *each], "down_proj": [everyone, *each]}
    for name, passes in expected.items():
        assert [slots for stack, slots in view.passes if stack == name] == passes


def test_moments_are_left_as_they_were() -> None:
    view = experts_layer(counts=[0, 1, 60])
    for kind in ("full", "diagonal"):
        moment = view.moments("gate_up_proj", kind, range(3))
        before = moment.clone()
        with smoothed(moment, view.tokens):
            assert torch.equal(moment[0], before[0])
            more = (moment - before)[1:].flatten(1).sum(1)
            mean = diagonal_of(before).mean(1)[1:]
            torch.testing.assert_close(more, 32 * mean * 8 / torch.tensor([1, 60]))
        assert torch.equal(moment, before)
