"""How many go: targets reached with as few as possible, floors, even layers, sensitivity; and options that refuse."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, KeepChannels, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.novices import low_rank_wants, novice_parameters, novice_values, settle_ranks
from tests.models import random_batches, tiny_mixtral
from tests.reference import emulated, untouched

BATCHES = random_batches(3, 2, 11)
SHAPE = architecture_of(tiny_mixtral()).shape(tiny_mixtral())
EXPERT = 3 * 32 * 48


class Untouchable:
    """Batches that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("calibration began before the options were checked")


def compress(model: Any, methods: Any, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    return ml.compress(model, batches, methods, progress=False, **options)


def scored(score: torch.Tensor, shape: ModelShape = SHAPE) -> Statistics:
    """Statistics whose criterion ``frequency`` is this score."""
    statistics = Statistics.synthetic(shape)
    statistics.info.clear()
    statistics.tensors |= {"count": score.double(), "tokens": torch.ones(len(score)).double()}
    statistics.tensors["output_count"] = torch.full_like(score.double(), 1e6)
    return statistics


def after(shape: ModelShape, edits: Any) -> ModelShape:
    for edit in edits:
        shape = edit.apply(shape)
    return shape


def random_scores(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))


# Targets.

METHODS: dict[str, tuple[Callable[..., Any], int, int]] = {
    # name: how to make it, parameters that one removal saves, experts of the 18 that may go
    "slice": (ml.ExpertDrop, EXPERT + 32, 12),
    "keep": (lambda **options: ml.ExpertDrop(router="keep", **options), EXPERT, 12),
    "down to one": (lambda **options: ml.ExpertDrop(allow_fewer_than_top_k=True, **options), EXPERT + 32, 15),
    "constants": (ml.Novices, EXPERT - 32, 18),
    "maps": (lambda **options: ml.Novices(novice="low_rank", rank=5, **options), EXPERT - 11 * 32, 18),
    "floor": (lambda **options: ml.Novices(floor=2, **options), EXPERT - 32, 12),
}


@pytest.mark.parametrize("scope", ["layer", "global", "sensitivity"])
@pytest.mark.parametrize("name", METHODS)
def test_a_target_is_reached_with_as_few_experts_as_possible(name: str, scope: Any) -> None:
    make, saved, most = METHODS[name]
    statistics = scored(random_scores())
    for number, slack in ((0, 0), (1, 0), (4, saved - 1), (7, 1), (most, 0)):
        target = SHAPE.parameters - number * saved + slack
        method = make(parameters=target, criterion="frequency", scope=scope)
        size = after(SHAPE, method.propose(SHAPE, statistics))
        assert size.parameters == SHAPE.parameters - number * saved <= target
        doubled = make(bytes=4 * target + 3, criterion="frequency", scope=scope)
        assert doubled.propose(SHAPE, statistics) == method.propose(SHAPE, statistics)
    smallest = SHAPE.parameters - most * saved
    for option, value in (("parameters", smallest), ("bytes", 4 * smallest)):
        method = make(**{option: value - 1}, criterion="frequency", scope=scope)
        with pytest.raises(
            ValueError, match=rf"{option}={value - 1:,} is out of reach.*set {option} to at least {value}"
        ):
            compress(tiny_mixtral(), method, Untouchable())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_counted_is_what_the_model_has(name: str) -> None:
    make, _, _ = METHODS[name]
    model = tiny_mixtral()
    target = SHAPE.parameters - 30_000
    result = compress(model, make(parameters=target, scope="global"))
    assert sum(parameter.numel() for parameter in model.parameters()) <= target
    assert result.size_after.bytes <= 4 * target


def test_bytes_are_those_of_the_type_that_the_model_has() -> None:
    target = 2 * (SHAPE.parameters - 3 * (EXPERT - 32))
    model = tiny_mixtral(dtype=torch.bfloat16)
    result = compress(model, ml.Novices(bytes=target, criterion="random"))
    assert result.size_after.bytes == target
    assert sum(len(layout.novices) for layout in result.shape_after.layouts) == 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(0, 12))
