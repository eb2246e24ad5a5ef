"""Pictures of one compression: what the statistics said, and who stayed."""

from __future__ import annotations

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lightning.plan import ModelShape
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.model_maps import frequency_variance, similarity_map
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.statistics.groups import real_experts


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
        By name: ``importance`` (scores, novices hatched and dropped experts crossed out), ``frequency_and_deviation``
        (who stays among frequent and variable experts), ``similarity`` (hidden states between blocks).
    """
    figures: dict[str, Figure] = {}
    layers = statistics.shape.moe_layers
    now = roles(statistics.shape, after)
    if criterion is not None and not criterion_named(criterion).selector and layers:
        score = statistics.score(criterion, seed).numpy()
        largest = numpy.nanmax(numpy.abs(score))
        figures["importance"] = heat_map(
            100 * score / largest if largest > 0 else score,
            title=f"Score of the experts, {title}",
            value_label=f"{criterion}, share of the largest",
            unit="%",
            layers=layers,
            novices=now["novice"],
            dropped=now["gone"],
            undefined_label="no score",
        )
    if {"routing", "outputs"} <= statistics.groups and layers:
        # Novices and experts that were gone before are no part of the decision.
        real = real_experts(statistics.shape).numpy()
        figures["frequency_and_deviation"] = frequency_variance(
            numpy.where(real, 100 * statistics.score("frequency").numpy(), numpy.nan),
            numpy.where(real, statistics.score("variance").numpy(), numpy.nan),
            now["stays"],
            title=f"Who stays, {title}",
            frequency_label="share of the tokens that pick the expert [%]",
            deviation_label="norm of the output's standard deviation",
            layers=layers,
        )
    if "similarity" in statistics.groups:
        figures["similarity"] = similarity_map(
            statistics.hidden_cosine.numpy(),
            title=f"Similarity between blocks, {title}",
            blocks=statistics.shape.blocks,
        )
    return figures
