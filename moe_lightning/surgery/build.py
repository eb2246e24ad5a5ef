"""``build(config, plan)``: a compressed model's structure from plain data, without values."""

from __future__ import annotations

import copy

from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from moe_lightning.architectures import architecture_named
from moe_lightning.architectures.base import CONFIG_KEY
from moe_lightning.plan import CompressionPlan
from moe_lightning.surgery.apply import config_entry
from moe_lightning.surgery.models import CompressedMixtralConfig, CompressedMixtralForCausalLM


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
    config = copy.deepcopy(config)
    if not plan:
        if getattr(config, CONFIG_KEY, None) is not None:
            setattr(config, CONFIG_KEY, None)
        config.__class__ = MixtralConfig
        return MixtralForCausalLM(config)
    config.__class__ = CompressedMixtralConfig
    setattr(config, CONFIG_KEY, None)
    after = plan.check(architecture.shape_of_config(config))
    setattr(config, CONFIG_KEY, config_entry(plan, after))
    return CompressedMixtralForCausalLM(config)