def test_layers_differ_by_one_at_most_and_the_extra_ones_are_the_next_lowest(seed: int, number: int) -> None:
    score = random_scores(seed)
    method = ml.ExpertDrop(parameters=SHAPE.parameters - number * (EXPERT + 32), criterion="frequency")
    layouts = after(SHAPE, method.propose(SHAPE, scored(score))).layouts
    gone = [sorted({*range(6)} - {*layout.router}) for layout in layouts]
    level, extra = divmod(number, 3)
    ranked = [sorted(range(6), key=lambda e, row=row: (float(row[e]), e)) for row in score]
    order = sorted(range(3), key=lambda row: (float(score[row, ranked[row][min(level, 5)]]), row))
    expected = [level + (row in order[:extra]) for row in range(3)]
    assert gone == [sorted(ranked[row][: expected[row]]) for row in range(3)]


def test_a_target_counts_layers_of_different_widths() -> None:
    """After ChannelDrop an expert of one layer is smaller than one of another."""
    shape = KeepChannels(1, 8).apply(SHAPE)
    score = random_scores()
    score[1] /= 100
    for target in range(shape.parameters - 55_000, shape.parameters, 3_777):
        method = ml.Novices(parameters=target, criterion="frequency", scope="global")
        edits = method.propose(shape, scored(score, shape))
        removed = sum(len(edit.experts) for edit in edits)
        assert after(shape, edits).parameters <= target
        if removed:
            fewer = ml.Novices(keep=(18 - removed + 1) / 3, criterion="frequency", scope="global")
            assert after(shape, fewer.propose(shape, scored(score, shape))).parameters > target


def test_a_target_that_the_model_meets_already_removes_nothing() -> None:
    model = tiny_mixtral()
    assert not compress(model, ml.Novices(parameters=SHAPE.parameters, criterion="random")).plan


# Floors.


def test_floors_hold_in_every_scope() -> None:
    score = random_scores()
    score[0] = 0
    for scope in ("global", "sensitivity"):
        kept = [
            len(layout.real)
            for layout in after(
                SHAPE, ml.Novices(keep=3, floor=2, criterion="frequency", scope=scope).propose(SHAPE, scored(score))
            ).layouts
        ]
        assert sum(kept) == 9 and kept[0] == 2 and min(kept) >= 2
    edits = ml.ExpertDrop(keep=3, floor=3, criterion="frequency", scope="global").propose(SHAPE, scored(score))
    assert [len(edit.experts) for edit in edits] == [3, 3, 3]


def test_fewer_than_the_router_picks_where_that_is_allowed() -> None:
    model = tiny_mixtral()
    method = ml.ExpertDrop(keep=1, allow_fewer_than_top_k=True, criterion="mone")
    result = compress(model, method)
    assert [len(layout.router) for layout in result.shape_after.layouts] == [1, 1, 1]
    with torch.no_grad():
        assert torch.isfinite(model(**BATCHES[0]).logits).all()
    uneven = ml.ExpertDrop(keep=2, allow_fewer_than_top_k=True, criterion="frequency", scope="global")
    score = random_scores()
    score[0] /= 100
    edits = uneven.propose(SHAPE, scored(score))
    assert [edit.allow_fewer_than_top_k for edit in edits] == [len(edit.experts) < 2 for edit in edits]
    assert len(edits[0].experts) == 1
    # A layer that is below the floor already is left as it is.
    lopsided = after(SHAPE, [ml.KeepExperts(0, (4,), allow_fewer_than_top_k=True)])
    edits = ml.ExpertDrop(keep=5 / 3, criterion="frequency", scope="global").propose(lopsided, scored(score, lopsided))
    assert [len(layout.router) for layout in after(lopsided, edits).layouts] == [1, 2, 2]


