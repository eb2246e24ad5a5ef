"""What only a GPU can show: bfloat16, recorded graphs whose routing changes, and offsets beyond 32 bits."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.block import mix_experts_op, mix_experts_twin, moe_block_op
from moe_kernels.triton_kernels.int4_layout import to_tiles
from moe_kernels.triton_kernels.router import choose_experts
from torch import Tensor

from tests.kernels.triton.problems import relative_error, routing_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
HIDDEN, INNER, EXPERTS, NOVICES = 512, 768, 8, 2
# Results and inner activations are rounded to bfloat16; behind more than 64 tokens, int4 weights are, too. What
# low-rank maps read is rounded twice before the result is: few numbers, whose errors (2^-9 at most) do not average out.
TOLERANCE, ROUNDED_TOLERANCE, MAPS_TOLERANCE = 3e-3, 5e-3, 6e-3
FORMS = pytest.mark.parametrize("form", ["dense", "int4", "sparse24"])


def matrices(form: str, slots: int, outputs: int, inputs: int) -> list[Tensor]:
    if form == "dense":
        return [(torch.randn(slots, outputs, inputs, device=DEVICE) * inputs**-0.5).to(DTYPE)]
    if form == "sparse24":
        values = torch.randn(slots, outputs, inputs // 2, device=DEVICE) * (inputs / 2) ** -0.5
        pairs = torch.tensor([low | high << 2 for high in range(4) for low in range(high)], device=DEVICE)
        drawn = torch.randint(0, 36, (slots, outputs, inputs // 8), device=DEVICE)
        return [values.to(DTYPE), (pairs[drawn % 6] | pairs[drawn // 6] << 4).to(torch.uint8)]
    groups = inputs // 128
    words = torch.randint(-(2**31), 2**31, (slots, outputs, inputs // 8), dtype=torch.int32, device=DEVICE)
    scale = (torch.rand(slots, outputs, groups, device=DEVICE) + 0.5) * inputs**-0.5 / 5
    tiles = to_tiles(words, scale.bfloat16(), None, inputs)
    return [tiles.words_SGOW, tiles.pairs_SGO]


def layer(form: str, maps: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Return a slot map, both stacks, and novices, with or without maps."""
    slots = EXPERTS - NOVICES
    slot_map = routing_problem(1, EXPERTS, 2, novices=(1, 6))[2].to(DEVICE)
    novices = [torch.randn(NOVICES, HIDDEN), torch.randn(3, HIDDEN) * HIDDEN**-0.5, torch.randn(3, HIDDEN)]
    held = [tensor.to(DEVICE, DTYPE) for tensor in novices] + [torch.tensor([0, 1, 1], device=DEVICE)]
    stacks = matrices(form, slots, 2 * INNER, HIDDEN), matrices(form, slots, HIDDEN, INNER)
    return slot_map, *stacks, held if maps else held[:1]


def tokens_of(number: int, seed: int = 0, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    index, weight, _ = routing_problem(number, EXPERTS, top_k, seed=seed)
    hidden = torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return hidden.to(DEVICE, DTYPE), index.to(DEVICE), weight.to(DEVICE)


def tolerance(form: str, tokens: int, maps: bool = True) -> float:
    if maps:
        return MAPS_TOLERANCE
    return ROUNDED_TOLERANCE if form == "int4" and tokens > 64 else TOLERANCE


@FORMS
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 32, 64, 65, 300, 2048])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("maps", [False, True])
def test_bfloat16_equals_the_twin(form: str, tokens: int, top_k: int, maps: bool) -> None:
    inputs, weights = tokens_of(tokens, top_k=top_k), layer(form, maps)
    got, want = mix_experts_op(*inputs, *weights), mix_experts_twin(*inputs, *weights)
    assert got.dtype == DTYPE
    assert relative_error(got, want) <= tolerance(form, tokens, maps)


