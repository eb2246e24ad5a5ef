"""On a trained model: what no theorem says of one matrix holds for the sums over all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.slimming import Slimming
from tests.trained import text_batches, trained_mixtral

CALIBRATION = text_batches(12, seed=3)


def output_error(method: Slimming, prepare: Callable[[Any], Any] = lambda model: model) -> float:
    """Return the squared error of all MoE layers for the original model's inputs, in units of the outputs' squares."""
    original, model = prepare(trained_mixtral()), prepare(trained_mixtral())
    ml.compress(model, CALIBRATION, method, progress=False)
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for place, layer in enumerate(original.model.layers):
            other = model.model.layers[place]
            seen: list[Any] = []
            handle = layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            for batch in CALIBRATION:
                original(**batch)
            handle.remove()
            for states in seen:
                before = layer.mlp(layer.post_attention_layernorm(states))
                after = other.mlp(other.post_attention_layernorm(states))
                sums += torch.stack([(after - before).double().square().sum(), before.double().square().sum()])
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_sparsegpt_before_wanda_before_magnitude(options: dict[str, Any]) -> None:
    errors = [output_error(kind(**options)) for kind in (ml.SparseGPT, ml.Wanda, ml.Magnitude)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("group_size", [16, "channel"])
def test_gptq_and_awq_before_rtn(group_size: int | str) -> None:
    nearest = output_error(ml.RTN(group_size=group_size))
    assert output_error(ml.GPTQ(group_size=group_size)) < 0.9 * nearest
    assert output_error(ml.GPTQ(group_size=group_size, desc_act=True)) < 0.9 * nearest
    assert output_error(ml.AWQ(group_size=group_size)) < nearest


def with_outliers(model: Any) -> Any:
    """Make some inputs of the first layer's experts large and the weights that read them small: the same function."""
    layer, factor = model.model.layers[0], torch.ones(32)
    factor[:5] = 16
    with torch.no_grad():
        layer.post_attention_layernorm.weight *= factor
        layer.mlp.experts.gate_up_proj /= factor
        layer.mlp.gate.weight /= factor
    return model


def router_logits(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(**CALIBRATION[0])
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awq_leaves_every_token_its_experts(dtype: torch.dtype) -> None:
    """To the last bit: the factors are powers of two."""
    model = with_outliers(trained_mixtral(dtype))
    before, weight = router_logits(model), model.model.layers[0].mlp.gate.weight.detach().clone()
    ml.compress(model, CALIBRATION[:4], ml.AWQ(group_size="channel"), max_fallback=1.0, progress=False)
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, weight), "nothing was rescaled"
    assert torch.equal(router_logits(model), before)


def test_awq_finds_inputs_that_matter() -> None:
    """Large inputs with small weights cost rounding to nearest much, and AWQ little."""
    options = {"group_size": "channel"}
    nearest = output_error(ml.RTN(**options), with_outliers)
    assert output_error(ml.AWQ(**options), with_outliers) < 0.3 * nearest
