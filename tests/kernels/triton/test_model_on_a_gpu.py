"""Whole compressed models on a GPU: decode steps that are recorded, replayed, and route anew, and steps of training."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from torch import Tensor
from transformers import DynamicCache, StaticCache

from moe_lightning.experts.kernel_path import use_kernels
from moe_lightning.plan import AddLora, DropBlock, DropMoE, Edit, KeepExperts, NoviceExperts, Quantize
from tests.architectures.compressed_models import by_kernels, fill_new
from tests.kernels.triton.problems import relative_error
from tests.packed import everywhere, packed_mixtral

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
BATCH, PROMPT, STEPS, LONGEST = 2, 5, 6, 32
NOVICES = (NoviceExperts(0, (1, 4), "low_rank", (3, 0)), NoviceExperts(2, (0, 2)))
MODELS: dict[str, tuple[Edit, ...]] = {
    "dense": (KeepExperts(0, (0, 1, 3, 5)), KeepExperts(2, (4,), allow_fewer_than_top_k=True)),
    "int4": everywhere(Quantize(0, group_size=128)),
    "int4 and novices": (*NOVICES, *everywhere(Quantize(0, group_size=128))),
    "dropped": (*NOVICES[:1], DropMoE(1), DropBlock(2)),
}
# Sums of three layers in another order, each rounded to bfloat16; fp32 products there may take tensor cores' TF32.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 2e-3}
FORMS = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    with torch.no_grad(), use_kernels("auto"):
        yield


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    # Packed on the CPU, where int4 scales have the type of the model.
    return fill_new(packed_mixtral(MODELS[name], dtype=dtype, **SIZES)).to("cuda")


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, size, generator=torch.Generator().manual_seed(seed)).cuda()


def expected(model: Any, ids: Tensor) -> Tensor:
    """Return the logits behind the last token, without a cache and without kernels."""
    with use_kernels("off"):
        return model(input_ids=ids, use_cache=False).logits[:, -1]


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [1, 5, 70])
def test_says_what_torch_says(name: str, dtype: torch.dtype, number: int) -> None:
    model, ids = make_model(name, dtype), draw(BATCH, number)
    with use_kernels("off"):
        want = model(input_ids=ids, use_cache=False).logits
    with by_kernels() as found:
        got = model(input_ids=ids, use_cache=False).logits
    assert set(found) == {"block"}
    # Where numbers are rounded, a token whose second and third experts weigh the same may go the other way.
    near = relative_error(got, want) <= TOLERANCE[dtype]
    tokens = torch.linalg.vector_norm(got - want, dim=-1) <= TOLERANCE[dtype] * torch.linalg.vector_norm(want, dim=-1)
    assert near or tokens.float().mean() >= 0.9


class Step:
    """A decode step whose inputs stay in place."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        """Fill a static cache with a prompt."""
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=LONGEST)
        self.token = torch.empty(BATCH, 1, dtype=torch.int64, device="cuda")
        self.position = torch.full((1, 1), prompt.shape[1], dtype=torch.int64, device="cuda")
        positions = torch.arange(prompt.shape[1], device="cuda")[None]
        model(input_ids=prompt, position_ids=positions, past_key_values=self.cache)
        # Rows are places in the cache, columns too: nothing about lengths is decided while the graph is recorded.
        places = torch.arange(LONGEST, device="cuda")
        self.allowed = (places[None] <= places[:, None])[:, None, None]

    def __call__(self) -> Tensor:
        """Return the logits behind the token."""
        mask = self.allowed[self.position[0]]
        outputs = self.model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask=mask.expand(BATCH, -1, -1, -1),
            past_key_values=self.cache,
        )
        return outputs.logits[:, -1]


def recorded(step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Warm up beside the main stream, put the cache back, record, and return the graph with its result."""
    layers = step.cache.layers
    held = [[tensor.clone() for tensor in (layer.keys, layer.values, layer.cumulative_length)] for layer in layers]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.token.fill_(3)
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for layer, (keys, values, length) in zip(layers, held, strict=True):
        layer.keys.copy_(keys)
        layer.values.copy_(values)
        layer.cumulative_length.copy_(length)
    return graph, output


@FORMS
def test_a_recorded_decode_step_routes_anew(name: str) -> None:
    model, ids = make_model(name), draw(BATCH, PROMPT)
    step = Step(model, ids)
    with by_kernels() as found:
        graph, output = recorded(step)
    assert set(found) == {"block"}
    for number in range(STEPS):
        following = draw(BATCH, 1, seed=10 + number)
        ids = torch.cat([ids, following], dim=1)
        step.token.copy_(following)
        step.position.fill_(ids.shape[1] - 1)
        output.fill_(torch.nan)
        graph.replay()
        assert relative_error(output, expected(model, ids)) <= TOLERANCE[torch.float32], number


@FORMS
def test_generates_the_same_tokens(name: str) -> None:
    model, ids = make_model(name), draw(BATCH, PROMPT)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    with use_kernels("off"):
        want = model.generate(ids, **options)
    for cache in (None, "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **options), want)


def waits_for_nothing(run: Callable[[], object]) -> None:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@FORMS
def test_a_decode_step_waits_for_nothing(name: str) -> None:
    model = make_model(name)
    step = Step(model, draw(BATCH, PROMPT))
    step.token.fill_(5)
    step()
    torch.cuda.synchronize()
    waits_for_nothing(step)


@FORMS
def test_one_graph_for_the_compiler(name: str) -> None:
    model = make_model(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    model(input_ids=draw(1, 1), use_cache=False)
    for number in (3, 9):
        ids = draw(1, number)
        positions = torch.arange(number, device="cuda")[None]
        got = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -1]
        assert relative_error(got, expected(model, ids)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["dense", "int4 and novices"])
def test_gradients_are_those_of_torch(name: str) -> None:
    model = packed_mixtral([*MODELS[name], AddLora(0, rank=8)], **SIZES)
    model = fill_new(model).to("cuda")
    ids, found = draw(BATCH, 20), []
    for use in ("off", "auto"):
        trained = copy.deepcopy(model).train()
        with torch.enable_grad(), use_kernels(use):  # type: ignore[arg-type]
            trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({key: parameter.grad for key, parameter in trained.named_parameters()})
    for key, want in found[0].items():
        if want is not None and want.any():
            assert relative_error(found[1][key], want) <= 5e-3, key


def test_the_cache_of_generate_grows() -> None:
    """Steps with a cache that grows, the way of ``generate`` without options."""
    model, ids = make_model("int4 and novices"), draw(BATCH, PROMPT)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    for number in range(3):
        following = draw(BATCH, 1, seed=20 + number)
        ids = torch.cat([ids, following], dim=1)
        got = model(input_ids=following, past_key_values=cache).logits[:, -1]
        assert relative_error(got, expected(model, ids)) <= TOLERANCE[torch.float32]
