"""What only a GPU can show of a training step: bfloat16, shipped tiles, no waiting, offsets beyond 32 bits."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels.training.operation import train_experts, train_experts_twin
from torch import Tensor

from tests.kernels.triton.problems import relative_error
from tests.kernels.triton.training_problems import NAMES, Problem, make_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one")

DEVICE = "cuda"
# Pre-activation, gradient, what terms read and int4 weights are rounded to bfloat16, and so are the gradients.
TOLERANCE, GRADIENT_TOLERANCE = 5e-3, 1e-2
FORMS = pytest.mark.parametrize("form", ["dense", "int4"])


def problem_of(form: str, tokens: int, **options) -> Problem:
    options = {"dtype": torch.bfloat16, "experts": 8, "novices": (1, 6), "hidden": 512, "inner": 768} | options
    return make_problem(form, tokens, **options).to(DEVICE)


def named(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in held.items() if name in NAMES}


def gradients(result: Tensor, held: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).to(result)
    return dict(zip(held, torch.autograd.grad(result, list(held.values()), grad), strict=True))


@FORMS
@pytest.mark.parametrize("tokens", [1, 3, 17, 300, 2048])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("ranks", [None, (12, 64)])
def test_result_and_gradients_equal_the_twin(
    form: str, tokens: int, top_k: int, ranks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(form, tokens, top_k=top_k, ranks=ranks, bias=True)
    held, wide = named(problem.leaves()), named(problem.leaves(wide=True))
    want = train_experts_twin(*problem.arguments(wide))
    wanted = gradients(want, wide)
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: poisoned(empty(*size, **options)))
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *size, **options: poisoned(new_empty(like, *size, **options)))
    got = train_experts(*problem.arguments(held))
    found = gradients(got, held)
    assert relative_error(got, want) <= TOLERANCE
    for name in held:
        assert relative_error(found[name], wanted[name]) <= GRADIENT_TOLERANCE, name


def poisoned(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(2**30)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


@FORMS
def test_one_expert_and_the_same_bits_again(form: str) -> None:
    problem = problem_of(form, 1000, ranks=(16, 16), bias=True)
    once = problem.tensors | {"weight": problem.tensors["weight"][:, :1]}
    one = replace(problem, index=torch.full((1000, 1), 3, device=DEVICE), tensors=once)
    for case in (problem, one):
        first, again = (
            gradients(train_experts(*case.arguments(held)), held) for held in map(named, (case.leaves(), case.leaves()))
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
    held, wide = named(one.leaves()), named(one.leaves(wide=True))
    wanted = gradients(train_experts_twin(*one.arguments(wide)), wide)
    for name, got in gradients(train_experts(*one.arguments(held)), held).items():
        assert relative_error(got, wanted[name]) <= GRADIENT_TOLERANCE, name


@FORMS
def test_nothing_waits_for_the_gpu(form: str) -> None:
    problem = problem_of(form, 300, ranks=(12, 64), bias=True)
    held = named(problem.leaves())
    grad = torch.randn(300, 512, device=DEVICE)

    def step() -> None:
        torch.autograd.grad(train_experts(*problem.arguments(held)), list(held.values()), grad)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@FORMS
def test_compiled(form: str) -> None:
    compiled = torch.compile(train_experts, fullgraph=True)
    for tokens in (300, 64, 65):
        problem = problem_of(form, tokens, ranks=(12, 64), bias=True)
        held, again = named(problem.leaves()), named(problem.leaves())
        got, want = compiled(*problem.arguments(held)), train_experts(*problem.arguments(again))
        assert torch.equal(got, want)
        found, wanted = gradients(got, held), gradients(want, again)
        for name in held:
            assert relative_error(found[name], wanted[name]) <= 1e-6, name


def test_tokens_beyond_32_bits() -> None:
    """Inputs, pre-activations and their gradients hold more than 2^31 numbers each."""
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free memory on the GPU")
    size, tokens, slots = 4096, 2**19 + 64, 2
    hidden = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    gate_up, down = (
        (torch.randn(slots, rows, size, device=DEVICE) * size**-0.5).bfloat16() for rows in (2 * size, size)
    )
    index = torch.randint(0, slots, (tokens, 1), device=DEVICE)
    weight, slot_map = torch.rand(tokens, 1, device=DEVICE), torch.arange(slots, device=DEVICE)
    result = train_experts(hidden, index, weight, slot_map, [gate_up], [down], [], [])
    grad = torch.randn_like(result)
    (found,) = torch.autograd.grad(result, hidden, grad)
    border = 2**31 // size
    for first in (0, border // 2 - 32, border - 32, tokens - 64):
        part = slice(first, first + 64)
        few = hidden[part].detach().double().requires_grad_()
        want = train_experts_twin(few, index[part], weight[part], slot_map, [gate_up], [down], [], [])
        (wanted,) = torch.autograd.grad(want, few, grad[part].double())
        assert relative_error(result[part], want) <= TOLERANCE, first
        assert relative_error(found[part], wanted) <= GRADIENT_TOLERANCE, first
