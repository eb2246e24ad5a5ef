"""Low-rank terms in a layer: values and gradients of a loop over tokens, and what they cost."""

from typing import Any

import pytest
import torch
from moe_kernels.machine import this_machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.experts import LoraLinear, LoraStack, PackedLinear, WeightStack
from moe_lightning.plan import KeepChannels, KeepExperts, MergeExperts, NoviceExperts, Quantize, Sparsify, WeightFormat
from tests.lora import BASES, adapted_mixtral, fill_terms, kept_weights
from tests.packed import FORMATS, packed, random_weight
from tests.stand_ins import unpacked

TOKENS, HIDDEN = 13, 32
NOVICES = (KeepExperts(0, (0, 2, 3, 4, 5), router="keep"), NoviceExperts(0, (2, 5), "low_rank", (0, 3)))
LAYERS: dict[str, tuple[Any, ...]] = {
    "dense": (),
    "int4": (Quantize(0, group_size=16),),
    "int4 symmetric": (Quantize(0, group_size="channel", symmetric=True),),
    "int8": (Quantize(0, bits=8, group_size=8),),
    "2:4": (Sparsify(0, pattern="2:4"),),
    "1:4": (Sparsify(0, pattern="1:4"),),
    "masked": (Sparsify(0, sparsity=0.4),),
    "int4 of 2:4": (Sparsify(0, pattern="2:4"), Quantize(0, group_size=16)),
    "novices": NOVICES,
    "novices, channels, int4": (*NOVICES, KeepChannels(0, 32), Quantize(0, group_size=16)),
    "channels": (KeepChannels(0, 20),),
    "merged": (MergeExperts(0, ((0, 3), (1, 2, 5), (4,))),),
    "novices, 2:4": (*NOVICES, Sparsify(0, pattern="2:4")),
}
"""Edits of layer 0: every way to hold real experts, alone and beside all that may stand in their place."""


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Return the experts of layer 0 of an adapted model, and its layout."""
    model = adapted_mixtral(LAYERS[name], targets="experts", dtype=dtype)
    experts = model.model.layers[0].mlp.experts
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (experts.novices, experts.novice_in, experts.novice_out, experts.storage.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return experts, architecture_of(model).shape(model).layout(0)


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, experts chosen (never expert 4, once expert 0), and routing weights."""
    draw = torch.Generator().manual_seed(4)
    hidden_NH = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    index_NK = torch.stack([torch.tensor([1, 2, 3, 5])[torch.randperm(4, generator=draw)[:2]] for _ in range(TOKENS)])
    index_NK[0, 0] = 0
    weight_NK = torch.rand(TOKENS, 2, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_NH, index_NK, weight_NK


def leaf(tensor: Tensor) -> Any:
    return tensor.detach().double().clone().requires_grad_()


class ByHand:
    """The same layer as a loop over tokens, with matrices spelled out; leaves hold the gradients."""

    def __init__(self, experts: Any, layout: Any) -> None:
        self.storage, self.layout = experts.storage, layout
        self.weights = {name: leaf(unpacked(getattr(self.storage, name))) for name in ("gate_up_proj", "down_proj")}
        self.kept = {name: kept_weights(getattr(self.storage, name), self.weights[name]) for name in self.weights}
        terms: dict[str, Any] = {"gate_up_proj": self.storage.gate_up_lora, "down_proj": self.storage.down_lora}
        self.terms = {name: (leaf(term.lora_A), leaf(term.lora_B)) for name, term in terms.items()}
        self.scale = 5.0 / 3  # alpha over rank of `adapted_mixtral`
        self.bias = None if self.storage.bias is None else leaf(self.storage.bias)
        self.novices = None if experts.novices is None else leaf(experts.novices)
        self.maps = None if experts.novice_in is None else (leaf(experts.novice_in), leaf(experts.novice_out))

    def matrix(self, name: str, slot: int) -> Tensor:
        first, second = (stack[slot] for stack in self.terms[name])
        return self.weights[name][slot] + self.kept[name][slot] * (self.scale * (second @ first))

    def expert(self, number: int, x_H: Tensor) -> Tensor:
        owner = dict(self.layout.merged).get(number, number)
        if owner in self.layout.real:
            slot = self.layout.real.index(owner)
            gate_I, up_I = (self.matrix("gate_up_proj", slot) @ x_H).chunk(2)
            out_H = self.matrix("down_proj", slot) @ (gate_I * torch.sigmoid(gate_I) * up_I)
            return out_H if self.bias is None else out_H + self.bias[slot]
        if number in self.layout.novices:
            assert self.novices is not None
            place = self.layout.novices.index(number)
            start = sum(self.layout.novice_ranks[:place])
            rows = slice(start, start + self.layout.novice_ranks[place])
            assert self.maps is not None
            return self.novices[place] + self.maps[1][rows].T @ (self.maps[0][rows] @ x_H)
        return torch.zeros_like(x_H)

    def __call__(self, hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        rows = []
        for token, x_H in enumerate(hidden_NH):
            pairs = zip(index_NK[token].tolist(), weight_NK[token], strict=True)
            rows.append(sum((weight * self.expert(number, x_H) for number, weight in pairs), torch.zeros(HIDDEN)))
        return torch.stack(rows)


def gradient_of_weights(weight: Any, gradient_SOX: Any) -> Tensor | None:
    """Return what the gradient of whole matrices means for the parameter that holds them, by hand; None for integers.

    Pruned matrices: only what is left gets one.
    """
    if not isinstance(weight, WeightStack):
        return gradient_SOX
    if weight.format.quantized:
        return None
    return gradient_SOX * kept_weights(weight, unpacked(weight))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_a_loop_over_tokens(name: str) -> None:
    experts, layout = make_layer(name)
    assert experts.storage.gate_up_lora is not None and layout.lora is not None
    by_hand = ByHand(experts, layout)
    inputs = make_inputs()
    ours, theirs = [inputs[0], inputs[2]], [leaf(inputs[0]), leaf(inputs[2])]
    mixed_NH = experts(ours[0], inputs[1], ours[1])
    expected_NH = by_hand(theirs[0], inputs[1], theirs[1])
    close(mixed_NH, expected_NH)
    probe_NH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mixed_NH.backward(probe_NH)
    expected_NH.backward(probe_NH)
    for mine, other in zip(ours, theirs, strict=True):  # hidden states and routing weights
        assert other.grad.abs().max() > 1e-3
        close(mine.grad, other.grad)
    for matrices, term in (("gate_up_proj", "gate_up_lora"), ("down_proj", "down_lora")):
        stack = getattr(experts.storage, term)
        for mine, other in zip((stack.lora_A, stack.lora_B), by_hand.terms[matrices], strict=True):
            assert other.grad.abs().max() > 1e-3
            close(mine.grad, other.grad)
        weight = getattr(experts.storage, matrices)
        wanted = gradient_of_weights(weight, by_hand.weights[matrices].grad)
        if wanted is None:
            assert not list(weight.parameters())
        elif not isinstance(weight, WeightStack):
            close(weight.grad, wanted)
        elif hasattr(weight, "metadata"):
            close(weight.values.grad, torch.take_along_dim(wanted, weight.places, -1))
        else:
            close(weight.weight.grad, wanted)
    pairs = [(experts.storage.bias, by_hand.bias), (experts.novices, by_hand.novices)]
    pairs += zip((experts.novice_in, experts.novice_out), by_hand.maps or (), strict=False)
    for mine, other in pairs:
        if mine is not None:
            assert other.grad.abs().max() > 1e-3
            close(mine.grad, other.grad)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
def test_a_linear_layer_with_a_term(name: str, packs: bool) -> None:
    weight = random_weight(1, 24, 32, dtype=torch.float64)
    stack, dense = packed(weight, FORMATS[name])
    term = LoraStack.empty(1, 24, 32, 4, 6.0, weight)
    linear: Any
    if packs:
        linear, plain = PackedLinear(stack), torch.from_numpy(dense[0])
        linear.lora = term
        kept = (plain != 0) if (FORMATS[name].pattern or FORMATS[name].sparsity) else torch.ones_like(plain)
    else:
        linear, plain, kept = LoraLinear(nn.Parameter(weight[0].clone()), term), weight[0], torch.ones(24, 32)
    fill_terms(linear)
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(2, 5, 32, generator=draw, dtype=torch.float64, requires_grad=True)
    other, first, second = leaf(x), leaf(term.lora_A[0]), leaf(term.lora_B[0])
    found, expected = linear(x), other @ (plain + kept * (1.5 * (second @ first))).T
    close(found, expected)
    probe = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    found.backward(probe)
    expected.backward(probe)
    assert x.grad is not None and term.lora_A.grad is not None and term.lora_B.grad is not None
    for mine, wanted in ((x.grad, other.grad), (term.lora_A.grad[0], first.grad), (term.lora_B.grad[0], second.grad)):
        assert wanted is not None
        close(mine, wanted)


class Largest(TorchDispatchMode):
    """Note the numbers in the largest tensor in floating point that any operation makes."""

    def __init__(self, held: set[int]) -> None:
        super().__init__()
        self.held = held
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            made = isinstance(tensor, Tensor) and tensor.is_floating_point()
            if made and tensor.untyped_storage().data_ptr() not in self.held:  # no view of the weights themselves
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize(
    "name", ["dense", "int4", "novices", "novices, channels, int4", "2:4", "1:4", "masked", "int4 of 2:4"]
)
def test_terms_cost_the_routed_tokens_and_no_matrix_of_the_size_of_the_weights(name: str) -> None:
    experts, _ = make_layer(name, torch.float32)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    for stack in (experts.storage.gate_up_lora, experts.storage.down_lora):
        stack.requires_grad_(True)
    hidden_NH, index_NK, weight_NK = make_inputs(torch.float32)
    saved: list[int] = []
    held = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            saved.append(tensor.numel())
        return tensor

    with Largest(held) as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(hidden_NH, index_NK, weight_NK).sum().backward()
    # At these sizes an int4 matrix is one tile, and a pruned one is spelled out: one of them at a time, and never those
    # of all experts.
    storage = experts.storage
    gate_up = storage.gate_up_proj
    one = gate_up[0].numel() if isinstance(gate_up, Tensor) else gate_up.outputs * gate_up.inputs
    assert storage.num_slots >= 2
    assert largest.numbers <= max(one, 2 * TOKENS * 96)
    assert max(saved) <= 2 * TOKENS * 96


@pytest.mark.skipif(this_machine().int4 == "tiles", reason="there is no fast int4 product for this CPU")
def test_beside_the_fast_int4_product_of_a_cpu() -> None:
    weight = random_weight(3, 80, 128)
    stack, dense = packed(weight, WeightFormat(bits=4, group_size=32), torch.bfloat16)
    term = LoraStack.empty(3, 80, 128, 4, 8.0, weight.bfloat16())
    holder = nn.ModuleDict({"term": term})
    fill_terms(holder)
    draw = torch.Generator().manual_seed(7)
    from moe_lightning.experts.lora import adapted_linear

    rows_PX = torch.randn(9, 128, generator=draw).bfloat16()
    offsets_S = torch.tensor([4, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        still_PO = adapted_linear(rows_PX, offsets_S, stack, term)
    assert stack.in_cpu_form  # so the gradients below go through the working form as well
    wanted, first, second = leaf(rows_PX), leaf(term.lora_A), leaf(term.lora_B)
    whole = torch.from_numpy(dense) + 2.0 * second @ first
    expected_PO = torch.cat([wanted[:4] @ whole[0].T, wanted[4:] @ whole[2].T])
    rows_PX.requires_grad_()
    found_PO = adapted_linear(rows_PX, offsets_S, stack, term)
    assert stack.in_cpu_form
    probe_PO = torch.randn(9, 80, generator=draw).bfloat16()
    found_PO.backward(probe_PO)
    expected_PO.backward(probe_PO.double())
    assert rows_PX.grad is not None and term.lora_A.grad is not None and term.lora_B.grad is not None
    for mine, other in (
        (still_PO, expected_PO),
        (found_PO, expected_PO),
        (rows_PX.grad, wanted.grad),
        (term.lora_A.grad, first.grad),
        (term.lora_B.grad, second.grad),
    ):
        assert other is not None
        assert (mine.double() - other).norm() <= 0.01 * other.norm()


def test_a_stack_says_what_it_adds_and_refuses_what_does_not_fit() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    stack = LoraStack.empty(2, 5, 7, 3, 4.5, like)
    assert (stack.rank, stack.scale) == (3, 1.5) and not stack.delta().any()
    fill_terms(nn.ModuleDict({"stack": stack}))
    for slot in range(2):
        close(stack.delta()[slot], 1.5 * stack.lora_B[slot] @ stack.lora_A[slot])
    with pytest.raises(ValueError, match="do not fit"):
        LoraStack(nn.Parameter(torch.zeros(2, 3, 7)), nn.Parameter(torch.zeros(2, 5, 4)), 1.0)
    with pytest.raises(ValueError, match="does not fit a weight"):
        LoraLinear(nn.Parameter(torch.zeros(5, 7)), stack)


@pytest.mark.parametrize("base", BASES)
def test_a_copy_of_a_model_has_terms_of_its_own(base: str) -> None:
    import copy

    model = adapted_mixtral(base)
    twin = copy.deepcopy(model)
    fill_terms(twin, seed=9)
    inputs = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=inputs).logits
        assert not torch.allclose(before, twin(input_ids=inputs).logits)
        fill_terms(twin)
        torch.testing.assert_close(before, twin(input_ids=inputs).logits, rtol=0, atol=0)
    assert ml.measure(model) == ml.measure(twin)
