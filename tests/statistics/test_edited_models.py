"""Statistics of models with every kind of edit, against the untouched model that emulates them by hand."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_lightning as ml
from moe_lightning.plan import (
    CompressionPlan,
    DropBlock,
    DropMoE,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    NoviceExperts,
)
from moe_lightning.statistics import GROUPS
from moe_lightning.surgery import apply_plan
from tests.models import random_batches
from tests.reference import (
    LayerRecord,
    assert_sums_equal,
    channels_by_hand,
    emulated,
    record,
    reference_sums,
    untouched,
)

STREAMED = {"routing", "outputs", "pairs", "channels", "layers", "blocks", "similarity"}
EXPERTS, WIDTH = 6, 10


@dataclass
class Edited:
    """A model with all edits, and how an untouched model acts as it.

    Block 1 of 6 is gone, so the layers of ``emulation`` are 0, 2, 3, 4, 5, of which 4 has no MoE layer any more.
    """

    model: Any
    emulation: Any
    dropped: dict[int, tuple[int, ...]]
    constants: dict[tuple[int, int], Any]
    kept: Tensor

    def records(self, batches: list[dict[str, Tensor]]) -> list[LayerRecord]:
        return record(self.emulation, batches, self.dropped, self.constants)


KNOWN = np.array([[1] * 6, [1] * 6, [1] * 6, [0, 0, 1, 0, 0, 0]], bool)
REAL = np.array([[1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]], bool)
PLACES = [0, 1, 2, 4]
"""Place of each MoE layer that is left in the emulation."""


@pytest.fixture(scope="module")
def edited() -> Edited:
    model = untouched(num_hidden_layers=6)
    emulation = copy.deepcopy(model)
    kept = torch.tensor([0, 3, 4, 7, 11, 20, 21, 30, 46, 47])
    plan = CompressionPlan(
        (
            KeepExperts(0, (0, 2, 4), router="keep"),
            DropBlock(1),
            NoviceExperts(2, (1, 3), novice="low_rank", ranks=(0, 3)),
            MergeExperts(3, ((0, 3), (1,), (2, 4, 5))),
            DropMoE(4),
            KeepExperts(5, (2,), allow_fewer_than_top_k=True),
            KeepChannels(5, WIDTH),
        )
    )
    apply_plan(model, plan, channels={5: kept[None]})
    layers = model.model.layers
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        experts, narrow = layers[1].mlp.experts, layers[4].mlp.experts.storage
        for parameter in (experts.novices, experts.novice_in, experts.novice_out, narrow.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 6)
        emulation.model.layers = nn.ModuleList(
            layer for place, layer in enumerate(emulation.model.layers) if place != 1
        )
        shared = emulation.model.layers[2].mlp.experts
        for expert, owner in ((3, 0), (4, 2), (5, 2)):
            shared.gate_up_proj[expert] = shared.gate_up_proj[owner]
            shared.down_proj[expert] = shared.down_proj[owner]
    zero = torch.zeros(32, dtype=torch.float64)
    whole = emulation.model.layers[4].mlp.experts
    gate_up, down = whole.gate_up_proj[2].detach(), whole.down_proj[2].detach()
    novices, reads, gives = (value.detach() for value in (experts.novices, experts.novice_in, experts.novice_out))
    constants = {
        **{(0, expert): zero for expert in (1, 3, 5)},
        (1, 1): novices[0],
        (1, 3): lambda x: novices[1] + sum((x @ reads[rank]) * gives[rank] for rank in range(3)),
        **{(3, expert): zero for expert in range(6)},
        (4, 2): lambda x: down[:, kept] @ channels_by_hand(x, gate_up)[kept] + narrow.bias[0].detach(),
    }
    return Edited(model, emulation, {4: (0, 1, 3, 4, 5)}, constants, kept)


def wanted_sums(edited: Edited, records: list[LayerRecord]) -> dict[str, np.ndarray]:
    """Bring the emulation's sums into the rows and channels of the edited model."""
    want = reference_sums(records)
    for name, table in want.items():
        if name in GROUPS["blocks"] or name in GROUPS["similarity"]:
            continue
        want[name] = table = table[PLACES]
        if name in GROUPS["channels"] and table.ndim == 3:
            narrow = np.full_like(table[3], np.nan)
            narrow[:, :WIDTH] = table[3][:, edited.kept.numpy()]
            table[3] = narrow
    # Experts that share weights have one set of channels, over the tokens of all of them.
    for owner, members in ((0, (0, 3)), (2, (2, 4, 5))):
        layer = records[PLACES[2]]
        rows = np.concatenate([layer.channel[layer.chosen[:, expert], expert] for expert in members])
        want["channel_count"][2, owner] = len(rows)
        want["channel_mean"][2, owner] = rows.mean(0)
        want["channel_m2"][2, owner] = ((rows - rows.mean(0)) ** 2).sum(0)
    return want


