"""Experts that few calibration tokens reach, or none, under every policy."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.compression.layerwise import SlimmingReport, _check_fallbacks
from moe_lightning.compression.starved import FRUITLESS_BATCHES, SequenceCounter, enough_batches
from moe_lightning.method import Method
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.policy import SlimmingPolicy, TooFewTokens
from moe_lightning.slimming.pruners import Magnitude, SparseGPT, Wanda
from moe_lightning.slimming.quantizers import GPTQ, RTN
from moe_lightning.statistics.layer_inputs import ExpertInputs, slots_reached
from tests.compression.test_compress import Snapshot
from tests.layer_reference import padded
from tests.models import random_batches, tiny_mixtral

LAYERS, EXPERTS = 3, 6
TWINS = {
    "gptq": (GPTQ(group_size=16), RTN(group_size=16)),
    "awq": (AWQ(group_size=16, propagate="original"), RTN(group_size=16)),
    "wanda": (Wanda(sparsity=0.5), Magnitude(sparsity=0.5)),
    "router wanda": (Wanda(pattern="2:4", router_weighted=True, propagate="original"), Magnitude(pattern="2:4")),
    "sparsegpt": (SparseGPT(pattern="2:4"), Magnitude(pattern="2:4")),
}
"""Methods, and what they come down to where nothing was measured."""


def counts(model: Any, batches: Any) -> Tensor:
    """Tokens of each expert by the pass that is tested elsewhere, ``[layers, experts]``."""
    return ml.collect(model, batches, {"routing"}, progress=False)["count"].long()


def compress(model: Any, batches: Any, method: Any, **options: Any) -> tuple[ml.CompressionResult, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ml.compress(model, batches, method, **{"progress": False, "max_fallback": 1.0, **options})
    return result, [str(item.message) for item in caught if item.category is UserWarning]


@torch.no_grad()
def stacks(model: Any) -> list[Tensor]:
    return [
        getattr(layer.mlp.experts.storage, name).dense()
        for layer in model.model.layers
        for name in ("gate_up_proj", "down_proj")
    ]


ONE_TOKEN = [{"input_ids": torch.tensor([[5]])}]
"""Two experts of each layer get one token, four get none."""


@pytest.mark.parametrize(("method", "twin"), TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("policy", ["warn", "fallback", "top_up"])
def test_no_token_and_one_token(method: Any, twin: Method, policy: Any) -> None:
    model, rounded, plain = tiny_mixtral(), tiny_mixtral(), tiny_mixtral()
    result, said = compress(model, ONE_TOKEN, method, starved=policy, top_up=ONE_TOKEN)
    compress(rounded, None, twin)
    for layer, status in enumerate(result.modules.values()):
        assert sorted(status.tokens.values()) == ([0] * 4 + [2] * 2 if policy == "top_up" else [0] * 4 + [1] * 2)
        for key, what in status.matrices.items():
            tokens = status.tokens[int(key.partition(".")[0])]
            fallen = what.startswith(("rtn fallback", "magnitude fallback"))
            assert fallen == (tokens == 0 or policy == "fallback"), (layer, key, what)
            assert not fallen or f"{tokens} token" in what
    original = [
        tensor.detach()
        for layer in plain.model.layers
        for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
    ]
    for number, (got, fallback, weight) in enumerate(zip(stacks(model), stacks(rounded), original, strict=True)):
        tokens = list(result.modules.values())[number // 2].tokens
        for expert in range(EXPERTS):
            assert torch.isfinite(got[expert]).all()
            # Far from zero, and near what it was; AWQ rescales.
            awq = isinstance(method, AWQ)
            assert awq or float((got[expert] - weight[expert]).detach().norm() / weight[expert].norm()) < 0.9
            assert (got[expert] != 0).float().mean() > 0.1
            if not awq and (policy == "fallback" or tokens[expert] == 0):
                assert torch.equal(got[expert], fallback[expert])
    if policy == "warn":
        assert len([message for message in said if "calibration tokens reach" in message]) == LAYERS
    if policy == "fallback":
        assert not said
    if policy == "top_up":
        assert len([message for message in said if "top_up is exhausted" in message]) == 1


def test_an_error_is_found_before_anything_is_done() -> None:
    model = tiny_mixtral().train()
    before = Snapshot(model)
    batches = random_batches(2, 2, 9)
    found = counts(tiny_mixtral(), batches)
    threshold = int(found.min()) + 1
    layer, expert = divmod(int(found.argmin()), EXPERTS)
    with pytest.raises(TooFewTokens, match=rf"layer {layer}: experts {expert} \({threshold - 1}\).*starved='top_up'"):
        compress(model, batches, [ml.ExpertDrop(keep=6), GPTQ(group_size=16)], starved="error", min_tokens=threshold)
    before.check()
    compress(model, batches, Wanda(sparsity=0.5, propagate="original"), starved="error", min_tokens=threshold - 1)


def test_no_batches_are_an_error_under_every_policy() -> None:
    for policy in ("warn", "fallback", "error", "top_up"):
        model = tiny_mixtral()
        before = Snapshot(model)
        with pytest.raises(ValueError, match="no calibration batches"):
            compress(model, [], GPTQ(group_size=16), starved=policy, top_up=ONE_TOKEN)
        before.check()


def test_warnings_name_experts_and_counts_once_a_layer() -> None:
    model = tiny_mixtral()
    batches = random_batches(2, 2, 9)
    found = counts(tiny_mixtral(), batches)
    _, said = compress(model, batches, Wanda(sparsity=0.5, propagate="original"), min_tokens=13)
    assert len(said) == int((found < 13).any(1).sum())
    for message, layer in zip(said, (found < 13).any(1).nonzero().flatten().tolist(), strict=True):
        few = [f"{expert} ({found[layer, expert]})" for expert in range(EXPERTS) if found[layer, expert] < 13]
        assert f"min_tokens=13, but fewer calibration tokens reach layer {layer}: experts {', '.join(few)}:" in message
    assert not compress(tiny_mixtral(), batches, Wanda(sparsity=0.5), min_tokens=0)[1]


def test_fallback_leaves_the_others_as_they_are() -> None:
    batches = random_batches(2, 2, 9)
    found = counts(tiny_mixtral(), batches)
    models = [tiny_mixtral(), tiny_mixtral(), tiny_mixtral()]
    method = Wanda(sparsity=0.5, propagate="original")
    compress(models[0], batches, method, starved="fallback", min_tokens=12)
    compress(models[1], batches, method, min_tokens=12)
    compress(models[2], None, Magnitude(sparsity=0.5))
    for number, (got, measured, magnitude) in enumerate(zip(*map(stacks, models), strict=True)):
        for expert in range(EXPERTS):
            few = found[number // 2, expert] < 12
            assert torch.equal(got[expert], (magnitude if few else measured)[expert])


class Source:
    """Batches that count how many of them were read."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield batch


