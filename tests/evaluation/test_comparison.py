"""One model against another: likelihood, divergence and agreement of every block, against numpy token by token."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from moe_lightning.evaluation.comparison import (
    BlockScores,
    Prediction,
    ReferencePredictions,
    join_scores,
    prediction_of,
    score_logits,
)
from moe_lightning.evaluation.likelihood import logits_of
from tests.models import random_batches, tiny_mixtral

NAMES = ("nats", "tokens", "bytes", "divergence", "agreement")


def held_out() -> list[dict[str, torch.Tensor]]:
    """Two batches; the second is padded, has bytes, tokens out of the loss, and a block in which none is predicted."""
    first, second = random_batches(2, batch=3, sequence=9, seed=4)
    labels = second["input_ids"].clone()
    labels[0, 3:5] = -100
    labels[1, 1:] = -100
    mask = torch.ones_like(labels)
    mask[2, -4:], labels[2, -4:] = 0, -100
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 5, labels.shape, generator=generator)
    return [first, {**second, "labels": labels, "attention_mask": mask, "token_bytes": sizes}]


def naive(model: Any, other: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    """The sums of each block, one token after the other in float64."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for batch in batches:
        mask = batch.get("attention_mask")
        with torch.no_grad():
            now, before = (
                item(input_ids=batch["input_ids"], attention_mask=mask).logits.double().numpy()
                for item in (model, other)
            )
        labels = batch.get("labels", batch["input_ids"]).numpy()
        sizes = batch.get("token_bytes", torch.zeros_like(batch["input_ids"])).numpy()
        for row in range(len(labels)):
            sums = dict.fromkeys(NAMES, 0.0)
            for place in range(1, labels.shape[1]):
                if labels[row, place] == -100:
                    continue
                p, q = (np.exp(logits[row, place - 1] - logits[row, place - 1].max()) for logits in (before, now))
                p, q = p / p.sum(), q / q.sum()
                sums["nats"] -= math.log(q[labels[row, place]])
                sums["tokens"] += 1
                sums["bytes"] += sizes[row, place]
                sums["divergence"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                sums["agreement"] += p.argmax() == q.argmax()
            for name in NAMES:
                found[name].append(sums[name])
    return found


def changed(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.experts.down_proj.mul_(0.8)
    return other


def assert_equal(scores: BlockScores, wanted: dict[str, list[float]], rows: list[int]) -> None:
    for name in NAMES:
        expected = [wanted[name][row] for row in rows]
        assert getattr(scores, name).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_scores_equal_a_loop_over_tokens() -> None:
    before = tiny_mixtral()
    now, batches = changed(before), held_out()
    wanted = naive(now, before, batches)
    assert sum(wanted["divergence"]) > 0.01 and 0 < sum(wanted["agreement"]) < sum(wanted["tokens"])
    with torch.no_grad():
        parts = []
        for batch in batches:
            known = prediction_of(logits_of(before, batch))
            parts.append(
                score_logits(
                    logits_of(now, batch), batch, lambda row, known=known: Prediction(known[0][row], known[1][row])
                )
            )
    for number, part in enumerate(parts):
        assert_equal(part, wanted, [3 * number + row for row in range(3)])
    # Block 4 has no predicted token.
    assert_equal(join_scores(parts), wanted, [0, 1, 2, 3, 5])
    assert_equal(ReferencePredictions(before, batches, 1 << 30, lambda: before).score(now), wanted, [0, 1, 2, 3, 5])
    assert_equal(ReferencePredictions(before, batches, 0, lambda: before).score(now), wanted, [0, 1, 2, 3, 5])


def test_blocks_without_reference_are_not_compared() -> None:
    before = tiny_mixtral()
    now, batch = changed(before), held_out()[0]
    wanted = naive(now, before, [batch])
    with torch.no_grad():
        logits, known = logits_of(now, batch), prediction_of(logits_of(before, batch))
    scores = score_logits(logits, batch, lambda row: Prediction(known[0][row], known[1][row]) if row == 1 else None)
    for name in ("divergence", "agreement"):
        values = getattr(scores, name)
        assert values.isnan().tolist() == [True, False, True]
        assert float(values[1]) == pytest.approx(wanted[name][1], rel=1e-4)
    assert scores.nats.tolist() == pytest.approx(wanted["nats"], rel=1e-5)
    alone = score_logits(logits, batch)
    assert alone.divergence.isnan().all() and alone.agreement.isnan().all() and torch.equal(alone.nats, scores.nats)


def test_the_same_model_has_no_divergence() -> None:
    model, batches = tiny_mixtral(), held_out()
    scores = ReferencePredictions(model, batches, 1 << 30, lambda: model).score(model)
    assert scores.divergence.tolist() == [0.0] * 5
    assert torch.equal(scores.agreement, scores.tokens.double())


def test_nothing_to_score_is_said() -> None:
    with pytest.raises(ValueError, match="there is no held-out batch"):
        join_scores([])
    batch = random_batches(1)[0]
    empty = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    with torch.no_grad():
        scores = score_logits(logits_of(tiny_mixtral(), empty), empty)
    with pytest.raises(ValueError, match="no token of the held-out batches is predicted"):
        join_scores([scores])
