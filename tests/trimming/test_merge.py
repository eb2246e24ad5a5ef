"""Merging experts: who joins whom, and what the merged weights are.

References: matching by trying out every permutation, clustering by recomputing every distance at every step, and the
untouched transformers model with the merged weights in the place of every member's.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_lightning as ml
from moe_lightning.plan import CompressionPlan, MergeExperts
from moe_lightning.trimming.merge import Merge
from moe_lightning.trimming.merging import ExpertWeights, aligned, cluster, join_cores, merged, sorted_groups
from tests.models import random_batches, tiny_mixtral
from tests.reference import LayerRecord, record, untouched

CHANNELS = 4
BATCHES = random_batches(3, 2, 11)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]
Groups = tuple[tuple[int, ...], ...]


def compress(model: Any, methods: Any = None, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def model_with(**changes: Any) -> Any:
    return untouched(**{"intermediate_size": CHANNELS, **changes})


# References.


def channels_of(gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    half = len(gate_up) // 2
    return np.concatenate([gate_up[:half], gate_up[half:], down.T], axis=1)


def best_order(core: tuple[np.ndarray, np.ndarray], expert: tuple[np.ndarray, np.ndarray]) -> list[int]:
    """Try every permutation of the expert's channels; take the one nearest to the core."""
    wanted, own = channels_of(*core), channels_of(*expert)
    orders = itertools.permutations(range(len(own)))
    return list(min(orders, key=lambda order: float(((wanted - own[list(order)]) ** 2).sum())))


def reference_merge(
    gate_up: np.ndarray, down: np.ndarray, group: Sequence[int], usage: np.ndarray, align: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Merge experts of the stacks ``[E, 2I, H]`` and ``[E, H, I]``."""
    core = max(group, key=lambda expert: (usage[expert], expert))
    weight = usage[list(group)] / usage[list(group)].sum() if usage[list(group)].sum() else np.ones(len(group))
    weight = weight / weight.sum()
    total_gate_up, total_down = np.zeros_like(gate_up[0]), np.zeros_like(down[0])
    for expert, share in zip(group, weight, strict=True):
        order = list(range(down.shape[2]))
        if align:
            order = best_order((gate_up[core], down[core]), (gate_up[expert], down[expert]))
        total_gate_up += share * gate_up[expert][order + [place + down.shape[2] for place in order]]
        total_down += share * down[expert][:, order]
    return total_gate_up, total_down


def reference_clusters(points: np.ndarray, number: int) -> Groups:
    """Join the two clusters with the smallest mean distance between their members, again and again."""
    clusters = [[place] for place in range(len(points))]
    distance = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    while len(clusters) > number:
        first, second = min(
            itertools.combinations(range(len(clusters)), 2),
            key=lambda pair: distance[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean(),
        )
        clusters[first] += clusters.pop(second)
    return tuple(sorted(tuple(sorted(members)) for members in clusters))


def reference_cores(layers: list[LayerRecord], kept: int) -> list[set[int]]:
    """Take the most used experts of the model, and the most used one of each layer in any case."""
    usage = np.stack([layer.chosen.sum(0) for layer in layers])
    cores = [{max(range(usage.shape[1]), key=lambda e, row=row: (row[e], e))} for row in usage]
    ranked = sorted(((usage[n, e], n, e) for n in range(len(usage)) for e in range(usage.shape[1])), reverse=True)
    for _, row, expert in ranked:
        if sum(map(len, cores)) < kept:
            cores[row].add(expert)
    return cores


def reference_groups(layers: list[LayerRecord], method: str, kept: list[set[int]]) -> list[Groups]:
    result = []
    for layer, cores in zip(layers, kept, strict=True):
        experts = layer.chosen.shape[1]
        if method == "hc_smoe":
            means = np.zeros((experts, layer.output.shape[2]))
            for expert in np.flatnonzero(layer.chosen.any(0)):
                means[expert] = layer.output[layer.chosen[:, expert], expert].mean(0)
            result.append(reference_clusters(means, len(cores)))
            continue
        unit = layer.logits / np.sqrt((layer.logits**2).sum(0))
        groups = {core: [core] for core in cores}
        for expert in set(range(experts)) - cores:
            groups[max(cores, key=lambda core: unit[:, expert] @ unit[:, core])].append(expert)
        result.append(tuple(sorted(tuple(sorted(group)) for group in groups.values())))
    return result


def with_merged_weights(original: Any, layers: list[LayerRecord], groups: list[Groups], align: bool) -> Any:
    """Put the merged weights into every member's place in a plain model."""
    model = copy.deepcopy(original)
    for number, layer in enumerate(layers):
        experts = model.model.layers[number].mlp.experts
        gate_up, down = experts.gate_up_proj.detach().numpy().copy(), experts.down_proj.detach().numpy().copy()
        for group in groups[number]:
            new = reference_merge(gate_up, down, group, layer.chosen.sum(0).astype(float), align)
            with torch.no_grad():
                for expert in group:
                    experts.gate_up_proj[expert] = torch.from_numpy(new[0])
                    experts.down_proj[expert] = torch.from_numpy(new[1])
    return model


# The whole method against the references.


@pytest.mark.parametrize(
    ("method", "scope", "keep", "align"),
    [
        ("mc_smoe", None, 3.34, None),
        ("mc_smoe", "global", 1.67, True),
        ("mc_smoe", "layer", 2, False),
        ("hc_smoe", None, 3, None),
        ("hc_smoe", "layer", 1, True),
        ("hc_smoe", "global", 2.5, False),
    ],
)
def test_equals_the_untouched_model_with_merged_weights(method: Any, scope: Any, keep: float, align: Any) -> None:
    original = model_with()
    layers = record(original, BATCHES)
    if scope == "layer" or (scope is None and method == "hc_smoe"):
        order = [sorted(range(6), key=lambda e, layer=layer: (layer.chosen[:, e].sum(), e)) for layer in layers]
        kept = [set(row[6 - int(keep) :]) for row in order]
    else:
        kept = reference_cores(layers, 18 - math.floor(18 - 3 * keep + 0.5))
        assert len({len(cores) for cores in kept}) > 1, "the layers do not differ: the test shows nothing"
    groups = reference_groups(layers, method, kept)
    model = copy.deepcopy(original)
    result = compress(model, Merge(keep=keep, algorithm=method, scope=scope, align=align))
    aligns = align if align is not None else method == "mc_smoe"
    assert result.plan.edits == tuple(
        MergeExperts(number, groups[number], aligns) for number in range(3) if len(groups[number]) < 6
    )
    expected = with_merged_weights(original, layers, groups, aligns)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-12)
    assert (logits(original) - logits(expected)).abs().max() > 1e-3, "nothing was merged"
    assert [layout.router for layout in result.shape_after.layouts] == [tuple(range(6))] * 3