def assert_equal_and_ragged(tensors: Mapping[str, Tensor], want: dict[str, np.ndarray]) -> None:
    """Compare, and check that NaN stands exactly where there is nothing."""
    got = {}
    for name, tensor in tensors.items():
        lost = np.zeros(tensor.shape, bool)
        if tensor.shape[:2] == KNOWN.shape:
            here = REAL if name in GROUPS["channels"] else KNOWN
            lost |= ~here.reshape(here.shape + (1,) * (tensor.ndim - 2))
            if tensor.ndim >= 3 and tensor.shape[2] == EXPERTS:
                lost |= ~KNOWN.reshape((4, 1, EXPERTS) + (1,) * (tensor.ndim - 3))
            if name in GROUPS["channels"] and tensor.ndim == 3:
                lost[3, :, WIDTH:] = True
        assert np.array_equal(np.isnan(tensor.numpy()), lost), name
        got[name] = torch.from_numpy(np.where(lost, 0.0, tensor.numpy()))
        want[name] = np.where(lost, 0.0, want[name])
    # A constant's deviations are nothing but rounding.
    for expert, row in ((1, 0), (3, 0), (5, 0), (1, 1)):
        assert float(got["output_m2"][row, expert].max()) < 1e-20
        got["output_m2"][row, expert] = 0
        want["output_m2"][row, expert] = 0
    assert_sums_equal(got, want)


def test_every_edit(edited: Edited) -> None:
    batches = random_batches(2, 2, 9)
    statistics = ml.collect(edited.model, batches, STREAMED, progress=False)
    assert statistics.shape.moe_layers == (0, 2, 3, 5)
    assert statistics.shape.blocks == (0, 2, 3, 4, 5)
    assert statistics.tensors["block_tokens"].shape == (5,)
    assert_equal_and_ragged(statistics.tensors, wanted_sums(edited, edited.records(batches)))


def test_padding_and_merged_halves(edited: Edited) -> None:
    batches = random_batches(2, 3, 7)
    for batch, lengths in zip(batches, ((7, 2, 0), (1, 5, 7)), strict=True):
        batch["attention_mask"] = (torch.arange(7)[None] < torch.tensor(lengths)[:, None]).long()
    parts = [ml.collect(edited.model, [batch], STREAMED, progress=False) for batch in batches]
    merged = ml.merge_statistics(parts)
    assert_equal_and_ragged(merged.tensors, wanted_sums(edited, edited.records(batches)))
    assert merged["similarity_sequences"].tolist() == [5]


def test_the_output_is_the_plain_output(edited: Edited) -> None:
    batch = random_batches(1, 2, 9)[0]
    plain = edited.model.model(**batch).last_hidden_state
    seen = []
    handle = edited.model.model.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state))
    ml.collect(edited.model, [batch], STREAMED, progress=False)
    handle.remove()
    torch.testing.assert_close(seen[0], plain, rtol=0, atol=1e-12)


def kl_by_hand(teacher: Tensor, student: Tensor) -> np.ndarray:
    left, right = (logits.double().numpy() for logits in (teacher, student))
    left = left - np.log(np.exp(left).sum(-1, keepdims=True))
    right = right - np.log(np.exp(right).sum(-1, keepdims=True))
    return (np.exp(left) * (left - right)).sum(-1)


def test_masking_each_expert_of_an_edited_model(edited: Edited) -> None:
    batch = random_batches(1, 2, 5)[0]
    batch["attention_mask"] = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    keep = batch["attention_mask"].bool()

    def logits(layer: int | None = None, expert: int | None = None) -> Tensor:
        dropped, constants = dict(edited.dropped), dict(edited.constants)
        if layer == 4:  # its only expert
            constants[4, 2] = torch.zeros(32, dtype=torch.float64)
        elif layer is not None and expert is not None:
            dropped[layer] = (expert,)
        with emulated(edited.emulation, dropped, constants):
            return edited.emulation(**batch).logits[keep]

    statistics = ml.collect(edited.model, [batch], {"interventions"}, progress=False)
    got = statistics["expert_divergence"].numpy()
    assert np.array_equal(np.isnan(got), ~KNOWN)
    assert statistics["divergence_tokens"].tolist() == [8]
    intact = logits()
    for row, expert in np.argwhere(KNOWN):
        want = kl_by_hand(intact, logits(PLACES[row], expert)).mean()
        assert got[row, expert] == pytest.approx(want, rel=1e-8, abs=1e-14), (row, expert)
    assert (got[KNOWN] > 1e-5).sum() > 12


def test_nothing_is_left_where_all_moe_layers_are_gone() -> None:
    model = untouched()
    apply_plan(model, CompressionPlan(tuple(DropMoE(layer) for layer in range(3))))
    statistics = ml.collect(model, random_batches(1), STREAMED | {"interventions"}, progress=False)
    assert statistics["count"].shape == (0, 6)
    assert statistics["expert_divergence"].shape == (0, 6)
    assert statistics.block_cosine.shape == (3,)
    ml.merge_statistics([statistics, statistics])
