"""A stack of int4 matrices before, while and after it is in the form of the Triton kernels: always the same."""

import copy
import io

import pytest
import torch
from torch import Tensor

from moe_lightning.experts import Int4
from moe_lightning.experts.stacks.gpu_form import TileMatrices
from moe_lightning.plan import WeightFormat

SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
NAMES = ("words", "scale", "zero")


def make_stack(symmetric: bool = False, inputs: int = 256, outputs: int = 48, group: int = 128) -> Int4:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (3, outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = torch.rand(3, outputs, inputs // group, generator=draw) * 0.05 + 1e-3
    zero = torch.randint(0, 16, scale.shape, generator=draw, dtype=torch.uint8)
    format = WeightFormat(bits=4, group_size=group, symmetric=symmetric)
    return Int4.pack(format, codes, scale, zero.fill_(8) if symmetric else zero, torch.float32)


def check_stored(stack: Int4, symmetric: bool) -> None:
    expected = make_stack(symmetric)
    assert not stack.in_kernel_form
    for name in NAMES:
        got, want = stack._buffers[name], expected._buffers[name]
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == want.dtype and torch.equal(got, want)


@SYMMETRIC
@pytest.mark.parametrize(
    "ask",
    [
        lambda stack: stack.state_dict(),
        lambda stack: stack.stored_tensors(),
        lambda stack: stack.words,
        lambda stack: stack.zero,
        lambda stack: stack.dense(),
        lambda stack: stack.select([0]),
        lambda stack: stack.to(torch.bfloat16),
        lambda stack: copy.deepcopy(stack),
        lambda stack: torch.save(stack, io.BytesIO()),
        lambda stack: stack.load_state_dict(make_stack(stack.format.symmetric).state_dict()),
    ],
    ids=lambda ask: ask.__code__.co_names[-1],
)
def test_is_stored_again_when_asked(symmetric: bool, ask) -> None:
    stack = make_stack(symmetric)
    with torch.inference_mode():
        tiles = stack.tiles()
    # One copy only.
    assert stack.in_kernel_form and set(dict(stack.named_buffers())) == {"tile_words", "tile_pairs"}
    assert stack.tiles().words_SGOW is tiles.words_SGOW and not tiles.words_SGOW.is_inference()
    ask(stack)
    check_stored(stack, symmetric)


@SYMMETRIC
def test_state_dict_and_copies_hold_the_weights(symmetric: bool) -> None:
    stack = make_stack(symmetric)
    stack.tiles()
    names = {name for name in NAMES if name != "zero" or not symmetric}
    assert set(stack.state_dict()) == names
    stack.tiles()
    check_stored(copy.deepcopy(stack), symmetric)
    stack.tiles()
    empty = Int4.empty(stack.format, 3, 48, 256, dtype=torch.float32)
    empty.tiles()
    empty.load_state_dict(stack.state_dict())
    check_stored(empty, symmetric)


@SYMMETRIC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_in_torch_go_on_with_the_kernels_form(symmetric: bool, dtype: torch.dtype) -> None:
    def outputs(stack: Int4) -> tuple[Tensor, Tensor]:
        rows = torch.randn(9, 256, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        result = stack.linear(rows, torch.tensor([4, 4, 9], dtype=torch.int32))
        result.square().sum().backward()
        assert rows.grad is not None
        return result.detach(), rows.grad

    stack = make_stack(symmetric)
    expected = outputs(stack)
    stack.tiles()
    assert isinstance(stack._matrices(torch.zeros(1, 256)), TileMatrices)
    for got, want in zip(outputs(stack), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert stack.in_kernel_form


@pytest.mark.parametrize(
    ("sizes", "message"), [({"group": 32}, "groups of 32"), ({"outputs": 40}, "40 outputs"), ({}, None)]
)
def test_sizes_that_the_kernels_do_not_know(sizes: dict[str, int], message: str | None) -> None:
    reason = make_stack(**sizes).why_no_tiles()
    assert reason is None if message is None else message in str(reason)
