"""One row for each setting of a method; ``test_methods.py`` runs over all of them. A new method is a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import moe_lightning as ml
from moe_lightning.method import Method


@dataclass(frozen=True)
class Setting:
    """Methods to apply one after the other, made anew for each test.

    Attributes:
        make: Returns the methods.
        plain: Whether the outcome is a plain Mixtral, which transformers alone loads.
        neutral: Whether the model says what it said before, and may be no smaller: low-rank terms begin as zeros.
    """

    make: Callable[[], Sequence[Method]]
    plain: bool = False
    neutral: bool = False


SETTINGS: dict[str, Setting] = {
    "expert drop": Setting(lambda: [ml.ExpertDrop(ratio=0.25)], plain=True),
    "expert drop to top-k": Setting(lambda: [ml.ExpertDrop(keep=2, criterion="reap")], plain=True),
    "expert drop global": Setting(lambda: [ml.ExpertDrop(ratio=0.4, scope="global", criterion="mone")]),
    "novices": Setting(lambda: [ml.Novices(ratio=0.5)]),
    "novices of the paper": Setting(lambda: [ml.Novices(keep=4, criterion="mone_paper")]),
    "novices global": Setting(
        lambda: [ml.Novices(keep=2.5, scope="global", criterion="residual", novice="gate2_mean")]
    ),
    "all experts novices": Setting(lambda: [ml.Novices(keep=0, novice="gate2_mean", criterion="random")]),
    "zero novices": Setting(lambda: [ml.Novices(ratio=0.3, novice="zero", criterion="frequency")]),
    "novices, then drop": Setting(lambda: [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=4, criterion="frequency")]),
    "novices, then drop them": Setting(lambda: [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=3, criterion="mone")], True),
    "drop, then novices": Setting(lambda: [ml.ExpertDrop(keep=4), ml.Novices(keep=2)]),
    "novices twice": Setting(
        lambda: [ml.Novices(keep=4), ml.Novices(keep=2, novice="gate2_mean", criterion="frequency")]
    ),
    "drop twice": Setting(lambda: [ml.ExpertDrop(keep=5), ml.ExpertDrop(keep=3, criterion="reap")], plain=True),
    "expert drop, router kept": Setting(lambda: [ml.ExpertDrop(keep=3, router="keep", criterion="ean")]),
    "fewer than top-k": Setting(lambda: [ml.ExpertDrop(keep=1, allow_fewer_than_top_k=True, criterion="man")]),
    "expert drop by subsets": Setting(lambda: [ml.ExpertDrop(keep=4, criterion="naee")], plain=True),
    "expert drop by intervention": Setting(lambda: [ml.ExpertDrop(keep=5, criterion="interventional")], plain=True),
    "expert drop by sensitivity": Setting(
        lambda: [ml.ExpertDrop(ratio=0.3, scope="sensitivity", criterion="power:1,1,0.5")]
    ),
    "low-rank novices": Setting(lambda: [ml.Novices(ratio=0.5, novice="low_rank", rank=3)]),
    "low-rank novices by sensitivity": Setting(
        lambda: [ml.Novices(ratio=0.5, scope="sensitivity", criterion="residual", novice="low_rank", rank=2)]
    ),
    "constants, then maps": Setting(
        lambda: [ml.Novices(keep=4), ml.Novices(keep=2, novice="low_rank", rank=3, criterion="variance")]
    ),
    "maps, then drop some": Setting(
        lambda: [ml.Novices(keep=3, novice="low_rank", rank=2), ml.ExpertDrop(keep=4, criterion="frequency")]
    ),
    "novices by subsets": Setting(lambda: [ml.Novices(keep=3, criterion="naee", novice="gate2_mean")]),
    "layer drop": Setting(lambda: [ml.LayerDrop(count=1)]),
    "all layers dropped": Setting(lambda: [ml.LayerDrop(count=3)]),
    "block drop": Setting(lambda: [ml.BlockDrop(count=1)], plain=True),
    "block drop, a run": Setting(lambda: [ml.BlockDrop(count=2, mode="consecutive")], plain=True),
    "angular": Setting(lambda: [ml.Angular(count=1)], plain=True),
    "block drop, then novices": Setting(lambda: [ml.BlockDrop(count=1), ml.Novices(ratio=0.5, novice="gate2_mean")]),
    "novices, then block drop": Setting(lambda: [ml.Novices(ratio=0.5), ml.BlockDrop(count=1)]),
    "layer drop, then block drop": Setting(lambda: [ml.LayerDrop(count=2), ml.BlockDrop(count=1)]),
    "layer drop, then expert drop": Setting(lambda: [ml.LayerDrop(count=1), ml.ExpertDrop(keep=4)]),
    "merge": Setting(lambda: [ml.Merge(ratio=0.5)]),
    "merge by clusters": Setting(lambda: [ml.Merge(algorithm="hc_smoe", keep=3)]),
    "novices, then merge": Setting(lambda: [ml.Novices(keep=4), ml.Merge(keep=2)]),
    "channel drop": Setting(lambda: [ml.ChannelDrop(ratio=0.4)]),
    "channel drop twice": Setting(lambda: [ml.ChannelDrop(ratio=0.2), ml.ChannelDrop(ratio=0.3, scope="layer")]),
    "channel drop, then novices": Setting(lambda: [ml.ChannelDrop(ratio=0.3), ml.Novices(ratio=0.5)]),
    "channel drop, then all novices": Setting(lambda: [ml.ChannelDrop(ratio=0.3), ml.Novices(keep=0)]),
    "channel drop, then merge": Setting(lambda: [ml.ChannelDrop(ratio=0.3), ml.Merge(keep=3)]),
    "everything": Setting(
        lambda: [ml.BlockDrop(count=1), ml.Novices(keep=4, novice="low_rank", rank=2), ml.ChannelDrop(ratio=0.5)]
    ),
    "magnitude": Setting(lambda: [ml.Magnitude(sparsity=0.5)]),
    "magnitude 2:4": Setting(lambda: [ml.Magnitude(pattern="2:4")]),
    "wanda": Setting(lambda: [ml.Wanda(sparsity=0.4, scope="matrix")]),
    "router-weighted wanda": Setting(lambda: [ml.Wanda(pattern="4:8", router_weighted=True)]),
    "sparsegpt": Setting(lambda: [ml.SparseGPT(sparsity=0.5)]),
    "sparsegpt, attention too": Setting(lambda: [ml.SparseGPT(pattern="2:4", targets="experts+attention")]),
    "rtn": Setting(lambda: [ml.RTN(group_size="channel")]),
    "rtn int8, attention too": Setting(
        lambda: [ml.RTN(bits=8, group_size=16, symmetric=True, targets="experts+attention")]
    ),
    "gptq": Setting(lambda: [ml.GPTQ(group_size=16, desc_act=True)]),
    "gptq, attention too": Setting(lambda: [ml.GPTQ(group_size=8, symmetric=True, targets="experts+attention")]),
    "awq": Setting(lambda: [ml.AWQ(group_size=16)]),
    "awq, attention too": Setting(lambda: [ml.AWQ(group_size="channel", targets="experts+attention", loss="diagonal")]),
    "int4, then expert drop": Setting(lambda: [ml.RTN(group_size=16), ml.ExpertDrop(keep=4)]),
    "expert drop, then int4": Setting(lambda: [ml.ExpertDrop(keep=4), ml.GPTQ(group_size=16)]),
    "novices, int4 and block drop": Setting(
        lambda: [ml.BlockDrop(count=1), ml.Novices(ratio=0.5, novice="low_rank", rank=2), ml.AWQ(group_size=8)]
    ),
    "int4, then novices": Setting(lambda: [ml.GPTQ(group_size=16), ml.Novices(ratio=0.5), ml.BlockDrop(count=1)]),
    "2:4, then rtn": Setting(lambda: [ml.Wanda(pattern="2:4"), ml.RTN(group_size=16)]),
    "sparsity twice": Setting(lambda: [ml.SparseGPT(sparsity=0.3), ml.SparseGPT(sparsity=0.6)]),
    "channel drop, then 2:4": Setting(lambda: [ml.ChannelDrop(ratio=0.5), ml.Magnitude(sparsity=0.3)]),
    "low-rank terms": Setting(lambda: [ml.LoRA(rank=3)], neutral=True),
    "low-rank terms, merged at once": Setting(lambda: [ml.LoRA(rank=2), ml.MergeLoRA()], True, True),
    "novices, int4, then low-rank terms": Setting(
        lambda: [
            ml.Novices(ratio=0.5, novice="low_rank", rank=2),
            ml.RTN(group_size=16, targets="experts+attention"),
            ml.LoRA(rank=2, alpha=3.0),
        ]
    ),
    "int4 with low-rank terms, merged, then gptq": Setting(
        lambda: [
            ml.RTN(group_size=16),
            ml.LoRA(rank=2, targets="experts"),
            ml.MergeLoRA(dequantize=True),
            ml.GPTQ(group_size=16),
        ]
    ),
    "low-rank terms, then layers go": Setting(lambda: [ml.LoRA(rank=2), ml.BlockDrop(count=1), ml.LayerDrop(count=1)]),
}
