"""The differentiable sum over experts: against float64 autograd, in its laws, and under the compiler."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.experts import ABSENT, NoviceMaps
from moe_kernels.triton_kernels.dispatch import Tiles
from moe_kernels.triton_kernels.training import operation, steps
from moe_kernels.triton_kernels.training.choose import OuterTiles, TrainingChoice
from moe_kernels.triton_kernels.training.operation import (
    train_experts,
    train_experts_backward_op,
    train_experts_op,
    train_experts_twin,
    train_experts_with_novices,
    why_not_train,
)
from torch import Tensor

from tests.kernels.triton.problems import relative_error
from tests.kernels.triton.training_problems import NAMES, NOVICE_NAMES, Problem, in_float64, make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of results and of gradients. In fp16 the pre-activation, what terms read and the gradient's own way are rounded.
TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.float16: (3e-3, 3e-3)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction, though the sizes of the tests are small."""
    tiles = Tiles(32, 4, 2, 64)
    choice = TrainingChoice(16, tiles, tiles, tiles, tiles, OuterTiles(64, 16, 4, 2))
    for module in (steps, operation):
        monkeypatch.setattr(module, "choice_for", lambda hidden: choice)


def run(problem: Problem, held: dict[str, Tensor], novices: bool = False) -> Tensor:
    arguments = problem.arguments(held)
    if not novices:
        return train_experts(*arguments)
    *first, bias = arguments
    maps = NoviceMaps(held["map_in"], held["map_out"], problem.owners) if "map_in" in held else None
    return train_experts_with_novices(*first, held.get("vectors"), maps, bias)


