"""The load-balancing loss against its formula in numpy and against transformers' own."""

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_lightning.experts import load_balancing_loss


def in_numpy(logits: np.ndarray, top_k: int, keep: np.ndarray) -> float:
    logits = logits[keep]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.argsort(-logits, 1)[:, :top_k]
    experts = logits.shape[1]
    load = np.array([(chosen == expert).sum() / len(logits) for expert in range(experts)])
    return experts / top_k * (load * probability.mean(0)).sum()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_the_formula_with_a_different_number_of_experts_in_each_layer(top_k: int, padded: bool) -> None:
    layers = [torch.randn(12, experts, dtype=torch.float64) for experts in (4, 7, 5)]
    mask = (torch.arange(12).view(2, 6) % 4 != 0).long() if padded else None
    keep = mask.reshape(-1).bool().numpy() if mask is not None else np.ones(12, bool)
    expected = np.mean([in_numpy(layer.numpy(), top_k, keep) for layer in layers])
    assert float(load_balancing_loss(layers, top_k, mask)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_layer_equals_transformers_up_to_top_k(top_k: int) -> None:
    logits = torch.randn(40, 6)
    ours = load_balancing_loss([logits], top_k)
    assert float(ours * top_k) == pytest.approx(float(load_balancing_loss_func((logits,), 6, top_k)), rel=1e-6)


def test_even_load_gives_one_and_a_collapsed_router_more() -> None:
    even = torch.eye(8).repeat(5, 1) * 1e-4
    assert float(load_balancing_loss([even], 1)) == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.tensor([9.0, 9.0] + [0.0] * 6).repeat(40, 1)
    assert float(load_balancing_loss([collapsed], 2)) == pytest.approx(4.0, rel=1e-2)


def test_fewer_experts_than_top_k() -> None:
    assert float(load_balancing_loss([torch.zeros(9, 2)], 4)) == pytest.approx(1.0)


def test_gradient_evens_out_the_load() -> None:
    logits = torch.randn(50, 4).add_(torch.tensor([2.0, 0, 0, 0])).requires_grad_(True)
    load_balancing_loss([logits], 1).backward()
    assert logits.grad is not None
    assert logits.grad[:, 0].sum() > 0 > logits.grad[:, 1:].sum()


def test_no_layer_has_nothing_to_balance() -> None:
    assert load_balancing_loss([], 2) == 0
