"""Which experts, layers, blocks and channels go, and what takes their place."""

from moe_lightning.trimming.angular import Angular
from moe_lightning.trimming.block_drop import BlockDrop
from moe_lightning.trimming.channel_drop import ChannelDrop
from moe_lightning.trimming.expert_drop import ExpertDrop
from moe_lightning.trimming.layer_drop import LayerDrop
from moe_lightning.trimming.merge import Merge
from moe_lightning.trimming.novices import NoviceKind, Novices, novice_values
from moe_lightning.trimming.replay import Replay

__all__ = [
    "Angular",
    "BlockDrop",
    "ChannelDrop",
    "ExpertDrop",
    "LayerDrop",
    "Merge",
    "NoviceKind",
    "Novices",
    "Replay",
    "novice_values",
]
