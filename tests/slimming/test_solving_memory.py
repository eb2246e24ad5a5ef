"""Memory of solving is what is counted for it."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe_lightning.slimming import Scheme, Selection, prune_by_sparse_gpt, round_by_gptq
from moe_lightning.slimming.hessian import inverse_factor, portions
from moe_lightning.statistics.moment_memory import AT_ONCE, SOLVING, moment_bytes, solved_at_once, solving_bytes
from tests.slimming.problems import hessian_of

SIZE = 1024
HESSIAN = hessian_of(torch.randn(1, 2 * SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
WEIGHT = torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([2 * SIZE])
ORDER = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))[None]


def peak(work: Callable[[], object]) -> float:
    """Return the most memory that torch held for some work, in Hessians."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / moment_bytes(SIZE, "full")


@pytest.mark.parametrize("order", [None, ORDER])
def test_the_inverse_takes_two_more_hessians(order: torch.Tensor | None) -> None:
    assert 1.9 < peak(lambda: inverse_factor(HESSIAN, tokens_S=TOKENS, order_SI=order)) < 2.2


@pytest.mark.parametrize("desc_act", [False, True])
def test_rounding_and_pruning_take_what_is_counted(desc_act: bool) -> None:
    """Of a square matrix, whose copy is as large as its Hessian."""
    scheme = Scheme(4, 128)
    rounding = peak(lambda: round_by_gptq(WEIGHT, HESSIAN, scheme, tokens=TOKENS, desc_act=desc_act))
    assert SOLVING - 1 < rounding < SOLVING + 0.2
    if not desc_act:
        pruning = peak(lambda: prune_by_sparse_gpt(WEIGHT, HESSIAN, Selection(0.5), tokens=TOKENS))
        assert SOLVING - 1 < pruning < SOLVING + 0.4  # scores of a block


def test_portions_on_a_gpu_are_those_that_are_counted() -> None:
    for inputs, slots in ((2048, 128), (768, 128), (16384, 4)):
        stack = torch.empty(slots, inputs, inputs, device="meta")
        found = portions(stack, None)
        assert found[0].stop == solved_at_once(inputs)
        assert found[0].stop * inputs**2 <= AT_ONCE or found[0].stop == 1
        one = moment_bytes(inputs, "full")
        assert solving_bytes(inputs, "full", slots=slots) == SOLVING * min(found[0].stop, slots) * one
        assert solving_bytes(inputs, "full") == SOLVING * one
    assert solving_bytes(64, "diagonal", slots=8) == 0
