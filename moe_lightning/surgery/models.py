"""The model classes of compressed models, as transformers' Auto registry sees them.

A compressed Mixtral has its own ``model_type``, so that a plain Mixtral class cannot load its folder and fill the gaps
with random weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.utils import can_return_tuple

from moe_lightning.architectures import MixtralArchitecture
from moe_lightning.architectures.base import CONFIG_KEY
from moe_lightning.experts import WeightStack
from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.surgery.layouts import change_layouts
from moe_lightning.surgery.packed import open_stacks


class CompressedMixtralConfig(MixtralConfig):
    """A Mixtral config that carries a compression plan.

    Attributes:
        moe_lightning: ``{"plan": ..., "per_layer_config": ...}``; the plan decides the structure.
    """

    model_type = MixtralArchitecture.compressed_model_type
    moe_lightning: dict[str, Any] | None = None


def as_config(config: MixtralConfig, kind: type[MixtralConfig], entry: dict[str, Any] | None) -> Any:
    """Return a copy of a config as another class of the family.

    Args:
        config: A Mixtral config, plain or compressed.
        kind: Class of the copy.
        entry: What stands under our key in the copy.
    """
    new = copy.deepcopy(config)
    new.__class__ = kind
    # A config read from a file holds its model type on the instance, where it would outlive the change of class.
    vars(new).pop("model_type", None)
    setattr(new, CONFIG_KEY, entry)
    return new


class CompressedMixtralForCausalLM(MixtralForCausalLM):
    """A Mixtral whose structure follows the plan in its config: ``build(config, plan)``.

    The decoder stack inside stays transformers' ``MixtralModel``: what it records (router logits, hidden states) is
    looked up by the name of its class.
    """

    config_class = CompressedMixtralConfig  # an annotation would be read as a string here

    def __init__(self, config: CompressedMixtralConfig) -> None:
        """Make the structure; values come from a weights file.

        Args:
            config: Config with the plan under ``moe_lightning``.

        Raises:
            ValueError: The plan does not fit the config.
        """
        architecture = MixtralArchitecture()
        after = architecture.shape_of_config(config)
        # First the original model, then what the plan leaves of it.
        left, config.num_hidden_layers = config.num_hidden_layers, after.num_layers
        entry, config.moe_lightning = config.moe_lightning, None
        try:
            super().__init__(config)
            change = change_layouts(self, architecture, after.uncompressed(), after)
            architecture.fuse_layers(self, change)
        finally:
            config.num_hidden_layers, config.moe_lightning = left, entry

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder as transformers does, and make masked matrices ready to work."""
        loaded = super().from_pretrained(*args, **kwargs)
        open_stacks(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters; of packed matrices, integers too, each weight that they stand for.

        Args:
            only_trainable: Only what an optimizer gets.
            exclude_embeddings: Without embeddings.
        """
        counted = super().num_parameters(only_trainable, exclude_embeddings)
        stacks = [module for module in self.modules() if isinstance(module, WeightStack)]
        held = sum(parameter.numel() for stack in stacks for parameter in stack.parameters())
        return counted if only_trainable else counted - held + sum(stack.num_weights for stack in stacks)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the source of the file that defines the class. Layers that nothing was
        # done to still hold its module; ours take every name and go their own way.
        return True

    @can_return_tuple
    def forward(  # noqa: D102 - the signature and meaning of MixtralForCausalLM.forward
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if not wanted:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                output_router_logits=False,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        # transformers' own balancing loss assumes the same number of experts in every layer.
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        # Ours is 1 where the load is even, transformers' is K: keep the scale that router_aux_loss_coef was chosen for.
        aux_loss = self.num_experts_per_tok * load_balancing_loss(
            outputs.router_logits, self.num_experts_per_tok, attention_mask
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def register_with_transformers() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` know the compressed classes. Idempotent."""
    AutoConfig.register(CompressedMixtralConfig.model_type, CompressedMixtralConfig, exist_ok=True)
    AutoModelForCausalLM.register(CompressedMixtralConfig, CompressedMixtralForCausalLM, exist_ok=True)


register_with_transformers()
