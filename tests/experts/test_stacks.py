"""Stacks of packed matrices: exact weights, exact slices, types that stay, products and gradients."""

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from moe_lightning.experts import Int4, Masked, Packed, PackedLinear, Sparse24, WeightStack
from moe_lightning.plan import WeightFormat
from tests.packed import FORMATS, packed, random_weight

ANY_FORMAT = pytest.mark.parametrize("name", FORMATS)
SLOTS, OUTPUTS, INPUTS = 4, 24, 48
CODED = ("words", "scale", "zero", "codes", "metadata", "bits")
"""Tensors that no cast may reach."""


def stack_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[WeightStack, Any]:
    return packed(random_weight(SLOTS, OUTPUTS, INPUTS, seed), FORMATS[name], dtype)


def same(left: WeightStack, right: WeightStack) -> None:
    assert type(left) is type(right) and left.format == right.format and left.dtype == right.dtype
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]) and tensor.dtype == states[1][key].dtype, key


def routed(counts: list[int], seed: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), INPUTS, generator=generator).to(dtype)
    return rows, torch.tensor(counts).cumsum(0).to(torch.int32)


def loop(rows: Any, dense: Any, counts: list[int]) -> Any:
    """Multiply in float64, one row after another."""
    slots = numpy.repeat(numpy.arange(len(counts)), counts)
    products = [dense[slot] @ row for row, slot in zip(rows.double().numpy(), slots, strict=True)]
    return numpy.array(products).reshape(len(slots), dense.shape[1])


@ANY_FORMAT
def test_weights_are_exactly_what_was_packed(name: str) -> None:
    stack, exact = stack_of(name)
    assert (stack.slots, stack.outputs, stack.inputs) == (SLOTS, OUTPUTS, INPUTS)
    assert numpy.array_equal(stack.dense(torch.float64).detach().numpy(), exact)
    assert numpy.array_equal(stack.dense().detach().numpy(), exact.astype(numpy.float32))
    assert stack.dense().dtype == torch.float32
    once = torch.from_numpy(exact.astype(numpy.float32)).bfloat16()  # rounded once, not twice
    assert torch.equal(stack.dense(torch.bfloat16), once)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("inputs", "group"), [(1, 1), (7, 7), (9, 3), (21, "channel"), (36, 12), (40, 8), (129, 43)])
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_sizes(bits: int, inputs: int, group: Any, symmetric: bool) -> None:
    for slots, outputs in ((1, 1), (3, 5)):
        stack, exact = packed(random_weight(slots, outputs, inputs), WeightFormat(bits, group, symmetric))
        assert numpy.array_equal(stack.dense(torch.float64).numpy(), exact)
        empty = WeightStack.empty(stack.format, slots, outputs, inputs)
        empty.load_state_dict(stack.state_dict())
        same(empty, stack)


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_odd_sizes_of_masks(inputs: int, scope: str) -> None:
    stack, exact = packed(random_weight(3, 5, inputs), WeightFormat(sparsity=0.4, scope=scope))
    assert numpy.array_equal(stack.dense(torch.float64).detach().numpy(), exact)
    empty = WeightStack.empty(stack.format, 3, 5, inputs)
    empty.load_state_dict(stack.state_dict())
    assert numpy.array_equal(empty.dense(torch.float64).detach().numpy(), exact)


@ANY_FORMAT
@pytest.mark.parametrize("slots", [(0, 2, 3), (3, 1), (2,), ()])
def test_dropping_and_packing_in_either_order(name: str, slots: tuple[int, ...]) -> None:
    weight = random_weight(SLOTS, OUTPUTS, INPUTS)
    stack, exact = packed(weight, FORMATS[name])
    chosen = stack.select(slots)
    same(chosen, packed(weight[list(slots)], FORMATS[name])[0])
    assert numpy.array_equal(chosen.dense(torch.float64).detach().numpy(), exact[list(slots)])
    assert chosen.num_weights == len(slots) * OUTPUTS * INPUTS
    before = copy.deepcopy(stack.state_dict())
    for tensor in (*chosen.parameters(), *chosen.buffers()):
        tensor.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in stack.state_dict().items()), "something is shared"


