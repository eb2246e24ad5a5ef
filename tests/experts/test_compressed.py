"""The module in ``mlp.experts``: equal to the stock one, equal to its twins, and no surprises as a module."""

import copy

import pytest
import torch
from moe_kernels import mix_experts, mix_experts_by_loop
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from moe_lightning.experts import CompressedExperts, Dense
from tests.models import tiny_config

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
HIDDEN, EXPERTS = 32, 6


def stock_module(dtype: torch.dtype = torch.float32, implementation: str = "eager", **changes) -> MixtralExperts:
    module = MixtralExperts(tiny_config(experts_implementation=implementation, **changes)).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def compressed(
    stock: MixtralExperts, real: list[int] | None = None, novices: Tensor | None = None
) -> CompressedExperts:
    """Keep the weights of some experts; the others, ascending, are the novices."""
    real = list(range(EXPERTS)) if real is None else real
    others = [expert for expert in range(EXPERTS) if expert not in real]
    slot_map = [real.index(e) if e in real else -1 - others.index(e) for e in range(EXPERTS)]
    storage = Dense(
        nn.Parameter(stock.gate_up_proj.detach()[real].clone()), nn.Parameter(stock.down_proj.detach()[real].clone())
    )
    return CompressedExperts(storage, slot_map, None if novices is None else nn.Parameter(novices), stock.act_fn)


