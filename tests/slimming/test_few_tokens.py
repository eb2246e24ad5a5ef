"""Few tokens: what a method learns from them must not cost other tokens more than having learnt nothing."""

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.slimming import (
    Scheme,
    Selection,
    SlimmedLayer,
    dequantize,
    output_error,
    prune_by_magnitude,
    prune_by_sparse_gpt,
    round_by_gptq,
    round_to_nearest,
)
from moe_lightning.slimming.hessian import inverse_factor
from tests.slimming.problems import hessian_of, weights
from tests.slimming.views import LayerInMemory

INPUTS = 256


def products(tokens: int, seed: int, sizes: Tensor | float = 1.0) -> Tensor:
    """Return tokens as down matrices see them, ``relu(a) b``: nearly uncorrelated, often zero."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, tokens, INPUTS, generator=generator)
    return torch.relu(a) * b * sizes


def normal(tokens: int, seed: int, sizes: Tensor | float = 1.0) -> Tensor:
    """Return correlated tokens of full rank."""
    mixing = torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(7)) / INPUTS**0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, INPUTS, generator=generator) @ (mixing + 2 * torch.eye(INPUTS)) * sizes


def hot() -> Tensor:
    sizes = torch.ones(INPUTS)
    sizes[::37] = 12
    return sizes


@pytest.mark.parametrize("draw", [products, normal])
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 1024])
def test_feedback_on_other_tokens(draw: object, tokens: int) -> None:
    """At one per cent of damping the errors of 64 to 256 tokens are up to twice those of rounding."""
    weight = weights(1, 96, INPUTS).float()
    seen, other = draw(tokens, 1), hessian_of(draw(3000, 2))[None]  # type: ignore[operator]
    hessian, counts = hessian_of(seen)[None], torch.tensor([tokens])
    scheme, selection = Scheme(4, 64), Selection(0.5)
    rounded = dequantize(round_by_gptq(weight, hessian, scheme, tokens=counts).quantized)
    nearest = dequantize(round_to_nearest(weight, scheme))
    assert output_error(weight, rounded, other) < 1.15 * output_error(weight, nearest, other)
    pruned = prune_by_sparse_gpt(weight, hessian, selection, tokens=counts).weight
    smallest = prune_by_magnitude(weight, selection).weight
    assert output_error(weight, pruned, other) < 1.1 * output_error(weight, smallest, other)


def test_statuses_say_where_damping_outweighs_what_was_measured() -> None:
    weight, tokens = weights(4, 4, 32), torch.tensor([0, 10, 33, 100_000])
    hessian = torch.eye(32, dtype=torch.float64).repeat(4, 1, 1)
    hessian[0] = 0
    rounded = round_by_gptq(weight, hessian, Scheme(4, 16), tokens=tokens)
    assert rounded.status == ("rtn fallback: no input reached it", "gptq damp x300", "gptq", "gptq")
    pruned = prune_by_sparse_gpt(weight, hessian, Selection(0.5), tokens=tokens)
    assert pruned.status == ("magnitude fallback: no input reached it", "sparsegpt damp x300", "sparsegpt", "sparsegpt")
    inverse = inverse_factor(hessian, tokens_S=tokens)
    assert inverse.dampings[1:] == pytest.approx((3.2, 32 / 33, 0.01))


def one_expert(seen: Tensor) -> LayerInMemory:
    """Return a layer whose matrices all get the same tokens."""
    stacks = {
        "gate_up_proj": weights(1, 2 * INPUTS, INPUTS, seed=1).float()[:, : 2 * INPUTS],
        "down_proj": weights(1, 64, INPUTS, seed=2).float(),
    }
    inputs = {"gate_up_proj": [seen], "down_proj": [seen]}
    return LayerInMemory("experts", stacks, lambda _: inputs, [torch.ones(len(seen))], norm=torch.ones(INPUTS))


def slim(method: ml.AWQ | ml.RTN | ml.GPTQ, view: LayerInMemory) -> SlimmedLayer:
    return method.slim(method.edit(view.layer, view.target), view)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_awq_on_other_tokens(tokens: int, power_of_two: bool) -> None:
    view, other = one_expert(products(tokens, 1, hot())), hessian_of(products(3000, 2, hot()))[None]
    made = slim(ml.AWQ(group_size=64, power_of_two=power_of_two), view)
    nearest = slim(ml.RTN(group_size=64), view)
    weight = view.weight("gate_up_proj")[:, :INPUTS]  # rows of up are divided as well
    scale = dict(made.rescale)["norm"].reciprocal()
    assert scale.max() <= 16 and scale.min() >= 1 / 16
    errors = []
    for layer, factor in ((made, scale), (nearest, torch.ones(INPUTS))):
        back = dequantize(layer.matrices["gate_up_proj"])[:, :INPUTS] / factor
        errors.append(float(output_error(weight, back, other)))
    assert errors[0] < 1.1 * errors[1]