def shuffled(model: Any, seed: int = 0) -> list[list[int]]:
    """Make every expert of every layer the first one, its channels in another order."""
    generator = np.random.default_rng(seed)
    orders = []
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            width = experts.down_proj.shape[2]
            for expert in range(1, experts.down_proj.shape[0]):
                order = generator.permutation(width)
                orders.append(order.tolist())
                experts.gate_up_proj[expert] = experts.gate_up_proj[0][np.concatenate([order, order + width])]
                experts.down_proj[expert] = experts.down_proj[0][:, order]
    return orders


@pytest.mark.parametrize("method", ["mc_smoe", "hc_smoe"])
def test_merging_permuted_copies_changes_nothing(method: Any) -> None:
    model = untouched(intermediate_size=48)
    assert any(order != list(range(48)) for order in shuffled(model))
    expected, without = logits(model), copy.deepcopy(model)
    compress(model, Merge(keep=1, algorithm=method, scope="layer", align=True))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)
    assert all(len(layer.mlp.experts.storage.down_proj) == 1 for layer in model.model.layers)
    compress(without, Merge(keep=1, algorithm=method, scope="layer", align=False))
    assert (logits(without) - expected).abs().max() > 1e-3, "the order of channels did not matter"


def test_merging_nothing_changes_nothing() -> None:
    model = tiny_mixtral()
    expected = logits(model)
    assert compress(model, Merge(keep=6)).plan.edits == ()
    assert torch.equal(logits(model), expected)


