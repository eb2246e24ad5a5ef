"""What an expert can be: weights in a storage, or a novice; and the one module that mixes them."""

from moe_lightning.experts.balancing import load_balancing_loss
from moe_lightning.experts.compressed import CompressedExperts
from moe_lightning.experts.storage import Dense

__all__ = ["CompressedExperts", "Dense", "load_balancing_loss"]