def test_router_keep_leaves_the_rows_and_a_dropped_expert_gives_nothing() -> None:
    model = untouched()
    original = copy.deepcopy(model)
    result = compress(model, ml.ExpertDrop(keep=3, router="keep"))
    gone = {
        (layout.layer, expert): torch.zeros(32).double()
        for layout in result.shape_after.layouts
        for expert in layout.absent
    }
    assert len(gone) == 9 and all(len(layout.router) == 6 for layout in result.shape_after.layouts)
    with emulated(original, constants=gone):
        expected = original(**BATCHES[0]).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCHES[0]).logits, expected, rtol=0, atol=1e-10)
    # Who is absent is no candidate any more.
    second = compress(model, ml.ExpertDrop(keep=2, router="slice"))
    for before, layout in zip(result.shape_after.layouts, second.shape_after.layouts, strict=True):
        assert set(layout.router) < set(before.real) and len(layout.router) == 2


# Layers alike.


def test_uniform_is_refused_by_the_options_or_by_the_shape() -> None:
    for kind, scope in itertools.product((ml.ExpertDrop, ml.Novices), ("global", "sensitivity")):
        with pytest.raises(ValueError, match=f"{kind.__name__}: compatible=uniform .*scope={scope}.*set scope=layer"):
            kind(ratio=0.5, scope=scope, compatible="uniform")
    target = SHAPE.parameters - 4 * (EXPERT + 32)
    with pytest.raises(ValueError, match=r"uniform.*layer 0: 4 of 4, layer 1: 5 of 5.*set keep=4, or compatible=any"):
        compress(tiny_mixtral(), ml.ExpertDrop(parameters=target, compatible="uniform"), Untouchable())
    uneven = ml.ExpertDrop(keep=4.5, scope="global")
    with pytest.raises(ValueError, match=r"Novices: compatible=uniform.*start from a model whose layers are alike"):
        compress(tiny_mixtral(), [uneven, ml.Novices(ratio=0.5, compatible="uniform")], Untouchable())


@pytest.mark.parametrize("kind", [ml.ExpertDrop, ml.Novices])
def test_uniform_accepts_what_is_even(kind: Any) -> None:
    saved = EXPERT + (32 if kind is ml.ExpertDrop else -32)
    for options in ({"keep": 4}, {"ratio": 0.3}, {"parameters": SHAPE.parameters - 6 * saved}):
        result = compress(tiny_mixtral(), kind(compatible="uniform", **options))
        assert {len(layout.real) for layout in result.shape_after.layouts} == {4}


# Sensitivity.


@pytest.mark.parametrize(
    "options", [{"keep": 4.5}, {"ratio": 0.25}, {"parameters": SHAPE.parameters - 5 * (EXPERT - 32)}]
)
def test_sensitivity_weighs_layers_by_what_trimming_them_alone_does(options: dict) -> None:
    """Trials, divergences and weights once more by the untouched model; the choice by trying all counts."""
    model = untouched()
    original = copy.deepcopy(model)
    method = ml.Novices(scope="sensitivity", novice="zero", criterion="frequency", **options)
    statistics = ml.collect(original, BATCHES, method.needs, progress=False)
    score = statistics.score("frequency")
    ranked = [sorted(range(6), key=lambda e, row=row: (float(score[row, e]), e)) for row in range(3)]
    trimmed = [2, 2, 2]
    if "parameters" in options:  # five over three layers: the sixth stays where the next score is largest
        third = max(range(3), key=lambda row: float(score[row, ranked[row][1]]))
        trimmed[third] = 1
    divergences, tokens = torch.zeros(3, dtype=torch.float64), 0
    for batch in BATCHES:
        with torch.no_grad():
            intact = original(**batch).logits.log_softmax(-1)
        tokens += intact[..., 0].numel()
        for row in range(3):
            gone = {(row, expert): torch.zeros(32).double() for expert in ranked[row][: trimmed[row]]}
            with emulated(original, constants=gone):
                other = original(**batch).logits.log_softmax(-1)
            divergences[row] += (intact.exp() * (intact - other)).sum()
    divergences /= tokens
    for row in range(3):
        (edit,) = method.trial(statistics.shape, statistics, row)
        assert edit.experts == tuple(sorted(ranked[row][: trimmed[row]]))
    weights = [
        float(divergences[row]) / sum(float(score[row, expert]) for expert in ranked[row][: trimmed[row]])
        for row in range(3)
    ]

    def cost(counts: tuple[int, ...]) -> float:
        gone = ((row, expert) for row in range(3) for expert in ranked[row][: counts[row]])
        return sum(weights[row] * float(score[row, expert]) for row, expert in gone)

    best = min((c for c in itertools.product(range(7), repeat=3) if sum(c) == 5), key=cost)
    result = compress(model, method)
    torch.testing.assert_close(result.statistics["layer_divergence"], divergences, rtol=1e-6, atol=1e-12)
    assert tuple(len(layout.novices) for layout in result.shape_after.layouts) == best