def test_novices_keep_out() -> None:
    original = model_with()
    model = copy.deepcopy(original)
    edits = compress(model, [ml.Novices(keep=3), Merge(keep=1, scope="layer")]).plan.edits
    novices = {edit.layer: set(edit.experts) for edit in edits[:3]}
    for edit in edits[3:]:
        assert isinstance(edit, MergeExperts)
        assert edit.groups == (tuple(sorted(set(range(6)) - novices[edit.layer])),)
    assert torch.isfinite(logits(model)).all()


def test_layers_without_real_experts_are_left_alone() -> None:
    model = model_with()
    plan = CompressionPlan((ml.NoviceExperts(1, tuple(range(6))),))
    compress(model, plan=plan)
    edits = compress(model, Merge(ratio=0.5)).plan.edits
    assert [edit.layer for edit in edits] == [1, 0, 2]


@pytest.mark.parametrize("method", ["mc_smoe", "hc_smoe"])
def test_experts_that_no_token_reached_have_no_weight(method: Any) -> None:
    original = model_with(attn_implementation="sdpa")
    batch = [{"input_ids": torch.full((1, 4), 9)}]
    used = [set(np.flatnonzero(layer.chosen.any(0)).tolist()) for layer in record(original, batch)]
    assert all(len(experts) == 2 for experts in used)
    model = copy.deepcopy(original)
    edits = compress(model, Merge(keep=2, algorithm=method, scope="layer"), batch).plan.edits
    for edit, experts in zip(edits, used, strict=True):
        stored = model.model.layers[edit.layer].mlp.experts.storage
        whole = original.model.layers[edit.layer].mlp.experts
        for slot, group in enumerate(edit.groups):
            alive = experts & set(group)
            if len(alive) == 1:
                (expert,) = alive
                assert torch.equal(stored.down_proj[slot], whole.down_proj[expert])
                assert torch.equal(stored.gate_up_proj[slot], whole.gate_up_proj[expert])
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("experts", [2, 3])
def test_one_layer_and_few_experts(experts: int) -> None:
    original = model_with(num_hidden_layers=1, num_local_experts=experts)
    layers = record(original, BATCHES)
    model = copy.deepcopy(original)
    compress(model, Merge(keep=1))
    expected = with_merged_weights(original, layers, [(tuple(range(experts)),)], True)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-12)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = tiny_mixtral()
    compress(model, Merge(ratio=0.5))
    ml.save_pretrained(model, tmp_path)
    loaded = ml.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


# Budgets.


@pytest.mark.parametrize("method", ["mc_smoe", "hc_smoe"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_a_target_merges_as_few_as_meet_it(method: Any, scope: Any, name: str) -> None:
    statistics = ml.collect(model_with(), BATCHES, {"routing", "outputs"}, progress=False)
    shape = statistics.shape
    one = shape.expert_parameters * (8 if name == "bytes" else 1)
    for gone in (0, 1, 2, 7, 14, 15):
        for slack in (0, one - 1):
            target = getattr(shape, name) - gone * one + slack
            edits = Merge(**{name: target}, algorithm=method, scope=scope).propose(shape, statistics)
            assert getattr(CompressionPlan(edits).check(shape), name) == target - slack
    with pytest.raises(ValueError, match=f"Merge: {name}=.*out of reach"):
        Merge(**{name: getattr(shape, name) - 16 * one}, algorithm=method, scope=scope).propose(shape, statistics)


def test_sensitivity_leaves_more_where_merging_hurts() -> None:
    model = model_with()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(20.0)
    edits = compress(model, Merge(ratio=0.5, scope="sensitivity")).plan.edits
    left = {edit.layer: len(edit.groups) for edit in edits}
    assert left.get(1, 6) > max(left.get(0, 6), left.get(2, 6))


# The parts.


def weights(seed: int, width: int, hidden: int = 3, bias: bool = False) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return ExpertWeights(
        torch.randn(2 * width, hidden, **options),
        torch.randn(hidden, width, **options),
        torch.randn(hidden, **options) if bias else None,
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 5))
def test_channels_are_matched_as_by_trying_out_every_order(seed: int, width: int) -> None:
    core, expert = weights(seed, width), weights(seed + 1, width)
    order = best_order((core[0].numpy(), core[1].numpy()), (expert[0].numpy(), expert[1].numpy()))
    result = aligned(expert, core)
    assert torch.equal(result.down, expert.down[:, order])
    assert torch.equal(result.gate_up, expert.gate_up[[*order, *(place + width for place in order)]])


@pytest.mark.parametrize("width", [1, 5, 40])
def test_alignment_undoes_a_permutation_and_never_changes_the_expert(width: int) -> None:
    core = weights(0, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    other = ExpertWeights(core.gate_up[torch.cat([order, order + width])], core.down[:, order])
    back = aligned(other, core)
    assert torch.equal(back.gate_up, core.gate_up) and torch.equal(back.down, core.down)


def test_the_mean_is_weighted_by_use_and_plain_where_nobody_is_used() -> None:
    experts = [weights(seed, 2, bias=True) for seed in range(3)]
    for usage, shares in (([1.0, 3.0, 0.0], [0.25, 0.75, 0.0]), ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3])):
        result = merged(experts, usage, align=False)
        for place in range(3):
            expected = sum(share * expert[place] for share, expert in zip(shares, experts, strict=True))
            torch.testing.assert_close(result[place], expected, rtol=0, atol=1e-15)


