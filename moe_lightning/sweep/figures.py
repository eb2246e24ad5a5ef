"""The pictures of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.figure import Figure

from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.reporting.decision_maps import STATES, decision_maps, dropping_order
from moe_lightning.reporting.interval_plots import Curve, RankedValue, interval_curves, interval_ranking
from moe_lightning.reporting.model_maps import similarity_map
from moe_lightning.reporting.statistics_figures import dropping_orders, use_and_variance
from moe_lightning.reporting.style import CATEGORICAL, save_figure
from moe_lightning.statistics import Statistics
from moe_lightning.sweep.results import Row, Summary, summaries
from moe_lightning.trimming import Novices

MOST_RANKED = 36
"""Lines of a ranking."""


def write_figures(rows: Sequence[Row], statistics: Statistics, folder: Path) -> list[Path]:
    """Draw everything that there is data for.

    Args:
        rows: What ``rows_of`` returned.
        statistics: The shared ones.
        folder: Where the pictures go.

    Returns:
        The files.
    """
    figures: dict[str, Figure] = {
        **_curves(rows),
        **_rankings(rows),
        **_decisions(rows, statistics.shape),
        **_of_statistics(statistics, sorted({row.cell.ratio for row in rows if row.cell and row.cell.ratio})),
    }
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        save_figure(figure, written[-1])
    return written


def _curve(points: Sequence[Summary], original: Row) -> Curve:
    whole = original.result.size.parameters
    ordered = sorted(points, key=lambda point: -point.parameters)
    return Curve(
        [0.0, *(100 * (1 - point.parameters / whole) for point in ordered)],
        [1.0, *(point.to_original for point in ordered)],
        [1.0, *(point.ends_to_original[0] for point in ordered)],
        [1.0, *(point.ends_to_original[1] for point in ordered)],
    )


def _curves(rows: Sequence[Row]) -> dict[str, Figure]:
    original, points = rows[0], [summary for summary in summaries(rows) if summary.cell.ratio is not None]
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for point in points:
        groups.setdefault((point.cell.scope, point.cell.operator, point.cell.criterion), []).append(point)
    labels = {
        "x_label": "parameters removed",
        "x_unit": "%",
        "y_label": "perplexity / uncompressed",
    }
    reference = (1.0, "")
    figures = {}
    for scope in dict.fromkeys(scope for scope, _, _ in groups if scope):
        criteria = _in_several_operators(scope, list(groups))[: len(CATEGORICAL)]
        panels: dict[str, dict[str, Curve]] = {}
        for (other, operator, criterion), members in groups.items():
            if other == scope and criterion in criteria:
                panels.setdefault(operator, {})[criterion] = _curve(members, original)
        # A panel with one curve says little beside panels with several.
        most = max(map(len, panels.values()), default=0)
        panels = {name: curves for name, curves in panels.items() if len(curves) > 1 or most == 1}
        if panels:
            title = f"Perplexity against size, scope {scope}"
            figures[f"curves-{scope}"] = interval_curves(panels, title=title, reference=reference, **labels)  # type: ignore[arg-type]
    unscored = {operator: _curve(members, original) for (scope, operator, _), members in groups.items() if not scope}
    if unscored:
        best = _best_label([point for point in points if point.cell.criterion] or points)
        room = len(CATEGORICAL) - 1
        chosen = dict(sorted(unscored.items(), key=lambda item: float(numpy.asarray(item[1].y)[-1]))[:room])
        chosen[f"best with a criterion: {' '.join(part for part in best if part)}"] = _curve(
            groups[best[2], best[1], best[0]], original
        )
        title = "Methods that rank by themselves, and the best one with a criterion"
        figures["curves-baselines"] = interval_curves({"": chosen}, title=title, reference=reference, **labels)  # type: ignore[arg-type]
    return figures


def _in_several_operators(scope: str, groups: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the criteria that were tried with the most operators under a scope, in their order."""
    counts: dict[str, int] = {}
    for other, _, criterion in groups:
        if other == scope:
            counts[criterion] = counts.get(criterion, 0) + 1
    most = max(counts.values(), default=0)
    return [criterion for criterion, count in counts.items() if count == most]


def _best_label(points: Sequence[Summary]) -> tuple[str, str, str]:
    """Return criterion, operator and scope of the cell with the least loss at the largest ratio."""
    largest = max(point.cell.ratio or 0.0 for point in points)
    best = min((point for point in points if point.cell.ratio == largest), key=lambda point: point.perplexity)
    return best.cell.criterion, best.cell.operator, best.cell.scope