@ANY_FORMAT
@pytest.mark.parametrize(
    "cast",
    [
        lambda stack: stack.to(torch.bfloat16),
        lambda stack: stack.half(),
        lambda stack: stack.double(),
        lambda stack: stack.to("cpu", torch.float64),
        lambda stack: stack.type(torch.float16),
        lambda stack: torch.nn.Sequential(torch.nn.ModuleList([stack])).bfloat16()[0][0],
    ],
    ids=["bf16", "half", "double", "cpu and double", "type", "inside another"],
)
def test_casts_reach_no_codes_and_no_scales(name: str, cast: Any) -> None:
    stack, _ = stack_of(name)
    before = {key: tensor.clone() for key, tensor in stack.state_dict().items() if key in CODED}
    stack = cast(stack)
    for key, tensor in before.items():
        now = stack.state_dict()[key]
        assert now.dtype == tensor.dtype and torch.equal(now, tensor), key
    assert stack.dtype != torch.float32
    assert stack.dense().dtype == stack.dtype
    for parameter in stack.parameters():
        assert parameter.dtype == stack.dtype
    if stack.format.quantized:
        again = stack.float()
        same(again, stack_of(name)[0])


@ANY_FORMAT
def test_copies_share_nothing(name: str) -> None:
    stack, _ = stack_of(name)
    other = copy.deepcopy(stack)
    same(other, stack)
    storages = {tensor.data_ptr() for tensor in (*stack.parameters(), *stack.buffers())}
    assert not storages & {tensor.data_ptr() for tensor in (*other.parameters(), *other.buffers())}


@ANY_FORMAT
def test_a_state_dict_fits_the_open_and_the_closed_form(name: str) -> None:
    stack, exact = stack_of(name)
    closed = WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS)
    opened = WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS)
    if isinstance(opened, Masked):
        opened.open()
        assert opened.weight is not None and opened.values is None
    for other in (closed, opened):
        assert other.state_dict().keys() == stack.state_dict().keys()
        other.load_state_dict(stack.state_dict(), strict=True)
        same(other, stack)
        assert numpy.array_equal(other.dense(torch.float64).detach().numpy(), exact)
        other.load_state_dict(stack.state_dict(), strict=True, assign=True)
        same(other, stack)
    if isinstance(closed, Masked):
        assert closed.values is not None and closed.weight is None
        closed.open()
        closed.open()
        same(closed, stack)
        assert isinstance(stack, Masked) and closed.weight is not None and stack.weight is not None
        assert torch.equal(closed.weight, stack.weight)


@ANY_FORMAT
def test_keys_that_are_missing_or_of_another_size_are_found(name: str) -> None:
    stack, _ = stack_of(name)
    for key in stack.state_dict():
        state = stack.state_dict()
        state.pop(key)
        for other in (copy.deepcopy(stack), WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS)):
            with pytest.raises(RuntimeError, match="Missing key"):
                other.load_state_dict(state)
    smaller = stack.select((0, 1)).state_dict()
    for other in (copy.deepcopy(stack), WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS)):
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
            other.load_state_dict(smaller)


@ANY_FORMAT
@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0], [17, 2, 0, 0]])
def test_products_equal_a_loop_in_float64(name: str, counts: list[int]) -> None:
    stack, exact = stack_of(name)
    rows, offsets = routed(counts)
    expected = loop(rows, exact, counts)
    for inference in (False, True):
        with torch.inference_mode(inference):
            got = stack.linear(rows, offsets)
        assert got.shape == (sum(counts), OUTPUTS) and got.dtype == torch.float32
        numpy.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=2e-5)
    got = stack.linear(rows.double(), offsets)
    assert got.dtype == torch.float64
    numpy.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-12)


@ANY_FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_narrow_types(name: str, dtype: torch.dtype) -> None:
    stack, exact = stack_of(name, dtype)
    rows, offsets = routed([3, 0, 1, 5], dtype=dtype)
    expected = loop(rows, exact, [3, 0, 1, 5])
    with torch.no_grad():
        got = stack.linear(rows, offsets)
    assert got.dtype == dtype
    error = numpy.linalg.norm(got.double().numpy() - expected) / numpy.linalg.norm(expected)
    assert error < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@ANY_FORMAT