def test_a_trial_trims_something_and_respects_the_floor() -> None:
    score = random_scores()
    score[1, :4] = 0
    statistics = scored(score)
    method = ml.Novices(ratio=0.01, criterion="frequency", scope="sensitivity", floor=1)
    assert [len(method.trial(SHAPE, statistics, layer)[0].experts) for layer in range(3)] == [1, 5, 1]
    full = ml.ExpertDrop(keep=6, floor=6, criterion="frequency", scope="sensitivity")
    assert full.trial(SHAPE, statistics, 0) == ()
    assert full.propose(SHAPE, statistics) == ()
    maps = ml.Novices(keep=4, criterion="frequency", scope="sensitivity", novice="low_rank", rank=3)
    (edit,) = maps.trial(SHAPE, statistics, 2)
    assert (edit.novice, edit.ranks, len(edit.experts)) == ("gate2_mean", (), 2)
    assert maps.measures_sensitivity and not ml.Novices(keep=4).measures_sensitivity


def test_a_sensitivity_of_other_trials_is_refused() -> None:
    statistics = scored(random_scores())
    method = ml.Novices(keep=4, criterion="frequency", scope="sensitivity")
    statistics.info["layer_divergence"] = method.describe()
    method.propose(SHAPE, statistics)
    dataclasses.replace(method, seed=3, compatible="any").propose(SHAPE, statistics)
    for changed in (dataclasses.replace(method, keep=3.5), dataclasses.replace(method, novice="zero")):
        with pytest.raises(ValueError, match=r"scope=sensitivity: .*measured by trials with (keep=4|novice=mean)"):
            changed.propose(SHAPE, statistics)
    with pytest.raises(ValueError, match="trials with method=Novices"):
        ml.ExpertDrop(keep=4, criterion="frequency", scope="sensitivity").propose(SHAPE, statistics)
    statistics.info["layer_divergence"] = dataclasses.replace(method, novice="low_rank").describe()
    dataclasses.replace(method, novice="gate2_mean").propose(SHAPE, statistics)
    del statistics.tensors["layer_divergence"]
    with pytest.raises(ValueError, match=r"Novices: scope=sensitivity needs layer_divergence.*or use scope=global"):
        method.propose(SHAPE, statistics)


# Low-rank novices: ranks, what is fitted, and what is filled in. The fits themselves: test_low_rank.py.


def fit(layer: int, expert: int, rank: int) -> Any:
    """What a fit looks like, with numbers that name it."""
    size = lambda n: torch.full((n, 32), 100.0 * layer + expert, dtype=torch.float64)  # noqa: E731
    return SimpleNamespace(rank=rank, constant=size(1)[0], novice_in=size(rank) + 0.1, novice_out=size(rank) + 0.2)


