"""The sum over experts as one operation: against numpy, in its laws, and under the compiler."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.block import mix_experts_op, mix_experts_twin, moe_block_op, why_not
from moe_kernels.triton_kernels.router import choose_experts
from torch import Tensor

from tests.kernels.triton.problems import DTYPES, TOLERANCE, int4_problem, relative_error, routing_problem
from tests.kernels.triton.sparse24_problems import sparse24_problem

HIDDEN, INNER, GROUP = 64, 64, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Arguments of the operation, and the weights in float64."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    slot_map: Tensor
    gate_up: list[Tensor]
    down: list[Tensor]
    novices: list[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    dense: tuple[np.ndarray, np.ndarray]

    @property
    def arguments(self) -> tuple:
        values = (
            self.hidden,
            self.index,
            self.weight,
            self.slot_map,
            self.gate_up,
            self.down,
            self.novices,
            self.bias,
            self.residual,
        )
        return tuple(
            [tensor.to(DEVICE) for tensor in value]
            if isinstance(value, list)
            else None
            if value is None
            else value.to(DEVICE)
            for value in values
        )


def make_case(
    form: str = "dense",
    tokens: int = 7,
    experts: int = 6,
    top_k: int = 2,
    novices: tuple[int, ...] = (),
    ranks: int = 0,
    dtype: torch.dtype = torch.float32,
    extras: bool = False,
) -> Case:
    index, weight, slot_map = routing_problem(tokens, experts, top_k, novices)
    slots = experts - len(novices)
    if form == "int4":
        problems = [int4_problem(slots, 2 * INNER, HIDDEN, GROUP), int4_problem(slots, HIDDEN, INNER, GROUP, seed=1)]
        weights = [[problem.tiles.words_SGOW, problem.tiles.pairs_SGO] for problem in problems]
        dense = (problems[0].dense, problems[1].dense)
    elif form == "sparse24":
        sizes = [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
        pruned = [sparse24_problem(slots, *size, dtype, seed) for seed, size in enumerate(sizes)]
        weights = [[problem.tiles.values_SOV, problem.tiles.metadata_SOB] for problem in pruned]
        dense = (pruned[0].dense, pruned[1].dense)
    else:
        tensors = [torch.randn(slots, 2 * INNER, HIDDEN) / 8, torch.randn(slots, HIDDEN, INNER) / 4]
        weights = [[tensor.to(dtype)] for tensor in tensors]
        dense = (weights[0][0].double().numpy(), weights[1][0].double().numpy())
    held = [torch.randn(len(novices), HIDDEN).to(dtype)] if novices else []
    if ranks:
        owners = torch.randint(0, len(novices), (ranks,))
        held += [torch.randn(ranks, HIDDEN).to(dtype) / 8, torch.randn(ranks, HIDDEN).to(dtype), owners]
    bias, residual = (torch.randn(size, HIDDEN).to(dtype) if extras else None for size in (slots, tokens))
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    return Case(hidden, index, weight, slot_map, *weights, held, bias, residual, dense)


def in_numpy(case: Case) -> np.ndarray:
    """``y = residual + sum_i g_i(x) E_i(x)`` in float64, from the equation."""
    hidden, weight = case.hidden.double().numpy(), case.weight.double().numpy()
    result = np.zeros_like(hidden) if case.residual is None else case.residual.double().numpy().copy()
    for token, row in enumerate(case.index.tolist()):
        for place, expert in enumerate(row):
            slot = int(case.slot_map[expert]) if 0 <= expert < len(case.slot_map) else ABSENT
            if slot >= 0:
                gate, up = np.split(case.dense[0][slot] @ hidden[token], 2)
                output = case.dense[1][slot] @ (gate / (1 + np.exp(-gate)) * up)
                if case.bias is not None:
                    output = output + case.bias[slot].double().numpy()
            elif slot == ABSENT:
                continue
            else:
                output = case.novices[0][-1 - slot].double().numpy()
                if len(case.novices) > 1:
                    reads, gives, owners = (tensor.double().numpy() for tensor in case.novices[1:])
                    output = output + ((reads @ hidden[token]) * (owners == -1 - slot)) @ gives
            result[token] += weight[token, place] * output
    return result


def run(case: Case) -> Tensor:
    return mix_experts_op(*case.arguments).cpu()


FORMS = pytest.mark.parametrize("form", ["dense", "int4", "sparse24"])
# More than 64 tokens are sorted by expert; packed weights are made dense then, and the rest is as with dense ones.
PATHS = pytest.mark.parametrize(("form", "tokens"), [("dense", 5), ("dense", 66), ("int4", 5), ("sparse24", 5)])


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1, "top_k": 1},
        {"tokens": 16, "novices": (1, 4), "extras": True},
        {"tokens": 20, "top_k": 6, "experts": 8, "novices": (0, 1, 2), "ranks": 5},
        {"tokens": 70, "novices": (5,), "ranks": 3, "extras": True},
        {"tokens": 3, "experts": 10, "top_k": 8},
    ],
    ids=str,
)
def test_equals_numpy(form: str, dtype: torch.dtype, options: dict) -> None:
    case = make_case(form, dtype=dtype, **options)
    got, want = run(case), in_numpy(case)
    assert got.dtype == dtype
    # Behind more tokens int4 weights are dequantised, and so rounded.
    rounded = form == "int4" and options["tokens"] > 64
    assert relative_error(got, want) <= TOLERANCE[dtype] * (2 if rounded else 1)
    assert relative_error(mix_experts_twin(*case.arguments), want) < 2e-6


@PATHS
def test_bfloat16_in_the_interpreter(form: str, tokens: int) -> None:
    """Its arithmetic is wrong there and casts to it cut off, so numbers are cast to fp32 as soon as they are loaded."""
    case = make_case(form, tokens, novices=(2,), ranks=3, dtype=torch.bfloat16, extras=True)
    assert relative_error(run(case), in_numpy(case)) <= 1.5e-2


@PATHS
def test_order_of_the_tokens_does_not_matter(form: str, tokens: int) -> None:
    case = make_case(form, tokens, novices=(2,), extras=True)
    order = torch.randperm(tokens)
    assert case.residual is not None
    shuffled = replace(
        case,
        hidden=case.hidden[order],
        index=case.index[order],
        weight=case.weight[order],
        residual=case.residual[order],
    )
    assert relative_error(run(shuffled), run(case)[order]) < 1e-6


@PATHS
def test_names_of_experts_and_slots_do_not_matter(form: str, tokens: int) -> None:
    case = make_case(form, tokens, novices=(2, 3))
    experts, slots = len(case.slot_map), case.gate_up[0].shape[0]
    name, slot = torch.randperm(experts), torch.randperm(slots)
    slot_map = torch.empty_like(case.slot_map)
    slot_map[name] = torch.where(case.slot_map >= 0, slot[case.slot_map.clamp(min=0)], case.slot_map)
    renamed = replace(
        case,
        index=name[case.index],
        slot_map=slot_map,
        gate_up=[tensor[slot.argsort()] for tensor in case.gate_up],
        down=[tensor[slot.argsort()] for tensor in case.down],
    )
    assert relative_error(run(renamed), run(case)) < 1e-6


@PATHS
def test_all_tokens_to_one_expert_novices_only_and_nobody(form: str, tokens: int) -> None:
    case = make_case(form, tokens, novices=(1, 4), ranks=4)
    one = replace(case, index=torch.full((tokens, 1), 3), weight=torch.rand(tokens, 1))
    assert relative_error(run(one), in_numpy(one)) <= 1e-5
    case.index[0], case.index[1], case.index[2, 1] = torch.tensor([4, 1]), torch.tensor([6, -1]), 6
    case.slot_map[0] = ABSENT
    got = run(case)
    assert relative_error(got, in_numpy(case)) <= 1e-5
    assert not got[1].any()
    novices = replace(case, index=torch.tensor([1, 4]).expand(tokens, 2))
    assert relative_error(run(novices), in_numpy(novices)) <= 1e-5


@FORMS
def test_experts_that_share_a_slot(form: str) -> None:
    """Both may be chosen by the same token."""
    case = make_case(form, experts=3)
    shared = replace(case, slot_map=torch.tensor([1, 0, 1]), index=torch.tensor([[0, 2]]).expand(7, 2))
    assert relative_error(run(shared), in_numpy(shared)) <= 1e-5


@FORMS
def test_no_tokens_and_no_real_experts(form: str) -> None:
    case = make_case(form, tokens=0, extras=True)
    assert run(case).shape == (0, HIDDEN)
    case = make_case(form, tokens=6, novices=(0, 1))
    nobody_real = replace(
        case,
        slot_map=torch.tensor([-1, -2]),
        index=torch.tensor([[1, 0]]).expand(6, 2),
        gate_up=[tensor[:0] for tensor in case.gate_up],
        down=[tensor[:0] for tensor in case.down],
    )
    assert relative_error(run(nobody_real), in_numpy(nobody_real)) <= 1e-5


@PATHS
def test_memory_that_was_used_before_does_not_show(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN: what is not written must not be read."""

    def poisoned(make):
        def made(*arguments, **options) -> Tensor:
            tensor = make(*arguments, **options)
            if tensor.dtype in (torch.int32, torch.int64):
                return tensor.fill_(2**30)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    case = make_case(form, tokens, novices=(0, 5), extras=True)
    case.index[0] = torch.tensor([0, 5])
    want = run(case)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert torch.equal(run(case), want)


