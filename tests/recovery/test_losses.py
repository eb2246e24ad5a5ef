"""The losses against closed forms in numpy's float64, and gradients against naive formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lightning.recovery import hidden_error, kl_to_teacher, kl_to_top_words, next_token_loss

N, V = 7, 11


def numbers(seed: int, *size: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*size, generator=generator, dtype=torch.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Return the mean KL divergence of rows of probabilities; 0 log 0 is 0."""
    total = 0.0
    for p, q in zip(teacher.reshape(-1), student.reshape(-1), strict=True):
        total += p * (np.log(p) - np.log(q)) if p > 0 else 0.0
    return total / len(teacher)


def cut(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is left of predictions, by sorting in numpy."""
    probability = softmax(logits.double().numpy() / temperature)
    words = np.argsort(-probability, -1, kind="stable")[:, :top_k]
    kept = np.take_along_axis(probability, words, -1)
    others = [np.delete(row, places).sum() for row, places in zip(probability, words, strict=True)]
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(kept)), torch.from_numpy(words), torch.from_numpy(np.log(others))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_divergence_from_logits(temperature: float) -> None:
    student, teacher = numbers(0, N, V), numbers(1, N, V)
    parts = (softmax(logits.numpy() / temperature) for logits in (teacher, student))
    expected = temperature**2 * divergence(*parts)
    assert float(kl_to_teacher(student, teacher, temperature)) == pytest.approx(expected, rel=1e-12)
    assert float(kl_to_teacher(student.float(), teacher.float(), temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_to_teacher(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradient_of_the_divergence(temperature: float) -> None:
    student, teacher = numbers(0, N, V).requires_grad_(), numbers(1, N, V).requires_grad_()
    kl_to_teacher(student, teacher, temperature).backward()
    assert teacher.grad is None
    # d/dx tau^2 KL = tau (q - p): of the size that it has at tau 1.
    q, p = (softmax(logits.detach().numpy() / temperature) for logits in (student, teacher))
    np.testing.assert_allclose(student.grad, temperature * (q - p) / N, rtol=1e-10, atol=1e-14)

    naive = student.detach().requires_grad_()
    p_NV, q_NV = (torch.exp(x / temperature) for x in (teacher.detach(), naive))
    p_NV, q_NV = p_NV / p_NV.sum(-1, keepdim=True), q_NV / q_NV.sum(-1, keepdim=True)
    (temperature**2 * (p_NV * (p_NV / q_NV).log()).sum() / N).backward()
    torch.testing.assert_close(student.grad, naive.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 4, V - 1, V])
def test_divergence_to_the_likeliest_words(top_k: int, temperature: float) -> None:
    student, teacher = numbers(0, N, V).requires_grad_(), numbers(1, N, V)
    kept, words, rest = cut(teacher, top_k, temperature)
    loss = kl_to_top_words(student, kept, words, rest, temperature)

    buckets = []
    for logits in (teacher, student.detach()):
        probability = softmax(logits.numpy() / temperature)
        top = np.take_along_axis(probability, words.numpy(), -1)
        left = [np.delete(row, places).sum() for row, places in zip(probability, words.numpy(), strict=True)]
        buckets.append(np.concatenate([top, np.array(left)[:, None]], -1))
    p, q = buckets
    if top_k == V:
        p, q = p[:, :-1], q[:, :-1]
    assert loss.item() == pytest.approx(temperature**2 * divergence(p, q), rel=1e-10)
    assert loss.item() <= float(kl_to_teacher(student, teacher, temperature)) + 1e-12

    loss.backward()
    naive = student.detach().requires_grad_()
    q_NV = torch.softmax(naive / temperature, -1)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(N):
        named = {int(word): float(value.exp()) for word, value in zip(words[row], kept[row], strict=True)}
        for word, probability in named.items():
            total = total + probability * (np.log(probability) - q_NV[row, word].log())
        others = [word for word in range(V) if word not in named]
        if others:
            mass = float(rest[row].exp())
            total = total + mass * (np.log(mass) - q_NV[row, others].sum().log())
    (temperature**2 * total / N).backward()
    assert bool(student.grad.isfinite().all())
    torch.testing.assert_close(student.grad, naive.grad, rtol=1e-9, atol=1e-13)


def test_all_words_are_the_whole_divergence() -> None:
    student, teacher = numbers(0, N, V).requires_grad_(), numbers(1, N, V)
    whole = kl_to_teacher(student, teacher, 2.0)
    (expected,) = torch.autograd.grad(whole, student)
    part = kl_to_top_words(student, *cut(teacher, V, 2.0), 2.0)
    (got,) = torch.autograd.grad(part, student)
    assert float(part) == pytest.approx(float(whole), rel=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_words_that_a_teacher_rules_out() -> None:
    student, teacher = numbers(0, N, V).requires_grad_(), numbers(1, N, V)
    teacher[:, 3:6] = -torch.inf
    teacher[0, 1:] = -torch.inf  # is sure
    p, q = softmax(teacher.numpy()), softmax(student.detach().numpy())
    loss = kl_to_teacher(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss) == pytest.approx(divergence(p, q), rel=1e-12)
    np.testing.assert_allclose(gradient, (q - p) / N, rtol=1e-10, atol=1e-14)

    kept, words, rest = cut(teacher, 9, 1.0)  # one more than are possible
    loss = kl_to_top_words(student, kept, words, rest)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss) == pytest.approx(divergence(p, q), rel=1e-10)
    np.testing.assert_allclose(gradient, (q - p) / N, rtol=1e-8, atol=1e-13)


def test_no_tokens_no_divergence() -> None:
    student = numbers(0, 0, V).requires_grad_()
    assert float(kl_to_teacher(student, numbers(1, 0, V))) == 0
    empty = torch.zeros(0, 3)
    assert float(kl_to_top_words(student, empty, empty.long(), torch.zeros(0))) == 0


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = numbers(0, N, V).bfloat16(), numbers(1, N, V).bfloat16()
    loss = kl_to_teacher(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(kl_to_teacher(student.double(), teacher.double(), 2.0)), rel=1e-5)


def test_next_token_loss() -> None:
    logits = numbers(0, 2, 5, V)
    labels = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 3:] = -100
    labels[1, 0] = -100  # the first token is never predicted
    log = np.log(softmax(logits.numpy()))
    counted = [(row, place) for row in range(2) for place in range(1, 5) if int(labels[row, place]) >= 0]
    expected = -np.mean([log[row, place - 1, int(labels[row, place])] for row, place in counted])
    assert len(counted) == 6
    assert float(next_token_loss(logits, labels)) == pytest.approx(expected, rel=1e-12)
    for narrow in (logits.float(), logits.bfloat16()):
        loss = next_token_loss(narrow, labels)
        assert loss.dtype == torch.float32
        # In float32 as it always was, bit by bit.
        targets, flat = labels[:, 1:].flatten(), narrow.float()[:, :-1].flatten(0, 1)
        assert torch.equal(loss, torch.nn.functional.cross_entropy(flat, targets, reduction="sum") / 6)
    assert float(next_token_loss(logits.float(), labels)) == pytest.approx(expected, rel=1e-6)
    assert float(next_token_loss(logits, torch.full_like(labels, -100))) == 0


def test_hidden_error() -> None:
    mine, theirs = ([numbers(seed, 3, 4) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    mine = [tensor.requires_grad_() for tensor in mine]
    theirs[1] *= 100  # its own scale
    loss = hidden_error(mine, theirs)
    parts = [
        ((a.detach().numpy() - b.numpy()) ** 2).sum() / (b.numpy() ** 2).sum()
        for a, b in zip(mine, theirs, strict=True)
    ]
    assert loss.item() == pytest.approx(np.mean(parts), rel=1e-12)
    loss.backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, (a.detach() - b) / b.square().sum(), rtol=1e-10, atol=1e-15)
    assert float(hidden_error(theirs, theirs)) == 0
    assert float(hidden_error([], [])) == 0
    with pytest.raises(ValueError):
        hidden_error(mine, theirs[:1])
