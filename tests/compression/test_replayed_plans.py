"""Plans with formats, replayed: the same weights again."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Quantize, Sparsify
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.pruners import SparseGPT, Wanda
from moe_lightning.slimming.quantizers import GPTQ, RTN
from moe_lightning.surgery import plan_of
from tests.compression.rounding_method import BATCHES, compress
from tests.lora import fill_terms
from tests.models import tiny_mixtral


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


REPLAYED: dict[str, Sequence[Method]] = {
    "gptq with options": [GPTQ(group_size=16, desc_act=True, damping=0.2, propagate="original")],
    "awq on attention": [AWQ(group_size=16, targets="experts+attention", clip=False)],
    "pruned, then rounded": [SparseGPT(pattern="2:4"), GPTQ(group_size="channel", symmetric=True)],
    "router-weighted": [Wanda(sparsity=0.25, router_weighted=True, scope="matrix")],
    "mixed": [RTN(group_size=16, targets="experts"), ml.Novices(keep=4), ml.ExpertDrop(keep=5), ml.BlockDrop(count=1)],
    "trimmed first": [ml.LayerDrop(count=1), ml.Merge(keep=4), Wanda(pattern="4:8", targets="experts+attention")],
}


@pytest.mark.parametrize("methods", REPLAYED.values(), ids=REPLAYED)
def test_a_plan_makes_the_same_weights_again(methods: Sequence[Method]) -> None:
    one, other, third = tiny_mixtral(), tiny_mixtral(), tiny_mixtral()
    result = compress(one, list(methods))
    again = compress(other, plan=CompressionPlan.from_json(result.plan.to_json()))
    assert again.plan == result.plan
    # A replay can be replayed.
    thrice = compress(third, plan=CompressionPlan.from_json(again.plan.to_json()))
    assert thrice.plan == result.plan
    want = state(one)
    for model in (other, third):
        for name, tensor in state(model).items():
            assert torch.equal(tensor, want[name]), name


def test_a_plan_written_by_hand_takes_the_methods_that_its_edits_name() -> None:
    plan = CompressionPlan(
        (
            ml.KeepExperts(1, (0, 2, 5)),
            Quantize(2, "experts", 4, 16, method="gptq"),
            Quantize(0, "attention", 8, "channel", True, method="rtn"),
            Sparsify(0, "experts", pattern="2:4", method="router_wanda"),
            Quantize(0, "experts", 4, 16, method="awq"),
            Sparsify(1, "experts", sparsity=0.5, scope="matrix"),
        )
    )
    model = tiny_mixtral()
    result = compress(model, plan=plan)
    assert result.plan.edits == plan.edits == plan_of(model).edits
    # Without how far GPTQ had to damp.
    said = {
        name: {status.partition(" damp")[0] for status in module.matrices.values()}
        for name, module in result.modules.items()
    }
    assert said["model.layers.0.mlp.experts"] == {"router wanda, then awq"}
    assert said["model.layers.0.self_attn"] == {"rtn"}
    assert said["model.layers.1.mlp.experts"] == {"magnitude"}
    assert said["model.layers.2.mlp.experts"] == {"gptq"}
    with pytest.raises(ValueError, match=r"unknown method 'magic' in the plan: known are awq, gptq.*router_wanda"):
        compress(tiny_mixtral(), plan=CompressionPlan((Quantize(0, method="magic"),)))


def test_the_edits_of_a_plan_hold_where_its_history_says_something_else() -> None:
    result = compress(tiny_mixtral(), GPTQ(group_size=16, damping=0.3))
    edits = tuple(dataclasses.replace(edit, group_size="channel") for edit in result.plan.edits)  # type: ignore[type-var]
    model = tiny_mixtral()
    compress(model, plan=CompressionPlan(edits, result.plan.origin))
    other = tiny_mixtral()
    compress(other, GPTQ(group_size="channel", damping=0.3))
    for name, tensor in state(other).items():
        assert torch.equal(tensor, state(model)[name]), name


def test_methods_before_and_after_trimming_give_working_models() -> None:
    novices = ml.Novices(keep=4, novice="low_rank", rank=2)
    for methods in ([GPTQ(group_size=16), novices], [novices, GPTQ(group_size=16)]):
        model = tiny_mixtral()
        result = compress(model, [*methods, ml.BlockDrop(count=1)])
        assert result.touched == result.claimed
        with torch.no_grad():
            assert torch.isfinite(model(**BATCHES[0]).logits).all()
        experts = model.model.layers[0].mlp.experts
        assert experts.novices.dtype == torch.float32 and experts.storage.format.bits == 4


def test_that_terms_learnt_something_is_in_no_plan() -> None:
    one = tiny_mixtral()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # making such a plan is no reason to warn
        ml.compress(one, None, [RTN(group_size=16), ml.LoRA(rank=2)], progress=False)
    fill_terms(one)
    plan = compress(one, ml.MergeLoRA()).plan
    with pytest.warns(UserWarning, match="what they learnt is in no plan") as found:
        again = ml.compress(tiny_mixtral(), None, plan=plan, progress=False)
    assert again.plan.edits == plan.edits
    assert len([item for item in found if "in no plan" in str(item.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.compress(tiny_mixtral(), None, plan=CompressionPlan(plan.edits[:3], plan.origin), progress=False)