def test_no_slots(name: str) -> None:
    stack = WeightStack.empty(FORMATS[name], 0, OUTPUTS, INPUTS)
    assert stack.dense().shape == (0, OUTPUTS, INPUTS)
    assert stack.linear(torch.zeros(0, INPUTS), torch.zeros(0, dtype=torch.int32)).shape == (0, OUTPUTS)
    assert stack.num_weights == 0
    same(stack.select(()), stack)


@ANY_FORMAT
def test_gradients_of_the_rows(name: str) -> None:
    stack, exact = stack_of(name)
    counts = [3, 0, 1, 5]
    rows, offsets = routed(counts)
    rows.requires_grad_()
    weight = torch.from_numpy(numpy.random.default_rng(0).normal(size=(sum(counts), OUTPUTS)))
    stack.linear(rows, offsets).backward(weight.float())
    slots = numpy.repeat(numpy.arange(SLOTS), counts)
    expected = numpy.stack([exact[slot].T @ row for slot, row in zip(slots, weight.numpy(), strict=True)])
    assert rows.grad is not None
    numpy.testing.assert_allclose(rows.grad.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["2:4", "1:4", "4:8", "half", "a third of each matrix"])
def test_gradients_of_weights_that_pruning_left(name: str) -> None:
    """Those of the dense matrices at the places that are left; zero, not missing, where no row came."""
    counts = [3, 0, 1, 5]
    stack, exact = stack_of(name, torch.float64)
    exact = stack.dense(torch.float64).detach().numpy()
    rows, offsets = routed(counts, dtype=torch.float64)
    weight = numpy.random.default_rng(0).normal(size=(sum(counts), OUTPUTS))
    stack.linear(rows, offsets).backward(torch.from_numpy(weight))
    dense = numpy.zeros_like(exact)
    for slot, left, row in zip(numpy.repeat(numpy.arange(SLOTS), counts), weight, rows.numpy(), strict=True):
        dense[slot] += numpy.outer(left, row)
    kept = stack.zeros_kept()
    assert kept is not None
    (parameter,) = stack.parameters()
    assert parameter.grad is not None
    if isinstance(stack, Sparse24):
        expected = numpy.take_along_axis(dense, stack.places.numpy(), -1)
    else:
        expected = numpy.where(kept.numpy(), dense, 0.0)
    numpy.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.kind in ("sparse24", "int8")])
