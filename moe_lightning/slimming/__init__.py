"""How the matrix of an expert gets smaller: fewer non-zero weights, or fewer bits for each.

Pure functions on stacks of matrices ``[S, O, I]``, all experts of a layer at once, which know nothing of models; and
thin methods, which are shown one layer after another through a :class:`LayerView`.
"""

from moe_lightning.plan.formats import Pattern
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.base import Slimming
from moe_lightning.slimming.gptq import GPTQResult, round_by_gptq
from moe_lightning.slimming.hessian import output_error
from moe_lightning.slimming.masks import Selection, keep_mask
from moe_lightning.slimming.pruners import Magnitude, SparseGPT, Wanda
from moe_lightning.slimming.pruning import (
    Pruned,
    prune_by_magnitude,
    prune_by_router_wanda,
    prune_by_sparse_gpt,
    prune_by_wanda,
)
from moe_lightning.slimming.quantizers import GPTQ, RTN
from moe_lightning.slimming.rounding import Quantized, Scheme, dequantize, round_to_nearest
from moe_lightning.slimming.view import LayerView, SlimmedLayer

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "GPTQResult",
    "LayerView",
    "Magnitude",
    "Pattern",
    "Pruned",
    "Quantized",
    "Scheme",
    "Selection",
    "SlimmedLayer",
    "Slimming",
    "SparseGPT",
    "Wanda",
    "dequantize",
    "keep_mask",
    "output_error",
    "prune_by_magnitude",
    "prune_by_router_wanda",
    "prune_by_sparse_gpt",
    "prune_by_wanda",
    "round_by_gptq",
    "round_to_nearest",
]
