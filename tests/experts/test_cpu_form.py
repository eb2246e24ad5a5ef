"""A stack of int4 matrices before, while and after it works on a CPU: always the same weights."""

import copy
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from moe_kernels import cpu_layout, int4, machine
from moe_kernels.cpu_kernels import build, lanes
from moe_kernels.machine import Int4Product, Machine
from torch import Tensor

from moe_lightning.experts import Int4, PackedLinear
from moe_lightning.experts.stacks import cpu_form
from moe_lightning.plan import WeightFormat

SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
SLOTS, OUTPUTS, INPUTS, GROUP = 3, 80, 128, 32
NAMES = ("words", "scale", "zero")
WORKING = {"kernel": {"lane_words", "lane_scale", "lane_zero"}, "op": {"cpu_codes", "cpu_scales"}}


def be(int4_product: Int4Product, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Machine(bf16_emulated=False, int4=int4_product)
    for module in (cpu_form, cpu_layout, int4, lanes):
        monkeypatch.setattr(module, "this_machine", lambda: found)


@pytest.fixture(autouse=True, params=["kernel", "op"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one of the products of a CPU, whichever would be taken here."""
    if request.param == "kernel" and not build.available():
        pytest.skip(f"no compiled products: {build.why_not() or 'compiling failed, see the log'}")
    if request.param == "op" and cpu_layout.cpu_layout(OUTPUTS) is None:
        pytest.skip("torch has no int4 product for this CPU")
    be(request.param, monkeypatch)
    return str(request.param)


def make_stack(symmetric: bool = False, outputs: int = OUTPUTS, slots: int = SLOTS) -> Int4:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (slots, outputs, INPUTS), generator=draw, dtype=torch.uint8)
    scale = torch.rand(slots, outputs, INPUTS // GROUP, generator=draw) * 0.05 + 1e-3
    zero = torch.randint(0, 16, scale.shape, generator=draw, dtype=torch.uint8)
    format = WeightFormat(bits=4, group_size=GROUP, symmetric=symmetric)
    return Int4.pack(format, codes, scale, zero.fill_(8) if symmetric else zero, torch.bfloat16)


def rows(number: int = 7, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(number, INPUTS, generator=draw).to(dtype), torch.tensor([2, 2, number], dtype=torch.int32)


def expected(stack: Int4, x: Tensor) -> np.ndarray:
    weight = stack.dense(torch.float64).numpy()
    wide = x.detach().double().numpy()
    return np.concatenate([wide[:2] @ weight[0].T, wide[2:] @ weight[2].T])


def close(got: Tensor, reference: np.ndarray, tolerance: float = 3e-3) -> bool:
    return bool(np.linalg.norm(got.detach().double().numpy() - reference) <= tolerance * np.linalg.norm(reference))


def tensors_of(stack: Int4) -> dict[str, Tensor | None]:
    return {name: stack._buffers[name] for name in NAMES}


def working(symmetric: bool = False) -> tuple[Int4, dict[str, Tensor | None]]:
    stack = make_stack(symmetric)
    stored = {name: None if tensor is None else tensor.clone() for name, tensor in tensors_of(stack).items()}
    with torch.no_grad():
        stack.linear(*rows())
    assert stack.in_cpu_form
    return stack, stored


def check_stored(stack: Int4, stored: dict[str, Tensor | None]) -> None:
    assert not stack.in_cpu_form and set(dict(stack.named_buffers())) == {
        name for name, tensor in stored.items() if tensor is not None
    }
    for name, tensor in stored.items():
        got = stack._buffers[name]
        assert (got is None) == (tensor is None)
        if tensor is not None:
            torch.testing.assert_close(got, tensor, rtol=0, atol=0)


@SYMMETRIC
def test_works_in_one_form_and_is_stored_in_another(symmetric: bool, product: str) -> None:
    stack = make_stack(symmetric)
    x, offsets = rows()
    reference = expected(stack, x)
    stored_bytes = sum(buffer.nbytes for buffer in stack.buffers())
    with torch.inference_mode():
        first, second = stack.linear(x, offsets), stack.linear(x, offsets)
    assert stack.in_cpu_form and close(first, reference)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert set(dict(stack.named_buffers())) == WORKING[product] - ({"lane_zero"} if symmetric else set())
    # One copy only: what is there weighs what was there, but for torch's zeros of 16 instead of 4 (or 0) bits.
    working_bytes = sum(buffer.nbytes for buffer in stack.buffers())
    if product == "kernel":
        assert working_bytes == stored_bytes
    assert working_bytes <= stored_bytes * (1 + (16 / GROUP) / (4 + 16 / GROUP))
    # Another type, and training, then work with what is there.
    assert close(stack.linear(x.float(), offsets), reference, 1e-6)
    stack.linear(x.requires_grad_(), offsets).sum().backward()
    assert x.grad is not None and stack.in_cpu_form


@SYMMETRIC
@pytest.mark.parametrize(
    "ask",
    [
        lambda stack: stack.state_dict(),
        lambda stack: stack.stored_tensors(),
        lambda stack: stack.words,
        lambda stack: stack.zero,
        lambda stack: stack.get_buffer("scale"),
        lambda stack: stack.dense(),
        lambda stack: stack.codes,
        lambda stack: stack.zeros,
        lambda stack: stack.select([0]),
        lambda stack: stack.to(torch.float32),
        lambda stack: stack.to("cpu"),
        lambda stack: copy.deepcopy(stack),
        lambda stack: torch.save(stack, io.BytesIO()),
        lambda stack: stack.load_state_dict(make_stack(stack.format.symmetric).state_dict()),
    ],
    ids=lambda ask: ask.__code__.co_names[-1],
)
def test_is_stored_again_when_asked(symmetric: bool, ask) -> None:
    stack, stored = working(symmetric)
    ask(stack)
    check_stored(stack, stored)
    with torch.no_grad():
        assert close(stack.linear(*rows()), expected(make_stack(symmetric), rows()[0]))


@SYMMETRIC
def test_state_dict_copy_and_selection_hold_the_weights(symmetric: bool) -> None:
    stack, stored = working(symmetric)
    names = {name for name in NAMES if stored[name] is not None}
    assert set(stack.state_dict()) == names
    empty = Int4.empty(stack.format, SLOTS, OUTPUTS, INPUTS, dtype=torch.bfloat16)
    assert isinstance(empty, Int4)
    empty.load_state_dict(working(symmetric)[0].state_dict())
    check_stored(empty, stored)
    check_stored(copy.deepcopy(working(symmetric)[0]), stored)
    file = io.BytesIO()
    torch.save(working(symmetric)[0], file)
    file.seek(0)
    check_stored(torch.load(file, weights_only=False), stored)
    chosen = working(symmetric)[0].select([2, 0])
    torch.testing.assert_close(chosen.words, make_stack(symmetric).words[[2, 0]], rtol=0, atol=0)
    assert working()[0].to("meta").words.device.type == "meta"


def test_a_state_dict_taken_before_does_not_change() -> None:
    stack = make_stack()
    before = stack.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        stack.linear(*rows())
    for name, tensor in kept.items():
        torch.testing.assert_close(before[name], tensor, rtol=0, atol=0)


def test_loading_while_it_works() -> None:
    stack, _ = working()
    other = make_stack()
    other.words.bitwise_not_()
    stack.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert close(stack.linear(*rows()), expected(other, rows()[0]))
    assert stack.in_cpu_form


# The kernel takes any scales, and is taken for training.
@pytest.mark.parametrize(
    ("product", "why"),
    [(product, why) for product in WORKING for why in ("type", "no rows", "outputs", "slow")]
    + [("op", "scales"), ("op", "gradient")],
    indirect=["product"],
)
def test_stays_stored(why: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(outputs=24 if why == "outputs" else OUTPUTS)
    other = torch.float32 if product == "op" else torch.float16
    x, offsets = rows(dtype=other if why == "type" else torch.bfloat16)
    if why == "gradient":
        x.requires_grad_()
    if why == "no rows":
        x, offsets = x[:0], offsets * 0
    if why == "scales":
        stack.scale[1, 0, 0] = 0
    if why == "slow":
        be("tiles", monkeypatch)
    stored = {name: None if tensor is None else tensor.clone() for name, tensor in tensors_of(stack).items()}
    reference = expected(stack, x)
    for _ in range(2):
        got = stack.linear(x, offsets)
        assert not x.shape[0] or close(got, reference, 4e-3)
        check_stored(stack, stored)


@pytest.mark.parametrize("product", ["kernel"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_was_computed_before_does_not_show_in_training(dtype: torch.dtype) -> None:
    x, offsets = rows(dtype=dtype)
    probe = torch.randn(len(x), OUTPUTS, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = []
    for evaluated in (False, True):
        stack, leaf = make_stack(), x.clone().requires_grad_()
        if evaluated:
            with torch.no_grad():
                stack.linear(x, offsets)
        out = stack.linear(leaf, offsets)
        out.backward(probe)
        assert leaf.grad is not None
        found.append((out.detach(), leaf.grad))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("product", ["op"], indirect=True)  # the kernel takes any weights of this size
def test_what_stayed_is_tried_again_with_other_weights() -> None:
    stack = make_stack()
    stack.scale[1, 0, 0] = 0
    with torch.no_grad():
        stack.linear(*rows())
        assert not stack.in_cpu_form
        stack.load_state_dict(make_stack().state_dict())
        stack.linear(*rows())
        assert stack.in_cpu_form


def test_a_linear_layer() -> None:
    layer = PackedLinear(make_stack(slots=1))
    x = torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        got = layer(x)
        assert isinstance(layer.stack, Int4) and layer.stack.in_cpu_form
        weight = layer.stack.dense(torch.float64)[0].numpy()
    assert close(got, x.double().numpy() @ weight.T)


def test_compiled_equals_eager() -> None:
    layer = PackedLinear(make_stack(slots=1))
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        layer.state_dict()
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


def together(*works: Callable[[], object]) -> list[object]:
    """Begin all works at once, and return what they do or raise."""
    barrier = Barrier(len(works))

    def one(work: Callable[[], object]) -> object:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(one, work) for work in works]]


@pytest.mark.parametrize("ask", ["linear", "dense", "state_dict", "copy", "buffers"])
def test_threads_share_a_stack(ask: str, product: str) -> None:
    x, offsets = rows()
    reference, dense = expected(make_stack(), x), make_stack().dense()
    stored = set(NAMES)

    def multiply() -> None:
        with torch.no_grad():
            for _ in range(5):
                assert close(stack.linear(x, offsets), reference)

    def other() -> None:
        for _ in range(5):
            if ask == "dense":
                assert torch.equal(stack.dense(), dense)
            elif ask == "state_dict":
                assert set(stack.state_dict()) == stored
            elif ask == "copy":
                assert torch.equal(copy.deepcopy(stack).dense(), dense)
            elif ask == "buffers":
                assert {name for name, _ in stack.named_buffers()} in (stored, WORKING[product])
            else:
                multiply()

    for _ in range(20):
        stack = make_stack()
        together(multiply, other, multiply, other)


@SYMMETRIC
@pytest.mark.parametrize("when", ["before", "while it works"])
def test_a_shallow_copy_is_a_stack_of_its_own(symmetric: bool, when: str) -> None:
    stack = make_stack(symmetric)
    x, offsets = rows()
    with torch.no_grad():
        if when == "while it works":
            stack.linear(x, offsets)
        other = copy.copy(stack)
        stack.linear(x, offsets)
        assert stack.in_cpu_form and not other.in_cpu_form
        assert torch.equal(other.dense(), make_stack(symmetric).dense())
        other.linear(x, offsets)
        stack.state_dict()
        assert other.in_cpu_form and not stack.in_cpu_form
        assert close(other.linear(x, offsets), expected(stack, x))


@pytest.fixture
def nothing_known() -> Iterator[None]:
    """Let what is known about the machine be found out again, and forget that."""
    for function in (cpu_layout.cpu_layout, machine.found_out):
        function.cache_clear()
    yield
    for function in (cpu_layout.cpu_layout, machine.found_out):
        function.cache_clear()


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_default_device_is_not_where_the_weights_go(dtype: torch.dtype) -> None:
    stack = make_stack()
    x, offsets = rows(200)
    reference = expected(stack, x)
    with torch.device("meta"):
        with torch.no_grad():
            got = [stack.linear(x, offsets), stack.linear(x.to(dtype), offsets)]
        assert stack.in_cpu_form and all(buffer.device.type == "cpu" for buffer in stack.buffers())
        wide = x.to(dtype).requires_grad_()
        stack.linear(wide, offsets).sum().backward()
        stored = stack.state_dict()
    assert all(close(part, reference) for part in got) and wide.grad is not None and wide.grad.isfinite().all()
    for name, tensor in make_stack().state_dict().items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("product", ["op"], indirect=True)  # the kernel's form is a transposition
def test_what_does_not_come_back_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_layout.cpu_layout(OUTPUTS) is not None  # found out before
    honest = cpu_layout._pack_rows
    monkeypatch.setattr(cpu_layout, "_pack_rows", lambda codes, layout: honest(codes, layout).bitwise_xor_(1))
    stack = make_stack()
    x, offsets = rows()
    with torch.no_grad():
        assert close(stack.linear(x, offsets), expected(make_stack(), x), 4e-3)
    check_stored(stack, tensors_of(make_stack()))
