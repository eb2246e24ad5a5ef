"""A layer in memory that methods can be shown: experts or attention with a few tokens."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lightning.slimming.view import MomentKind, Target
from tests.slimming.problems import inputs_of, weights

Inputs = Callable[[dict[str, Tensor]], dict[str, list[Tensor]]]


class LayerInMemory:
    """Implements LayerView by keeping all tokens.

    Args:
        target: Which matrices they are.
        stacks: Name and weights, in the order of the data flow.
        inputs: From weights to the tokens ``[n, I]`` that each matrix of each stack receives.
        gates: Routing weight of each token of each slot.
        norm, router, novice_in: The parameters beside them.
        at_once: Slots whose moments fit into memory.
    """

    def __init__(
        self,
        target: Target,
        stacks: dict[str, Tensor],
        inputs: Inputs,
        gates: list[Tensor],
        *,
        norm: Tensor,
        router: Tensor | None = None,
        novice_in: Tensor | None = None,
        masks: dict[str, Tensor] | None = None,
        at_once: int = 100,
        min_tokens: int = 0,
        use_fallback: bool = False,
    ) -> None:
        self.target = target
        self.stacks = stacks
        self.now = dict(stacks)
        self.inputs = inputs
        self.gates = gates
        self.norm_weight, self.router_weight, self.novice_in = norm, router, novice_in
        self.masks = masks or {}
        self.at_once = at_once
        self.use_fallback = use_fallback
        self.min_tokens = min_tokens
        self.layer = 3
        self.passes: list[tuple[str, tuple[int, ...]]] = []

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(self.stacks)

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([len(gate) for gate in self.gates])

    @property
    def starved(self) -> Tensor:
        return self.tokens < self.min_tokens

    def weight(self, name: str) -> Tensor:
        return self.stacks[name]

    def keep(self, name: str) -> Tensor | None:
        return self.masks.get(name)

    def groups(self, name: str, kind: MomentKind) -> list[list[int]]:
        slots = list(range(len(self.stacks[name])))
        size = self.at_once if kind == "full" else len(slots)
        return [slots[first : first + size] for first in range(0, len(slots), size)]

    def moments(self, name: str, kind: MomentKind, slots: Sequence[int], *, gated: bool = False) -> Tensor:
        self.passes.append((name, tuple(slots)))
        tokens = self.inputs(self.now)[name]
        found = []
        for slot in slots:
            x = tokens[slot] * self.gates[slot][:, None] if gated else tokens[slot]
            if self.use_fallback and bool(self.starved[slot]):
                x = x[:0]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            found.append(x.mT @ x if kind == "full" else x.square().sum(0))
        return torch.stack(found)

    def replace(self, name: str, weight_SOI: Tensor) -> None:
        assert weight_SOI.shape == self.now[name].shape
        self.now[name] = weight_SOI


def expert_tokens(slots: int, hidden: int, tokens: int, empty: Sequence[int] = ()) -> list[Tensor]:
    """Return the tokens that reach each expert: correlated inputs, of different number."""
    found = list(inputs_of(slots, tokens, hidden))
    return [x[: 0 if slot in empty else tokens - slot] for slot, x in enumerate(found)]


def experts_layer(
    slots: int = 3,
    hidden: int = 32,
    width: int = 16,
    tokens: int = 80,
    dtype: torch.dtype = torch.float64,
    counts: Sequence[int] | None = None,
    **options: object,
) -> LayerInMemory:
    """Return a layer of gated experts, with a router and low-rank maps beside them."""
    stacks = {
        "gate_up_proj": weights(slots, 2 * width, hidden, seed=1).to(dtype) / hidden**0.5,
        "down_proj": weights(slots, hidden, width, seed=2).to(dtype) / width**0.5,
    }
    seen = [x.to(dtype) for x in expert_tokens(slots, hidden, tokens)]
    if counts is not None:
        seen = [x[:count] for x, count in zip(seen, counts, strict=True)]

    def inputs(now: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        inner = []
        for x, matrix in zip(seen, now["gate_up_proj"], strict=True):
            gate, up = (x @ matrix.mT).chunk(2, -1)
            inner.append(torch.nn.functional.silu(gate) * up)
        return {"gate_up_proj": seen, "down_proj": inner}

    generator = torch.Generator().manual_seed(5)
    gates = [torch.rand(len(x), dtype=dtype, generator=generator) for x in seen]
    parts = {
        "norm": weights(1, 1, hidden, seed=3)[0, 0].to(dtype),
        "router": weights(1, slots + 2, hidden, seed=4)[0].to(dtype),
        "novice_in": weights(1, 4, hidden, seed=6)[0].to(dtype),
    }
    return LayerInMemory("experts", stacks, inputs, gates, **{**parts, **options})  # type: ignore[arg-type]


def attention_layer(hidden: int = 32, values: int = 32, tokens: int = 60, **options: object) -> LayerInMemory:
    """Return a layer of attention whose o reads what v makes, each token for itself."""
    stacks = {
        "q_proj": weights(1, 32, hidden, seed=1),
        "k_proj": weights(1, values, hidden, seed=2),
        "v_proj": weights(1, values, hidden, seed=3),
        "o_proj": weights(1, hidden, 32, seed=4),
    }
    seen = inputs_of(1, tokens, hidden)[0]

    def inputs(now: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        made = seen @ now["v_proj"][0].mT
        return {
            "q_proj": [seen],
            "k_proj": [seen],
            "v_proj": [seen],
            "o_proj": [made.repeat_interleave(32 // values, -1)],
        }

    norm = weights(1, 1, hidden, seed=5)[0, 0]
    return LayerInMemory("attention", stacks, inputs, [torch.ones(tokens).double()], norm=norm, **options)  # type: ignore[arg-type]
