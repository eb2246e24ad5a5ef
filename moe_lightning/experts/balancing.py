"""The auxiliary loss that keeps the load of the experts even.

Legend: N tokens, E experts the router knows (may differ from layer to layer), K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """Compute the mean over layers of ``E / K * sum_e f_e * P_e``.

    ``f_e`` is the number of tokens that picked expert e, divided by the number of tokens; ``P_e`` the mean full-softmax
    probability of e. A perfectly even router gives 1, whatever E and K.

    Args:
        router_logits: One ``[N, E]`` tensor for each MoE layer; E may differ between layers.
        top_k: K.
        attention_mask: ``[batch, sequence]`` with N entries, zero at padding, which is left out; None where there is
            none.

    Returns:
        The loss, fp32 scalar, differentiable through the probabilities; zero where no layer is left (Layer Drop may
        have taken every MoE).

    Source: Switch Transformer (2101.03961) eq. 4-6. transformers' version is K times larger, and first averages f and
        P over
    all layers, which needs the same E in each and lets one layer's imbalance make up for another's.
    """
    if not router_logits:
        return torch.zeros(())
    losses = []
    for logits_NE in router_logits:
        num_experts = logits_NE.shape[-1]
        picks = min(top_k, num_experts)
        probability_NE = logits_NE.float().softmax(-1)
        chosen_NE = torch.zeros_like(probability_NE).scatter(
            1, probability_NE.detach().topk(picks, dim=-1).indices, 1.0
        )
        if attention_mask is None:
            load_E, mass_E = chosen_NE.mean(0), probability_NE.mean(0)
        else:
            mask_N1 = attention_mask.reshape(-1, 1).to(probability_NE)
            tokens = mask_N1.sum().clamp(min=1)
            load_E, mass_E = (chosen_NE * mask_N1).sum(0) / tokens, (probability_NE * mask_N1).sum(0) / tokens
        losses.append(num_experts / picks * (load_E * mass_E).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
