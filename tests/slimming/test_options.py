"""Options of the methods: what they refuse, how YAML reads them, what they propose."""

from collections.abc import Sequence
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import moe_lightning as ml
from moe_lightning.compression import compress
from moe_lightning.method import Method
from moe_lightning.plan import Quantize, Sparsify
from moe_lightning.slimming import Slimming
from moe_lightning.statistics import Statistics
from moe_lightning.surgery import plan_of
from tests.models import random_batches, tiny_mixtral

PRUNING = (ml.Magnitude, ml.Wanda, ml.SparseGPT)
ROUNDING = (ml.RTN, ml.GPTQ, ml.AWQ)
SCHEDULE = ml.SparsitySchedule(0.0, 0.5, 100)


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of sparsity and pattern, e.g. sparsity=0.5"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of sparsity and pattern"),
        ({"pattern": 124}, "put quotes around it, pattern: '2:4'"),
        ({"pattern": 248}, "pattern: '4:8'"),
        ({"pattern": "3:4"}, "unknown pattern '3:4': choose 2:4 or 4:8 or 1:4"),
        ({"sparsity": 0}, "between 0 and 1, got 0"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": 50}, "between 0 and 1"),
        ({"sparsity": True}, "between 0 and 1"),
        ({"sparsity": "0.5"}, "between 0 and 1"),
        ({"sparsity": 0.5, "scope": "column"}, "scope 'column': choose row or matrix"),
        ({"sparsity": 0.5, "targets": "attention"}, "targets 'attention': choose experts"),
    ],
)
def test_refused_by_pruning_methods(method: type, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{said}"):
        method(**options)


@pytest.mark.parametrize("method", ROUNDING)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3}, "bits 3: choose 4 or 8"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "row"}, "group_size .* got 'row'"),
        ({"symmetric": "yes"}, "symmetric must be true or false"),
        ({"targets": "all"}, "targets"),
    ],
)
def test_refused_by_rounding_methods(method: type, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{said}"):
        method(**options)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (ml.Wanda, {"sparsity": 0.5, "propagate": "both"}, "propagate"),
        (ml.Wanda, {"sparsity": 0.5, "router_weighted": 1}, "router_weighted"),
        (ml.SparseGPT, {"sparsity": 0.5, "damping": 0}, "damping must be a positive number.*default is 0.01"),
        (ml.SparseGPT, {"sparsity": 0.5, "sequential": None}, "sequential"),
        (ml.GPTQ, {"damping": float("nan")}, "damping"),
        (ml.GPTQ, {"desc_act": True, "static_groups": False}, "leave static_groups out"),
        (ml.AWQ, {"points": 0}, "points must be a whole number"),
        (ml.AWQ, {"loss": "none"}, "loss 'none': choose full or diagonal"),
        (ml.AWQ, {"clip": 0.9}, "clip"),
    ],
)
def test_refused_by_single_methods(method: type, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}: .*{said}"):
        method(**options)


def apply(methods: Sequence[Method] = ()) -> Any:
    """Stand for a command that takes methods."""
    return methods


