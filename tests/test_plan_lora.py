"""Edits of low-rank terms: what they refuse, how they are written, and the sizes that they claim."""

import dataclasses
import json
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import (
    AddLora,
    CompressionPlan,
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    LoraRank,
    MergeExperts,
    MergeLora,
    ModelShape,
    NoviceExperts,
    Quantize,
    Sparsify,
)
from tests.lora import BASES, adapted_mixtral
from tests.models import tiny_mixtral

EXPERTS, ATTENTION = AddLora(0, "experts", 4, 8.0), AddLora(0, "attention", 2, 3.0)


def shape_after(*edits: Edit) -> ModelShape:
    model = tiny_mixtral()
    return CompressionPlan(edits).check(architecture_of(model).shape(model))


def test_terms_are_noted_and_change_nothing_else() -> None:
    before, after = shape_after(), shape_after(EXPERTS, dataclasses.replace(ATTENTION, layer=2))
    assert after.layout(0).lora == after.lora(0, "experts") == LoraRank(4, 8.0)
    assert after.attention_lora == ((2, LoraRank(2, 3.0)),) and after.lora(2, "attention") == LoraRank(2, 3.0)
    assert after.lora(1, "experts") is after.lora(0, "attention") is None
    assert dataclasses.replace(after, layouts=before.layouts, attention_lora=()) == before
    assert after.uncompressed() == before
    merged = shape_after(EXPERTS, MergeLora(0))
    assert merged == before


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((EXPERTS, EXPERTS), "layer 0: its experts have low-rank terms already: merge them first"),
        ((ATTENTION, ATTENTION), "layer 0: its attention has low-rank terms already"),
        ((dataclasses.replace(EXPERTS, rank=0),), "rank of low-rank terms must be 1 or more, not 0"),
        ((dataclasses.replace(EXPERTS, alpha=0.0),), "alpha must be positive, not 0"),
        ((dataclasses.replace(EXPERTS, layer=3),), "layer 3 is not an MoE layer"),
        ((dataclasses.replace(ATTENTION, layer=3),), "layer 3 is not a decoder layer"),
        ((DropMoE(0), EXPERTS), "layer 0 is not an MoE layer of this model"),
        ((DropBlock(0), ATTENTION), "layer 0 is not a decoder layer"),
        ((NoviceExperts(0, (0, 1, 2, 3, 4, 5)), EXPERTS), "layer 0 has no real expert to put low-rank terms beside"),
        ((MergeLora(0),), "layer 0: its experts have no low-rank terms to merge"),
        ((EXPERTS, MergeLora(0, "attention")), "layer 0: its attention has no low-rank terms to merge"),
        ((EXPERTS, MergeLora(0), MergeLora(0)), "no low-rank terms to merge"),
        *(
            (
                (EXPERTS, edit),
                f"cannot {verb} the experts, because its experts have low-rank terms: fold .*merge: true.*MergeLoRA",
            )
            for edit, verb in (
                (KeepExperts(0, (0, 1)), "drop"),
                (NoviceExperts(0, (1,)), "replace"),
                (MergeExperts(0, ((0, 1, 2, 3, 4, 5),)), "merge"),
                (KeepChannels(0, 16), "take channels out of"),
                (Sparsify(0, pattern="2:4"), "prune"),
                (Quantize(0, group_size=16), "quantise"),
            )
        ),
        (
            (ATTENTION, Sparsify(0, "attention", pattern="2:4")),
            "cannot prune the attention, because its attention has low-rank terms",
        ),
        (
            (ATTENTION, Quantize(0, "attention", group_size=16)),
            "cannot quantise the attention, because its attention has low-rank terms",
        ),
    ],
)
def test_what_does_not_fit_is_refused(edits: tuple[Edit, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_after(*edits)


def test_what_stands_elsewhere_does_not_mind() -> None:
    after = shape_after(EXPERTS, Quantize(0, "attention", group_size=16), KeepExperts(1, (0, 1)), KeepChannels(2, 16))
    assert after.layout(0).lora and after.attention_format(0)
    # Terms go with their layers.
    assert shape_after(EXPERTS, ATTENTION, DropBlock(0)).attention_lora == ()
    without = shape_after(EXPERTS, ATTENTION, DropMoE(0))
    assert without.attention_lora and without.moe_layers == (1, 2)
    # After merging everything is as if they had never been.
    assert shape_after(EXPERTS, MergeLora(0), KeepExperts(0, (0, 1))) == shape_after(KeepExperts(0, (0, 1)))


@pytest.mark.parametrize("target", ["experts", "attention"])
@pytest.mark.parametrize("sparse", [None, "2:4"])
def test_merging_may_leave_integers_in_floating_point_and_zeros_where_they_are(target: Any, sparse: str | None) -> None:
    first: tuple[Edit, ...] = () if sparse is None else (Sparsify(0, target, pattern=sparse),)
    edits: tuple[Edit, ...] = (*first, Quantize(0, target, group_size=16), AddLora(0, target, 4, 8.0))
    assert shape_after(*edits, MergeLora(0, target)) == shape_after(*edits[:-1])
    assert shape_after(*edits, MergeLora(0, target, dequantize=True)) == shape_after(*first)
    again = shape_after(*edits, MergeLora(0, target, True), Quantize(0, target, group_size=16))
    assert again == shape_after(*edits[:-1])


def test_written_and_read() -> None:
    plan = CompressionPlan((EXPERTS, ATTENTION, MergeLora(0, dequantize=True)), {"seed": 1})
    for again in (CompressionPlan.from_json(plan.to_json()), CompressionPlan.from_dict(plan.to_dict())):
        assert again == plan and again.edits == plan.edits
    entry = json.loads(plan.to_json())["edits"][0]
    assert entry == {"kind": "add_lora", "layer": 0, "target": "experts", "rank": 4, "alpha": 8.0}
    for change, message in (({"rank": "4"}, "rank"), ({"alpha": "x"}, "alpha"), ({"target": "router"}, "target")):
        with pytest.raises(ValueError, match=message):
            CompressionPlan.from_dict({**plan.to_dict(), "edits": [{**entry, **change}]})
    shape = shape_after(EXPERTS, ATTENTION)
    assert ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape
    old = shape_after().to_dict()  # as files had it before there were terms
    del old["attention_lora"]
    for layout in old["layouts"]:
        del layout["lora"]
    assert ModelShape.from_dict(old) == shape_after()


@pytest.mark.parametrize("base", BASES)
def test_parameters_and_bytes_are_those_measured(base: str) -> None:
    model = adapted_mixtral(base, rank=5)
    shape, size = architecture_of(model).shape(model), ml.measure(model)
    terms = {name: tensor for name, tensor in model.named_parameters() if "lora" in name}
    # By hand: R (outputs + inputs) of gate_up [96, 32] and down [32, 48] for six experts, and of q, k, v, o.
    by_hand = 5 * (6 * (96 + 32 + 32 + 48) + (32 + 32) * 2 + (16 + 32) * 2)
    assert sum(tensor.numel() for tensor in terms.values()) == 3 * by_hand
    assert shape.parameters == size.parameters == model.num_parameters()
    assert shape.layouts[0].lora_parameters(32, 48) + shape.attention_lora_parameters(0) == by_hand
    assert shape.bytes == sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with torch.device("meta"):
        built = ml.build(model.config)
    assert ml.measure(built).parameters == size.parameters
