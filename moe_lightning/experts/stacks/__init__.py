"""Stacks of matrices that are stored packed: integers with scales, or what is left after pruning.

A stack knows the size of its matrices; its weights in floating point exist only while they are asked for.
"""

from moe_lightning.experts.stacks.base import WeightStack, packed_buffers
from moe_lightning.experts.stacks.integers import Int4, Int8
from moe_lightning.experts.stacks.sparse import Masked, Sparse24

__all__ = ["Int4", "Int8", "Masked", "Sparse24", "WeightStack", "packed_buffers"]