@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 0]])
def test_products_on_a_cpu_spell_out_no_stack(monkeypatch: pytest.MonkeyPatch, name: str, counts: list[int]) -> None:
    stack, exact = stack_of(name)
    monkeypatch.setattr(type(stack), "dense", lambda *_: pytest.fail("the whole stack was spelled out"))
    rows, offsets = routed(counts)
    got = stack.linear(rows.requires_grad_(), offsets)
    numpy.testing.assert_allclose(got.detach().numpy(), loop(rows.detach(), exact, counts), rtol=0, atol=2e-5)
    got.sum().backward()
    assert rows.grad is not None
    for parameter in stack.parameters():
        assert parameter.grad is not None and parameter.grad.any() == any(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_2_of_4_is_multiplied_as_it_is_stored(dtype: torch.dtype) -> None:
    """No product changes what a stack holds, and each sees what an optimizer, or anybody else, wrote before."""
    stack, _ = packed(random_weight(SLOTS, OUTPUTS, INPUTS), FORMATS["2:4"], dtype)
    assert isinstance(stack, Sparse24)
    held, stored = stack.values, {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    counts = [3, 0, 1, 5]
    rows, offsets = routed(counts, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for _ in range(3):
        exact = stack.dense(torch.float64).detach().numpy()
        with torch.inference_mode():
            first = stack.linear(rows, offsets)
        numpy.testing.assert_allclose(first.double().numpy(), loop(rows, exact, counts), rtol=tolerance, atol=tolerance)
        assert stack.values is held and set(stack.state_dict()) == set(stored)
        assert all(torch.equal(stack.state_dict()[name], tensor) for name, tensor in stored.items())
        optimizer.zero_grad()
        second = stack.linear(rows, offsets)
        torch.testing.assert_close(second.detach(), first, rtol=0, atol=0)  # evaluation and training see one product
        second.square().sum().backward()
        optimizer.step()
        assert not torch.equal(stack.values, stored["values"])
        stored["values"] = stack.values.detach().clone()


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.kind == "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_multiplied_as_it_is_stored(name: str, dtype: torch.dtype) -> None:
    stack, _ = packed(random_weight(SLOTS, OUTPUTS, INPUTS), FORMATS[name], dtype)
    held = dict(stack.named_buffers())
    stored = {key: tensor.clone() for key, tensor in held.items()}
    counts = [3, 0, 1, 12]
    rows, offsets = routed(counts, dtype=dtype)
    wanted = loop(rows, stack.dense(torch.float64).numpy(), counts)
    with torch.inference_mode():
        first = stack.linear(rows, offsets)
    error = numpy.linalg.norm(first.double().numpy() - wanted) / numpy.linalg.norm(wanted)
    assert error <= (1e-6 if dtype == torch.float32 else 5e-3)
    assert all(tensor is held[key] for key, tensor in stack.named_buffers())
    assert all(torch.equal(tensor, stored[key]) for key, tensor in stack.state_dict().items())
    second = stack.linear(rows.requires_grad_(), offsets)  # evaluation and training see one product
    torch.testing.assert_close(second.detach(), first, rtol=0, atol=0)


def test_a_linear_layer_of_2_of_4_trains() -> None:
    stack, exact = packed(random_weight(1, OUTPUTS, INPUTS), FORMATS["2:4"])
    rows = random_weight(1, 7, INPUTS, 5)[0]
    PackedLinear(stack)(rows.view(7, 1, INPUTS)).sum().backward()
    assert isinstance(stack, Sparse24) and stack.values.grad is not None
    expected = numpy.broadcast_to(rows.double().numpy().sum(0), exact.shape)
    expected = numpy.take_along_axis(expected, stack.places.numpy(), -1)
    numpy.testing.assert_allclose(stack.values.grad.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["2:4", "4:8", "half"])
def test_zeros_stay_zeros_through_training(name: str) -> None:
    stack, exact = stack_of(name)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1, weight_decay=0.1)
    rows, offsets = routed([3, 2, 1, 5])
    for _ in range(3):
        optimizer.zero_grad()
        stack.linear(rows, offsets).square().sum().backward()
        optimizer.step()
    kept = stack.zeros_kept()
    assert kept is not None
    if isinstance(stack, Masked):
        assert stack.weight is not None and stack.dense().data_ptr() == stack.weight.data_ptr()  # no copy to train on
    dense = stack.dense().detach()
    assert not dense[~kept].any()
    assert (dense != torch.from_numpy(exact).float())[kept].all()
    empty = WeightStack.empty(stack.format, SLOTS, OUTPUTS, INPUTS)
    empty.load_state_dict(stack.state_dict())
    assert torch.equal(empty.dense(), dense)


@ANY_FORMAT
def test_which_weights_may_be_other_than_zero(name: str) -> None:
    stack, exact = stack_of(name)
    kept = stack.zeros_kept()
    format = FORMATS[name]
    if format.pattern is None and format.sparsity is None:
        assert kept is None
    elif not format.quantized:
        assert kept is not None
        assert numpy.array_equal(kept.numpy(), exact != 0)
        assert (kept.flatten(1).sum(1) == format.kept(OUTPUTS, INPUTS)).all()


def test_zeros_among_integers_are_exact() -> None:
    weight = random_weight(SLOTS, OUTPUTS, INPUTS)
    sparse, dense = packed(weight, FORMATS["2:4"])
    stack, _ = packed(torch.from_numpy(dense), FORMATS["int4 of 2:4"], torch.float32)
    kept = stack.zeros_kept()
    pruned = sparse.zeros_kept()
    assert kept is not None and pruned is not None
    assert not (kept & ~pruned).any()


def test_masks_that_do_not_fit_are_an_error() -> None:
    weight = random_weight(2, 3, 8)
    keep = torch.ones_like(weight, dtype=torch.bool)
    with pytest.raises(ValueError, match="exactly two of every four"):
        Sparse24.pack(WeightFormat(pattern="2:4"), weight, keep)
    shifted = torch.tensor([True, True, True, False, False, True, False, False]).expand(2, 3, 8)
    with pytest.raises(ValueError, match="exactly two of every four"):
        Sparse24.pack(WeightFormat(pattern="2:4"), weight, shifted)
    with pytest.raises(ValueError, match=r"keeps \[24, 24\] weights of the matrices, 0.5 zeros keeps 12"):
        Masked.pack(WeightFormat(sparsity=0.5), weight, keep)


@ANY_FORMAT
def test_on_the_meta_device(name: str) -> None:
    stack = WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS, dtype=torch.bfloat16, device="meta")
    if isinstance(stack, Masked):
        stack.open()
    assert stack.device.type == "meta" and stack.select((0, 2)).slots == 2
    assert stack.dtype == torch.bfloat16
    for key, tensor in stack.state_dict().items():
        assert tensor.device.type == "meta"
        expected = WeightStack.empty(FORMATS[name], SLOTS, OUTPUTS, INPUTS, dtype=torch.bfloat16).state_dict()[key]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), key