def routed(tokens: int = 17, top_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    value, index = torch.randn(tokens, EXPERTS).softmax(-1).topk(top_k, dim=-1)
    return torch.randn(tokens, HIDDEN).to(dtype), index, value / value.sum(-1, keepdim=True)


# transformers' grouped_mm has no float64.
ORACLES = [
    (implementation, dtype)
    for implementation in ("eager", "grouped_mm", "batched_mm")
    for dtype in TOLERANCE
    if (implementation, dtype) != ("grouped_mm", torch.float64)
]


@pytest.mark.parametrize(("implementation", "dtype"), ORACLES)
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_nothing_compressed_equals_the_stock_module(dtype: torch.dtype, top_k: int, implementation: str) -> None:
    stock = stock_module(dtype, implementation)
    ours, inputs = compressed(stock), routed(top_k=top_k, dtype=dtype)
    hidden = [inputs[0].clone().requires_grad_(True) for _ in range(2)]
    outputs = [module(x, *inputs[1:]) for module, x in zip((ours, stock), hidden, strict=True)]
    assert outputs[0].dtype == dtype
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(*outputs, **tolerance)
    if dtype == torch.bfloat16:
        return  # sums of roundings; the other types check the gradients
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(hidden[0].grad, hidden[1].grad, **tolerance)
    torch.testing.assert_close(ours.storage.gate_up_proj.grad, stock.gate_up_proj.grad, **tolerance)
    torch.testing.assert_close(ours.storage.down_proj.grad, stock.down_proj.grad, **tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("real", [[0, 1, 2, 3, 4, 5], [0, 2, 5], [3], []])
@pytest.mark.parametrize("top_k", [1, 3])
def test_equals_its_twins(dtype: torch.dtype, real: list[int], top_k: int) -> None:
    novices = torch.randn(EXPERTS - len(real), HIDDEN).to(dtype) if len(real) < EXPERTS else None
    module, (hidden, index, weight) = compressed(stock_module(dtype), real, novices), routed(top_k=top_k, dtype=dtype)
    arguments = (hidden, index, weight, *module.storage.dense(), torch.tensor(module.slot_map), novices, silu)
    for twin in (mix_experts, mix_experts_by_loop):
        torch.testing.assert_close(
            module(hidden, index, weight), twin(*arguments), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


def test_takes_the_activation_of_the_config() -> None:
    stock = stock_module(hidden_act="gelu")
    inputs = routed()
    torch.testing.assert_close(compressed(stock)(*inputs), stock(*inputs))
    assert isinstance(stock.act_fn, type(ACT2FN["gelu"]))


def test_a_novice_gets_its_routing_weight_and_nothing_is_renormalised() -> None:
    novices = torch.randn(5, HIDDEN)
    module = compressed(stock_module(), [2], novices)
    weight = torch.tensor([[0.3, 0.1]])
    out = module(torch.randn(1, HIDDEN), torch.tensor([[5, 0]]), weight)
    torch.testing.assert_close(out[0], 0.3 * novices[4] + 0.1 * novices[0])


@pytest.mark.parametrize("seed", range(3))
def test_relabelling_experts_together_with_router_rows_changes_nothing(seed: int) -> None:
    stock = MixtralSparseMoeBlock(tiny_config(experts_implementation="eager")).double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    one, other = copy.deepcopy(stock), copy.deepcopy(stock)
    real, novices = [0, 2, 3, 5], torch.randn(2, HIDDEN, dtype=torch.float64)
    one.experts = compressed(stock.experts, real, novices)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))  # new row r is old expert order[r]
    with torch.no_grad():
        other.gate.weight.copy_(stock.gate.weight[order])
    slot_map = [one.experts.slot_map[expert] for expert in order.tolist()]
    other.experts = CompressedExperts(one.experts.storage, slot_map, one.experts.novices, one.experts.act_fn)
    hidden = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(one(hidden), other(hidden))


@pytest.mark.parametrize(
    "slot_map",
    [[0, 1], [0, 1, 2, -1], [0, 1, 3], [0, 1, 1], [0, 1, 2, -2], [-1, -2, -3], []],
)
def test_a_slot_map_that_names_too_little_or_too_much_is_an_error(slot_map: list[int]) -> None:
    with pytest.raises(ValueError, match="slot map"):
        CompressedExperts(Dense.empty(3, 4, 8), slot_map, None, silu)


def test_a_slot_map_that_forgets_a_novice_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 novices"):
        CompressedExperts(Dense.empty(3, 4, 8), [0, -1, 1, 2], nn.Parameter(torch.zeros(2, 8)), silu)


@pytest.mark.parametrize("down", [(3, 8, 5), (2, 8, 4), (3, 4, 8)])
def test_stacks_that_do_not_fit_are_an_error(down: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Dense(nn.Parameter(torch.zeros(3, 8, 8)), nn.Parameter(torch.zeros(down)))


def test_state_dict_holds_weights_only() -> None:
    module = compressed(stock_module(), [0, 1, 2, 3], torch.randn(2, HIDDEN))
    module(*routed())  # the map has been made by now
    assert set(module.state_dict()) == {"storage.gate_up_proj", "storage.down_proj", "novices"}
    assert not list(module.buffers())
    assert set(compressed(stock_module()).state_dict()) == {"storage.gate_up_proj", "storage.down_proj"}
    assert module.num_experts == 6 and module.num_novices == 2 and module.storage.num_slots == 4


def test_deep_copy_is_independent() -> None:
    module, inputs = compressed(stock_module(), [0, 1, 2, 3], torch.randn(2, HIDDEN)), routed()
    before = module(*inputs)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(*inputs), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(module(*inputs), before, rtol=0, atol=0)
    assert not twin(*inputs).any()


def test_the_map_follows_the_device() -> None:
    module, inputs = compressed(stock_module(), [0, 1, 2, 3], torch.randn(2, HIDDEN)), routed()
    before = module(*inputs)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to("meta")
    assert module.slot_map_on(torch.device("meta")).device.type == "meta"
    module.load_state_dict(state, assign=True)
    assert module.slot_map_on(torch.device("cpu")).tolist() == [0, 1, 2, 3, -1, -2]
    torch.testing.assert_close(module(*inputs), before, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one")
def test_moves_to_a_gpu_and_back() -> None:
    module, inputs = compressed(stock_module(), [0, 1, 2, 3], torch.randn(2, HIDDEN)), routed()
    before = module(*inputs)
    there = module.cuda()(*(tensor.cuda() for tensor in inputs))
    torch.testing.assert_close(there.cpu(), before)
    torch.testing.assert_close(module.cpu()(*inputs), before, rtol=0, atol=0)


def test_trains_after_a_first_call_in_inference_mode() -> None:
    module, inputs = compressed(stock_module(), [0, 1, 2, 3], torch.randn(2, HIDDEN)), routed()
    with torch.inference_mode():
        module(*inputs)
    module(*inputs).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
