"""Errors of what leaves each block, against hooks on transformers' own model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import moe_lightning as ml
from moe_lightning.evaluation.layer_errors import LayerErrors, block_outputs
from tests.models import random_batches, tiny_mixtral


def by_hooks(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what leaves each layer of a model that transformers made, as its own hooks see it."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output)) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def errors_of(model: Any, before: Any, batches: list[dict[str, torch.Tensor]]) -> dict[int, float]:
    errors = LayerErrors()
    for batch in batches:
        reference = dict(enumerate(by_hooks(before, batch)))
        with torch.no_grad(), block_outputs(model) as outputs:
            model(**batch)
            errors.add(outputs, reference, batch.get("attention_mask"))
    return errors.compute()


def test_equals_hooks_on_the_untouched_model() -> None:
    before = tiny_mixtral()
    now = copy.deepcopy(before)
    with torch.no_grad():
        now.model.layers[1].mlp.experts.down_proj.mul_(0.5)
    batches = random_batches(2, seed=3)
    expected = []
    for layer in range(3):
        pairs = [(by_hooks(now, batch)[layer].double(), by_hooks(before, batch)[layer].double()) for batch in batches]
        error = sum(float((new - old).square().sum()) for new, old in pairs)
        expected.append(error / sum(float(old.square().sum()) for _, old in pairs))
    found = errors_of(now, before, batches)
    assert list(found) == [0, 1, 2]
    assert list(found.values()) == pytest.approx(expected, rel=1e-6)
    assert expected[0] == 0 < min(expected[1:])


def test_blocks_keep_their_numbers() -> None:
    """Of a model without block 1 the last block is compared with the last one of before."""
    before = tiny_mixtral()
    with torch.no_grad():  # the block that does least
        before.model.layers[1].self_attn.o_proj.weight.mul_(0.1)
        before.model.layers[1].mlp.experts.down_proj.mul_(0.1)
    now = copy.deepcopy(before)
    batches = random_batches(2, seed=3)
    ml.compress(now, batches, [ml.BlockDrop(count=1)], progress=False)
    assert len(now.model.layers) == 2
    found = errors_of(now, before, batches)
    assert list(found) == [0, 2] and found[0] == 0
    error = squares = 0.0
    for batch in batches:
        new, old = by_hooks(now, batch)[1].double(), by_hooks(before, batch)[2].double()
        error += float((new - old).square().sum())
        squares += float(old.square().sum())
    assert found[2] == pytest.approx(error / squares, rel=1e-6) and found[2] > 0


def test_padding_does_not_count() -> None:
    before = tiny_mixtral()
    now = copy.deepcopy(before)
    with torch.no_grad():
        now.model.embed_tokens.weight[2] += 5.0  # the padding token
        now.model.layers[2].mlp.experts.down_proj.mul_(0.9)
    batch = random_batches(1, seed=3)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -3:] = 0
    batch = {"input_ids": batch["input_ids"].masked_fill(mask == 0, 2), "attention_mask": mask}
    found = errors_of(now, before, [batch])
    assert max(found[0], found[1]) < 1e-12 < found[2]
    assert errors_of(now, before, [{"input_ids": batch["input_ids"]}])[0] > 1e-3


def test_outputs_are_held_inside_the_block_only() -> None:
    model = tiny_mixtral()
    with torch.no_grad(), block_outputs(model) as outputs:
        model(**random_batches(1)[0])
        assert [tuple(outputs[number].shape) for number in range(3)] == [(2, 11, 32)] * 3
    assert not outputs
    with torch.no_grad():
        model(**random_batches(1)[0])
    assert not outputs