def _rankings(rows: Sequence[Row]) -> dict[str, Figure]:
    figures = {}
    everything = summaries(rows)
    for ratio in sorted({point.cell.ratio for point in everything if point.cell.ratio is not None}):
        chosen = sorted(
            (point for point in everything if point.cell.ratio == ratio), key=lambda point: point.perplexity
        )
        values = [
            RankedValue(
                " ".join(part for part in point.cell.label[:3] if part),
                point.to_original,
                *point.ends_to_original,
                point.cell.operator if point.cell.criterion else "ranks by itself",
            )
            for point in chosen[:MOST_RANKED]
        ]
        title = f"Budget of {ratio:.0%} of the experts: "
        title += "all cells" if len(chosen) <= MOST_RANKED else f"the best {MOST_RANKED} of {len(chosen)} cells"
        figures[f"ranking-{100 * ratio:g}"] = interval_ranking(
            values,
            title=title,
            value_label="perplexity divided by that of the uncompressed model",
            reference=(1.0, "uncompressed"),
        )
    return figures


def states_of(plan: CompressionPlan, shape: ModelShape) -> numpy.ndarray:
    """Return what became of every expert, ``[layers, experts]``, as places in ``decision_maps.STATES``.

    Args:
        plan: What was decided.
        shape: Shape of the model before.
    """
    after = {layout.layer: layout for layout in plan.check(shape).layouts}
    states = numpy.full((len(shape.layouts), shape.num_experts), STATES.index("gone"))
    for row, layer in enumerate(shape.moe_layers):
        layout = after.get(layer)
        if layout is not None:
            states[row, list(layout.real)] = STATES.index("stays")
            states[row, list(layout.novices)] = STATES.index("replaced by a novice")
            states[row, [expert for expert, _ in layout.merged]] = STATES.index("merged into another")
    return states


def _decisions(rows: Sequence[Row], shape: ModelShape) -> dict[str, Figure]:
    figures = {}
    scored = [row for row in rows if row.cell is not None and row.cell.criterion and row.cell.ratio is not None]
    for ratio in sorted({row.cell.ratio for row in scored if row.cell and row.cell.ratio}):
        at_ratio = [row for row in scored if row.cell and row.cell.ratio == ratio]
        operators = [row.cell.operator for row in at_ratio if row.cell]
        # The operator that was tried the most; of equal ones the last, which is the largest of a usual list.
        operator = max(reversed(list(dict.fromkeys(operators))), key=operators.count)
        maps: dict[tuple[str, str], numpy.ndarray] = {}
        for row in at_ratio:
            assert row.cell is not None
            if row.cell.operator == operator:
                maps.setdefault((row.cell.criterion, row.cell.scope), states_of(row.result.plan, shape))
        title = f"Who goes at {ratio:.0%}, operator {operator}"
        figures[f"decisions-{100 * ratio:g}"] = decision_maps(maps, title=title, layers=shape.moe_layers)
    return figures


def _of_statistics(statistics: Statistics, ratios: Sequence[float]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    shape, groups = statistics.shape, statistics.groups
    if "similarity" in groups:
        cosine = statistics["hidden_cosine_sum"] / statistics["similarity_tokens"]
        title = "How alike the hidden states between blocks are"
        figures["similarity"] = similarity_map(cosine.numpy(), title=title, blocks=shape.blocks)
    if {"layers", "blocks", "similarity"} <= groups and len(shape.blocks) > 1:
        figures["dropping-order"] = dropping_order(
            dropping_orders(statistics), title="Which layers go first", rows=shape.blocks
        )
    if {"routing", "outputs"} <= groups:
        for ratio in ratios:
            figures[f"frequency-variance-{100 * ratio:g}"] = _scatter(statistics, ratio)
    return figures


def _scatter(statistics: Statistics, ratio: float) -> Figure:
    edits = Novices(ratio=ratio, criterion="mone", scope="global").propose(statistics.shape, statistics)
    stays = numpy.ones((len(statistics.shape.layouts), statistics.shape.num_experts), dtype=bool)
    for edit in edits:
        stays[statistics.row(edit.layer), list(edit.experts)] = False  # type: ignore[attr-defined]
    title = f"Use and variance of the experts; MoNE lets {ratio:.0%} go, one budget for all layers"
    return use_and_variance(statistics, stays, title, "mone")
