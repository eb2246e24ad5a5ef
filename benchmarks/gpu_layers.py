"""What `gpu.py` times: layers with random weights and inputs that choose the experts they shall, and the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from moe_kernels import dequantize_int4
from moe_kernels.packing import Packed24, pack_int4, unpack_24
from torch import Tensor
from torch.nn.functional import linear, silu

if TYPE_CHECKING:  # not before it is needed: layers are made on CPUs without triton, too
    from moe_kernels.triton_kernels.int4_layout import Int4Tiles

EXPERTS, TOP_K, SETS = 8, 2, 4
TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
ROUTINGS = ("uniform", "skewed", "one expert")
"""Each expert alike; the r-th most popular ``1 / r`` times as often; the same first choice for all, a real expert."""

FORMATS = {
    "bf16": ("dense", 0),
    "novices 25 %": ("dense", 2),
    "novices 50 %": ("dense", 4),
    "int4": ("int4", 0),
    "int4 + novices 50 %": ("int4", 4),
    "2:4": ("sparse24", 0),
}
"""Form of the weights, and how many of eight experts are novices."""

THEIRS = {"eager": 8192, "grouped_mm": 8192, "batched_mm": 16}
"""transformers' implementations, up to how many tokens: batched_mm copies the weights of each token's experts."""


@dataclass(frozen=True)
class Sizes:
    """What is timed where.

    Attributes:
        device: ``cuda`` or ``cpu``.
        dtype: Of activations and dense weights.
        hidden: H.
        inner: I.
        group: Inputs of an int4 group.
        tokens: Numbers of tokens.
        product: Rows of the large product.
        copied: Bytes of the copy.
        seconds: Time of one measurement.
        steps: Numbers of tokens of a training step.
    """

    device: str
    dtype: torch.dtype
    hidden: int
    inner: int
    group: int
    tokens: tuple[int, ...]
    product: int
    copied: int
    seconds: float
    steps: tuple[int, ...]


GPU = Sizes("cuda", torch.bfloat16, 4096, 14336, 128, TOKENS, 8192, 2**31, 0.2, (512, 2048))
DRY = Sizes("cpu", torch.float32, 64, 64, 64, (1, 66), 64, 2**12, 0.0, (3,))


class Weights:
    """One set of random weights in every form."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        """Draw them."""
        self.sizes = sizes
        self._draw = torch.Generator(sizes.device).manual_seed(seed)
        self.router = self._normal(EXPERTS, sizes.hidden, scale=sizes.hidden**-0.5)
        self.novices = self._normal(EXPERTS, sizes.hidden, scale=0.1)
        shapes = [(2 * sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)]
        self.dense = [self._normal(EXPERTS, *shape, scale=shape[1] ** -0.5) for shape in shapes]
        self.stored = [self._int4(*shape) for shape in shapes]

    @cached_property
    def tiles(self) -> list[Int4Tiles]:
        """The same int4 weights in the layout of the kernels."""
        from moe_kernels.triton_kernels.int4_layout import to_tiles

        sizes = (self.sizes.hidden, self.sizes.inner)
        with torch.inference_mode(False):  # training steps take them, too
            return [to_tiles(*stored, inputs) for stored, inputs in zip(self.stored, sizes, strict=True)]

    @cached_property
    def sparse(self) -> list[Packed24]:
        """Other weights with the pattern 2:4, as they are stored and as the kernels read them."""
        shapes = [(2 * self.sizes.inner, self.sizes.hidden), (self.sizes.hidden, self.sizes.inner)]
        with torch.inference_mode(False):
            return [self._sparse24(*shape) for shape in shapes]

    def _normal(self, *size: int, scale: float) -> Tensor:
        numbers = torch.randn(size, generator=self._draw, device=self.sizes.device, dtype=self.sizes.dtype)
        return numbers.mul_(scale)

    def _int4(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        def integers(least: int, end: int, *size: int, dtype: torch.dtype) -> Tensor:
            return torch.randint(
                least, end, (EXPERTS, outputs, *size), generator=self._draw, device=self.sizes.device, dtype=dtype
            )

        groups = inputs // self.sizes.group
        words = integers(-(2**31), 2**31, inputs // 8, dtype=torch.int32)
        zero = integers(6, 10, groups, dtype=torch.uint8)
        # Codes spread by 4.6 around their zero.
        scale = (0.8 + 0.4 * integers(0, 100, groups, dtype=torch.int32) / 100) * inputs**-0.5 / 4.6
        return words, scale.bfloat16(), pack_int4(zero, torch.uint8)

    def _sparse24(self, outputs: int, inputs: int) -> Packed24:
        values = self._normal(EXPERTS, outputs, inputs // 2, scale=(inputs / 2) ** -0.5)
        # Both places of a group of four, the lower one in the lower bits; two groups a byte.
        pairs = torch.tensor([low | high << 2 for high in range(4) for low in range(high)], dtype=torch.uint8)
        nibbles = torch.cartesian_prod(pairs, pairs).to(self.sizes.device)
        drawn = torch.randint(
            0, 36, (EXPERTS, outputs, inputs // 8), generator=self._draw, device=self.sizes.device, dtype=torch.int32
        )
        return Packed24(values, (nibbles[:, 0] | nibbles[:, 1] << 4)[drawn])

    def for_kernels(self, form: str, real: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights of the first experts as the kernels take them."""
        if form == "dense":
            return [self.dense[0][:real]], [self.dense[1][:real]]
        if form == "sparse24":
            gate_up, down = ([packed.values[:real], packed.metadata[:real]] for packed in self.sparse)
            return gate_up, down
        gate_up, down = ([tiles.words_SGOW[:real], tiles.pairs_SGO[:real]] for tiles in self.tiles)
        return gate_up, down

    def in_float32(self, form: str, expert: int) -> tuple[Tensor, Tensor]:
        """Return the matrices of an expert, from what is stored and not from the kernels' layout."""
        if form == "dense":
            return self.dense[0][expert].float(), self.dense[1][expert].float()
        if form == "sparse24":
            gate_up, down = (unpack_24(Packed24(*(part[expert] for part in packed))).float() for packed in self.sparse)
            return gate_up, down
        sizes = (self.sizes.hidden, self.sizes.inner)
        gate_up, down = (
            dequantize_int4(words[expert], scale[expert], zero[expert], inputs, torch.float32)
            for (words, scale, zero), inputs in zip(self.stored, sizes, strict=True)
        )
        return gate_up, down


