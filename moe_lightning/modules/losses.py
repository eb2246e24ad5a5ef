"""What a language model is trained on.

Legend: B blocks, S tokens of a block, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given those before it, in nats.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]``, not shifted; -100 where a token does not count.

    Returns:
        A scalar in fp32; 0 for a batch in which no token counts.
    """
    targets = labels[:, 1:].reshape(-1)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    total = functional.cross_entropy(flat, targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
