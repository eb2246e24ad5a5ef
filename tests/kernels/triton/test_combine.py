"""The sum over chosen experts against the oracle of the package, against its twin and in its properties."""

import pytest
import torch

pytest.importorskip("triton", reason="these are tests of Triton kernels, and triton is not installed")

from moe_kernels.experts import ABSENT, NoviceMaps, mix_experts_by_loop
from moe_kernels.triton_kernels.combine import combine, combine_twin
from torch import Tensor
from torch.nn.functional import silu

from tests.kernels.triton.problems import DTYPES, TOLERANCE, relative_error, routing_problem

HIDDEN = 40


def make_parts(
    index: Tensor, weight: Tensor, slot_map: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, splits: int
) -> tuple[Tensor, Tensor]:
    """Return what the down projection writes, NaN where it writes nothing, and the table of slots."""
    slot = torch.where(index < len(slot_map), slot_map[index.clamp(max=len(slot_map) - 1)], ABSENT)
    parts = torch.full((splits, *index.shape, hidden.shape[1]), torch.nan)
    for token, row in enumerate(slot.tolist()):
        for place, number in enumerate(row):
            if number >= 0:
                gate, up = (gate_up[number] @ hidden[token]).chunk(2)
                output = weight[token, place] * (down[number] @ (silu(gate) * up))
                shares = torch.randn(splits - 1, len(output))
                parts[:-1, token, place] = shares
                parts[-1, token, place] = output - shares.sum(0)
    return parts, slot.int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "novices", "ranks", "biased", "residual"),
    [
        (1, 1, (), 0, False, False),
        (5, 2, (1, 4), 0, True, True),
        (19, 2, (0, 3), 5, True, False),
        (16, 8, (0, 1, 2, 3, 4, 5, 6, 7), 33, False, True),
        (3, 3, (2,), 2, False, False),
    ],
)
def test_equals_the_oracle(
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    novices: tuple[int, ...],
    ranks: int,
    biased: bool,
    residual: bool,
    device: str,
) -> None:
    index, weight, slot_map = routing_problem(tokens, 8, top_k, novices)
    if novices == (2,):
        slot_map[slot_map == 6] = ABSENT  # two that contribute nothing: an absent expert, and nobody
        index[0, 0] = 8
    real = 8 - len(novices)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    gate_up, down = torch.randn(real, 16, HIDDEN) / 6, torch.randn(real, HIDDEN, 8) / 3
    vectors = torch.randn(len(novices), HIDDEN).to(dtype) if novices else None
    maps = None
    if ranks:
        owners = torch.randint(0, len(novices), (ranks,))
        maps = NoviceMaps(torch.randn(ranks, HIDDEN).to(dtype) / 6, torch.randn(ranks, HIDDEN).to(dtype), owners)
    bias = torch.randn(real, HIDDEN).to(dtype) if biased else None
    extra = torch.randn(tokens, HIDDEN).to(dtype) if residual else None
    parts, slot = make_parts(index, weight, slot_map, hidden.float(), gate_up, down, splits=3)

    def moved(value):
        if isinstance(value, NoviceMaps):
            return NoviceMaps(*(tensor.to(device) for tensor in value))
        return None if value is None else value.to(device)

    arguments = [moved(value) for value in (parts, slot, weight, hidden, vectors, maps, bias, extra)]
    got = combine(*arguments)
    assert got.dtype == dtype
    wide = [None if v is None else v.double() for v in (hidden, weight, gate_up, down, vectors, bias, extra)]
    wide_maps = NoviceMaps(maps.in_RH.double(), maps.out_RH.double(), maps.novice_R) if maps else None
    want = mix_experts_by_loop(wide[0], index, wide[1], wide[2], wide[3], slot_map, wide[4], silu, wide_maps, wide[5])
    want = want if extra is None else want + wide[6]
    assert relative_error(combine_twin(*arguments), want) < 2e-6
    assert relative_error(got, want) <= TOLERANCE[dtype]


def test_the_same_bits_every_time_and_for_any_company(device: str) -> None:
    """A token's result does not depend on what other tokens there are, nor on their order."""
    index, weight, _ = routing_problem(20, 6, 2)
    parts = torch.randn(2, 20, 2, HIDDEN, device=device)
    slot, weight = index.int().to(device), weight.to(device)
    hidden = torch.zeros(20, HIDDEN, device=device)
    all_of_them = combine(parts, slot, weight, hidden)
    assert torch.equal(all_of_them, combine(parts, slot, weight, hidden))
    order = torch.randperm(20, device=device)
    shuffled = combine(parts[:, order].contiguous(), slot[order], weight[order], hidden)
    assert torch.equal(shuffled, all_of_them[order])
    assert torch.equal(combine(parts[:, 3:4].contiguous(), slot[3:4], weight[3:4], hidden[3:4])[0], all_of_them[3])


def test_no_tokens(device: str) -> None:
    empty = combine(
        torch.empty(4, 0, 2, HIDDEN, device=device),
        torch.empty(0, 2, dtype=torch.int32, device=device),
        torch.empty(0, 2, device=device),
        torch.empty(0, HIDDEN, device=device),
    )
    assert empty.shape == (0, HIDDEN)
