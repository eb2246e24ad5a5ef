"""``build(config, plan)``: a compressed model's structure from plain data, without values."""

from __future__ import annotations

from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe_lightning.architectures import architecture_named
from moe_lightning.plan import CompressionPlan
from moe_lightning.surgery.apply import config_entry
from moe_lightning.surgery.models import CompressedMixtralConfig, CompressedMixtralForCausalLM, as_config


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
        return MixtralForCausalLM(as_config(config, MixtralConfig, None))
    after = plan.check(architecture.shape_of_config(as_config(config, CompressedMixtralConfig, None)))
    return CompressedMixtralForCausalLM(as_config(config, CompressedMixtralConfig, config_entry(plan, after)))