@dataclass
class Call:
    """One layer call: a set of weights, and an input whose tokens choose the experts that they shall."""

    weights: Weights
    hidden: Tensor

    @cached_property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """Experts and routing weights in plain torch, from the same logits as everybody's, ``[N, K]``."""
        logits = linear(self.hidden, self.weights.router).float()
        weight, index = logits.softmax(-1).topk(TOP_K)
        return index, weight / weight.sum(-1, keepdim=True)

    def oracle(self, form: str, real: int) -> Tensor:
        """Compute the layer expert by expert in float32."""
        (index, weight), hidden = self.chosen, self.hidden.float()
        result = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            tokens, place = (index == expert).nonzero(as_tuple=True)
            if not tokens.shape[0]:
                continue
            if expert < real:
                gate_up, down = self.weights.in_float32(form, expert)
                gate, up = (hidden[tokens] @ gate_up.T).chunk(2, -1)
                output = (silu(gate) * up) @ down.T
            else:
                output = self.weights.novices[expert - real].float().expand(tokens.shape[0], -1)
            result.index_add_(0, tokens, output * weight[tokens, place, None])
        return result

    def floor(self, form: str, real: int, ceilings: dict[str, float]) -> tuple[float, str]:
        """Return the least seconds that the ceilings allow, and what decides about them."""
        sizes, index = self.weights.sizes, self.chosen[0]
        of_real = index[index < real]
        weights = 3 * sizes.hidden * sizes.inner
        # int4: four bits, and for each group a scale of 16 and a zero of 4; the kernels' pairs take 12 bits more. 2:4:
        # half of the weights, and a bit for each.
        dense = sizes.dtype.itemsize
        each = {"dense": dense, "int4": 0.5 + 2.5 / sizes.group, "sparse24": dense / 2 + 1 / 8}[form]
        moved = of_real.unique().numel() * weights * each + 2 * self.hidden.numel() * sizes.dtype.itemsize
        by_bytes = moved / ceilings["bytes_per_second"]
        by_flops = 2 * of_real.numel() * weights / ceilings["flops_per_second"]
        return max(by_bytes, by_flops), "bytes" if by_bytes >= by_flops else "operations"


def make_call(weights: Weights, tokens: int, routing: str, seed: int) -> Call:
    """Draw an input whose tokens choose experts as the routing says."""
    sizes = weights.sizes
    draw = torch.Generator().manual_seed(seed)
    popularity = torch.ones(EXPERTS)
    if routing == "skewed":
        popularity = 1 / (1 + torch.randperm(EXPERTS, generator=draw))
    index = torch.multinomial(popularity.expand(tokens, -1), TOP_K, generator=draw)
    if routing == "one expert":
        index[:, 1] = torch.where(index[:, 1] == 0, index[:, 0], index[:, 1])
        index[:, 0] = 0
    logits = 0.5 * torch.rand(tokens, EXPERTS, generator=draw)
    logits.scatter_add_(1, index, torch.tensor([[3.0, 2.0]]).expand(tokens, -1))
    hidden = torch.randn(tokens, sizes.hidden, generator=draw).to(sizes.device)
    # The smallest change of a random input that gives these logits.
    router = weights.router.float()
    missing = logits.to(sizes.device) - hidden @ router.T
    hidden = hidden + missing @ torch.linalg.inv(router @ router.T) @ router
    return Call(weights, hidden.to(sizes.dtype))


def ours(call: Call, form: str, real: int) -> Callable[[], Tensor]:
    """Return the layer as one operation of ours."""
    from moe_kernels.triton_kernels.block import moe_block_op

    places = [*range(real), *(-1 - number for number in range(EXPERTS - real))]
    slot_map = torch.tensor(places, device=call.hidden.device)
    novices = [call.weights.novices[: EXPERTS - real]] if real < EXPERTS else []
    gate_up, down = call.weights.for_kernels(form, real)
    return lambda: moe_block_op(call.hidden, call.weights.router, TOP_K, True, slot_map, gate_up, down, novices)[0]


def mixtral_block(weights: Weights, implementation: str) -> torch.nn.Module:
    """Return transformers' block with weights of ours, which has the router too."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=weights.sizes.hidden,
        intermediate_size=weights.sizes.inner,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config).eval()
    block.gate.weight = torch.nn.Parameter(weights.router, requires_grad=False)
    block.experts.gate_up_proj, block.experts.down_proj = (
        torch.nn.Parameter(weight, requires_grad=False) for weight in weights.dense
    )
    return block


def transformers_block(weights: Weights, implementation: str) -> Callable[[Tensor], Tensor]:
    """Return transformers' block as a function of its input ``[N, H]``."""
    block = mixtral_block(weights, implementation)
    return lambda hidden: block(hidden[None])[0]
