"""What was decided, and for what shape of model, as plain data. Imports no torch.

A :class:`CompressionPlan` is a tuple of edits. Layer and expert numbers in it are always those of the *original*
model, so that plans can be re-read, compared and continued. A :class:`ModelShape` is all that a decision needs to know
of a model.
"""

from moe_lightning.plan.edits import (
    DropBlock,
    DropMoE,
    Edit,
    KeepChannels,
    KeepExperts,
    MergeExperts,
    NoviceExperts,
)
from moe_lightning.plan.format_edits import Quantize, Sparsify
from moe_lightning.plan.formats import AUTO_GROUPS, MaskScope, Pattern, WeightFormat
from moe_lightning.plan.lora_edits import AddLora, MergeLora
from moe_lightning.plan.plan import PLAN_VERSION, CompressionPlan
from moe_lightning.plan.shape import ABSENT, ExpertLayout, LoraRank, ModelShape, sizes_of_model
from moe_lightning.plan.table import formats_of, plan_table

__all__ = [
    "ABSENT",
    "AUTO_GROUPS",
    "PLAN_VERSION",
    "AddLora",
    "CompressionPlan",
    "DropBlock",
    "DropMoE",
    "Edit",
    "ExpertLayout",
    "KeepChannels",
    "KeepExperts",
    "LoraRank",
    "MaskScope",
    "MergeExperts",
    "MergeLora",
    "ModelShape",
    "NoviceExperts",
    "Pattern",
    "Quantize",
    "Sparsify",
    "WeightFormat",
    "formats_of",
    "plan_table",
    "sizes_of_model",
]
