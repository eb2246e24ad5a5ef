"""The only code that changes a model's structure, and the model classes that the structure needs."""

from moe_lightning.surgery.apply import Surgery, apply_plan, check_class, plan_of, rebuild
from moe_lightning.surgery.build import build
from moe_lightning.surgery.models import (
    CompressedMixtralConfig,
    CompressedMixtralForCausalLM,
    as_config,
    register_with_transformers,
)
from moe_lightning.surgery.optimizer import (
    GROUP_NAMES,
    add_missing_groups,
    carry_optimizer,
    is_novice,
    parameter_groups,
    planned_carry,
)
from moe_lightning.surgery.packed import Stacks, open_stacks

__all__ = [
    "GROUP_NAMES",
    "CompressedMixtralConfig",
    "CompressedMixtralForCausalLM",
    "Stacks",
    "Surgery",
    "add_missing_groups",
    "apply_plan",
    "as_config",
    "build",
    "carry_optimizer",
    "check_class",
    "is_novice",
    "open_stacks",
    "parameter_groups",
    "plan_of",
    "planned_carry",
    "rebuild",
    "register_with_transformers",
]
