"""How far one model's predictions are from another's, token by token.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits that are float64 at a time, 16 MiB of them: never a second copy of all.
_CHUNK = 2**21


def _chunks(teacher_NV: Tensor, student_NV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if teacher_NV.shape != student_NV.shape:
        raise ValueError(
            f"logits {tuple(teacher_NV.shape)} and {tuple(student_NV.shape)} do not fit: give those of the same tokens"
        )
    vocabulary = teacher_NV.shape[-1]
    step = max(1, _CHUNK // max(1, vocabulary))
    teacher_NV, student_NV = teacher_NV.reshape(-1, vocabulary), student_NV.reshape(-1, vocabulary)
    for start in range(0, teacher_NV.shape[0], step):
        yield teacher_NV[start : start + step], student_NV[start : start + step]


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Compute ``KL(teacher || student)`` of the predictions for each token.

    Args:
        teacher_logits: ``[..., vocabulary]``, of any floating-point type.
        student_logits: The same shape. Minus infinity forbids a word.

    Returns:
        ``[...]`` in nats, float64: at divergences of 1e-4 and below, fp32 would be half rounding. Infinite where the
        student forbids a word that the teacher does not.

    Raises:
        ValueError: The shapes differ.
    """
    parts = []
    for teacher, student in _chunks(teacher_logits, student_logits):
        log_teacher = teacher.double().log_softmax(-1)
        difference = log_teacher - student.double().log_softmax(-1)
        probability = log_teacher.exp()
        # A word that the teacher forbids adds nothing, whatever the student says of it.
        parts.append((probability * difference.masked_fill(probability == 0, 0.0)).sum(-1))
    flat = torch.cat(parts) if parts else teacher_logits.new_zeros(0, dtype=torch.float64)
    return flat.view(teacher_logits.shape[:-1])


def top1_agreement(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Say for each token whether both give the same word the largest logit.

    Args:
        teacher_logits: ``[..., vocabulary]``.
        student_logits: The same shape.

    Returns:
        Bool ``[...]``. Of equal logits the first counts.

    Raises:
        ValueError: The shapes differ.
    """
    parts = [teacher.argmax(-1) == student.argmax(-1) for teacher, student in _chunks(teacher_logits, student_logits)]
    flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device=teacher_logits.device)
    return flat.view(teacher_logits.shape[:-1])
