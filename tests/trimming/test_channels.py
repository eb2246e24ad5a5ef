"""Channel Drop: which channels stay, how many in which layer, and what the bias makes good.

References: numpy on the channels that hooks on the untouched model recorded, and that model with the columns of dropped
channels set to zero.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.plan import CompressionPlan, KeepChannels
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.channel_drop import (
    ChannelDrop,
    Step,
    best_channels,
    channel_scores,
    standardised,
    widths_at_budget,
)
from moe_lightning.trimming.merge import Merge
from moe_lightning.trimming.replay import Replay
from tests.models import random_batches, tiny_mixtral
from tests.reference import LayerRecord, record, untouched

# Every width is permitted here: small experts show more of them.
channel_drop = partial(ChannelDrop, multiple_of=1)

EXPERTS, CHANNELS, HIDDEN = 6, 48, 32
BATCHES = random_batches(3, 2, 11)
INPUTS = random_batches(1, 2, 9, seed=5)[0]["input_ids"]
# One token again and again: every expert that it reaches sees one input, so that its channels do not vary.
REPEATED = [{"input_ids": torch.full((2, 7), 9)}]


def compress(model: Any, methods: Any = None, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


def logits(model: Any, inputs: Tensor = INPUTS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=inputs).logits


# References.


def reference_scores(layer: LayerRecord) -> np.ndarray:
    """Return ``Var(h_j) * ||W_down[:, j]||^2`` with the unbiased variance, ``[E, I]``."""
    experts, _, channels = layer.down.shape
    scores = np.zeros((experts, channels))
    for expert in range(experts):
        h = layer.channel[layer.chosen[:, expert], expert]
        if len(h) > 1:
            scores[expert] = h.var(0, ddof=1) * (layer.down[expert] ** 2).sum(0)
    return scores


def reference_widths(layers: list[LayerRecord], removed: int) -> list[int]:
    """Try every threshold; take the lowest that keeps few enough channels."""
    voices = []
    for layer in layers:
        scores = reference_scores(layer)[layer.chosen.any(0)]
        voices.append((scores - scores.mean(1, keepdims=True)) / scores.std(1, ddof=1, keepdims=True))
    best: list[int] = []
    for threshold in sorted({value for voice in voices for value in voice.ravel()}, reverse=True):
        widths = [max(1, math.floor((voice >= threshold).sum() / len(voice) + 0.5)) for voice in voices]
        if EXPERTS * sum(widths) > len(layers) * EXPERTS * CHANNELS - removed:
            break
        best = widths
    return best


def without_channels(original: Any, layers: list[LayerRecord], widths: list[int]) -> Any:
    """Set the columns of dropped channels of a plain model to zero and add the biases by a hook."""
    model = copy.deepcopy(original)
    for number, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        scores = reference_scores(layer)
        biases = torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
        experts = model.model.layers[number].mlp.experts
        for expert in range(EXPERTS):
            gone = sorted(range(CHANNELS), key=lambda j, row=scores[expert]: (row[j], j))[: CHANNELS - width]
            h = layer.channel[layer.chosen[:, expert], expert]
            if len(h):
                biases[expert] = torch.from_numpy(layer.down[expert][:, gone] @ h.mean(0)[gone])
            with torch.no_grad():
                experts.down_proj[expert][:, gone] = 0.0

        def add(module: Any, args: Any, output: Tensor, biases: Tensor = biases) -> Tensor:
            _, index, weight = args
            return output + (weight.double()[..., None] * biases[index]).sum(1)

        experts.register_forward_hook(add)
    return model


@pytest.fixture(scope="module")
def observed() -> tuple[Any, Statistics, list[LayerRecord]]:
    model = untouched()
    return model, ml.collect(model, BATCHES, {"channels"}, progress=False), record(model, BATCHES)


def test_scores_equal_the_formula(observed: Any) -> None:
    _, statistics, layers = observed
    for number, layer in enumerate(layers):
        expected = reference_scores(layer)
        np.testing.assert_allclose(channel_scores(statistics, number).numpy(), expected, rtol=1e-9, atol=1e-18)
        assert (expected.max(1) > 0).all()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_widths_are_those_of_the_lowest_threshold(observed: Any, ratio: float) -> None:
    _, statistics, layers = observed
    total = 3 * EXPERTS * CHANNELS
    edits = channel_drop(ratio=ratio).propose(statistics.shape, statistics)
    widths = [edit.width for edit in edits]
    removed = math.floor(ratio * total + 0.5)
    assert widths == reference_widths(layers, removed)
    assert total - removed - EXPERTS < EXPERTS * sum(widths) <= total - removed, "misses the budget by a whole step"
    assert len(set(widths)) > 1, "the layers do not differ: the test shows nothing"


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_equals_the_untouched_model_with_zero_columns_and_biases(observed: Any, ratio: float) -> None:
    original, _, layers = observed
    model = copy.deepcopy(original)
    widths = [edit.width for edit in compress(model, channel_drop(ratio=ratio)).plan.edits]
    expected = without_channels(original, layers, widths)
    assert (logits(original) - logits(expected)).abs().max() > 1e-3, "nothing was removed"
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-10)


def test_the_mean_output_of_every_expert_stays(observed: Any) -> None:
    """The bias is what makes it so. Of the first layer: the others get other inputs."""
    original, _, layers = observed
    model = copy.deepcopy(original)
    compress(model, plan=CompressionPlan((KeepChannels(0, 7),)))
    experts = model.model.layers[0].mlp.experts
    for expert in range(EXPERTS):
        seen = layers[0].chosen[:, expert]
        scores = reference_scores(layers[0])[expert]
        kept = sorted(sorted(range(CHANNELS), key=lambda j, row=scores: (row[j], j))[CHANNELS - 7 :])
        assert torch.equal(
            experts.storage.down_proj[expert], original.model.layers[0].mlp.experts.down_proj[expert][:, kept]
        )
        h = layers[0].channel[seen, expert][:, kept]
        outputs = (
            h @ experts.storage.down_proj[expert].detach().numpy().T + experts.storage.bias[expert].detach().numpy()
        )
        np.testing.assert_allclose(outputs.mean(0), layers[0].output[seen, expert].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "methods",
    [
        [channel_drop(ratio=0.9)],
        [channel_drop(ratio=0.5, scope="layer")],
        [channel_drop(ratio=0.3), channel_drop(ratio=0.5), channel_drop(ratio=0.5, scope="layer")],
    ],
    ids=["once", "layer", "three times"],
)
def test_channels_that_do_not_vary_go_without_a_trace(methods: Any) -> None:
    # transformers' eager softmax is fp32: its weights add up to 1 within 1e-7 only, so that positions would differ.
    model = untouched(attn_implementation="sdpa")
    inputs = REPEATED[0]["input_ids"]
    expected = logits(model, inputs)
    channels = np.stack([layer.channel[0][layer.chosen[0]] for layer in record(model, REPEATED)])
    assert (np.abs(channels).max(-1) > 0.1).all(), "the channels are zero: the test shows nothing"
    compress(model, methods, REPEATED)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-10)
    for layer in model.model.layers:
        layer.mlp.experts.storage.bias.data.zero_()
    assert (logits(model, inputs) - expected).abs().max() > 1e-3, "the bias did nothing"


def test_silent_channels_go_first() -> None:
    """Channels that are always zero change nothing on any text, in each expert other ones."""
    model = untouched()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for expert in range(EXPERTS):
                layer.mlp.experts.gate_up_proj[expert, generator.permutation(CHANNELS)[:20]] = 0.0
    expected = logits(model)
    edits = compress(model, channel_drop(ratio=20 / 48, scope="layer")).plan.edits
    assert [edit.width for edit in edits] == [28] * 3
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_dropping_nothing_changes_nothing() -> None:
    model = tiny_mixtral()
    expected, before = logits(model), type(model)
    for method in (channel_drop(ratio=0.0), channel_drop(ratio=0.0, scope="layer"), channel_drop(parameters=10**9)):
        assert compress(model, method).plan.edits == ()
    assert type(model) is before
    assert torch.equal(logits(model), expected)


def test_an_expert_that_no_token_reached_keeps_some_and_has_no_bias() -> None:
    model = untouched(attn_implementation="sdpa")
    original = copy.deepcopy(model)
    reached = [layer.chosen.any(0) for layer in record(model, REPEATED)]
    assert all(row.sum() == 2 for row in reached)
    compress(model, channel_drop(ratio=0.5, scope="layer"), REPEATED)
    for number, row in enumerate(reached):
        storage = model.model.layers[number].mlp.experts.storage
        whole = original.model.layers[number].mlp.experts
        for expert in range(EXPERTS):
            assert bool(storage.bias[expert].any()) == row[expert]
            if not row[expert]:
                assert torch.equal(storage.down_proj[expert], whole.down_proj[expert][:, 24:]), "the first go"
    assert torch.isfinite(logits(model)).all()


def test_experts_that_no_token_reached_have_no_say(observed: Any) -> None:
    _, statistics, layers = observed
    dead = [1, 3, 4, 5]
    tensors = {name: tensor.clone() for name, tensor in statistics.tensors.items()}
    for name in ("channel_count", "channel_mean", "channel_m2"):
        tensors[name][0, dead] = 0.0
    chosen = layers[0].chosen.copy()
    chosen[:, dead] = False
    others = [dataclasses.replace(layers[0], chosen=chosen), *layers[1:]]
    changed = 0
    for removed in (100, 200, 400, 500, 700):
        widths = reference_widths(others, removed)
        changed += widths != reference_widths(layers, removed)
        method = channel_drop(ratio=removed / (3 * EXPERTS * CHANNELS))
        edits = method.propose(statistics.shape, Statistics(statistics.shape, tensors))
        assert [edit.width for edit in edits] == widths
    assert changed, "they had a say that changed nothing"


def test_novices_and_merged_experts_keep_out() -> None:
    model = untouched()
    result = compress(model, [ml.Novices(keep=4), Merge(keep=2), channel_drop(ratio=0.5)])
    for layout in result.shape_after.layouts:
        assert layout.width is not None
        storage = model.model.layers[layout.layer].mlp.experts.storage
        assert tuple(storage.down_proj.shape) == (len(layout.real), HIDDEN, layout.width)
        assert tuple(storage.bias.shape) == (len(layout.real), HIDDEN)
    assert sum(len(layout.real) for layout in result.shape_after.layouts) == 6
    assert torch.isfinite(logits(model)).all()


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = tiny_mixtral()
    compress(model, channel_drop(ratio=0.5))
    ml.save_pretrained(model, tmp_path)
    loaded = ml.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


# Widths.


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_a_target_is_met_and_missed_by_less_than_a_step(observed: Any, scope: Any, name: str) -> None:
    _, statistics, _ = observed
    shape = statistics.shape
    unit = 8 if name == "bytes" else 1
    step = EXPERTS * 3 * HIDDEN * unit * (3 if scope == "layer" else 1)
    biases = 3 * EXPERTS * HIDDEN * unit
    for share in (0.999, 0.9, 0.7, 0.5, 0.3):
        target = int(share * getattr(shape, name))
        edits = channel_drop(**{name: target}, scope=scope).propose(shape, statistics)
        reached = getattr(CompressionPlan(edits).check(shape), name)
        assert reached <= target < reached + step + biases
        assert channel_drop(**{name: reached}, scope=scope).propose(shape, statistics) == edits
        if scope == "layer":
            assert len({edit.width for edit in edits}) == 1
        if len(edits) == 3:
            assert target < reached + step


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("multiple_of", "floor"), [(8, 1), (8, 20), (10, 1), (1, 30)])
def test_permitted_widths(observed: Any, scope: Any, multiple_of: int, floor: int) -> None:
    _, statistics, _ = observed
    seen = set()
    for ratio in (0.05, 0.2, 0.3):
        method = channel_drop(ratio=ratio, scope=scope, multiple_of=multiple_of, floor=floor)
        for edit in method.propose(statistics.shape, statistics):
            assert edit.width % multiple_of == 0 and floor <= edit.width < CHANNELS
            seen.add(edit.width)
    assert len(seen) > 1


@pytest.mark.parametrize(("ratio", "width"), [(0.3, 34), (0.01, 48), (0.011, 47), (0.5, 24), (0.99, 1)])
def test_the_same_width_in_every_layer_rounds_to_the_nearest(observed: Any, ratio: float, width: int) -> None:
    _, statistics, _ = observed
    edits = channel_drop(ratio=ratio, scope="layer").propose(statistics.shape, statistics)
    assert [edit.width for edit in edits] == ([width] * 3 if width < CHANNELS else [])


def test_a_large_ratio_leaves_the_floor(observed: Any) -> None:
    _, statistics, _ = observed
    edits = channel_drop(ratio=0.9999).propose(statistics.shape, statistics)
    assert [edit.width for edit in edits] == [1, 1, 1]


def test_one_layer_one_channel() -> None:
    model = untouched(num_hidden_layers=1, intermediate_size=1)
    assert compress(model, channel_drop(ratio=0.9)).plan.edits == ()
    model = untouched(num_hidden_layers=1, intermediate_size=2)
    assert compress(model, channel_drop(ratio=0.5)).plan.edits == (KeepChannels(0, 1),)
    assert torch.isfinite(logits(model)).all()


def test_of_equal_scores_the_first_go() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert best_channels(scores, 2).tolist() == [[0, 3], [2, 3]]
    assert best_channels(scores, 3).tolist() == [[0, 2, 3], [1, 2, 3]]
    assert best_channels(scores, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_equal_scores_standardise_to_zero() -> None:
    assert standardised(torch.full((2, 3), 5.0, dtype=torch.float64)).tolist() == [[0.0] * 3] * 2
    assert standardised(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]
    values = standardised(torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(values.mean(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(values.std(1), torch.ones(2, dtype=torch.float64))


def test_one_threshold_stops_at_the_first_step_that_is_too_dear() -> None:
    steps = [Step(3.0, 0, 2, 10), Step(2.0, 1, 2, 10), Step(1.0, 0, 3, 10), Step(0.5, 1, 3, 1)]
    assert widths_at_budget(steps, [1, 1], 0) == [1, 1]
    assert widths_at_budget(steps, [1, 1], 19) == [2, 1]
    assert widths_at_budget(steps, [1, 1], 29) == [2, 2], "the cheap step below the threshold was taken"
    assert widths_at_budget(steps[::-1], [1, 1], 31) == [3, 3]
    ties = [Step(1.0, row, width, 1) for width in (3, 2) for row in (1, 0)]
    assert widths_at_budget(ties, [1, 1], 1) == [2, 1]
    assert widths_at_budget(ties, [1, 1], 3) == [3, 2]


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs exactly one of ratio, parameters and bytes: got none"),
        ({"ratio": 0.5, "parameters": 3}, "needs exactly one.*ratio=0.5, parameters=3"),
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"ratio": float("nan")}, "ratio must lie"),
        ({"parameters": 0}, "parameters must be more than 0"),
        ({"bytes": -1}, "bytes must be more than 0"),
        ({"ratio": 0.5, "scope": "expert"}, "unknown scope 'expert': choose layer or global"),
        ({"ratio": 0.5, "floor": 0}, "floor must be at least 1"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"ChannelDrop.*{message}"):
        channel_drop(**options)


class Untouchable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("calibration began before the options were checked")


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_targets_out_of_reach_are_found_before_calibration(name: str, scope: Any) -> None:
    with pytest.raises(ValueError, match=rf"ChannelDrop: {name}=100 is out of reach.*raise {name} to that") as caught:
        compress(tiny_mixtral(), channel_drop(**{name: 100}, scope=scope), Untouchable())
    least = int(str(caught.value).split("still has ")[1].split(":")[0])
    result = compress(tiny_mixtral(), channel_drop(**{name: least}, scope=scope))
    assert [layout.width for layout in result.shape_after.layouts] == [1, 1, 1]
    assert getattr(result.size_after, name) == least


def test_a_plan_that_changes_a_layer_before_its_channels_measures_in_between() -> None:
    drop, channels = ml.KeepExperts(0, (1, 2, 3)), KeepChannels(0, 5)
    by_hand, one_after_the_other = tiny_mixtral(), tiny_mixtral()
    compress(by_hand, plan=CompressionPlan((drop, channels)))
    for edit in (drop, channels):
        compress(one_after_the_other, Replay(CompressionPlan((edit,))))
    for name, tensor in one_after_the_other.state_dict().items():
        assert torch.equal(by_hand.state_dict()[name], tensor), name


def test_a_step_that_changes_a_layer_before_its_channels_is_refused() -> None:
    plan = CompressionPlan((ml.KeepExperts(0, (1, 2, 3)), KeepChannels(0, 5)))
    with pytest.raises(ValueError, match="layer 0: 6 experts of 48 channels were measured, but there are 3 of 48 now"):
        compress(tiny_mixtral(), Replay(plan))
