"""What the kernels cost on GPUs, known from compiling them alone: bounds that hold on any machine."""

import functools
import re
from dataclasses import replace
from importlib.metadata import version

import pytest
from moe_kernels.triton_kernels.compile_only import (
    SHARED_BYTES_LIMIT,
    Request,
    Resources,
    can_compile,
    resources,
    resources_of,
)

from tests.kernels.triton.compiled_kernels import EVERYTHING, SAMPLE, Case

pytestmark = pytest.mark.skipif(can_compile() is not None, reason=f"kernels cannot be compiled: {can_compile()}")

# Bounds are those of triton 3.7 and later. 3.6 takes up to 1.18 times as many instructions for int4 weights, and parks
# up to eight registers before or behind a loop.
OLDER = can_compile() is None and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
MORE, PARKED = (1.2, 8) if OLDER else (1.0, 0)


@functools.cache
def compiled(everything: bool) -> dict[str, Resources]:
    """Compile in one process: to start one takes as long as to compile a kernel."""
    cases = EVERYTHING if everything else SAMPLE
    return {case.name: found for case, found in zip(cases, resources_of([case.request for case in cases]), strict=True)}


def check(case: Case, found: Resources) -> None:
    # One register may be parked in memory before the loop and fetched behind it; in the loop, none.
    assert found.spills <= max(case.spills, PARKED), found
    assert not {"STL", "LDL"} & found.opcodes.keys() or not found.loop_instructions, found
    assert found.shared_bytes <= SHARED_BYTES_LIMIT[case.request.arch], found
    assert found.has_wgmma == case.wgmma, found
    assert found.has_mma >= case.products, found
    if case.weights:
        assert 0.5 < found.per_weight(case.request.num_warps, case.weights) <= MORE * case.per_weight, found


# All of these in one test: with several workers, each would compile them all.
def test_sample() -> None:
    for case in SAMPLE:
        check(case, compiled(False)[case.name])


@pytest.mark.slow
def test_everything() -> None:
    failed = []
    for case in EVERYTHING:
        try:
            check(case, compiled(True)[case.name])
        except AssertionError as error:
            failed.append(f"{case.name}: {str(error).splitlines()[0]}")
    assert not failed, "\n".join(failed)


def test_routing_for_a_hidden_size_that_is_no_power_of_two() -> None:
    """The interpreter never looks at branches that are not taken; a compiler does."""
    pointers = dict.fromkeys(("hidden_ptr", "sums_ptr"), "*bf16") | dict.fromkeys(("index_ptr", "slot_map_ptr"), "*i64")
    pointers |= dict.fromkeys(("slot_ptr", "reached_ptr"), "*i32")
    numbers = dict.fromkeys(("num_tokens", "num_slots", "num_experts"), "i32")
    constants = {"TOP_K": 2, "ABSENT_SLOT": -(2**31), "HIDDEN": 72, "GROUP": 0}
    constants |= {"BLOCK_PAIRS": 128, "BLOCK_SLOTS": 16, "BLOCK_GROUPS": 16}
    name = "moe_kernels.triton_kernels.routing:routing_kernel"
    (found,) = resources_of([Request(name, pointers | numbers, constants)])
    assert not found.spills


def test_arguments_that_a_kernel_does_not_have() -> None:
    sample = SAMPLE[0].request
    wrong = replace(sample, signature={**sample.signature, "other_ptr": "*bf16"})
    with pytest.raises(ValueError, match=re.escape("no arguments named ['other_ptr'], no types or values for []")):
        resources(wrong)


def test_the_interpreter_is_no_compiler() -> None:
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels were not imported for the interpreter: there is a GPU")
    with pytest.raises(RuntimeError, match="process without it"):
        resources(SAMPLE[0].request)
