"""From statistics to a score ``[layers, experts]`` (larger = keep), and from scores and a budget to who stays.

Importing this package fills the registry that ``Statistics.score`` reads; ``ml.collect`` and ``ml.Statistics`` come
from here for that reason.
"""

from moe_lightning.criteria import experts, families, naee
from moe_lightning.criteria.counts import Scope
from moe_lightning.criteria.selection import kept_experts
from moe_lightning.statistics import Statistics, collect

__all__ = ["Scope", "Statistics", "collect", "experts", "families", "kept_experts", "naee"]
