"""The sum over experts against numpy, against the untouched transformers module, and its laws."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import experts as kernels
from moe_kernels import mix_experts, mix_experts_by_loop
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tests.models import tiny_config

# Largest error, absolute for numbers below 1 and relative above.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}
BOTH = pytest.mark.parametrize("mix", [mix_experts, mix_experts_by_loop])


@dataclass
class Case:
    """Arguments of the functions under test; ``novices`` are the numbers of the experts that are novices."""

    hidden: Tensor
    index: Tensor
    weight: Tensor
    gate_up: Tensor
    down: Tensor
    slot_map: Tensor
    vectors: Tensor | None

    @property
    def arguments(self) -> tuple:
        return (self.hidden, self.index, self.weight, self.gate_up, self.down, self.slot_map, self.vectors, silu)

    def to(self, dtype: torch.dtype) -> "Case":
        vectors = None if self.vectors is None else self.vectors.to(dtype)
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(torch.promote_types(dtype, torch.float32)),
            gate_up=self.gate_up.to(dtype),
            down=self.down.to(dtype),
            vectors=vectors,
        )


def make_case(
    tokens: int = 13,
    experts: int = 6,
    top_k: int = 2,
    novices: tuple[int, ...] = (),
    hidden: int = 16,
    intermediate: int = 24,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    real = [expert for expert in range(experts) if expert not in novices]
    slot_map = torch.tensor([real.index(e) if e in real else -1 - novices.index(e) for e in range(experts)])
    order = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :top_k]
    weight = torch.rand(tokens, top_k, generator=draw)
    case = Case(
        hidden=torch.randn(tokens, hidden, generator=draw),
        index=order,
        weight=weight / weight.sum(1, keepdim=True),
        gate_up=torch.randn(len(real), 2 * intermediate, hidden, generator=draw) * hidden**-0.5,
        down=torch.randn(len(real), hidden, intermediate, generator=draw) * 2 * intermediate**-0.5,
        slot_map=slot_map,
        vectors=torch.randn(len(novices), hidden, generator=draw) if novices else None,
    )
    return case.to(dtype)


def in_numpy(case: Case) -> np.ndarray:
    """``y = sum_i g_i(x) E_i(x)`` in float64, from the equation."""
    hidden, weight, gate_up, down = (
        tensor.detach().double().numpy() for tensor in (case.hidden, case.weight, case.gate_up, case.down)
    )
    vectors = None if case.vectors is None else case.vectors.detach().double().numpy()
    result = np.zeros_like(hidden)
    half = gate_up.shape[1] // 2
    for token, row in enumerate(case.index.tolist()):
        for place, expert in enumerate(row):
            if not 0 <= expert < len(case.slot_map):
                continue
            slot = int(case.slot_map[expert])
            if slot >= 0:
                gate, up = gate_up[slot, :half] @ hidden[token], gate_up[slot, half:] @ hidden[token]
                output = down[slot] @ (gate / (1 + np.exp(-gate)) * up)
            else:
                assert vectors is not None
                output = vectors[-1 - slot]
            result[token] += weight[token, place] * output
    return result


def check(case: Case, mix=mix_experts) -> None:
    got = mix(*case.arguments)
    assert got.dtype == case.hidden.dtype and got.shape == case.hidden.shape
    tolerance = TOLERANCE[case.hidden.dtype]
    np.testing.assert_allclose(got.detach().double().numpy(), in_numpy(case), rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 6},
        {"novices": (1, 4)},
        {"novices": (0, 1, 2, 3, 4, 5), "top_k": 3},
        {"novices": (0, 1, 2, 3, 4), "top_k": 6},
        {"tokens": 0},
        {"tokens": 0, "novices": (2,)},
        {"tokens": 1},
        {"tokens": 1, "novices": (0, 5), "top_k": 6},
        {"experts": 1, "top_k": 1},
        {"hidden": 14, "intermediate": 9, "novices": (3,)},
    ],
    ids=str,
)
def test_equals_numpy(mix, dtype: torch.dtype, options: dict) -> None:
    check(make_case(**options, dtype=dtype), mix)


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_equals_the_untouched_transformers_module(mix, dtype: torch.dtype, top_k: int) -> None:
    config = tiny_config(hidden_size=16, intermediate_size=24, experts_implementation="eager")
    stock = MixtralExperts(config).to(dtype)
    case = make_case(top_k=top_k, dtype=dtype)
    with torch.no_grad():
        stock.gate_up_proj.copy_(case.gate_up)
        stock.down_proj.copy_(case.down)
        expected = stock(case.hidden, case.index, case.weight)
    torch.testing.assert_close(mix(*case.arguments), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize("expert", range(4))
def test_all_tokens_to_one_expert(mix, expert: int) -> None:
    case = make_case(experts=4, top_k=1, novices=(1, 3))
    check(replace(case, index=torch.full_like(case.index, expert)), mix)


@BOTH
def test_token_whose_experts_are_all_novices(mix) -> None:
    case = make_case(tokens=3, novices=(1, 4))
    case.index[1] = torch.tensor([4, 1])
    assert case.vectors is not None
    check(case, mix)
    by_hand = case.weight[1, 0] * case.vectors[1] + case.weight[1, 1] * case.vectors[0]
    torch.testing.assert_close(mix(*case.arguments)[1], by_hand)


@BOTH
@pytest.mark.parametrize("novices", [(), (0, 5)])
def test_numbers_out_of_range_mean_nobody(mix, novices: tuple[int, ...]) -> None:
    case = make_case(novices=novices, tokens=6)
    case.index[0] = torch.tensor([6, 2])
    case.index[1] = torch.tensor([6, 6])
    case.index[2] = torch.tensor([5, 6])
    check(case, mix)
    assert not mix(*case.arguments)[1].any()


@BOTH
def test_sentinel_equals_the_untouched_transformers_module(mix) -> None:
    stock = MixtralExperts(tiny_config(hidden_size=16, intermediate_size=24, experts_implementation="eager"))
    case = make_case()
    case.index[::2, 0] = 6
    with torch.no_grad():
        stock.gate_up_proj.copy_(case.gate_up)
        stock.down_proj.copy_(case.down)
        try:
            expected = stock(case.hidden, case.index, case.weight)
        except RuntimeError as error:  # it had no word for "nobody" then
            pytest.skip(
                f"the oracle of transformers {transformers.__version__} refuses the sentinel ({error}): update it"
            )
        torch.testing.assert_close(mix(*case.arguments), expected)


def test_the_grouped_product_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grouped = torch.nn.functional.grouped_mm
    monkeypatch.setattr(kernels, "cpu_product_pays", lambda *_: False)
    monkeypatch.setattr(kernels.F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped(*args, **kwargs))
    for dtype, expected in ((torch.float32, 2), (torch.bfloat16, 2), (torch.float64, 0)):
        calls.clear()
        check(make_case(dtype=dtype))
        assert len(calls) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_that_the_grouped_product_refuses(dtype: torch.dtype) -> None:
    check(make_case(hidden=10, intermediate=7, novices=(0,), dtype=dtype))
    case = make_case(dtype=dtype)
    check(replace(case, gate_up=case.gate_up.transpose(1, 2).contiguous().transpose(1, 2)))
    check(replace(case, down=case.down.transpose(1, 2).contiguous().transpose(1, 2)))
    padded = torch.zeros(*case.down.shape[:2], case.down.shape[2] + 1, dtype=dtype)
    padded[..., 1:] = case.down
    check(replace(case, down=padded[..., 1:]))
    check(replace(case, hidden=case.hidden.t().contiguous().t(), index=case.index.t().contiguous().t()))
    # Aligned strides at an address that is not.
    buffer = torch.empty(case.down.numel() + 1, dtype=dtype)
    shifted = buffer[1:].view_as(case.down)
    shifted.copy_(case.down)
    check(replace(case, down=shifted))


def leaves(case: Case) -> list[Tensor]:
    tensors = [case.hidden, case.weight, case.gate_up, case.down]
    return tensors if case.vectors is None else [*tensors, case.vectors]


def gradients(case: Case, mix, seed: int = 1) -> list[Tensor]:
    for tensor in leaves(case):
        tensor.requires_grad_(True)
    output = mix(*case.arguments)
    draw = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((output.double() * draw).sum(), leaves(case), allow_unused=True))


@BOTH
@pytest.mark.parametrize("novices", [(), (1, 3), (0, 1, 2, 3)])
def test_gradients_against_finite_differences(mix, novices: tuple[int, ...]) -> None:
    case = make_case(tokens=4, experts=4, novices=novices, hidden=3, intermediate=2, top_k=2, dtype=torch.float64)
    case.index[0] = torch.tensor([4, 1])
    inputs = [tensor.requires_grad_(True) for tensor in leaves(case) if tensor.numel()]

    def function(*_: Tensor) -> Tensor:
        return mix(*case.arguments)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unreached", [(), (0,), (2, 3), (5,), (0, 1, 2, 3)])
def test_gradients_of_the_grouped_path_equal_those_of_the_loop(dtype: torch.dtype, unreached: tuple[int, ...]) -> None:
    """Experts that no token reached get zeros, whatever was in memory before."""
    case = make_case(novices=(4,), dtype=dtype)
    for expert in unreached:
        case.index[case.index == expert] = 6
    exact = gradients(case.to(torch.float64), mix_experts_by_loop)
    # Rubbish in freed memory would show in gradients that are never written.
    rubbish = [torch.full_like(tensor, torch.nan) for tensor in leaves(case) for _ in range(3)]
    del rubbish
    for got, want in zip(gradients(case, mix_experts), exact, strict=True):
        scale = float(want.abs().max()) + 1
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale * 2)
    for expert in unreached:
        if expert != 4:
            assert not gradients(case, mix_experts)[3][int(case.slot_map[expert])].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_nothing_reached_have_zero_gradients_and_not_none(dtype: torch.dtype) -> None:
    case = make_case(novices=(0, 1), dtype=dtype)
    nobody = replace(case, index=torch.ones_like(case.index) * torch.tensor([0, 1]))
    nothing = replace(case, hidden=case.hidden[:0], index=case.index[:0], weight=case.weight[:0])
    for empty in (nobody, nothing):
        for gradient in gradients(empty, mix_experts)[2:4]:
            assert gradient is not None and not gradient.any()


cases = st.builds(
    make_case,
    tokens=st.integers(1, 9),
    experts=st.just(5),
    top_k=st.integers(1, 5),
    novices=st.sampled_from([(), (0,), (1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)]),
    hidden=st.sampled_from([8, 5]),
    intermediate=st.sampled_from([4, 3]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_any_case_equals_numpy(case: Case) -> None:
    check(case)


@settings(max_examples=25, deadline=None)
@given(case=cases, seed=st.integers(0, 1000))
def test_order_of_the_tokens_does_not_matter(case: Case, seed: int) -> None:
    order = torch.randperm(len(case.hidden), generator=torch.Generator().manual_seed(seed))
    shuffled = replace(case, hidden=case.hidden[order], index=case.index[order], weight=case.weight[order])
    tolerance = TOLERANCE[case.hidden.dtype]
    torch.testing.assert_close(
        mix_experts(*shuffled.arguments), mix_experts(*case.arguments)[order], rtol=0, atol=tolerance
    )


@settings(max_examples=25, deadline=None)
@given(case=cases, seed=st.integers(0, 1000))
def test_names_of_experts_slots_and_novices_do_not_matter(case: Case, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    experts, slots = len(case.slot_map), len(case.gate_up)
    novices = 0 if case.vectors is None else len(case.vectors)
    name, slot, novice = (torch.randperm(count, generator=draw) for count in (experts, slots, novices))
    place = torch.where(
        case.slot_map >= 0,
        torch.cat([slot, torch.zeros(1, dtype=torch.int64)])[case.slot_map.clamp(min=0, max=slots)],
        -1 - torch.cat([novice, torch.zeros(1, dtype=torch.int64)])[(-1 - case.slot_map).clamp(min=0, max=novices)],
    )
    slot_map = torch.empty_like(case.slot_map)
    slot_map[name] = place
    renamed = replace(
        case,
        index=name[case.index],
        slot_map=slot_map,
        gate_up=case.gate_up[slot.argsort()],
        down=case.down[slot.argsort()],
        vectors=None if case.vectors is None else case.vectors[novice.argsort()],
    )
    tolerance = TOLERANCE[case.hidden.dtype]
    torch.testing.assert_close(mix_experts(*renamed.arguments), mix_experts(*case.arguments), rtol=0, atol=tolerance)


def test_sorted_pairs_leave_out_novices_and_keep_the_order_of_tokens() -> None:
    index = torch.tensor([[2, 0], [1, 2], [3, 0], [4, 2]])
    pairs = kernels.sort_pairs(index, torch.tensor([1, -1, 0, 2]), 3)
    assert pairs.order.tolist() == [0, 3, 7, 1, 5, 4]
    assert pairs.offsets.tolist() == [3, 5, 6] and pairs.offsets.dtype == torch.int32
    assert pairs.tokens.tolist() == [0, 1, 3, 0, 2, 2]


def test_novices_weights() -> None:
    index, weight = torch.tensor([[1, 0], [2, 1], [4, 3]]), torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    table = kernels.novice_weights(index, weight, torch.tensor([0, -2, 1, -1]), 2)
    torch.testing.assert_close(table, torch.tensor([[0, 0.25], [0, 0.5], [0.1, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    """A traced F.grouped_mm knows bf16 only: other types must take another way."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    index = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]])
    weight = torch.rand(5, 2, generator=generator)
    slot_map = torch.tensor([0, -1, 1, kernels.ABSENT])
    maps = kernels.NoviceMaps(draw(3, 16), draw(3, 16), torch.zeros(3, dtype=torch.int64))
    arguments = (draw(5, 16), index, weight, draw(2, 16, 16), draw(2, 16, 8), slot_map, draw(1, 16))
    compiled = torch.compile(mix_experts, backend="aot_eager")
    got = compiled(*arguments, torch.nn.functional.silu, maps, draw(2, 16) * 0)
    expected = mix_experts(*arguments, torch.nn.functional.silu, maps)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        mix_experts_by_loop(*arguments, torch.nn.functional.silu, maps), expected, rtol=2e-2, atol=2e-2
    )
