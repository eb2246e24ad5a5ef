"""Errors of all subsets of a layer, against an untouched model with the other experts masked."""

import itertools

import numpy as np
import pytest
import torch

import moe_lightning as ml
from moe_lightning.statistics import merge_statistics
from moe_lightning.statistics.subsets import subset_number
from tests.models import random_batches, tiny_mixtral
from tests.reference import record, untouched

EXPERTS = 4
BATCHES = random_batches(3, 2, 7)
BATCHES[1]["attention_mask"] = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])


def test_every_subset_equals_a_masked_run() -> None:
    model = untouched(num_local_experts=EXPERTS, attn_implementation="sdpa")
    intact = record(model, BATCHES)
    statistics = ml.collect(model, BATCHES, {"subsets"}, progress=False)
    assert statistics["subset_tokens"].item() == sum(len(layer.mixed) for layer in intact[:1]) == 38
    for layer in range(3):
        for size in range(1, EXPERTS + 1):
            for stays in itertools.combinations(range(EXPERTS), size):
                gone = set(range(EXPERTS)) - set(stays)
                mixed = record(model, BATCHES, {layer: gone})[layer].mixed
                expected = ((mixed - intact[layer].mixed) ** 2).sum(1).mean()
                got = float(statistics["subset_error"][layer, subset_number(stays)])
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


def test_parts_merge_to_the_whole() -> None:
    model = untouched(num_local_experts=EXPERTS, attn_implementation="sdpa")
    whole = ml.collect(model, BATCHES, {"subsets"}, progress=False)
    merged = merge_statistics([ml.collect(model, [batch], {"subsets"}, progress=False) for batch in BATCHES])
    torch.testing.assert_close(merged["subset_error"], whole["subset_error"], equal_nan=True)


def test_a_layer_that_has_lost_experts_knows_only_its_own_subsets() -> None:
    model = tiny_mixtral(num_local_experts=EXPERTS)
    ml.compress(model, BATCHES, plan=ml.CompressionPlan((ml.KeepExperts(1, (0, 2, 3)),)), progress=False)
    error = ml.collect(model, BATCHES, {"subsets"}, progress=False)["subset_error"]
    known = {number for number in range(1, 16) if not number & 0b10}
    assert {int(number) for number in (~error[1].isnan()).nonzero()} == known
    assert float(error[1, subset_number((0, 2, 3))]) == 0.0
    assert (~error[0].isnan()).sum() == 15


def test_expert_drop_keeps_the_best_measured_subset() -> None:
    model = tiny_mixtral(num_local_experts=EXPERTS)
    error = ml.collect(model, BATCHES, {"subsets"}, progress=False)["subset_error"]
    result = ml.compress(model, BATCHES, ml.ExpertDrop(keep=2, criterion="naee_dense"), progress=False)
    for row, edit in enumerate(result.plan.edits):
        pairs = list(itertools.combinations(range(EXPERTS), 2))
        assert edit.experts == min(pairs, key=lambda pair: float(error[row, subset_number(pair)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ml.Novices(keep=3, criterion="naee_dense"), "use criterion=naee"),
        (lambda: ml.ExpertDrop(keep=3, criterion="naee_dense", router="keep"), "router=slice"),
        (lambda: ml.ExpertDrop(keep=3, criterion="naee_dense", scope="global"), "scope"),
        (
            lambda: ml.compress(tiny_mixtral(num_local_experts=12), [], ml.ExpertDrop(keep=3, criterion="naee_dense")),
            "up to 10 experts",
        ),
        (lambda: ml.collect(tiny_mixtral(num_local_experts=12), BATCHES, {"subsets"}), "up to 10 experts"),
    ],
)
def test_what_cannot_be_is_an_early_error(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
