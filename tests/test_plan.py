"""Plans: written, read, checked; numbers of the original model through several edits."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, Edit, ExpertLayout, KeepExperts, ModelShape, NoviceExperts
from moe_lightning.surgery import build
from tests.models import tiny_config

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def shape_of(**changes: Any) -> ModelShape:
    with torch.device("meta"):
        model = build(tiny_config(**changes))
    return architecture_of(model).shape(model)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return shape_of()


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    """Draw edits that fit, in any order of layers and kinds; the bookkeeping here is a plain set a layer."""
    router = {layer: set(range(EXPERTS)) for layer in range(LAYERS)}
    novices: dict[int, set[int]] = {layer: set() for layer in range(LAYERS)}
    edits: list[Edit] = []
    for _ in range(draw(st.integers(0, 6))):
        layer = draw(st.integers(0, LAYERS - 1))
        real = router[layer] - novices[layer]
        if draw(st.booleans()):
            kept = draw(st.sets(st.sampled_from(sorted(router[layer])), min_size=TOP_K))
            router[layer] = kept
            novices[layer] &= kept
            edits.append(KeepExperts(layer, tuple(sorted(kept))))
        elif real:
            chosen = draw(st.sets(st.sampled_from(sorted(real)), min_size=1))
            novices[layer] |= chosen
            edits.append(NoviceExperts(layer, tuple(sorted(chosen)), draw(st.sampled_from(["mean", "zero"]))))
    return CompressionPlan(tuple(edits), {"seed": draw(st.integers(0, 9)), "sets": [1, {"a": None}]})


def bookkeeping(plan: CompressionPlan) -> list[tuple[set[int], set[int]]]:
    """Say which experts of each layer have a router row and which of these are novices."""
    result = []
    for layer in range(LAYERS):
        router, novices = set(range(EXPERTS)), set()
        for edit in plan.edits:
            if edit.layer == layer and isinstance(edit, KeepExperts):
                router, novices = set(edit.experts), novices & set(edit.experts)
            elif edit.layer == layer:
                assert isinstance(edit, NoviceExperts)
                novices = novices | set(edit.experts)
        result.append((router, novices))
    return result


@settings(max_examples=30, deadline=None)
@given(plan=plans())
def test_json_round_trip(plan: CompressionPlan) -> None:
    for again in (
        CompressionPlan.from_json(plan.to_json()),
        CompressionPlan.from_dict(plan.to_dict()),
        CompressionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))),
    ):
        assert again == plan and again.edits == plan.edits
        assert again.origin == plan.origin
        assert hash(again) == hash(plan)
    assert json.loads(plan.to_json()) == plan.to_dict()


@settings(max_examples=30, deadline=None)
@given(plan=plans())
def test_original_numbers_through_several_edits(plan: CompressionPlan) -> None:
    shape = shape_of()
    after = plan.check(shape)
    for layout, (router, novices) in zip(after.layouts, bookkeeping(plan), strict=True):
        assert layout.router == tuple(sorted(router))
        assert layout.novices == tuple(sorted(novices))
        assert layout.real == tuple(sorted(router - novices))
        for row, expert in enumerate(layout.router):
            place = layout.slot_map[row]
            assert (layout.real[place] if place >= 0 else layout.novices[-1 - place]) == expert
    # Shape by shape, edit by edit, is the same as at once; and nothing of the original is lost.
    step = shape
    for edit in plan.edits:
        step = CompressionPlan((edit,)).check(step)
    assert step == after
    assert after.uncompressed() == shape
    assert ModelShape.from_dict(json.loads(json.dumps(after.to_dict()))) == after


@settings(max_examples=15, deadline=None)
@given(plan=plans(), tied=st.booleans(), heads=st.sampled_from([(4, 2, None), (4, 4, 16), (2, 1, 8)]))
def test_claimed_parameters_equal_those_counted(
    plan: CompressionPlan, tied: bool, heads: tuple[int, int, int | None]
) -> None:
    query, key, width = heads
    config = tiny_config(tie_word_embeddings=tied, num_attention_heads=query, num_key_value_heads=key, head_dim=width)
    with torch.device("meta"):
        model = build(config, plan)
    shape = architecture_of(model).shape(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    for layer, (router, novices) in zip(model.model.layers, bookkeeping(plan), strict=True):
        assert layer.mlp.gate.weight.shape == (len(router), 32)
        held = [p for p in layer.mlp.experts.parameters() if p.ndim == 3]
        assert {len(p) for p in held} == {len(router - novices)}
        rows = [len(p) for p in layer.mlp.experts.parameters() if p.ndim == 2]
        assert sum(rows) == len(novices)


def test_other_versions_are_an_error() -> None:
    values = CompressionPlan((KeepExperts(0, (0, 1)),)).to_dict()
    for version in (0, 2, "1", None):
        with pytest.raises(ValueError, match=f"version {version!r}"):
            CompressionPlan.from_dict({**values, "version": version})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "melt", "layer": 0}, "unknown kind of edit 'melt'.*keep_experts.*novice_experts"),
        ({"layer": 0, "experts": [0]}, "unknown kind of edit None"),
        ({"kind": "keep_experts", "layer": 0}, "wrong fields.*experts"),
        ({"kind": "keep_experts", "layer": 0, "experts": [0], "x": 1}, "wrong fields.*'x'"),
        (7, "edit"),
        ("keep_experts", "edit"),
        ({"kind": "keep_experts", "layer": "0", "experts": [0, 1]}, "layer.*whole number"),
        ({"kind": "keep_experts", "layer": 0, "experts": ["0", "1"]}, "experts.*whole numbers"),
        ({"kind": "keep_experts", "layer": 0, "experts": 3}, "experts.*whole numbers"),
        ({"kind": "keep_experts", "layer": 0, "experts": [0, 1.5]}, "experts.*whole numbers"),
    ],
)
def test_edits_that_are_none_are_an_error(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_dict({"version": 1, "edits": [edit]})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"version": 1}', '{"version": 1, "edits": {}}'])
def test_files_that_are_no_plan_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="plan"):
        CompressionPlan.from_json(text)


def test_an_origin_that_is_no_mapping_is_an_error() -> None:
    with pytest.raises(ValueError, match="origin"):
        CompressionPlan.from_dict({"version": 1, "edits": [], "origin": [3]})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((KeepExperts(1, (4,)),), "layer 1 would keep 1 expert.* the router picks 2: keep at least 2"),
        ((KeepExperts(1, ()),), "layer 1 would keep no expert"),
        ((KeepExperts(3, (0, 1)),), r"layer 3 is not an MoE layer.*\[0, 1, 2\]"),
        ((KeepExperts(0, (1, 0)),), "ascending and distinct"),
        ((KeepExperts(0, (1, 1, 2)),), "ascending and distinct"),
        ((KeepExperts(0, (1, 6)),), r"layer 0: cannot keep experts \[6\].*\[0, 1, 2, 3, 4, 5\]"),
        ((KeepExperts(0, (-1, 2)),), r"cannot keep experts \[-1\]"),
        ((KeepExperts(0, (0, 1)), KeepExperts(0, (1, 2))), r"cannot keep experts \[2\].*\[0, 1\] at this point"),
        ((NoviceExperts(0, (3,)), NoviceExperts(0, (3, 4))), r"cannot replace by novices experts \[3\]"),
        ((KeepExperts(0, (0, 1)), NoviceExperts(0, (2,))), r"cannot replace by novices experts \[2\]"),
        ((NoviceExperts(0, ()),), "layer 0.*no expert"),
    ],
)
def test_plans_that_do_not_fit_are_an_error(shape: ModelShape, edits: tuple[Edit, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionPlan(edits).check(shape)


def test_keep_may_keep_novices_and_drop_them() -> None:
    plan = CompressionPlan((NoviceExperts(0, (1, 3)), KeepExperts(0, (0, 3, 5))))
    assert plan.check(shape_of()).layouts[0] == ExpertLayout(0, (0, 3, 5), (3,))


def test_extending() -> None:
    first = CompressionPlan((KeepExperts(0, (0, 1)),), {"base": "x"})
    second = first.extended([NoviceExperts(1, (2,))], {"method": "Novices"})
    third = second.extended([NoviceExperts(1, (3,))], {"method": "Novices", "n": 2})
    assert third.edits == (KeepExperts(0, (0, 1)), NoviceExperts(1, (2,)), NoviceExperts(1, (3,)))
    assert third.origin == {
        "base": "x",
        "history": [{"method": "Novices", "edits": 1}, {"method": "Novices", "n": 2, "edits": 1}],
    }
    assert first.origin == {"base": "x"} and len(second.origin["history"]) == 1
    assert third.starts_with(first) and third.starts_with(third) and not first.starts_with(third)
    assert not third.starts_with(CompressionPlan((NoviceExperts(1, (2,)),)))
    assert bool(first) and not CompressionPlan((), {"base": "x"})


def test_edits_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KeepExperts(0, (0, 1)).layer = 2  # type: ignore[misc]


def test_imports_no_torch() -> None:
    code = "import sys, moe_lightning.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_steps_are_what_each_method_added() -> None:
    one, two, three = KeepExperts(0, (0, 1)), NoviceExperts(1, (2,)), NoviceExperts(2, (3,))
    plan = CompressionPlan().extended([one], {"m": 1}).extended([], {"m": 2}).extended([two, three], {"m": 3})
    for again in (plan, CompressionPlan.from_json(plan.to_json())):
        assert [step.edits for step in again.steps()] == [(one,), (two, three)]
        assert [step.origin["m"] for step in again.steps()] == [1, 3]
    by_hand = CompressionPlan((one, two))
    assert by_hand.steps() == (by_hand,)
    mixed = plan.extended([NoviceExperts(2, (4,))])  # whose history tells of a part only
    assert [step.edits for step in mixed.steps()] == [(one, two, three), (NoviceExperts(2, (4,)),)]
    assert CompressionPlan().steps() == ()


def test_plan_and_kernels_mean_the_same_by_absent() -> None:
    """Neither imports the other."""
    import moe_kernels

    from moe_lightning.plan import ABSENT

    assert ABSENT == moe_kernels.ABSENT
