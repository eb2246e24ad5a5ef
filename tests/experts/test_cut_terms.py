"""Low-rank terms beside pruned matrices: gradients are autograd's of the sum spelled out, and nothing dense is kept."""

from typing import Any

import pytest
import torch
from moe_kernels import grouped_linear
from torch import Tensor

from moe_lightning.experts import LoraStack, Masked, WeightStack
from moe_lightning.experts.lora import adapted_linear, kept_delta
from moe_lightning.plan import WeightFormat
from tests.lora import fill_terms
from tests.packed import packed, random_weight, zeros_by_magnitude

SLOTS, OUTPUTS, INPUTS, ROWS = 4, 24, 32, 11
OFFSETS = torch.tensor([5, 5, 6, 11], dtype=torch.int32)  # no row for slot 1, one for slot 2
KINDS: dict[str, WeightFormat] = {
    "2:4": WeightFormat(pattern="2:4"),
    "1:4": WeightFormat(pattern="1:4"),
    "masked by rows": WeightFormat(sparsity=0.4),
    "masked by matrices": WeightFormat(sparsity=0.4, scope="matrix"),
    "int4 of 2:4": WeightFormat(bits=4, group_size=16, pattern="2:4"),
    "int8 of masked": WeightFormat(bits=8, group_size=16, sparsity=0.5),
}


