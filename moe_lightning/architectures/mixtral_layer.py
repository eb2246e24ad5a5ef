"""The decoder layer of a compressed Mixtral: its MoE half runs as one operation where the Triton kernels are used.

``h + mlp(norm(h))`` becomes the norm and one operation that routes, mixes the experts and adds the residual. Whoever
watches a part of it gets to see that part: a router with hooks is called as a module (so transformers records its
logits), and a block or experts with hooks, or with another forward on the instance, go transformers' own way.

Legend: N tokens, H hidden.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralExperts,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

from moe_lightning.experts import CompressedExperts
from moe_lightning.experts.implementation import NAME, stock_inputs
from moe_lightning.experts.kernel_path import KernelInputs, block_by_kernels, mix_by_kernels, why_torch

_STEPS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
KNOWS_TRANSFORMERS_LAYER: bool = inspect.unwrap(MixtralDecoderLayer.forward).__code__.co_names == _STEPS
"""Whether transformers' layer still does what is said again below: these four, and two sums. If not, it runs alone."""

# What ``generate`` puts there by itself, and ours. Who asks for another one ("eager") gets it.
_REPLACED_IMPLEMENTATIONS = (None, "grouped_mm", "batched_mm", NAME)


class CompressedMixtralDecoderLayer(MixtralDecoderLayer):
    """Transformers' layer with its MoE half fused: on a GPU where no gradient is wanted; see `kernel_path`.

    It has no parameters or settings of its own, so a layer becomes one, and ceases to be one, by its class alone.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Do what transformers' layer does.

        Args:
            hidden_states: ``[batch, sequence, hidden]``.
            position_embeddings: Passed on to the attention, like all that follows.
            attention_mask: Of the attention.
            position_ids: Of the attention.
            past_key_values: Of the attention.
            **kwargs: Of the attention.

        Returns:
            ``[batch, sequence, hidden]``.
        """
        rest = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if not self._may_be_fused(hidden_states):
            return super().forward(hidden_states, **rest)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **rest)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        fused = self._fused(normed, hidden_states)
        return hidden_states + self.mlp(normed) if fused is None else fused

    def _may_be_fused(self, hidden_states: Tensor) -> bool:
        """Say whether the MoE half is to go through the kernels, if they know its weights."""
        block = self.mlp
        # Something else stands there: nothing, or somebody's wrapper.
        if type(block) is not MixtralSparseMoeBlock or not KNOWS_TRANSFORMERS_LAYER:
            return False
        experts = block.experts
        if type(experts) is MixtralExperts:
            if experts.config._experts_implementation not in _REPLACED_IMPLEMENTATIONS:
                return False
        elif type(experts) is not CompressedExperts:
            return False
        if why_torch(hidden_states, None, self.parameters(), experts.act_fn) is not None:
            return False
        noisy = block.training and block.jitter_noise > 0
        return not noisy and not _watched(block) and not _watched(experts)

    def _fused(self, normed: Tensor, residual: Tensor) -> Tensor | None:
        """Return ``residual + mlp(normed)``; None where the kernels do not know the weights."""
        if residual.dtype != normed.dtype:
            return None
        router, experts = self.mlp.gate, self.mlp.experts
        normed_NH, residual_NH = normed.flatten(0, -2), residual.flatten(0, -2)
        inputs: KernelInputs | None
        if isinstance(experts, CompressedExperts):
            inputs = experts.kernel_inputs(normed_NH)
        else:
            inputs = stock_inputs(experts, normed_NH)
        if inputs is None:
            return None
        if type(router) is MixtralTopKRouter and not _watched(router):
            mixed_NH = block_by_kernels(normed_NH, router.weight, router.top_k, True, inputs, residual_NH)
        else:
            _, weight_NK, index_NK = router(normed_NH)
            mixed_NH = mix_by_kernels(normed_NH, index_NK, weight_NK, inputs, residual_NH)
        return mixed_NH.view_as(residual)


def _watched(module: nn.Module) -> bool:
    """Say whether somebody sees the calls of a module, or has put something in place of its forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
    )
    return any(len(held) > 0 for held in hooks) or "forward" in module.__dict__