def test_topping_up_draws_only_what_reaches_a_starved_expert_and_stops() -> None:
    model = tiny_mixtral()
    before = Snapshot(model)
    batches = random_batches(2, 2, 5)
    more = [random_batches(1, 3, 7, seed=seed)[0] for seed in range(1, 40)]
    more[1] = padded(list(more[1]["input_ids"][:, :4]), 9)
    source = Source(more)
    policy = SlimmingPolicy(min_tokens=11, starved="top_up", top_up=source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough, named = enough_batches(model, batches, range(LAYERS), policy, progress=False)
    before.check()
    assert not named
    drawn = list(enough)[len(batches) :]
    assert all(one is other for one, other in zip(enough, batches, strict=False))
    assert (counts(model, enough) >= 11).all()
    # By hand, sequence after sequence.
    have, expected = counts(model, batches), []
    for batch in more[: source.read]:
        for row in range(3):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            found = counts(model, [one])
            if ((have < 11) & (found > 0)).any():
                expected.append(one["input_ids"][0])
                have += found
    assert [row.tolist() for batch in drawn for row in batch["input_ids"]] == [row.tolist() for row in expected]
    assert torch.equal(counts(model, enough), have)
    # The last batch that was read was needed, and no further one was.
    without = [batch for batch in drawn if not torch.equal(batch["input_ids"][-1], expected[-1])]
    assert (counts(model, [*batches, *without]) < 11).any() and source.read < len(more)


def test_topping_up_measures_what_was_drawn_and_warns_where_the_source_ends() -> None:
    batches, more = random_batches(1, 2, 5), random_batches(4, 2, 9, seed=5)
    model, other = tiny_mixtral(), tiny_mixtral()
    method = Wanda(sparsity=0.5, propagate="original")
    result, said = compress(model, batches, method, starved="top_up", top_up=more, min_tokens=10**6)
    # Everything reaches a starved expert, so that everything is drawn.
    compress(other, [*batches, *more], method, min_tokens=0)
    for got, want in zip(stacks(model), stacks(other), strict=True):
        assert torch.equal(got, want)
    assert len(said) == 1 and "top_up is exhausted" in said[0] and "layer 2: experts 0 (" in said[0]
    found = counts(tiny_mixtral(), [*batches, *more])
    tokens = [list(status.tokens.values()) for status in result.modules.values()]
    assert tokens == found.tolist()


def test_a_generator_goes_on_where_the_method_before_left_it() -> None:
    model = tiny_mixtral()
    source = iter(random_batches(60, 2, 9, seed=7))
    options = {"starved": "top_up", "top_up": source, "min_tokens": 20}
    compress(model, random_batches(1, 2, 5), [Wanda(sparsity=0.25), GPTQ(group_size=16)], **options)
    assert len(list(source)) > 30


def test_a_list_too_is_gone_through_once_by_all_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second method draws behind what the first one drew, and not the same again."""
    model, seen = tiny_mixtral(), []

    def watched(*arguments: Any, **options: Any) -> Any:
        found = enough_batches(*arguments, **options)
        seen.append([tuple(row.tolist()) for batch in found[0] for row in batch["input_ids"]])
        return found

    monkeypatch.setattr("moe_lightning.compression.layerwise.enough_batches", watched)
    source = Source(random_batches(60, 2, 9, seed=7))
    methods = [Wanda(sparsity=0.25), Wanda(sparsity=0.8), GPTQ(group_size=16)]
    # Those that were pruned send tokens other ways.
    compress(model, random_batches(1, 2, 5), methods, starved="top_up", top_up=source, min_tokens=30)
    assert len(seen) == 3 and len(seen[-1]) > len(seen[0]) > 2, "a later method drew as well"
    for one, other in itertools.pairwise(seen):
        assert other[: len(one)] == one
    assert len(set(seen[-1])) == len(seen[-1]) and source.read < 60


class Forever:
    """Calibration data that are read again at every pass, and never kept."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        yield from self.batches


@pytest.mark.parametrize("useful", [0, 1])
def test_drawing_from_a_stream_without_end_ends(useful: int) -> None:
    """Two experts of each layer get the same token again and again, the other four nothing."""
    model, read = tiny_mixtral(), []

    def stream() -> Iterator[Any]:
        yield from random_batches(useful, 1, 4, seed=3)
        for number in itertools.count():
            assert number < 10 * FRUITLESS_BATCHES, "there is no end"
            read.append(number)
            yield ONE_TOKEN[0]

    policy = SlimmingPolicy(min_tokens=1, starved="top_up", top_up=stream())
    calibration = Forever(ONE_TOKEN)
    with pytest.warns(UserWarning, match=rf"{FRUITLESS_BATCHES} batches of top_up in a row.*layer 0: experts \d \(0\)"):
        enough, named = enough_batches(model, calibration, range(LAYERS), policy, progress=False)
    assert len(read) == FRUITLESS_BATCHES == 64
    assert calibration.passes == 1, "batches are not kept beside what was drawn"
    assert len(list(enough)) == len(list(enough)) == 1 + useful
    assert calibration.passes == 3
    assert named == {
        (layer, expert)
        for layer, row in enumerate(counts(model, enough).tolist())
        for expert in range(6)
        if not row[expert]
    }


def test_an_option_without_sense_is_found_before_anything_runs() -> None:
    def unread() -> Iterator[Any]:
        raise AssertionError("the calibration data was read")
        yield

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"starved": "top_up"}, "give them as top_up="),
        ({"starved": "ignore"}, "warn, top_up, fallback, error, not 'ignore'"),
        ({"min_tokens": -1}, "min_tokens must be a whole number, at least 0, not -1"),
        ({"min_tokens": 2.5}, "min_tokens must be a whole number"),
        ({"max_fallback": 10}, "max_fallback must be a share from 0 to 1, not 10"),
        ({"max_fallback": "all"}, "max_fallback must be a share"),
        ({"max_moment_bytes": 0}, "max_moment_bytes must be a positive number of bytes"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ml.compress(tiny_mixtral(), unread(), GPTQ(group_size=16), **options)


def test_policies_do_not_concern_methods_that_measure_nothing() -> None:
    for policy in ("warn", "fallback", "error"):
        assert not compress(tiny_mixtral(), ONE_TOKEN, RTN(group_size=16), starved=policy, max_fallback=0.0)[1]


@pytest.mark.parametrize("policy", ["warn", "fallback"])
def test_too_many_fallbacks_fail_and_leave_nothing(policy: Any) -> None:
    model = tiny_mixtral().train()
    before = Snapshot(model)
    fallen = 4 if policy == "warn" else 6
    with pytest.raises(
        TooFewTokens, match=r"of 36 matrices .* max_fallback=0.6.*starved='top_up'.*min_tokens"
    ) as failed:
        compress(model, ONE_TOKEN, [ml.Novices(keep=6), GPTQ(group_size=16)], starved=policy, max_fallback=0.6)
    before.check()
    # It fails as soon as it is certain, and says where.
    assert "layer 1: " in str(failed.value) and "gate_up_proj" in str(failed.value)
    compress(model, ONE_TOKEN, GPTQ(group_size=16), starved=policy, max_fallback=fallen / 6)


def test_the_share_of_fallbacks_that_is_allowed_passes() -> None:
    batches = random_batches(6, 2, 11)
    result, _ = compress(
        tiny_mixtral(), batches, GPTQ(group_size=16), starved="fallback", min_tokens=40, max_fallback=1
    )
    statuses = list(itertools.chain(*(status.matrices.values() for status in result.modules.values())))
    fallen = sum(status.startswith("rtn fallback") for status in statuses)
    assert fallen > 0
    said = [module.status for module in result.modules.values() if "without measurement" in module.status]
    assert said and all(" of 12 matrices without measurement" in status for status in said)
    for share, fails in ((fallen / 36, False), (fallen / 36 - 0.01, True)):
        options = {"starved": "fallback", "min_tokens": 40, "max_fallback": share}
        if fails:
            with pytest.raises(RuntimeError, match="max_fallback"):
                compress(tiny_mixtral(), batches, GPTQ(group_size=16), **options)
        else:
            compress(tiny_mixtral(), batches, GPTQ(group_size=16), **options)


def test_an_outcome_is_no_wrong_option() -> None:
    assert issubclass(TooFewTokens, RuntimeError) and not issubclass(TooFewTokens, ValueError)


@pytest.mark.parametrize("number", [29, 30])
def test_a_share_that_is_met_to_the_last_bit_is_allowed(number: int) -> None:
    assert 0.29 * 100 < 29
    report = SlimmingReport({0: {f"{expert}.down_proj": "rtn fallback: 0 tokens" for expert in range(number)}})
    with contextlib.nullcontext() if number == 29 else pytest.raises(TooFewTokens, match="30 of 100"):
        _check_fallbacks(report, 100, "GPTQ()", SlimmingPolicy(max_fallback=0.29))


def test_choices_of_nobody_reach_nothing() -> None:
    """Router rows that do not exist mean nobody, as in transformers, in both ways of counting."""
    model = tiny_mixtral()
    plan = ml.CompressionPlan((ml.NoviceExperts(1, (1, 2)), ml.KeepExperts(2, (0, 3, 4, 5))))
    compress(model, ONE_TOKEN, None, plan=plan)
    index = torch.tensor([[0, -1], [3, 6], [-2, 1], [7, 99]])
    for layer, slots in ((0, 6), (1, 4), (2, 4)):
        slot_map = model.model.layers[layer].mlp.experts.slot_map_on("cpu") if layer else torch.arange(6)
        found = slots_reached(slot_map, index, slots)
        for row, pair in enumerate(index.tolist()):
            for place, choice in enumerate(pair):
                slot = int(slot_map[choice]) if 0 <= choice < len(slot_map) else -1
                assert found[row, place] == (slot if slot >= 0 else slots)
        inputs = ExpertInputs(torch.zeros(4, 32), index, torch.full((4, 2), 0.5))
        reached, gates = inputs.gates(slot_map, slots, torch.float32)
        assert reached.sum() == (found < slots).sum() and float(gates.sum()) == 0.5 * int(reached.sum())


def test_counting_sees_slots_and_leaves_padding_out() -> None:
    model = tiny_mixtral()
    batches = random_batches(3, 2, 9)
    plan = ml.CompressionPlan(
        (ml.KeepExperts(0, (0, 2, 5)), ml.NoviceExperts(1, (1, 2)), ml.MergeExperts(2, ((0, 1, 2), (3, 4, 5))))
    )
    compress(model, batches, None, plan=plan)
    counter = SequenceCounter(model, [2, 0, 1])
    layouts = architecture_of(model).shape(model).layouts
    assert counter.owners == [(layout.layer, expert) for layout in layouts for expert in layout.real]
    rows = [torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in (7, 3, 5)]
    seen: dict[int, Tensor] = {}
    for row in rows:
        handles = [
            layer.mlp.experts.register_forward_pre_hook(lambda m, a, number=number: seen.update({number: a[1]}))
            for number, layer in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(row[None])
        for handle in handles:
            handle.remove()
        expected = []
        for number, layout in enumerate(layouts):
            slots = [[layout.slot_map[place] for place in pair] for pair in seen[number].tolist()]
            expected += [sum(slot in pair for pair in slots) for slot in range(len(layout.real))]
        with counter.attached():
            assert counter({"input_ids": row[None]}, 0).tolist() == [expected]
            got = counter(padded([row, rows[0]], 11), 0)
        assert got[0].tolist() == expected
    assert not any(module._forward_pre_hooks for module in model.modules())