def test_ranks_from_the_proposal_to_the_values() -> None:
    statistics = scored(torch.arange(18.0).reshape(3, 6))
    statistics.tensors["output_count"][0, 1] = 19  # below 4 tokens a rank
    statistics.tensors["gate2_output_sum"] = torch.rand(3, 6, 32, dtype=torch.float64)
    method = ml.Novices(keep=3, criterion="frequency", novice="low_rank", rank=5)
    edits = method.propose(SHAPE, statistics)
    assert [edit.ranks for edit in edits] == [(5, 0, 5), (5, 5, 5), (5, 5, 5)]
    wants = method.low_rank_wants(edits)
    assert wants == {0: ((0, 5), (2, 5)), 1: ((0, 5), (1, 5), (2, 5)), 2: ((0, 5), (1, 5), (2, 5))}
    assert method.settle(edits, statistics) == edits, "without fits (a what-if) ranks stay"
    for layer, pairs in wants.items():
        for expert, rank in pairs:
            statistics.fits[layer, expert] = fit(layer, expert, rank if (layer, expert) != (1, 1) and layer < 2 else 0)
    settled = method.settle(edits, statistics)
    assert [edit.ranks for edit in settled] == [(5, 0, 5), (5, 0, 5), ()]
    values = method.fill(settled[0], statistics)
    constant = novice_values("gate2_mean", statistics, 0, (1,))
    torch.testing.assert_close(
        values["novices"], torch.cat([torch.full((1, 32), 0.0), constant, torch.full((1, 32), 2.0)])
    )
    assert values["novice_in"][:, 0].tolist() == [0.1] * 5 + [2.1] * 5
    assert values["novice_out"][:, 0].tolist() == [0.2] * 5 + [2.2] * 5
    assert method.fill(settled[2], statistics).keys() == {"novices"}
    # A plan that is replayed says the rank; a map that is no better than the constant is then zero.
    again = novice_parameters(edits[1], statistics)
    assert again["novice_in"].shape == (15, 32) and not again["novice_out"][5:10].any()
    del statistics.fits[0, 2]
    with pytest.raises(ValueError, match="layer 0: no low-rank map was fitted for expert 2"):
        method.fill(settled[0], statistics)
    assert low_rank_wants([ml.NoviceExperts(0, (1, 2)), ml.KeepExperts(1, (0, 1))]) == {}
    assert settle_ranks(edits[:0], statistics) == ()


def test_all_starved_are_constants_at_once() -> None:
    statistics = scored(random_scores())
    statistics.tensors["output_count"][:] = 3
    edits = ml.Novices(keep=3, criterion="frequency", novice="low_rank", rank=4).propose(SHAPE, statistics)
    assert all(edit.ranks == () and edit.novice == "low_rank" for edit in edits)


def test_low_rank_novices_in_a_model() -> None:
    model = untouched()
    result = compress(model, ml.Novices(keep=4, novice="low_rank", rank=2, criterion="residual", scope="global"))
    ranks = [rank for layout in result.shape_after.layouts for rank in layout.novice_ranks]
    assert len(ranks) == 6 and set(ranks) <= {0, 2}
    assert result.touched == result.claimed


# Options that refuse.


