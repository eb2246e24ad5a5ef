"""Pictures of one compression: what the statistics said, and who stayed."""

from __future__ import annotations

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lightning.plan import ModelShape
from moe_lightning.reporting.decision_maps import dropping_order
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.model_maps import similarity_map
from moe_lightning.reporting.statistics_figures import dropping_orders, similarity_curves, use_and_variance
from moe_lightning.statistics import Statistics, criterion_named


def roles(before: ModelShape, after: ModelShape) -> dict[str, NDArray[numpy.bool_]]:
    """Say what became of the experts that a model had.

    Args:
        before: Shape before.
        after: Shape after.

    Returns:
        ``stays``, ``novice`` and ``gone``: bool ``[layers of before, experts]``. A merged expert is gone.
    """
    found = {name: numpy.zeros((len(before.layouts), before.num_experts), bool) for name in ("stays", "novice", "gone")}
    for row, layout in enumerate(before.layouts):
        if layout.layer in after.moe_layers:
            now = after.layout(layout.layer)
            found["stays"][row, list(now.real)] = True
            found["novice"][row, list(now.novices)] = True
        found["gone"][row] = ~(found["stays"][row] | found["novice"][row])
    return found


def compression_figures(
    statistics: Statistics, criterion: str | None, after: ModelShape, title: str, seed: int = 0
) -> dict[str, Figure]:
    """Draw what a compression decided by, as far as the statistics hold it.

    Args:
        statistics: What was measured before the model changed.
        criterion: What experts were scored by; None where no score decided.
        after: Shape of the model afterwards.
        title: Added to the titles, e.g. ``step 600``.
        seed: Seed of ``criterion=random``.

    Returns:
        By name: ``importance`` (scores; those that become novices are hatched, others that go marked),
        ``use_and_variance`` (who stays among experts that are used and vary, and the boundary), ``similarity`` (hidden
        states between blocks), ``similarity_by_depth`` (of blocks and MoE sub-layers), ``dropping_order`` (of layers).
    """
    figures: dict[str, Figure] = {}
    layers = statistics.shape.moe_layers
    now = roles(statistics.shape, after)
    if criterion is not None and not criterion_named(criterion).selector and layers:
        score = statistics.score(criterion, seed).numpy()
        largest = numpy.nanmax(numpy.abs(score))
        # One score far above all others would leave these without a difference.
        logarithmic = bool(numpy.nanmin(score) >= 0 and largest > 5 * numpy.nanmedian(score) > 0)
        figures["importance"] = heat_map(
            100 * score / largest if largest > 0 else score,
            title=f"Score of the experts, {title}",
            value_label=f"{criterion}, share of the largest",
            unit="%",
            layers=layers,
            novices=now["novice"],
            marked=now["gone"] & numpy.isfinite(score),
            marked_label="goes",
            dropped_label="was not there",
            logarithmic=logarithmic,
            number_format=".1f" if logarithmic else None,
        )
    if {"routing", "outputs"} <= statistics.groups and layers:
        figures["use_and_variance"] = use_and_variance(statistics, now["stays"], f"Who stays, {title}", criterion)
    if "similarity" in statistics.groups:
        figures["similarity"] = similarity_map(
            statistics.hidden_cosine.numpy(),
            title=f"Similarity between blocks, {title}",
            blocks=statistics.shape.blocks,
        )
    if statistics.groups & {"blocks", "layers"}:
        figures["similarity_by_depth"] = similarity_curves(statistics, f"What blocks leave as it was, {title}")
    if {"layers", "blocks", "similarity"} <= statistics.groups and len(statistics.shape.blocks) > 1:
        orders = dropping_orders(statistics)
        figures["dropping_order"] = dropping_order(
            orders, title=f"Which layers would go first, {title}", rows=statistics.shape.blocks
        )
    return figures