def test_bf16_weights_are_summed_in_fp32() -> None:
    big, small = (torch.full((2, 1), value).bfloat16() for value in (256.0, 1.0))
    experts = [ExpertWeights(big, big[:1].T)] + [ExpertWeights(small, small[:1].T)] * 255
    result = merged(experts, [1.0] * 256, align=False)
    assert result.down.dtype == torch.bfloat16
    assert result.down.item() == torch.tensor((256 + 255) / 256).bfloat16().item()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), number=st.integers(1, 8))
def test_clusters_equal_those_recomputed_at_every_step(seed: int, count: int, number: int) -> None:
    points = np.random.default_rng(seed).standard_normal((count, 3))
    number = min(number, count)
    assert sorted_groups(cluster(torch.from_numpy(points), number)) == reference_clusters(points, number)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_exactly_so_many_clusters_where_all_distances_are_equal(number: int) -> None:
    for points in (torch.zeros(5, 2), torch.eye(5)):
        groups = cluster(points, number)
        assert len(groups) == number
        assert sorted(place for group in groups for place in group) == list(range(5))


def test_joining_ties_and_silent_logits() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[3, 3] = 0.0
    assert join_cores(gram, range(4), (1, 2)) == ((0, 1, 3), (2,)), "of equal cores the first"
    gram[0, 2] = gram[2, 0] = 0.5
    gram[0, 1] = gram[1, 0] = -0.9
    assert join_cores(gram, range(4), (1, 2)) == ((0, 2), (1, 3)), "opposite is not alike"
    gram[1, 1], gram[0, 1], gram[1, 0] = 100.0, 1.0, 1.0
    assert join_cores(gram, range(4), (1, 2)) == ((0, 2), (1, 3)), "large logits are not alike for that"


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs exactly one of ratio, keep, parameters and bytes"),
        ({"ratio": 0.5, "keep": 3}, "needs exactly one"),
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": 2.5, "scope": "layer"}, "keep must be a whole number with scope=layer"),
        ({"keep": 2.5, "algorithm": "hc_smoe"}, "keep must be a whole number with scope=layer"),
        ({"keep": 3, "algorithm": "mean"}, "unknown algorithm 'mean': choose mc_smoe or hc_smoe"),
        ({"keep": 3, "scope": "block"}, "unknown scope 'block'"),
        ({"parameters": 0}, "parameters must be a whole number above 0"),
        ({"keep": 3, "compatible": "uniform"}, "compatible=uniform"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Merge.*{message}"):
        Merge(**options)


class Untouchable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("calibration began before the options were checked")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (Merge(keep=7), "Merge: keep=7 is more than"),
        (Merge(keep=7, scope="layer"), "Merge: keep=7 is more than the 6 experts of a layer"),
        (Merge(ratio=0.95), "Merge: .*a layer keeps at least one"),
        (Merge(parameters=1000), "Merge: parameters=1,000 is out of reach"),
        ([Merge(keep=3), Merge(keep=2)], "layer 0: cannot merge experts"),
        ([Merge(keep=3), ml.ExpertDrop(keep=2)], "layer 0: cannot drop experts.*put Merge behind"),
    ],
)
def test_budgets_that_do_not_fit_are_found_before_calibration(methods: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny_mixtral(), methods, Untouchable())
