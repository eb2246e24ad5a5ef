"""Divergences against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lightning import divergence
from moe_lightning.divergence import kl_divergence, top1_agreement


def logits(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_hand(teacher: Tensor, student: Tensor) -> np.ndarray:
    p, q = (np.exp(tensor.double().numpy()) for tensor in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 64, 2**21])
def test_equals_the_formula(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_CHUNK", chunk)
    teacher, student = logits(3, 5, 19, dtype=dtype), logits(3, 5, 19, seed=1, dtype=dtype)
    got = kl_divergence(teacher, student)
    assert got.shape == (3, 5) and got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), by_hand(teacher, student), rtol=1e-10)
    agree = top1_agreement(teacher, student)
    assert torch.equal(agree, teacher.argmax(-1) == student.argmax(-1)) and agree.any() and not agree.all()


def test_a_tiny_divergence_keeps_its_digits() -> None:
    teacher = logits(50, 500)
    student = teacher + 1e-4 * logits(50, 500, seed=1)
    want = by_hand(teacher, student)
    assert want.max() < 1e-6
    np.testing.assert_allclose(kl_divergence(teacher, student).numpy(), want, rtol=1e-6)


def test_shift_does_not_matter_and_equal_is_zero() -> None:
    teacher = logits(4, 9, dtype=torch.float64)
    assert float(kl_divergence(teacher, teacher).abs().max()) == 0
    assert float(kl_divergence(teacher, teacher + 7).abs().max()) < 1e-14


def test_forbidden_words() -> None:
    teacher, student = logits(2, 6), logits(2, 6, seed=1)
    teacher[:, 2] = student[:, 2] = -torch.inf
    left = [word for word in range(6) if word != 2]
    np.testing.assert_allclose(kl_divergence(teacher, student), by_hand(teacher[:, left], student[:, left]))
    student[:, 2] = 0.0
    assert torch.isfinite(kl_divergence(teacher, student)).all()
    assert torch.isinf(kl_divergence(student, teacher)).all()


def test_nothing_and_what_does_not_fit() -> None:
    assert kl_divergence(logits(0, 7), logits(0, 7)).shape == (0,)
    assert top1_agreement(logits(0, 7), logits(0, 7)).shape == (0,)
    for function in (kl_divergence, top1_agreement):
        with pytest.raises(ValueError, match="do not fit"):
            function(logits(3, 7), logits(1, 7))