@pytest.mark.parametrize("kind", [ml.Novices, ml.ExpertDrop])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 5, "bytes": 5}, "exactly one of ratio, keep, parameters and bytes, got parameters=5, bytes=5"),
        ({"parameters": 0}, "parameters must be a whole number above 0"),
        ({"bytes": 2.5}, "bytes must be a whole number above 0"),
        ({"bytes": True}, "bytes must be a whole number"),
        ({"keep": 3, "floor": 4}, "keep=3 is below floor=4: keep more, or lower the floor"),
        ({"keep": 3, "floor": -1}, "floor must be a whole number of experts"),
        ({"keep": 3, "floor": 1.5}, "floor must be a whole number of experts"),
        ({"keep": 3, "compatible": "vllm"}, "unknown compatible 'vllm': choose one of any, uniform"),
        ({"keep": 3, "criterion": "power:1,1"}, "criterion 'power:1,1' is none of power:ALPHA,BETA,B"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{message}"):
        kind(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ml.ExpertDrop(keep=3, floor=0), "ExpertDrop: floor must be .* at least 1, got 0"),
        (lambda: ml.ExpertDrop(keep=3, router="mask"), "ExpertDrop: unknown router 'mask': choose slice or keep"),
        (lambda: ml.Novices(keep=3, novice="low_rank", rank=0), "Novices: rank must be .* above 0, got 0"),
        (lambda: ml.Novices(keep=3, novice="low_rank", rank=1.5), "Novices: rank must be a whole number"),
        (lambda: ml.Novices(keep=3, rank=8), "Novices: rank=8 is of novice=low_rank, got novice=mean"),
    ],
)
def test_options_of_one_method_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (ml.ExpertDrop(keep=3, floor=1), "floor=1 but the router picks 2: set floor to at least 2, or allow"),
        (ml.ExpertDrop(ratio=0.9, allow_fewer_than_top_k=True, floor=2), "floor=2: lower the floor, or set keep"),
        (ml.ExpertDrop(ratio=0.95, allow_fewer_than_top_k=True), "layer 0 would keep 0.*a layer keeps at least one"),
        (ml.ExpertDrop(ratio=0.9), "set allow_fewer_than_top_k=True, or set keep to at least 2 or ratio to at most"),
        (ml.Novices(ratio=0.9, floor=2), "Novices: layer 0 would keep 1.*floor=2: lower the floor, or set keep to at"),
        (
            ml.Novices(ratio=0.9, floor=2, scope="global"),
            "on average.*floor=2.*keep to at least 2 or ratio to at most 0.6",
        ),
        (ml.Novices(keep=7, scope="sensitivity"), "Novices: keep=7"),
        (ml.Novices(ratio=0.5, novice="low_rank", rank=33), "rank=33 is more than the hidden size 32"),
        (ml.Novices(ratio=0.5, criterion="residual:33"), "'residual:33': errors are measured up to rank 32"),
        (
            [ml.Novices(keep=4), ml.ExpertDrop(keep=5, criterion="residual:2")],
            "ExpertDrop: criterion=residual:2 is measured for real experts only",
        ),
        (
            [ml.Novices(keep=4), ml.ExpertDrop(parameters=90_000, criterion="naee")],
            "ExpertDrop: criterion=naee cannot aim at parameters where some experts are novices",
        ),
        ([ml.LayerDrop(count=3), ml.Novices(keep=4)], "Novices: the model has no MoE layers left at this point"),
        ([ml.ChannelDrop(ratio=0.9), ml.Novices(keep=4, novice="low_rank")], "a map of rank=16 has at least as many"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_calibration(methods: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny_mixtral(), methods, Untouchable())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_advice_where_the_ratio_is_a_share_of_the_original(scope: Any) -> None:
    """Of 6 experts 4 are left and 2 must stay: 2 / 3 of the original's may go, though only half of those left."""
    model = tiny_mixtral()
    compress(model, ml.ExpertDrop(keep=4))
    start = architecture_of(model).shape(model)

    def drop(ratio: float) -> Any:
        method = ml.ExpertDrop(ratio=ratio, of="original", scope=scope, criterion="frequency")
        return method.propose(start, Statistics.synthetic(start))

    with pytest.raises(ValueError, match="set ratio to at most ") as raised:
        drop(0.9)
    assert "keep to at least" not in str(raised.value)
    most = float(str(raised.value).rpartition(" ")[2])
    assert most == pytest.approx(4 / 6, abs=1e-5)
    kept = CompressionPlan(drop(most)).check(start)
    assert sum(len(layout.real) for layout in kept.layouts) == 2 * len(start.layouts)
    # Without it both are there, and about those that are left.
    with pytest.raises(ValueError, match=r"set keep to at least 2 or ratio to at most 0\.5$"):
        ml.ExpertDrop(ratio=0.9, scope=scope, criterion="frequency").propose(start, Statistics.synthetic(start))
