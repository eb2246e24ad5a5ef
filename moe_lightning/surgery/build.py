"""``build(config, plan)``: a compressed model's structure from plain data, without values."""

from __future__ import annotations

from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe_lightning.architectures import architecture_named
from moe_lightning.plan import CompressionPlan
from moe_lightning.surgery.apply import compressed_config
from moe_lightning.surgery.models import CompressedMixtralForCausalLM, as_config


def build(config: MixtralConfig, plan: CompressionPlan | None = None) -> MixtralForCausalLM:
    """Make the structure of a model; deterministic, idempotent, and free under ``torch.device("meta")``.

    Args:
        config: A Mixtral config, plain or compressed. It is copied.
        plan: The whole plan. None takes the one that the config carries, if any.

    Returns:
        A plain ``MixtralForCausalLM`` for an empty plan, else a ``CompressedMixtralForCausalLM``.

    Raises:
        ValueError: Not a Mixtral config, or the plan does not fit it.
    """
    architecture = architecture_named(config.model_type)
    if plan is None:
        plan = architecture.plan_of_config(config)
    if not plan:
        plain = as_config(config, MixtralConfig, None)
        plain.num_hidden_layers = architecture.shape_of_config(config).num_layers
        return MixtralForCausalLM(plain)
    after = plan.check(architecture.shape_of_config(config).uncompressed())
    return CompressedMixtralForCausalLM(compressed_config(config, plan, after))