def parsed(text: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(apply)
    return parser.instantiate(parser.parse_args(["--methods", text])).methods


def test_yaml() -> None:
    found = parsed(
        "[{class_path: Magnitude, init_args: {pattern: '2:4'}},"
        " {class_path: Wanda, init_args: {sparsity: 0.5, router_weighted: true}},"
        " {class_path: SparseGPT, init_args: {sparsity: {start: 0, end: 0.5, steps: 100, shape: linear}}},"
        " {class_path: SparseGPT, init_args: {pattern: '4:8', targets: experts+attention}},"
        " {class_path: RTN, init_args: {group_size: channel, bits: 8}},"
        " {class_path: GPTQ, init_args: {group_size: 32, static_groups: true}},"
        " {class_path: AWQ, init_args: {group_size: auto, power_of_two: false}},"
        " {class_path: GPTQ}]"
    )
    assert found == [
        ml.Magnitude(pattern="2:4"),
        ml.Wanda(sparsity=0.5, router_weighted=True),
        ml.SparseGPT(sparsity=ml.SparsitySchedule(0, 0.5, 100, shape="linear")),
        ml.SparseGPT(pattern="4:8", targets="experts+attention"),
        ml.RTN(group_size="channel", bits=8),
        ml.GPTQ(group_size=32, static_groups=True),
        ml.AWQ(group_size="auto", power_of_two=False),
        ml.GPTQ(),
    ]


@pytest.mark.parametrize(
    "options",
    ["{pattern: '3:4'}", "{bits: 4}", "{sparsity: half}", "{sparsity: {start: 0, end: 0.5}}", "{scope: all}", "{}"],
)
def test_yaml_that_does_not_fit(options: str) -> None:
    """A base class with annotations would let all of them through unchecked."""
    with pytest.raises(Exception, match=r"Wanda|sparsity"):
        parsed(f"[{{class_path: Wanda, init_args: {options}}}]")


def test_edits() -> None:
    shape = _shape()
    nothing = Statistics.synthetic(shape)
    assert ml.Wanda(sparsity=0.5, scope="matrix").propose(shape, nothing) == tuple(
        Sparsify(layer, "experts", 0.5, None, "matrix", "wanda") for layer in range(3)
    )
    assert ml.SparseGPT(pattern="2:4").propose(shape, nothing)[1] == Sparsify(
        1, "experts", None, "2:4", "row", "sparsegpt"
    )
    edits = ml.GPTQ(bits=8, group_size="channel", targets="experts+attention").propose(shape, nothing)
    assert [(edit.layer, edit.target) for edit in edits] == [
        (layer, target) for layer in range(3) for target in ("attention", "experts")
    ]
    assert edits[0] == Quantize(0, "attention", 8, "channel", False, "gptq")
    assert ml.Wanda(0.5, router_weighted=True).propose(shape, nothing)[0].method == "router_wanda"


def _shape() -> ml.ModelShape:
    from moe_lightning.architectures import architecture_of

    model = tiny_mixtral()
    return architecture_of(model).shape(model)


def test_layers_without_real_experts_are_left_out() -> None:
    shape = ml.CompressionPlan((ml.DropMoE(0), ml.NoviceExperts(1, tuple(range(6))))).check(_shape())
    nothing = Statistics.synthetic(shape)
    assert [edit.layer for edit in ml.RTN(group_size=16).propose(shape, nothing)] == [2]
    both = ml.RTN(group_size=16, targets="experts+attention").propose(shape, nothing)
    assert [(edit.layer, edit.target) for edit in both] == [
        (0, "attention"),
        (1, "attention"),
        (2, "attention"),
        (2, "experts"),
    ]
    none = ml.CompressionPlan(tuple(ml.DropMoE(layer) for layer in range(3))).check(_shape())
    with pytest.raises(ValueError, match="RTN: no layer has real experts"):
        ml.RTN().propose(none, Statistics.synthetic(none))


@pytest.mark.parametrize("kind", PRUNING)
def test_a_schedule_takes_a_run(kind: type) -> None:
    method = kind(sparsity=SCHEDULE)
    assert method.schedule == SCHEDULE
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=f"{kind.__name__}: sparsity is a schedule.*callback.*sparsity=0.5"):
        compress(model, random_batches(), method, progress=False)
    assert not plan_of(model)
    assert method.at_share(0.25) == kind(sparsity=0.25)
    assert method.at_share(0.25).schedule is None


def test_what_is_measured() -> None:
    kinds = [
        (ml.Magnitude(0.5), None),
        (ml.RTN(), None),
        (ml.Wanda(0.5), "diagonal"),
        (ml.AWQ(loss="diagonal"), "diagonal"),
        (ml.AWQ(), "full"),
        (ml.GPTQ(), "full"),
        (ml.SparseGPT(0.5), "full"),
    ]
    for method, kind in kinds:
        assert isinstance(method, Slimming)
        assert method.granularity == "layer"
        assert not method.needs
        assert method.moment_kind == kind


def test_groups_that_do_not_divide_are_found_before_anything_is_measured() -> None:
    class Untouchable(list):
        def __iter__(self) -> Any:
            raise AssertionError("batches were read")

    for method in (ml.GPTQ(), ml.AWQ(group_size=24)):
        with pytest.raises(ValueError, match=r"group_size .* does not divide"):
            compress(tiny_mixtral(), Untouchable(random_batches()), method, progress=False)