def gradients(result: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Differentiate with a gradient that is random and the same for all."""
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(7)).to(result)
    found = torch.autograd.grad(result, list(held.values()), grad, allow_unused=True)
    return dict(zip(held, found, strict=True))


def check(problem: Problem, dtype: torch.dtype = torch.float32, novices: bool = False) -> None:
    """Compare result and gradients with float64."""
    names = NAMES + (NOVICE_NAMES if novices else [])
    held = {name: tensor for name, tensor in problem.to(DEVICE).leaves().items() if name in names}
    wide = {name: tensor for name, tensor in problem.leaves(wide=True).items() if name in names}
    got, want = run(problem.to(DEVICE), held, novices), in_float64(problem, wide, novices)
    assert got.dtype == torch.float32
    close, close_gradient = TOLERANCE[dtype]
    assert relative_error(got, want) <= close
    found, wanted = gradients(got, held), gradients(want, wide)
    for name in held:
        gradient, right = found[name], wanted[name]
        right = torch.zeros_like(wide[name]) if right is None else right
        assert gradient is not None, name
        assert gradient.dtype == held[name].dtype and gradient.shape == held[name].shape, name
        assert relative_error(gradient, right) <= close_gradient, name


FORMS = pytest.mark.parametrize("form", ["dense", "int4"])


@FORMS
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "options",
    [
        {"ranks": (8, 4), "novices": (1,), "bias": True},
        {"top_k": 1, "tokens": 40, "ranks": (12, 16), "experts": 3},
        {"top_k": 8, "experts": 8, "tokens": 3, "novices": (0, 2, 5), "bias": True},
    ],
    ids=str,
)
def test_result_and_gradients_equal_float64(form: str, dtype: torch.dtype, options: dict) -> None:
    check(make_problem(form, dtype=dtype, **options), dtype)


def test_sizes_that_no_tile_divides() -> None:
    check(make_problem(hidden=72, inner=40, tokens=21, ranks=(5, 3), bias=True))


@pytest.mark.parametrize("ranks", [(64, 80), (1, 16)])
def test_large_and_least_ranks(ranks: tuple[int, int]) -> None:
    check(make_problem("int4", ranks=ranks, tokens=5))


@FORMS
def test_novices_and_their_maps(form: str) -> None:
    check(make_problem(form, novices=(1, 3), ranks=(4, 8), map_ranks=5, bias=True), novices=True)


@FORMS
def test_one_expert_novices_only_and_nobody(form: str) -> None:
    problem = make_problem(form, tokens=20, novices=(1, 4), ranks=(4, 4), bias=True)
    once = problem.tensors | {"weight": problem.tensors["weight"][:, :1]}
    check(replace(problem, index=torch.full((20, 1), 3), tensors=once), novices=True)
    problem.index[0], problem.index[1], problem.index[2, 1] = torch.tensor([4, 1]), torch.tensor([6, -1]), 6
    problem.slot_map[0] = ABSENT
    check(problem, novices=True)
    check(replace(problem, index=torch.tensor([1, 4]).expand(20, 2)), novices=True)


def test_experts_that_share_a_slot() -> None:
    """Both may be chosen by the same token."""
    problem = make_problem(experts=3, ranks=(4, 4), bias=True)
    check(replace(problem, slot_map=torch.tensor([1, 0, 1]), index=torch.tensor([[0, 2]]).expand(9, 2)))


@FORMS
def test_no_tokens_and_no_real_experts(form: str) -> None:
    check(make_problem(form, tokens=0, ranks=(4, 4), bias=True))
    problem = make_problem(form, tokens=6, novices=(0, 1), ranks=(4, 4), bias=True, map_ranks=3)
    few = {name: tensor[:0] if name in NAMES[2:] else tensor for name, tensor in problem.tensors.items()}
    tiles = [[tensor[:0] for tensor in stack] for stack in problem.tiles]
    index, slot_map = torch.tensor([[1, 0]]).expand(6, 2), torch.tensor([-1, -2])
    check(replace(problem, tensors=few, tiles=tiles, index=index, slot_map=slot_map), novices=True)


@FORMS
def test_the_twin_says_the_same(form: str) -> None:
    problem = make_problem(form, novices=(2,), ranks=(4, 8), bias=True)
    held = {name: tensor for name, tensor in problem.leaves(wide=True).items() if name in NAMES}
    wide = {name: tensor for name, tensor in problem.leaves(wide=True).items() if name in NAMES}
    got, want = train_experts_twin(*problem.arguments(held)), in_float64(problem, wide, novices=False)
    assert relative_error(got, want) < 1e-12
    found, wanted = gradients(got, held), gradients(want, wide)
    for name in held:
        assert relative_error(found[name], wanted[name]) < 1e-12, name  # type: ignore[arg-type]


def test_only_what_is_wanted_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(tokens=3, experts=3, ranks=(4, 4), bias=True).to(DEVICE)
    held = problem.leaves()
    whole = gradients(run(problem, held), held)
    for name in ("hidden", "weight", "down", "reads_up", "reads_down", "bias"):
        alone = {other: tensor.detach().requires_grad_(other == name) for other, tensor in held.items()}
        asked: list[list[bool]] = []

        def noted(*arguments, asked=asked):
            asked.append(arguments[-1])
            return train_experts_backward_op(*arguments)

        monkeypatch.setattr(operation, "train_experts_backward_op", noted)
        got = gradients(run(problem, alone), {name: alone[name]})[name]
        assert torch.equal(got, whole[name]), name  # type: ignore[arg-type]
        assert asked == [[other == name for other in NAMES]]


def test_matrices_of_terms_in_another_type() -> None:
    """Adapters are often kept in fp32 beside frozen matrices in half precision; their gradients are fp32, too."""
    problem = make_problem("int4", ranks=(4, 8), bias=True, dtype=torch.float16)
    wide = {name: tensor.float() if name in NAMES[4:] else tensor for name, tensor in problem.tensors.items()}
    check(replace(problem, tensors=wide), torch.float16)


def test_routing_weights_in_half_precision_and_other_strides() -> None:
    problem = make_problem(ranks=(4, 4), bias=True, dtype=torch.float16)
    changed = {"weight": problem.tensors["weight"].half(), "hidden": problem.tensors["hidden"].T.contiguous().T}
    changed |= {name: problem.tensors[name].mT.contiguous().mT for name in NAMES[4:8]}
    changed["bias"] = problem.tensors["bias"][:, ::2].repeat_interleave(2, 1)
    check(replace(problem, tensors=problem.tensors | changed), torch.float16)


def test_gradients_that_are_not_contiguous() -> None:
    problem = make_problem(tokens=3, ranks=(4, 4)).to(DEVICE)
    held = problem.leaves()
    summed = torch.autograd.grad(run(problem, held).sum(), list(held.values()))
    result = run(problem, held)
    for got, want in zip(
        summed, torch.autograd.grad(result, list(held.values()), torch.ones_like(result)), strict=True
    ):
        assert torch.equal(got, want)


def test_the_same_bits_again() -> None:
    problem = make_problem("dense", tokens=20, ranks=(4, 8), bias=True, novices=(1,)).to(DEVICE)
    first, again = (gradients(run(problem, held), held) for held in (problem.leaves(), problem.leaves()))
    assert all(torch.equal(first[name], again[name]) for name in NAMES if first.get(name) is not None)  # type: ignore[arg-type]


def test_order_of_the_tokens_does_not_matter() -> None:
    problem = make_problem(tokens=30, novices=(2,), ranks=(4, 8), bias=True)
    order = torch.randperm(30)
    moved = {name: problem.tensors[name][order] for name in ("hidden", "weight")}
    shuffled = replace(problem, tensors=problem.tensors | moved, index=problem.index[order])
    results = []
    for case in (problem.to(DEVICE), shuffled.to(DEVICE)):
        held = {name: tensor for name, tensor in case.leaves().items() if name in NAMES}
        result = run(case, held)
        results.append(
            (result, dict(zip(held, torch.autograd.grad(result.square().sum(), list(held.values())), strict=True)))
        )
    (result, found), (moved_result, moved_found) = results
    assert relative_error(moved_result, result[order]) < 1e-6
    for name, gradient in found.items():
        want = gradient[order] if name in ("hidden", "weight") else gradient
        assert relative_error(moved_found[name], want) < 2e-6, name


@FORMS
def test_memory_that_was_used_before_does_not_show(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN: what is not written must not be read."""

    def poisoned(make):
        def made(*arguments, **options) -> Tensor:
            tensor = make(*arguments, **options)
            if tensor.dtype in (torch.int32, torch.int64):
                return tensor.fill_(2**30)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    problem = make_problem(form, tokens=20, experts=6, novices=(0, 5), ranks=(4, 5), bias=True).to(DEVICE)
    problem.index[:, 0] = 0
    problem.index[:, 1] = torch.tensor([1, 2, 6, 5]).repeat(5)
    held = {name: tensor for name, tensor in problem.leaves().items() if name in NAMES}
    want = run(problem, held)
    wanted = gradients(want, held)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    got = run(problem, held)
    found = gradients(got, held)
    assert torch.equal(got, want)
    assert all(torch.equal(found[name], wanted[name]) for name in held)  # type: ignore[arg-type]


def test_bfloat16_in_the_interpreter() -> None:
    """Its arithmetic is wrong there and casts to it cut off, so numbers are cast to fp32 as soon as they are loaded."""
    problem = make_problem("int4", ranks=(4, 8), bias=True, dtype=torch.bfloat16)
    held, wide = problem.to(DEVICE).leaves(), problem.leaves(wide=True)
    got, want = run(problem.to(DEVICE), held), in_float64(problem, wide, novices=False)
    assert relative_error(got, want) <= 1.5e-2
    found, wanted = gradients(got, held), gradients(want, wide)
    for name in held:
        assert relative_error(found[name], wanted[name]) <= 3e-2, name  # type: ignore[arg-type]


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    # It compares everything that two runs give, and places behind the last pair hold whatever stood in the memory.
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).zero_())
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *size, **options: new_empty(like, *size, **options).zero_())
    problem = make_problem("int4", tokens=2, experts=3, novices=(1,), ranks=(4, 8), bias=True).to(DEVICE)
    *first, (up_scale, down_scale), bias = problem.arguments(problem.leaves())
    torch.library.opcheck(train_experts_op, (*first, up_scale, down_scale, bias))
    *first, (up_scale, down_scale), bias = problem.arguments(problem.tensors)
    hidden, _, weight, _, *rest = first
    result, *kept = train_experts_op(*first, up_scale, down_scale, bias)
    wanted = [name not in ("gate_up", "down") for name in NAMES]
    arguments = (result, hidden, weight, kept, *rest, up_scale, down_scale, bias, wanted)
    torch.library.opcheck(train_experts_backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_with_any_number_of_tokens() -> None:
    """One graph for the first size, one for all others."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: 2 * train_experts(*arguments), fullgraph=True, backend=backend)
    for tokens in (5, 3, 18):
        problem = make_problem("int4", tokens, experts=3, novices=(1,), ranks=(4, 8), bias=True).to(DEVICE)
        held = {name: tensor for name, tensor in problem.leaves().items() if name in NAMES}
        again = {name: tensor.detach().clone().requires_grad_() for name, tensor in held.items()}
        got, want = compiled(*problem.arguments(held)), 2 * train_experts(*problem.arguments(again))
        assert torch.equal(got, want)
        found, wanted = gradients(got, held), gradients(want, again)
        assert all(torch.equal(found[name], wanted[name]) for name in held)  # type: ignore[arg-type]
    assert len(calls) <= 2


def test_what_the_kernels_do_not_know() -> None:
    problem = make_problem(ranks=(4, 8))
    hidden, _, _, _, gate_up, down, lora, _, _ = problem.arguments(problem.tensors)
    assert DEVICE == "cuda" or why_not_train(hidden, gate_up, down, lora) is None
    assert "come as 2 tensors" in str(why_not_train(hidden, gate_up, down, lora[:2]))
    assert "low-rank terms are on meta" in str(why_not_train(hidden, gate_up, down, [m.to("meta") for m in lora]))
    assert "fit the experts" in str(why_not_train(hidden, gate_up, down, [lora[2], lora[1], lora[0], lora[3]]))
    assert "float64" in str(why_not_train(hidden.double(), gate_up, down, lora))
    with pytest.raises(ValueError, match="cannot compute this: low-rank terms come as 3"):
        train_experts(*problem.arguments(problem.tensors)[:6], lora[:3], [1.0, 1.0])
