"""Texts, who measures which of their batches, one pass for everything, and where tokens go."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.evaluation.comparison import ReferencePredictions, join_scores
from moe_lightning.evaluation.quality import Comparison, Text, score_texts, shares, text_routing
from moe_lightning.evaluation.reference_file import ReferenceFile, ReferenceWriter, token_fingerprint
from tests.models import SIZES, random_batches, tiny_mixtral


def text(name: str = "test", count: int = 3, seed: int = 0) -> Text:
    return Text(name, random_batches(count, batch=2, sequence=8, seed=seed), calibrated=True)


def test_whole_blocks_within_the_first_tokens() -> None:
    found = text()
    assert found.num_blocks == 6 and found.sizes == [(2, 8)] * 3
    wholes = {0: 0, 1: 8, 8: 8, 15: 8, 16: 16, 30: 24, 47: 40, 48: 48, 1000: 48}
    assert {tokens: found.whole(tokens) for tokens in wholes} == wholes
    assert found.rows(24) == [2, 1, 0] and found.rows(0) == [0, 0, 0] and found.rows(48) == [2, 2, 2]
    first = list(found.first(24))
    assert [len(batch["input_ids"]) for batch in first] == [2, 1]
    described = found.reference(31)
    assert described.tokens == 24 and described.fingerprint == token_fingerprint(batch["input_ids"] for batch in first)
    assert found.fingerprint == token_fingerprint(batch["input_ids"] for batch in found.batches)


def test_texts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="topics: there is no batch to measure on"):
        Text("topics", [], calibrated=False)
    with pytest.raises(ValueError, match="topics: batches must be dicts with 'input_ids', got Tensor"):
        Text("topics", [torch.zeros(1)], calibrated=False)  # type: ignore[list-item]


def test_the_first_process_takes_what_is_compared() -> None:
    texts = [text(count=4), text("other", count=2)]
    assert shares(texts, [[2, 1, 0, 0], [1, 0]], 1) == [[0] * 4, [0] * 2]
    assert shares(texts, [[2, 1, 0, 0], [1, 0]], 2) == [[0, 0, 1, 1], [0, 1]]
    assert shares(texts, [[0] * 4, [0] * 2], 3) == [[0, 1, 2, 0], [1, 2]]


def test_one_pass_gives_what_many_give(tmp_path: Path) -> None:
    """Scores of all blocks and errors of layers, with the reference of a file, against a second model in memory."""
    before = tiny_mixtral()
    now = copy.deepcopy(before)
    texts = [text(), text("other", count=2, seed=7)]
    described = {item.name: item.reference(24) for item in texts}
    path = tmp_path / "reference.safetensors"
    with ReferenceWriter(path, described, SIZES["vocab_size"], 16, 32, [0, 1, 2], []) as writer:
        own = Comparison(texts, writer)
        first = score_texts(before, texts, own)
    # Of itself: nothing differs.
    assert own.layer_errors.compute() == {0: 0.0, 1: 0.0, 2: 0.0}
    for scores in first:
        values = join_scores([scores[number] for number in sorted(scores)])
        assert values.divergence[:3].tolist() == [0.0] * 3 and values.divergence[3:].isnan().all()
        assert torch.equal(values.agreement[:3], values.tokens[:3].double())
    ml.compress(now, random_batches(2, seed=9), [ml.ExpertDrop(keep=4), ml.BlockDrop(count=1)], progress=False)
    passes = []
    handle = now.register_forward_hook(lambda *_: passes.append(1))
    comparison = Comparison(texts, ReferenceFile(path))
    found = score_texts(now, texts, comparison)
    handle.remove()
    assert len(passes) == 5 and comparison.unknown == []
    for item, scores in zip(texts, found, strict=True):
        values = join_scores([scores[number] for number in sorted(scores)])
        wanted = ReferencePredictions(before, list(item.batches), 1 << 30, lambda: before).score(now)
        assert torch.equal(values.nats, wanted.nats) and torch.equal(values.tokens, wanted.tokens)
        assert values.divergence[:3].tolist() == pytest.approx(wanted.divergence[:3].tolist(), abs=1e-6)
        assert torch.equal(values.agreement[:3], wanted.agreement[:3])
        assert values.divergence[3:].isnan().all() and values.agreement[3:].isnan().all()
    errors = comparison.layer_errors.compute()
    assert tuple(errors) == architecture_of(now).shape(now).blocks and len(errors) == 2
    assert all(0 < error < 10 for error in errors.values())


def test_other_blocks_are_not_compared(tmp_path: Path) -> None:
    model, texts = tiny_mixtral(), [text(), text("other", seed=7)]
    path = tmp_path / "reference.safetensors"
    described = {item.name: item.reference(16) for item in texts}
    with ReferenceWriter(path, described, SIZES["vocab_size"], 8, 32, [0, 1, 2], []) as writer:
        score_texts(model, texts, Comparison(texts, writer))
    changed = [text(seed=1), texts[1], text("new", seed=2)]
    comparison = Comparison(changed, ReferenceFile(path))
    assert comparison.unknown == ["test", "new"]
    assert comparison.compared == [[0, 0, 0], [2, 0, 0], [0, 0, 0]] and comparison.with_hidden == [[0, 0, 0]] * 3
    assert Comparison(changed, None).unknown == []


def test_routing_is_what_the_routers_say() -> None:
    model = tiny_mixtral()
    batches = random_batches(2, seed=3)
    ml.compress(model, batches, [ml.ExpertDrop(keep=5), ml.Novices(keep=3)], progress=False)
    count, mass = torch.zeros(3, 6), torch.zeros(3, 6)
    routers = [layout.router for layout in architecture_of(model).shape(model).layouts]

    def see(layer: int, output: tuple[torch.Tensor, ...]) -> None:
        for weights, rows in zip(output[1], output[2], strict=True):
            for weight, row in zip(weights, rows, strict=True):
                count[layer, routers[layer][int(row)]] += 1
                mass[layer, routers[layer][int(row)]] += float(weight)

    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output, number=number: see(number, output))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = text_routing(model, batches)
    assert found is not None and found.layers == [0, 1, 2]
    for layer in range(3):
        known = routers[layer]
        assert len(known) == 5 and len(found.novices[layer]) == 2
        for expert in range(6):
            if expert not in known:
                assert found.load[layer][expert] is None and found.mass[layer][expert] is None
                continue
            assert found.load[layer][expert] == pytest.approx(float(count[layer, expert] / count[layer].sum()))
            assert found.mass[layer][expert] == pytest.approx(float(mass[layer, expert] / mass[layer].sum()), rel=1e-5)


def test_no_routing_without_moe_layers() -> None:
    model, batches = tiny_mixtral(), random_batches(1)
    ml.compress(model, batches, [ml.LayerDrop(count=3)], progress=False)
    assert text_routing(model, batches) is None