@ANY_FORMAT
def test_a_linear_layer_takes_any_leading_sizes(name: str) -> None:
    stack, exact = packed(random_weight(1, OUTPUTS, INPUTS), FORMATS[name])
    linear = PackedLinear(stack)
    assert (linear.in_features, linear.out_features) == (INPUTS, OUTPUTS)
    generator = torch.Generator().manual_seed(0)
    for leading in ((), (3,), (2, 5), (0, 4), (2, 1, 3)):
        rows = torch.randn(*leading, INPUTS, generator=generator)
        expected = rows.double().numpy() @ exact[0].T
        numpy.testing.assert_allclose(linear(rows).detach().numpy(), expected, rtol=0, atol=2e-5)


@ANY_FORMAT
def test_under_autocast(name: str) -> None:
    stack, exact = packed(random_weight(1, OUTPUTS, INPUTS), FORMATS[name])
    rows = random_weight(1, 7, INPUTS, 5)[0]
    expected = rows.double().numpy() @ exact[0].T
    for requires_grad in (False, True):
        rows.requires_grad_(requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            got = PackedLinear(stack)(rows)
        assert got.dtype == torch.bfloat16
        if requires_grad:
            got.float().square().sum().backward()
            assert rows.grad is not None and rows.grad.dtype == torch.float32
        error = numpy.linalg.norm(got.detach().double().numpy() - expected) / numpy.linalg.norm(expected)
        assert error < 1e-2


def test_stacks_that_do_not_fit_each_other_are_an_error() -> None:
    half = WeightFormat(sparsity=0.5)
    gate_up, down = WeightStack.empty(half, 2, 12, 8), WeightStack.empty(half, 2, 8, 6)
    storage = Packed(gate_up, down)
    assert (storage.num_slots, storage.hidden_size, storage.num_weights) == (2, 8, 2 * 18 * 8)
    for wrong in (WeightStack.empty(half, 3, 8, 6), WeightStack.empty(half, 2, 8, 5), WeightStack.empty(half, 2, 7, 6)):
        with pytest.raises(ValueError, match="the stacks do not fit"):
            Packed(gate_up, wrong)
    with pytest.raises(ValueError, match=r"bias \(2, 6\) does not fit"):
        Packed(gate_up, down, torch.nn.Parameter(torch.zeros(2, 6)))
    with pytest.raises(ValueError, match="a linear layer has one matrix, this stack has 2"):
        PackedLinear(down)


def test_reads_well() -> None:
    stack = WeightStack.empty(WeightFormat(4, 16), 2, 8, 32)
    assert isinstance(stack, Int4)
    assert repr(stack) == "Int4(int4, group 16, asymmetric, slots=2, outputs=8, inputs=32)"
