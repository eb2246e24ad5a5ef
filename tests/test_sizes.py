"""Sizes: the numbers of the papers' models, and counts in real tensors."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import CompressionPlan, KeepExperts, NoviceExperts
from moe_lightning.sizes import data_size
from moe_lightning.surgery import build
from tests.models import random_batches, tiny_config, tiny_mixtral

SEQUENCE = 2048
LAYERS, HIDDEN, INTERMEDIATE, TOP_K = 32, 4096, 14336, 2
EXPERT = 3 * HIDDEN * INTERMEDIATE


def mixtral_8x7b(plan: CompressionPlan | None = None) -> Any:
    with torch.device("meta"):
        return build(MixtralConfig(dtype="bfloat16"), plan).to(torch.bfloat16)


def flops_by_hand(rows: int, novices: int, picks: float) -> float:
    """Two for each multiply-add of one sequence through Mixtral-8x7B."""
    attention = HIDDEN * (32 + 8 + 8 + 32) * 128
    products = LAYERS * (attention + rows * HIDDEN + novices * HIDDEN + picks * EXPERT) + 32_000 * HIDDEN
    return 2 * SEQUENCE * products + LAYERS * 4 * SEQUENCE**2 * HIDDEN


@pytest.fixture(scope="module")
def base() -> Any:
    return mixtral_8x7b()


@pytest.fixture(scope="module")
def expert_drop() -> Any:
    return mixtral_8x7b(CompressionPlan(tuple(KeepExperts(layer, (0, 2, 3, 4, 5, 7)) for layer in range(LAYERS))))


@pytest.fixture(scope="module")
def novices() -> Any:
    return mixtral_8x7b(CompressionPlan(tuple(NoviceExperts(layer, (1, 6)) for layer in range(LAYERS))))


def test_mixtral_8x7b(base: Any) -> None:
    size = ml.measure(base, SEQUENCE)
    assert size.parameters == 46_702_792_704
    assert round(size.bytes / 2**30, 2) == 86.99
    assert round(size.flops / 1e12, 2) == 54.42
    assert size.flops == flops_by_hand(8, 0, TOP_K)
    assert architecture_of(base).shape(base).parameters == size.parameters


def test_mixtral_8x7b_without_a_quarter_of_its_experts(expert_drop: Any) -> None:
    size = ml.measure(expert_drop, SEQUENCE)
    assert size.parameters == 35_428_241_408
    assert round(size.bytes / 2**30, 2) == 65.99
    assert size.flops == flops_by_hand(6, 0, TOP_K)


def test_mixtral_8x7b_with_a_quarter_of_its_experts_as_novices(novices: Any) -> None:
    size = ml.measure(novices, SEQUENCE)
    assert size.parameters == 35_428_765_696
    assert round(size.bytes / 2**30, 2) == 65.99
    assert size.flops == flops_by_hand(8, 2, TOP_K)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_routed_share(novices: Any, share: float) -> None:
    """Of the routed pairs a share goes to novices, whose vectors cost next to nothing."""
    expected = flops_by_hand(8, 2, TOP_K * (1 - share))
    assert ml.measure(novices, SEQUENCE, share).flops == round(expected)
    assert ml.measure(novices, SEQUENCE, [share] * LAYERS).flops == round(expected)
    mixed = [share] * 16 + [0.5] * 16
    half = flops_by_hand(8, 2, TOP_K * 0.5)
    assert ml.measure(novices, SEQUENCE, mixed).flops == pytest.approx((expected + half) / 2, rel=1e-12)


def test_bad_shares_are_an_error(novices: Any) -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="routed_share"):
            ml.measure(novices, SEQUENCE, share)
    with pytest.raises(ValueError, match=r"routed_share has 3 entries.*32"):
        ml.measure(novices, SEQUENCE, [0.1] * 3)


def test_other_lengths_and_defaults(base: Any) -> None:
    assert ml.measure(base) == ml.measure(base, SEQUENCE)
    short = ml.measure(base, 1).flops
    assert short == 2 * (LAYERS * (HIDDEN * 80 * 128 + 8 * HIDDEN + 2 * EXPERT) + 32_000 * HIDDEN) + LAYERS * 4 * HIDDEN


@pytest.mark.parametrize("keep", [0, 1])
def test_fewer_real_experts_than_the_router_picks_bound_the_flops(keep: int) -> None:
    model = tiny_mixtral(num_experts_per_tok=3)
    before = ml.measure(model, 16)
    ml.compress(model, random_batches(1), ml.Novices(keep=keep, novice="zero", criterion="random"), progress=False)
    after = ml.measure(model, 16)
    one = 2 * 16 * 3 * 32 * 48
    vectors = 2 * 16 * (6 - keep) * 32
    assert before.flops - after.flops == 3 * ((3 - keep) * one - vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [None, ml.Novices(ratio=0.5), ml.ExpertDrop(keep=3)])
def test_parameters_and_bytes_equal_those_counted(dtype: torch.dtype, tied: bool, method: Any) -> None:
    model = tiny_mixtral(dtype=dtype, tie_word_embeddings=tied, experts_implementation="eager")
    if method is not None:
        ml.compress(model, random_batches(1), method, progress=False)
    size = ml.measure(model)
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size.bytes == size.parameters * torch.empty((), dtype=dtype).element_size()


def test_the_head_dimension_of_the_config_counts() -> None:
    with torch.device("meta"):
        model = build(tiny_config(head_dim=24, num_hidden_layers=1))
    counted = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    experts = 6 * 3 * 32 * 48
    products = counted - experts + 2 * 3 * 32 * 48
    assert ml.measure(model, 8).flops == 2 * 8 * products + 4 * 8 * 8 * 4 * 24


def test_not_a_mixtral_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a transformers model"):
        ml.measure(torch.nn.Linear(2, 2))


def test_reads_well() -> None:
    assert str(ml.ModelSize(46_702_792_704, 93 * 2**20, 54_420_000_000)) == (
        "46,702,792,704 parameters, 93.0 MiB, 54.42 GFLOP a sequence"
    )


def test_sizes_in_the_unit_that_suits() -> None:
    assert [data_size(count) for count in (1 << 19, 9471504, (1 << 30) - 1, 5 << 28)] == [
        *("0.5 MiB", "9.0 MiB", "1,024.0 MiB", "1.25 GiB"),
    ]
