"""Which sums over experts go through the Triton kernels, and that they say there what plain torch says."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from transformers.activations import ACT2FN

pytest.importorskip("triton", reason="these are tests of the way to Triton kernels, and triton is not installed")

from moe_kernels.triton_kernels import block

from moe_lightning.experts import Channels, CompressedExperts, Dense, Int4, Int8, Packed, Sparse24, kernel_path
from moe_lightning.experts.kernel_path import storage_weights, use_kernels, why_torch
from moe_lightning.plan import WeightFormat
from tests.kernels.triton.problems import relative_error

HIDDEN, INNER, EXPERTS = 64, 64, 6
REAL, NOVICES, RANKS = 4, 2, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(bits: int, outputs: int, inputs: int, group: int = 64) -> Int4 | Int8:
    codes = torch.randint(0, 2**bits, (REAL, outputs, inputs), dtype=torch.uint8)
    scale = torch.rand(REAL, outputs, inputs // group) * 2.0**-bits / 2
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8)
    kind = Int4 if bits == 4 else Int8
    return kind.pack(WeightFormat(bits=bits, group_size=group), codes, scale, zero, torch.float32)


def pruned(outputs: int, inputs: int) -> Sparse24:
    """Two of every four weights, not always the largest."""
    keep = torch.rand(REAL, outputs, inputs // 4, 4).argsort(-1).lt(2).flatten(-2)
    return Sparse24.pack(WeightFormat(pattern="2:4"), torch.randn(REAL, outputs, inputs) / 8, keep)


def storage(form: str) -> Dense | Packed:
    if form == "2:4":
        return Packed(pruned(2 * INNER, HIDDEN), pruned(HIDDEN, INNER))
    if form in ("int4", "int8"):
        bits = int(form[-1])
        return Packed(packed(bits, 2 * INNER, HIDDEN), packed(bits, HIDDEN, INNER))
    if form == "int4 group 32":
        return Packed(packed(4, 2 * INNER, HIDDEN, 32), packed(4, HIDDEN, INNER, 32))
    slots = 0 if form == "only novices" else REAL
    weights = [nn.Parameter(torch.randn(size) / 8) for size in ((slots, 2 * INNER, HIDDEN), (slots, HIDDEN, INNER))]
    if form == "channels":
        return Channels(*weights, nn.Parameter(torch.randn(slots, HIDDEN)))
    return Dense(*weights)


def module(form: str, maps: bool = True, act_fn=silu) -> CompressedExperts:
    if form == "only novices":
        return CompressedExperts(storage(form), (-1, -2), nn.Parameter(torch.randn(2, HIDDEN)), act_fn)
    low_rank = [nn.Parameter(torch.randn(RANKS, HIDDEN) / 8) for _ in range(2)] if maps else [None, None]
    owners = (0, 0, 1) if maps else ()
    novices = nn.Parameter(torch.randn(NOVICES, HIDDEN))
    return CompressedExperts(storage(form), (0, -1, 1, 2, -2, 3), novices, act_fn, *low_rank, owners).to(DEVICE)


def routed(tokens: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    value, index = torch.randn(tokens, experts).softmax(-1).topk(2, dim=-1)
    return torch.randn(tokens, HIDDEN).to(DEVICE), index.to(DEVICE), (value / value.sum(-1, keepdim=True)).to(DEVICE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count calls of the kernels, by tokens."""
    found: list[int] = []
    operation = block.mix_experts_op

    def counted(hidden: Tensor, *arguments):
        found.append(hidden.shape[0])
        return operation(hidden, *arguments)

    monkeypatch.setattr(block, "mix_experts_op", counted)
    return found


@pytest.mark.parametrize("tokens", [0, 5, 66])
@pytest.mark.parametrize("form", ["dense", "channels", "int4", "2:4", "only novices"])
def test_the_kernels_say_what_torch_says(form: str, tokens: int, calls: list[int]) -> None:
    experts = module(form)
    inputs = routed(tokens, 2 if form == "only novices" else EXPERTS)
    with torch.no_grad(), use_kernels("off"):
        want = experts(*inputs)
    assert not calls
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    with torch.no_grad(), use_kernels("always"):
        got = experts(*inputs)
    assert calls == [tokens] and got.shape == want.shape and got.dtype == want.dtype
    assert relative_error(got, want) <= 1e-5
    if form == "int4":
        assert all(stack.in_kernel_form for stack in (experts.storage.gate_up_proj, experts.storage.down_proj))
    # Training goes on from there, by kernels of its own.
    hidden = inputs[0].clone().requires_grad_()
    with use_kernels("always"):
        experts(hidden, *inputs[1:]).sum().backward()
    assert calls == [tokens] and hidden.grad is not None
    after = experts.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("form", ["dense", "int4", "2:4"])
