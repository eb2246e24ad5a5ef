"""What an expert can be: weights in a storage, or a novice; and the one module that mixes them."""

from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.experts.compressed import CompressedExperts
from moe_lightning.experts.no_moe import NoMoE
from moe_lightning.experts.storage import Channels, Dense

__all__ = ["Channels", "CompressedExperts", "Dense", "NoMoE", "load_balancing_loss"]
