"""What calibration says of a model before anything is done to it, and who stays by it.

L MoE layers, E experts of the original model, B decoder layers, N numbers of layers that go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from moe_lightning.plan import DropBlock, DropMoE
from moe_lightning.reporting.curves import layer_curves
from moe_lightning.reporting.model_maps import BoundaryOf, frequency_variance
from moe_lightning.statistics import Statistics
from moe_lightning.statistics.groups import real_experts
from moe_lightning.trimming import Angular, BlockDrop, LayerDrop

FIGURE_NEEDS = frozenset({"routing", "outputs", "layers", "blocks", "similarity"})
"""Groups of statistics that the figures here show. All come from one shared pass."""


def dropping_orders(statistics: Statistics) -> dict[str, NDArray[numpy.bool_]]:
    """Say which layers go when one, two, ... of them go, by each method that ranks layers.

    Args:
        statistics: With the groups ``layers``, ``blocks`` and ``similarity``.

    Returns:
        By method, bool ``[B, N]``: whether a decoder layer (or its MoE sub-layer) is gone when n + 1 go.
    """
    shape = statistics.shape
    most = len(shape.blocks) - 1
    makers: Mapping[str, tuple[Callable[[int], LayerDrop | BlockDrop | Angular], int]] = {
        "MoE layers (Layer Drop)": (lambda count: LayerDrop(count=count), len(shape.layouts)),
        "Blocks (Block Drop)": (lambda count: BlockDrop(count=count), most),
        "Runs of blocks (Block Drop)": (lambda count: BlockDrop(count=count, mode="consecutive"), most),
        "Runs of blocks (Angular)": (lambda count: Angular(count=count), most),
    }
    orders = {}
    for name, (make, largest) in makers.items():
        gone = numpy.zeros((len(shape.blocks), largest), dtype=bool)
        for count in range(1, largest + 1):
            for edit in make(count).propose(shape, statistics):
                assert isinstance(edit, DropMoE | DropBlock)
                gone[shape.blocks.index(edit.layer), count - 1] = True
        orders[name] = gone
    return orders


def similarity_curves(statistics: Statistics, title: str) -> Figure:
    """Draw, by depth, how little the blocks and their MoE sub-layers turn the hidden states.

    Args:
        statistics: With the groups ``blocks`` or ``layers``, or both.
        title: Above the picture.

    Returns:
        The figure.

    Raises:
        ValueError: It has neither.
    """
    shape, groups = statistics.shape, statistics.groups
    series: dict[str, NDArray[numpy.float64]] = {}
    if "blocks" in groups:
        series["whole block: its input and output"] = statistics.block_cosine.numpy()
    if "layers" in groups and shape.moe_layers:
        cosine_B = numpy.full(len(shape.blocks), numpy.nan)
        cosine_B[[shape.blocks.index(layer) for layer in shape.moe_layers]] = statistics.moe_cosine.numpy()
        series["MoE sub-layer: the residual stream before and after"] = cosine_B
    if not series:
        raise ValueError("the statistics hold no cosines: collect with needs={'blocks', 'layers'}")
    return layer_curves(
        series, title=title, value_label="mean cosine similarity", layers=shape.blocks, layer_label="decoder layer"
    )


def use_and_variance(
    statistics: Statistics, stays: NDArray[numpy.bool_], title: str, criterion: str | None = None
) -> Figure:
    """Draw how much every expert is used against how much its output varies, who stays, and the boundary.

    The boundary is that of scores that can be drawn on these axes: either of them, or their product (MoNE). It is one
    line where one threshold parts all experts, and one for each layer where each has its own.

    Args:
        statistics: With the groups ``routing`` and ``outputs``.
        stays: Which experts keep their weights, bool ``[L, E]``.
        title: Above the picture.
        criterion: What experts were scored by.

    Returns:
        The figure.
    """
    real_LE = real_experts(statistics.shape)
    family = (criterion or "").removesuffix("_l1")
    frequency_LE = 100 * statistics.score("frequency")
    label = "share of the tokens that pick the expert [%]"
    if family in ("mone", "routing_score"):
        frequency_LE, label = _mass(statistics), "routing weight, mean over all tokens"
    elif family == "mone_paper":
        frequency_LE = statistics["gate_sum"] / statistics["count"].clamp(min=1)
        label = "routing weight, mean where the expert is picked"
    norm = "variance_l1" if (criterion or "").endswith("_l1") else "variance"
    deviation_LE = statistics.score(norm)
    products: dict[str, tuple[BoundaryOf, Tensor]] = {
        "mone": ("product", frequency_LE * deviation_LE),
        "mone_paper": ("product", frequency_LE * deviation_LE),
        "frequency": ("frequency", frequency_LE),
        "routing_score": ("frequency", frequency_LE),
        "variance": ("deviation", deviation_LE),
    }
    there = real_LE.numpy()
    kind: BoundaryOf = "product"
    boundary: float | list[float] | None = None
    if family in products:
        kind, score_LE = products[family]
        boundary = boundary_of(score_LE.numpy(), stays & there, ~stays & there)
    return frequency_variance(
        numpy.where(there, frequency_LE.numpy(), numpy.nan),
        numpy.where(there, deviation_LE.numpy(), numpy.nan),
        stays,
        title=title,
        frequency_label=label,
        deviation_label="deviation of the output [norm]" if norm == "variance" else "deviation of the output [L1 norm]",
        layers=statistics.shape.moe_layers,
        boundary=boundary,
        boundary_of=kind,
        boundary_label=f"boundary of {criterion}",
    )


def _mass(statistics: Statistics) -> Tensor:
    tokens = statistics["tokens"].unsqueeze(-1)
    return torch.where(tokens > 0, statistics["gate_sum"] / tokens.clamp(min=1), 0.0)


def boundary_of(
    score: NDArray[numpy.float64], stays: NDArray[numpy.bool_], goes: NDArray[numpy.bool_]
) -> float | list[float] | None:
    """Return the scores at which experts stay.

    Args:
        score: ``[L, E]``, larger = stays.
        stays: Bool ``[L, E]``.
        goes: Bool ``[L, E]``.

    Returns:
        One number where it parts all experts; one for each layer, NaN where it has none, where each has its own; None
        where scores do not part them.
    """
    whole = _between(score[stays], score[goes])
    if not numpy.isnan(whole):
        return whole
    both = stays.any(1) & goes.any(1)
    each = [_between(row[kept], row[gone]) for row, kept, gone in zip(score, stays, goes, strict=True)]
    return each if both.any() and not numpy.isnan(each)[both].any() else None


def _between(stays: NDArray[numpy.float64], goes: NDArray[numpy.float64]) -> float:
    """Return a number between the last that goes and the first that stays: half way on a logarithmic axis."""
    if not stays.size or not goes.size or not goes.max() <= stays.min() or stays.min() <= 0:
        return float("nan")
    first = float(stays.min())
    return float(numpy.sqrt(first * max(float(goes.max()), first * 1e-6)))