def test_opcheck_and_compiler() -> None:
    case = make_case("int4", tokens=3, novices=(1,), ranks=2, extras=True)
    torch.library.opcheck(
        mix_experts_op, case.arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    compiled = torch.compile(
        lambda *arguments: mix_experts_op(*arguments) * 2, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (3, 4, 70):
        case = make_case("dense", tokens, extras=True)
        torch.testing.assert_close(compiled(*case.arguments).cpu(), 2 * run(case))


@FORMS
def test_the_whole_block(form: str) -> None:
    case = make_case(form, tokens=9, novices=(3,), extras=True)
    router = torch.randn(6, HIDDEN)
    hidden, _, _, *rest = case.arguments
    mixed, logits = moe_block_op(hidden, router.to(DEVICE), 2, True, *rest)
    torch.testing.assert_close(logits.cpu(), case.hidden @ router.T, rtol=1e-5, atol=1e-5)
    index, weight = choose_experts(logits, 2, True)
    routed = replace(case, index=index.cpu(), weight=weight.cpu())
    assert relative_error(mixed, in_numpy(routed)) <= 1e-5


def test_opcheck_of_the_whole_block() -> None:
    case = make_case(tokens=3, novices=(1,), ranks=2, extras=True)
    hidden, _, _, *rest = case.arguments
    arguments = (hidden, torch.randn(6, HIDDEN).to(DEVICE), 2, False, *rest)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(moe_block_op, arguments, test_utils=tests)


def test_what_the_kernels_do_not_know() -> None:
    case = make_case()
    gate_up, down = case.gate_up, case.down
    assert why_not(case.hidden.to(DEVICE), *case.arguments[4:6]) is None
    assert "float64" in str(why_not(case.hidden.double(), gate_up, down))
    assert "float16" in str(why_not(case.hidden, [gate_up[0].half()], down))
    assert "3 tensors (torch.float32" in str(why_not(case.hidden, gate_up * 3, down))
    int4, pruned = make_case("int4"), make_case("sparse24")
    assert "int4 and sparse24: the kernels want both" in str(why_not(case.hidden, int4.gate_up, pruned.down))
    assert "2 tensors (torch.int64" in str(why_not(case.hidden, [tensor.long() for tensor in int4.gate_up], down))
    assert "metadata of 2:4 are torch.float32" in str(why_not(case.hidden, gate_up * 2, pruned.down))
    assert "weights are torch.float32, the input is torch.float16" in str(
        why_not(case.hidden.half(), pruned.gate_up, pruned.down)
    )
    assert "not contiguous" in str(why_not(case.hidden, [gate_up[0].transpose(1, 2)], down))
    assert "the input is on meta" in str(why_not(case.hidden.to("meta"), gate_up, down))
    with pytest.raises(ValueError, match="cannot compute this: numbers are"):
        mix_experts_op(case.hidden.double(), *case.arguments[1:])