def test_is_traced_as_one_graph(form: str) -> None:
    """int4 after a first pass: to change their form is nothing that a graph could hold."""
    experts = module(form)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), use_kernels("always"):
        experts(*routed(1))
        for tokens in (2, 5):
            inputs = routed(tokens)
            torch.testing.assert_close(compiled(*inputs), experts(*inputs))


def test_the_kernels_see_values_of_2_4_after_a_step(calls: list[int]) -> None:
    """They read the parameters themselves: there is no second form that could be out of date."""
    experts, inputs = module("2:4"), routed(5)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.5)
    with torch.no_grad(), use_kernels("always"):
        before = experts(*inputs)
    with use_kernels("always"):
        experts(*inputs).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        with use_kernels("off"):
            want = experts(*inputs)
        with use_kernels("always"):
            got = experts(*inputs)
    assert calls == [5, 5] and relative_error(got, before) > 1e-2 and relative_error(got, want) <= 1e-5
    held = storage_weights(experts.storage, inputs[0])
    assert not isinstance(held, str) and held.gate_up[0] is experts.storage.gate_up_proj.values


def test_rows_of_2_4_that_the_kernels_do_not_know(calls: list[int]) -> None:
    """A byte of metadata is for eight inputs, and here are rows of four more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "INNER", 60)
        experts = module("2:4")
    inputs = routed(3)
    with torch.no_grad():
        with use_kernels("off"):
            want = experts(*inputs)
        with use_kernels("always"):
            assert torch.equal(experts(*inputs), want)
    assert not calls


@pytest.mark.parametrize("form", ["int8", "int4 group 32"])
def test_what_the_kernels_do_not_know_goes_the_way_of_torch(form: str, calls: list[int]) -> None:
    experts, inputs = module(form), routed(3)
    with torch.no_grad():
        with use_kernels("off"):
            want = experts(*inputs)
        with use_kernels("always"):
            assert torch.equal(experts(*inputs), want)
    assert not calls and isinstance(storage_weights(experts.storage, inputs[0]), str)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_nothing_changes_on_a_cpu(calls: list[int]) -> None:
    experts, inputs = module("int4"), routed(3)
    with torch.no_grad():
        experts(*inputs)
    assert not calls and not experts.storage.gate_up_proj.in_kernel_form


def test_types_that_the_kernels_do_not_know(calls: list[int]) -> None:
    experts, inputs = module("dense").double(), routed(3)
    with torch.no_grad(), use_kernels("always"):
        experts(inputs[0].double(), *inputs[1:])
    assert not calls


def reason(device: str = "cuda", activation=silu, grad: bool = False, capability: int = 9) -> str | None:
    """Ask about tensors of a device that need not be there."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(kernel_path, "_capability", lambda _: capability)
        hidden, weight = torch.empty(3, HIDDEN, device=device), torch.empty(3, 2, device=device)
        trained = [torch.empty(2, 2, device=device, requires_grad=grad), None]
        return why_torch(hidden, weight, trained, activation)


@pytest.fixture
def switched_on() -> Iterator[None]:
    """Let the kernels be taken where they can be."""
    with use_kernels("auto"):
        yield


def test_the_kernels_are_off_until_a_gpu_has_run_their_tests() -> None:
    assert reason() == "the kernels are switched off"


@pytest.mark.usefixtures("switched_on")
def test_the_decision() -> None:
    assert reason() is None
    assert all(reason(activation=ACT2FN[name]) is None for name in ("silu", "swish"))
    assert "SiLU" in str(reason(activation=ACT2FN["gelu"]))
    assert reason("cpu") == "the input is on cpu"
    assert "older" in str(reason(capability=7))
    assert reason(grad=True) == "a gradient is wanted"
    with torch.no_grad():
        assert reason(grad=True) is None
    with torch.inference_mode():
        assert reason() is None
    with torch.autocast("cpu"), use_kernels("always"):
        assert "autocast" in str(reason("cpu"))
    with use_kernels("off"):
        assert "switched off" in str(reason())
    with use_kernels("always"):
        assert reason("cpu") is None
    assert reason("cpu") == "the input is on cpu"


@pytest.mark.usefixtures("switched_on")
def test_words_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="MOE_KERNELS_GPU=on: give auto, off or always"), use_kernels("on"):
        pass
    monkeypatch.setattr(kernel_path, "_HAS_TRITON", False)
    assert "not installed" in str(reason())
