"""Pairs sorted, and outputs added up, by the compiled functions: as plain torch says it, or not at all."""

import pytest
import torch
from moe_kernels import ABSENT, combine_with_novices, experts, mix_experts, mix_experts_by_loop, sort_pairs
from moe_kernels.cpu_kernels import build, calls, pairs
from moe_kernels.cpu_kernels.pairs import compiled_combine, compiled_sort
from moe_kernels.experts import NoviceMaps
from moe_kernels.machine import Machine
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not build.available(), reason=f"no compiled products: {build.why_not() or 'compiling failed, see the log'}"
)
TOKENS, HIDDEN, EXPERTS, SLOTS, NOVICES = 23, 37, 7, 3, 2
# A slot that two experts share, novices, and one that gives nothing.
SLOT_MAP = [2, -1, 0, ABSENT, 1, -2, 0]


@pytest.fixture(autouse=True)
def kernel_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "this_machine", lambda: Machine(False, "kernel"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain torch do it."""
    monkeypatch.setattr(experts, "compiled_sort", lambda *_: None)
    monkeypatch.setattr(experts, "compiled_combine", lambda *_: None)


def draw_routing(top_k: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(top_k)
    index = torch.stack([torch.randperm(EXPERTS, generator=draw)[:top_k] for _ in range(tokens)])
    weight = torch.rand(tokens, top_k, generator=draw)
    # Numbers outside mean nobody, as in transformers.
    index[::5, 0] = EXPERTS
    index[1::7, -1] = -1
    return index, weight


def by_hand(index: Tensor) -> tuple[list[int], list[int]]:
    """Order and ends, pair by pair."""
    found: list[list[int]] = [[] for _ in range(SLOTS)]
    for pair, expert in enumerate(index.flatten().tolist()):
        if 0 <= expert < EXPERTS and SLOT_MAP[expert] >= 0:
            found[SLOT_MAP[expert]].append(pair)
    ends = [sum(map(len, found[: slot + 1])) for slot in range(SLOTS)]
    return [pair for slot in found for pair in slot], ends


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_pairs_are_sorted(top_k: int) -> None:
    index, _ = draw_routing(top_k)
    order, ends = by_hand(index)
    for given in (index, index.t().contiguous().t()):
        found = compiled_sort(given, torch.tensor(SLOT_MAP), SLOTS)
        assert found is not None
        assert found[0].tolist() == order and found[1].tolist() == ends
        assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.int32)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_plain_torch_sorts_alike(top_k: int) -> None:
    index, _ = draw_routing(top_k)
    found = sort_pairs(index, torch.tensor(SLOT_MAP), SLOTS)
    assert (found.order.tolist(), found.offsets.tolist()) == by_hand(index)


def test_no_tokens_no_slots_and_wrong_slots() -> None:
    nothing = compiled_sort(torch.empty(0, 2, dtype=torch.int64), torch.tensor(SLOT_MAP), SLOTS)
    assert nothing is not None and nothing[0].numel() == 0 and nothing[1].tolist() == [0, 0, 0]
    novices_only = compiled_sort(torch.tensor([[0, 1]]), torch.tensor([-1, -2]), 0)
    assert novices_only is not None and novices_only[0].numel() == 0 and novices_only[1].numel() == 0
    with pytest.raises(IndexError, match=r"a slot map .* for 2 slots"):
        compiled_sort(torch.tensor([[0, 1]]), torch.tensor(SLOT_MAP), 2)


def draw_outputs(index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = compiled_sort(index, torch.tensor(SLOT_MAP), SLOTS)
    assert found is not None
    draw = torch.Generator().manual_seed(9)
    outputs = torch.randn(len(found[0]), HIDDEN, generator=draw).to(dtype)
    return *found, outputs, torch.randn(NOVICES, HIDDEN, generator=draw).to(dtype)


def sums_by_hand(order: Tensor, outputs: Tensor, index: Tensor, weight: Tensor, novices: Tensor | None) -> Tensor:
    total = torch.zeros(len(index), HIDDEN, dtype=torch.float64)
    for pair, output in zip(order.tolist(), outputs.double(), strict=True):
        total[pair // index.shape[1]] += weight.flatten()[pair].double() * output
    for token, experts_of in enumerate(index.tolist()):
        for place, expert in enumerate(experts_of):
            slot = SLOT_MAP[expert] if 0 <= expert < EXPERTS else 0
            if novices is not None and -NOVICES <= slot < 0:
                total[token] += weight[token, place].double() * novices[-1 - slot].double()
    return total


@pytest.mark.parametrize("with_novices", [False, True])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_outputs_are_added_up(top_k: int, dtype: torch.dtype, weight_type: torch.dtype, with_novices: bool) -> None:
    index, weight = draw_routing(top_k)
    weight = weight.to(weight_type)
    order, _, outputs, drawn = draw_outputs(index, dtype)
    novices = drawn if with_novices else None
    got = compiled_combine(outputs, order, index, weight, torch.tensor(SLOT_MAP), novices)
    assert got is not None and got.dtype == torch.float32
    expected = sums_by_hand(order, outputs, index, weight, novices)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index, weight = draw_routing(2)
    order, _, outputs, novices = draw_outputs(index, torch.float32)
    given = outputs, order, index, weight, torch.tensor(SLOT_MAP), novices
    alone = compiled_combine(*given)
    monkeypatch.setattr(calls, "_THREADS_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert alone is not None
    torch.testing.assert_close(compiled_combine(*given), alone, rtol=0, atol=0)


@pytest.mark.parametrize("why", ["gradient", "float64", "meta", "another class", "switched off"])
def test_what_is_left_to_plain_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, weight = draw_routing(2)
    slot_map = torch.tensor(SLOT_MAP)
    order, _, outputs, novices = draw_outputs(index, torch.float32)
    if why == "gradient":
        weight.requires_grad_()
    elif why == "float64":
        outputs = outputs.double()
    elif why == "meta":
        outputs, index = outputs.to("meta"), index.to("meta")
    elif why == "another class":
        outputs, index = outputs.as_subclass(Other), index.as_subclass(Other)
    else:
        monkeypatch.setattr(pairs, "this_machine", lambda: Machine(False, "op"))
    assert compiled_combine(outputs, order, index, weight, slot_map, novices) is None
    assert (compiled_sort(index, slot_map, SLOTS) is None) == (why not in ("gradient", "float64"))


class Other(Tensor):
    """A tensor that is not a plain one."""


@pytest.mark.parametrize("kind", [torch.int32, "strided"], ids=str)
def test_integers_of_another_kind(kind: object) -> None:
    draw = torch.Generator().manual_seed(2)
    index, weight = draw_routing(2)
    hidden, novices = torch.randn(TOKENS, HIDDEN, generator=draw), torch.randn(NOVICES, HIDDEN, generator=draw)
    gate_up, down = torch.randn(SLOTS, 22, HIDDEN, generator=draw), torch.randn(SLOTS, HIDDEN, 11, generator=draw)
    slot_map = torch.tensor(SLOT_MAP)
    silu = torch.nn.functional.silu
    expected = mix_experts_by_loop(hidden, index, weight, gate_up, down, slot_map, novices, silu)
    if kind == "strided":
        slot_map = torch.stack([slot_map, slot_map * 0], 1)[:, 0]
        assert not slot_map.is_contiguous()
    else:
        index = index.int()
    got = mix_experts(hidden, index, weight, gate_up, down, slot_map, novices, silu)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_whole_sum_over_experts(ranks: int) -> None:
    draw = torch.Generator().manual_seed(2)
    index, weight = draw_routing(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    gate_up = torch.randn(SLOTS, 2 * 11, HIDDEN, generator=draw) * 0.2
    down = torch.randn(SLOTS, HIDDEN, 11, generator=draw)
    novices = torch.randn(NOVICES, HIDDEN, generator=draw)
    bias = torch.randn(SLOTS, HIDDEN, generator=draw)
    maps = None
    if ranks:
        rows = torch.randn(2, ranks, HIDDEN, generator=draw) * 0.2
        maps = NoviceMaps(*rows, torch.tensor([0, 1, 1]))
    given = (hidden, index, weight, gate_up, down, torch.tensor(SLOT_MAP), novices, torch.nn.functional.silu)
    got = mix_experts(*given, maps, bias)
    expected = mix_experts_by_loop(*given, maps, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # The same with a gradient, which goes the way of plain torch.
    hidden.requires_grad_()
    trained = mix_experts(*given, maps, bias)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), got, rtol=1e-5, atol=1e-5)


def test_combine_without_pairs() -> None:
    index, weight = torch.tensor([[1, 5]]), torch.tensor([[0.25, 0.5]])
    novices = torch.arange(8.0).view(2, 4)
    pairs_of = sort_pairs(index, torch.tensor(SLOT_MAP), SLOTS)
    got = combine_with_novices(torch.empty(0, 4), pairs_of, index, weight, torch.tensor(SLOT_MAP), novices)
    torch.testing.assert_close(got, 0.25 * novices[:1] + 0.5 * novices[1:])
