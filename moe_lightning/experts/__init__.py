"""What an expert can be: weights in a storage, or a novice; and the one module that mixes them."""

from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.experts.compressed import CompressedExperts
from moe_lightning.experts.linears import LoraLinear, PackedLinear
from moe_lightning.experts.lora import LoraStack, is_lora
from moe_lightning.experts.no_moe import NoMoE
from moe_lightning.experts.stacks import Int4, Int8, Masked, Sparse24, WeightStack
from moe_lightning.experts.storage import Channels, Dense, Packed

__all__ = [
    "Channels",
    "CompressedExperts",
    "Dense",
    "Int4",
    "Int8",
    "LoraLinear",
    "LoraStack",
    "Masked",
    "NoMoE",
    "Packed",
    "PackedLinear",
    "Sparse24",
    "WeightStack",
    "is_lora",
    "load_balancing_loss",
]