def recorded(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Warm up, record, and return the graph with its result."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


@FORMS
@pytest.mark.parametrize("tokens", [4, 66])
def test_a_recorded_graph_follows_the_routing(form: str, tokens: int) -> None:
    weights = layer(form)
    hidden, index, weight = tokens_of(tokens)
    graph, output = recorded(lambda: mix_experts_op(hidden, index, weight, *weights))
    one = torch.tensor([[3, 2]], device=DEVICE).expand(tokens, 2)
    novices = torch.tensor([[1, 6]], device=DEVICE).expand(tokens, 2)
    others = [tokens_of(tokens, seed)[1] for seed in (1, 2)]
    for seed, changed in enumerate([*others, one, novices, torch.full_like(index, EXPERTS), others[0]]):
        fresh, _, fresh_weight = tokens_of(tokens, 10 + seed)
        hidden.copy_(fresh)
        index.copy_(changed)
        weight.copy_(fresh_weight)
        output.fill_(torch.nan)
        graph.replay()
        want = mix_experts_twin(hidden, index, weight, *weights)
        if bool((index == EXPERTS).all()):
            assert not output.any()
        else:
            assert relative_error(output, want) <= tolerance(form, tokens)


@FORMS
def test_a_recorded_block_routes_anew(form: str) -> None:
    """With its router: other tokens go to other experts."""
    weights, router = layer(form), torch.randn(EXPERTS, HIDDEN, device=DEVICE).to(DTYPE) * HIDDEN**-0.5
    hidden = tokens_of(4)[0]
    graph, output = recorded(lambda: moe_block_op(hidden, router, 2, True, *weights)[0])
    seen = set()
    for seed in range(5):
        hidden.copy_(tokens_of(4, seed)[0])
        output.fill_(torch.nan)
        graph.replay()
        index, weight = choose_experts(torch.nn.functional.linear(hidden, router), 2, True)
        seen.add(tuple(index.flatten().tolist()))
        assert relative_error(output, mix_experts_twin(hidden, index, weight, *weights)) <= MAPS_TOLERANCE
    assert len(seen) > 1


def enough_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free memory on the GPU")


def test_tokens_beyond_32_bits() -> None:
    """Inputs, inner activations, parts and results hold more than 2^31 numbers each."""
    enough_memory(40)
    size, tokens = 4096, 2**19 + 64
    gate_up, down = matrices("dense", 2, 2 * size, size), matrices("dense", 2, size, size)
    slot_map = torch.tensor([0, -1, 1, ABSENT], device=DEVICE)
    novices = [torch.randn(1, size, device=DEVICE).to(DTYPE)]
    hidden = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
    index = torch.randint(0, 4, (tokens, 1), device=DEVICE)
    weight = torch.rand(tokens, 1, device=DEVICE)
    got = mix_experts_op(hidden, index, weight, slot_map, gate_up, down, novices, None, hidden)
    border = 2**31 // size
    for first in (0, border // 2 - 32, border - 32, tokens - 64):
        part = slice(first, first + 64)
        inputs = hidden[part], index[part], weight[part]
        want = mix_experts_twin(*inputs, slot_map, gate_up, down, novices, None, hidden[part])
        assert relative_error(got[part], want) <= TOLERANCE, first


@pytest.mark.parametrize("form", ["dense", "sparse24"])
@pytest.mark.parametrize("tokens", [3, 70])
def test_weights_beyond_32_bits(form: str, tokens: int) -> None:
    enough_memory(30)
    slots, inner, size = 34, 8192, 4096
    gate_up, down = matrices(form, slots, 2 * inner, size), matrices(form, slots, size, inner)
    assert slots * 2 * inner * size > 2**31
    hidden = torch.randn(tokens, size, device=DEVICE, dtype=DTYPE)
    index = torch.tensor([[slots - 1, 0]], device=DEVICE).expand(tokens, 2).contiguous()
    weight = torch.rand(tokens, 2, device=DEVICE)
    got = mix_experts_op(hidden, index, weight, torch.arange(slots, device=DEVICE), gate_up, down, [])
    # The twin would hold all of them in fp32.
    few = [[tensor[[0, slots - 1]] for tensor in stack] for stack in (gate_up, down)]
    slot_map = torch.tensor([0, *[ABSENT] * (slots - 2), 1], device=DEVICE)
    assert relative_error(got, mix_experts_twin(hidden, index, weight, slot_map, *few, [])) <= TOLERANCE


@FORMS
@pytest.mark.parametrize("tokens", [4, 66])
def test_nothing_waits_for_the_gpu(form: str, tokens: int) -> None:
    inputs, weights = tokens_of(tokens), layer(form)
    mix_experts_op(*inputs, *weights)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_experts_op(*inputs, *weights)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@FORMS
def test_tensors_on_another_gpu_than_the_current_one(form: str) -> None:
    inputs, (slot_map, *stacks) = tokens_of(5), layer(form)
    want = mix_experts_op(*inputs, slot_map, *stacks)
    moved = [[tensor.to("cuda:1") for tensor in stack] for stack in stacks]
    got = mix_experts_op(*(tensor.to("cuda:1") for tensor in inputs), slot_map.to("cuda:1"), *moved)
    assert got.device == torch.device("cuda:1")
    torch.testing.assert_close(got.to(DEVICE), want)
