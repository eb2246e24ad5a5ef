"""What a language model is trained on: the text, or what a teacher makes of it.

Legend: B blocks, S tokens of a block, N tokens, V vocabulary, K words that a teacher's prediction was cut to, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given those before it, in nats.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]``, not shifted; -100 where a token does not count.

    Returns:
        A scalar in fp32 or wider; 0 for a batch in which no token counts.
    """
    targets = labels[:, 1:].reshape(-1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).to(wide)
    total = functional.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def kl_to_teacher(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``tau^2 KL(teacher || student)``, the mean over tokens, of predictions softened by a temperature.

    Args:
        student_NV: Logits, ``[N, V]``.
        teacher_NV: Logits, ``[N, V]``; no gradient goes there.
        temperature: tau.

    Returns:
        A scalar in nats, in fp32 or wider; 0 for no tokens.

    Source: Hinton et al. 2015 (1503.02531), section 2: the factor keeps gradients of the size that they have at tau 1.
    """
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    log_student_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    log_teacher_NV = (teacher_NV.detach().to(wide) / temperature).log_softmax(-1)
    return temperature**2 * _mean_kl(log_teacher_NV, log_student_NV)


def kl_to_top_words(
    student_NV: Tensor, teacher_NK: Tensor, words_NK: Tensor, rest_N: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return ``tau^2 KL`` where of the teacher only its likeliest words are known, and all others are one bucket.

    It is at most :func:`kl_to_teacher` (merging words loses information), and equal to it where K is V.

    Args:
        student_NV: Logits, ``[N, V]``.
        teacher_NK: Log-probabilities of the teacher's likeliest words, softened by the same temperature, ``[N, K]``.
        words_NK: Their numbers, int64 ``[N, K]``, distinct in a row.
        rest_N: Log-probability of all other words together, ``[N]``; minus infinity where there are none.
        temperature: tau.

    Returns:
        A scalar in nats, in fp32 or wider; 0 for no tokens.
    """
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    log_student_NV = (student_NV.to(wide) / temperature).log_softmax(-1)
    top_NK = log_student_NV.gather(-1, words_NK)
    rest_of_student_N = log_student_NV.scatter(-1, words_NK, -torch.inf).logsumexp(-1)
    teacher = torch.cat([teacher_NK.detach().to(wide), rest_N.detach().to(wide)[:, None]], -1)
    return temperature**2 * _mean_kl(teacher, torch.cat([top_NK, rest_of_student_N[:, None]], -1))


def _mean_kl(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    # A word that the teacher rules out adds nothing, whatever the student says of it.
    never = log_teacher == -torch.inf
    terms = log_teacher.exp() * (log_teacher - log_student).masked_fill(never, 0)
    return terms.sum(-1).sum() / max(1, log_teacher.shape[0])


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared error of hidden states in units of the teacher's squares, the mean over layers.

    Args:
        student: Hidden states of some layers, each ``[N, H]``.
        teacher: Those of the same layers of the teacher; no gradient goes there.

    Returns:
        A scalar in fp32 or wider, 0 where they are equal; 0 for no layers.
    """
    if not student:
        return torch.zeros(())
    total = torch.zeros((), device=student[0].device)
    for mine_NH, theirs_NH in zip(student, teacher, strict=True):
        wide = torch.promote_types(mine_NH.dtype, torch.float32)
        theirs_NH = theirs_NH.detach().to(wide)
        error = (mine_NH.to(wide) - theirs_NH).square().sum()
        total = total + error / theirs_NH.square().sum().clamp(min=torch.finfo(wide).tiny)
    return total / len(student)
