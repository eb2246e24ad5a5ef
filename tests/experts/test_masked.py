"""Weights outside a mask are zero for every reader, whatever somebody writes there."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_lightning.experts import Masked, WeightStack
from moe_lightning.plan import WeightFormat

SLOTS, OUTPUTS, INPUTS = 3, 5, 12
FORMAT = WeightFormat(sparsity=0.5)
OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)


def stack_and_mask() -> tuple[Masked, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(SLOTS, OUTPUTS, INPUTS, generator=draw)
    keep = torch.rand(SLOTS, OUTPUTS, INPUTS, generator=draw).argsort(-1) < INPUTS // 2
    return Masked.pack(FORMAT, weight, keep), keep


def rows() -> Tensor:
    return torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(1))


def reloaded(stack: Masked) -> WeightStack:
    again = WeightStack.empty(FORMAT, SLOTS, OUTPUTS, INPUTS)
    again.load_state_dict(stack.state_dict())
    return again


def by_optimizer(weight: Tensor) -> None:
    """An update that is not zero where the gradient is, as Muon's."""
    with torch.no_grad():
        weight.add_(0.5)


def by_data(weight: Tensor) -> None:
    """As old optimizers and Lightning's weight averaging write: autograd's count of changes does not move."""
    weight.data.add_(0.5)


@pytest.mark.parametrize("write", [by_optimizer, by_data])
@pytest.mark.parametrize("grad", [True, False])
def test_the_weights_that_work_are_those_that_are_saved(write: Callable[[Tensor], None], grad: bool) -> None:
    stack, keep = stack_and_mask()
    assert stack.weight is not None
    stack.linear(rows(), OFFSETS).sum().backward()
    write(stack.weight)
    expected = (stack.weight.detach() * keep).clone()
    stack.train(grad)
    with torch.set_grad_enabled(grad):
        assert torch.equal(stack.dense(), expected)
        output = stack.linear(rows(), OFFSETS)
        assert torch.equal(output, reloaded(stack).linear(rows(), OFFSETS))
    assert not stack.weight.detach()[~keep].any()


@pytest.mark.parametrize("write", [by_optimizer, by_data])
def test_saving_leaves_no_difference_behind(write: Callable[[Tensor], None]) -> None:
    """Also where nothing is computed and no mode changes between the write and the state dict."""
    stack, keep = stack_and_mask()
    assert stack.weight is not None
    stack.eval()
    write(stack.weight)
    again = reloaded(stack)
    with torch.no_grad():
        assert torch.equal(again.dense(), stack.dense())
        assert torch.equal(again.linear(rows(), OFFSETS), stack.linear(rows(), OFFSETS))
    assert not stack.weight.detach()[~keep].any()


def test_a_write_without_gradients_is_seen_by_the_next_product() -> None:
    stack, keep = stack_and_mask()
    assert stack.weight is not None
    stack.eval()
    with torch.no_grad():
        stack.dense()
        stack.weight.add_(0.5)
        assert not stack.dense()[~keep].any()
        other = copy.deepcopy(stack)
        stack.weight.add_(0.5)
        other_weight = other.weight
        assert other_weight is not None
        other_weight.add_(0.25)
        assert not other.dense()[~keep].any() and not stack.select([2, 0]).dense()[~keep[[2, 0]]].any()


def test_a_graph_that_holds_the_weights_stays_valid() -> None:
    """Two products before one backward pass, and the gradients of a product with a mask."""
    stack, keep = stack_and_mask()
    assert stack.weight is not None
    plain = stack.weight.detach().clone().requires_grad_()
    loss = stack.linear(rows(), OFFSETS).square().sum() + stack.linear(2 * rows(), OFFSETS).square().sum()
    loss.backward()
    wanted = torch.zeros(())
    for scale in (1.0, 2.0):
        start = 0
        for slot, end in enumerate(OFFSETS.tolist()):
            wanted = wanted + (scale * rows()[start:end] @ (plain * keep)[slot].T).square().sum()
            start = end
    wanted.backward()
    torch.testing.assert_close(stack.weight.grad, plain.grad)


def test_weights_made_in_inference_mode() -> None:
    stack, keep = stack_and_mask()
    with torch.inference_mode():
        stack = stack.double()
        assert not stack.dense()[~keep].any()
        stack.eval()
    assert torch.equal(reloaded(stack).dense(torch.float64), stack.dense())