def problem(name: str, dtype: torch.dtype = torch.float64, closed: bool = False) -> tuple[Any, LoraStack, Tensor]:
    """Return pruned matrices, terms beside them, and rows."""
    format = KINDS[name]
    weight = random_weight(SLOTS, OUTPUTS, INPUTS, dtype=dtype)
    if format.quantized:
        keep = zeros_by_magnitude(
            weight.double().numpy(), WeightFormat(pattern=format.pattern, sparsity=format.sparsity)
        )
        weight = weight.masked_fill(~torch.from_numpy(keep), 0)
    stack = packed(weight, format, dtype)[0]
    assert stack.is_pruned
    if closed:
        state = stack.state_dict()
        stack = WeightStack.empty(format, SLOTS, OUTPUTS, INPUTS, dtype=dtype)
        stack.load_state_dict(state)
        assert isinstance(stack, Masked) and stack.weight is None
    term = LoraStack.empty(SLOTS, OUTPUTS, INPUTS, 3, 6.0, weight)
    fill_terms(torch.nn.ModuleDict({"term": term}))
    draw = torch.Generator().manual_seed(3)
    rows_PX = torch.randn(ROWS, INPUTS, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return stack, term, rows_PX


def spelled_out(rows_PX: Tensor, offsets_S: Tensor, stack: Any, term: LoraStack) -> Tensor:
    """Return the product by autograd's own operations, with all matrices at once."""
    delta_SOX = kept_delta(stack, term, rows_PX.dtype)
    assert delta_SOX is not None
    return grouped_linear(rows_PX, stack.dense(rows_PX.dtype) + delta_SOX, offsets_S)


def leaves(stack: Any, term: LoraStack, rows_PX: Tensor) -> list[Tensor]:
    return [rows_PX, term.lora_A, term.lora_B, *stack.parameters()]


CLOSED = [(name, False) for name in KINDS] + [("masked by rows", True), ("masked by matrices", True)]


@pytest.mark.parametrize(("name", "closed"), CLOSED)
def test_gradients_are_those_of_the_sum_spelled_out(name: str, closed: bool) -> None:
    stack, term, rows_PX = problem(name, closed=closed)
    inputs = leaves(stack, term, rows_PX)
    assert len(inputs) == (3 if KINDS[name].quantized else 4)
    probe_PO = torch.randn(ROWS, OUTPUTS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected_PO = spelled_out(rows_PX, OFFSETS, stack, term)
    found_PO = adapted_linear(rows_PX, OFFSETS, stack, term)
    torch.testing.assert_close(found_PO, expected_PO, rtol=1e-12, atol=1e-13)
    wanted = torch.autograd.grad(expected_PO, inputs, probe_PO)
    found = torch.autograd.grad(found_PO, inputs, probe_PO)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype and other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
    for gradient_S in found[1:]:
        assert not gradient_S[1].any() and all(gradient_S[slot].any() for slot in (0, 2, 3))


@pytest.mark.parametrize("name", ["2:4", "masked by rows", "int8 of masked"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    stack, term, rows_PX = problem(name)

    class Loose(LoraStack):
        def __init__(self, first: Tensor, second: Tensor) -> None:
            torch.nn.Module.__init__(self)
            self.lora_A, self.lora_B, self.alpha = first, second, 6.0  # type: ignore[assignment]

    def loose(rows_PX: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return adapted_linear(rows_PX, OFFSETS, stack, Loose(first, second))

    inputs = [rows_PX, *(half.detach().clone().requires_grad_() for half in (term.lora_A, term.lora_B))]
    assert torch.autograd.gradcheck(loose, inputs)


@pytest.mark.parametrize("name", KINDS)
def test_what_does_not_train_gets_no_gradient_and_no_rows_give_zeros(name: str) -> None:
    stack, term, rows_PX = problem(name)
    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    term.lora_A.requires_grad_(False)
    adapted_linear(rows_PX.detach(), OFFSETS, stack, term).sum().backward()
    assert term.lora_B.grad is not None and term.lora_B.grad.any() and term.lora_A.grad is None
    assert all(parameter.grad is None for parameter in stack.parameters())

    stack, term, rows_PX = problem(name)
    empty_PX = rows_PX.detach()[:0].requires_grad_()
    found_PO = adapted_linear(empty_PX, torch.zeros_like(OFFSETS), stack, term)
    assert found_PO.shape == (0, OUTPUTS)
    found_PO.sum().backward()
    for leaf in leaves(stack, term, empty_PX):
        assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_the_size_of_the_weights_is_kept(name: str, trains: bool) -> None:
    stack, term, rows_PX = problem(name)
    for parameter in stack.parameters():
        parameter.requires_grad_(trains)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*stack.parameters(), *term.parameters())}
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linear(rows_PX, OFFSETS, stack, term).sum().backward()
    assert sum(saved) == ROWS * INPUTS  # the rows


@pytest.mark.parametrize("name", ["2:4", "masked by rows"])
def test_weights_that_change_before_the_way_back_are_noticed(name: str) -> None:
    stack, term, rows_PX = problem(name)
    loss = adapted_linear(rows_PX, OFFSETS, stack, term).sum()
    with torch.no_grad():
        next(stack.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_written_outside_the_mask_does_not_count() -> None:
    stack, term, rows_PX = problem("masked by rows")
    expected_PO = adapted_linear(rows_PX, OFFSETS, stack, term)
    with torch.no_grad():
        stack.weight[~stack.zeros_kept()] = 5.0
    torch.testing.assert_close(adapted_linear(rows_PX, OFFSETS, stack, term), expected_PO, rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_in_half_precision_and_under_autocast(name: str) -> None:
    stack, term, rows_PX = problem(name, torch.bfloat16)
    expected_PO = spelled_out(rows_PX.double(), OFFSETS, stack, term)
    found_PO = adapted_linear(rows_PX, OFFSETS, stack, term)
    assert found_PO.dtype == torch.bfloat16
    assert (found_PO.double() - expected_PO).norm() < 0.02 * expected_PO.norm()
    found_PO.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 for leaf in leaves(stack, term, rows_PX))
    # Weights in fp32, rows as autocast makes them: gradients in the type of what trains.
    stack, term, rows_PX = problem(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_PO = adapted_linear(rows_PX.bfloat16(), OFFSETS, stack, term)
    assert found_PO.dtype == torch.bfloat16
    found_PO.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves(stack, term, rows_PX))
