"""Pictures of what a run's quality record holds: what was lost on which text, by which layer, for which size and speed.

L MoE layers, E experts of the original model, B decoder layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lightning.evaluation.intervals import Interval, paired_intervals
from moe_lightning.evaluation.records import BEFORE, QualityMoment, QualityRecord, Routing
from moe_lightning.reporting.captions import Drawn
from moe_lightning.reporting.curves import layer_curves
from moe_lightning.reporting.dots import Dot, dot_rows, interval_dot
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.reporting.moments import drawn_moments, joined, left_out
from moe_lightning.reporting.pareto import ParetoPanel, ParetoPoint, pareto_plot
from moe_lightning.reporting.style import Look

MIB = 2**20


def ratios(moment: QualityMoment, before: QualityMoment | None, text: str) -> dict[str, Interval]:
    """Return what is known of a model on a text, in pairs with the model before where both saw the same blocks.

    Args:
        moment: The model.
        before: The model before the first compression, or None.
        text: Name of the text.
    """
    return paired_intervals(moment.texts[text], None if before is None else before.texts.get(text))


# ---------------------------------------------------------------- texts


def damage_by_text(quality: QualityRecord) -> Drawn | None:
    """Draw by how much perplexity rose on each text, at each moment; None where there is nothing to compare with.

    Args:
        quality: The record.
    """
    before = quality.moment(BEFORE)
    later = [moment for moment in drawn_moments(quality) if moment.name != BEFORE]
    if before is None or not later:
        return None
    rows: dict[str, dict[str, Dot]] = {}
    broken: list[str] = []
    for text, scores in before.texts.items():
        name = f"{text} (not calibrated on)" if scores.calibrated is False else text
        for moment in later:
            if text not in moment.texts or "perplexity_ratio" not in (known := ratios(moment, before, text)):
                continue
            if known["perplexity_ratio"].finite:
                rows.setdefault(name, {})[moment.name] = interval_dot(known["perplexity_ratio"])
            else:
                broken.append(f"{moment.name} on {text}")
    return damage_rows(rows, left_out("not finite", broken))


def damage_rows(rows: Mapping[str, Mapping[str, Dot]], note: str) -> Drawn | None:
    """Draw perplexities in units of that before compression; None where there is none.

    Args:
        rows: By the name of the row and in it.
        note: For the caption.
    """
    if not rows:
        return None
    figure = dot_rows(
        rows,
        title="What was lost on each text",
        value_label="perplexity, in units of that before compression",
        reference=(1.0, "before"),
    )
    return Drawn(figure, note)


# ---------------------------------------------------------------- routing


def load_maps(quality: QualityRecord) -> dict[str, Figure]:
    """Draw which expert gets how many tokens, at each moment, all in one scale of colours.

    Args:
        quality: The record.

    Returns:
        By moment: ``load_before``, ``load_compressed``, ...
    """
    moments = [(moment, moment.routing) for moment in drawn_moments(quality) if moment.routing is not None]
    layers = sorted({layer for _, routing in moments for layer in routing.layers})
    if not layers:
        return {}
    loads = {moment.name: _table(routing, routing.load, layers) for moment, routing in moments}
    largest = max((float(numpy.nanmax(load)) for load in loads.values() if numpy.isfinite(load).any()), default=0.0)
    figures = {}
    for moment, routing in moments:
        load_LE = 100 * loads[moment.name]
        novices_LE = numpy.zeros(load_LE.shape, dtype=bool)
        for layer, novices in zip(routing.layers, routing.novices, strict=True):
            novices_LE[layers.index(layer), novices] = True
        figures[f"load_{moment.name}"] = heat_map(
            load_LE,
            title=f"Load of the experts, {_when(moment)}",
            value_label="share of the routed tokens",
            unit="%",
            layers=layers,
            novices=novices_LE,
            limits=(0.0, 100 * largest or None),
            reference=(100.0 / load_LE.shape[1], "even") if numpy.isfinite(load_LE).all() else None,
            number_format=".1f",
        )
    return figures


def novice_mass(quality: QualityRecord, mass_before: Mapping[int, Sequence[float]] | None = None) -> Figure | None:
    """Draw how much routing weight novices get in each layer, and what the same experts got before they were novices.

    Args:
        quality: The record.
        mass_before: Share of the routing weight of every expert before, by layer; used where the record does not have
            it, for example from calibration.

    Returns:
        None where there are no novices.
    """
    later = [
        (moment, moment.routing)
        for moment in drawn_moments(quality)
        if moment.name != BEFORE and moment.routing is not None and any(moment.routing.novices)
    ]
    if not later:
        return None
    before = quality.moment(BEFORE)
    last = later[-1][1]
    layers = sorted({layer for _, routing in later for layer in routing.layers})
    there = dict(zip(last.layers, last.novices, strict=True))
    known: Mapping[int, Sequence[float | None]] | None = mass_before
    if before is not None and before.routing is not None:
        known = dict(zip(before.routing.layers, before.routing.mass, strict=True))
    series: dict[str, Any] = {}
    if known is not None:
        series[BEFORE] = [_sum(known.get(layer), there.get(layer, ())) for layer in layers]
    for moment, routing in later:
        masses = dict(zip(routing.layers, routing.novice_masses, strict=True))
        series[moment.name] = [100 * masses.get(layer, math.nan) for layer in layers]
    return layer_curves(
        series, title="Routing weight that goes to novices", value_label="share of the weight", unit="%", layers=layers
    )


def _sum(mass: Sequence[float | None] | None, experts: Sequence[int]) -> float:
    return math.nan if mass is None else 100 * sum(mass[expert] or 0.0 for expert in experts)


def _table(routing: Routing, values: Sequence[Sequence[float | None]], layers: Sequence[int]) -> NDArray[numpy.float64]:
    found_LE = numpy.full((len(layers), max(map(len, values), default=1)), numpy.nan)
    for layer, row in zip(routing.layers, values, strict=True):
        found_LE[layers.index(layer)] = [math.nan if value is None else value for value in row]
    return found_LE


def _when(moment: QualityMoment) -> str:
    return f"{moment.name}, step {moment.step}"


# ---------------------------------------------------------------- layers


def layer_error_curves(quality: QualityRecord) -> Figure | None:
    """Draw how far what leaves each block is from what left it before; None where it was not measured.

    Args:
        quality: The record.
    """
    measured = {moment.name: moment.layer_errors for moment in drawn_moments(quality)}
    known = {name: errors for name, errors in measured.items() if any(error > 0 for error in errors.values())}
    return error_curves(known) if known else None


def error_curves(errors: Mapping[str, Mapping[int, float]], shown: Mapping[str, Look] | None = None) -> Figure:
    """Draw errors of what leaves each block, one curve for each model.

    Args:
        errors: By the name of the model, and by the block's original number, in units of the squares before.
        shown: How each of them looks; as everywhere where None.
    """
    blocks = sorted({block for found in errors.values() for block in found})
    return layer_curves(
        {name: [100 * found.get(block, math.nan) for block in blocks] for name, found in errors.items()},
        title="Error of what leaves each block",
        value_label="squared error, relative",
        unit="%",
        layers=blocks,
        layer_label="decoder layer",
        logarithmic=True,
        shown=shown,
    )


# ---------------------------------------------------------------- size and speed


def loss_of(moment: QualityMoment, before: QualityMoment | None, measure: str) -> Interval | None:
    """Return what was lost on the first text.

    Args:
        moment: The model.
        before: The model before the first compression, or None.
        measure: ``perplexity_ratio``, ``divergence`` or ``perplexity``.

    Returns:
        None where it is not known. The model before has exactly ratio 1 and divergence 0.
    """
    if moment is before and measure != "perplexity":
        value = 1.0 if measure == "perplexity_ratio" else 0.0
        return Interval(value, value, value)
    return ratios(moment, before, next(iter(moment.texts))).get(measure) if moment.texts else None


MEASURES = {
    "perplexity_ratio": ("perplexity, in units of that before", "", (1.0, "as before")),
    "divergence": ("KL from the model before", "nats per token", None),
    "perplexity": ("perplexity", "", None),
}
"""What a loss may be, with its unit and the line of no loss; the first that all points have is drawn."""

_BARS = {
    "perplexity_ratio": "Bars are 95 % intervals over blocks, in pairs with the model before.",
    "divergence": "Bars are 95 % intervals over blocks; the model before itself is not there, or at 0.",
    "perplexity": (
        "Bars are 95 % intervals over blocks, of each model by itself and not in pairs. A block that is hard for one "
        "model is hard for all, so they differ more surely than their bars say."
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A model in a picture of quality against cost.

    Attributes:
        name: Beside its point.
        group: Decides its look: a moment of a run, or a family of methods.
        moment: What was measured on it.
        before: The model before the first compression of the same run, or None.
        look: How it looks, where its group does not decide that.
    """

    name: str
    group: str
    moment: QualityMoment
    before: QualityMoment | None
    look: Look | None = None


def tradeoff_figures(candidates: Sequence[Candidate], title: str, path: bool) -> dict[str, Drawn]:
    """Draw quality against bytes and against speed, with the Pareto front.

    Args:
        candidates: The models.
        title: Of the pictures; what is on their axis is added.
        path: Whether the models follow each other in one run.

    Returns:
        ``quality_against_bytes`` and ``quality_against_speed``, those that there is data for: two models or more that
        have the same measure of quality. Rates are drawn of those that were timed with the same batch and context, most
        often. The notes tell the measure, and who is left out.
    """
    found = _measured(candidates)
    if found is None:
        return {}
    measure, losses = found
    broken = [model.name for model, loss in losses if not loss.finite]
    missing = [model.name for model in candidates if all(model is not other for other, _ in losses)]
    losses = [(model, loss) for model, loss in losses if loss.finite]
    if not losses:
        return {}
    notes = [_BARS[measure], left_out("not measured", missing), left_out("not finite", broken)]
    y_label, y_unit, reference = MEASURES[measure]
    labels: dict[str, Any] = {"y_label": y_label, "y_unit": y_unit, "reference": reference, "path": path}
    sizes = []
    for label, size in (("weights on disk", "bytes_on_disk"), ("weights in memory", "bytes")):
        points = [_point(model, getattr(model.moment, size) / MIB, loss) for model, loss in losses]
        sizes.append(ParetoPanel(label, "MiB", points))
    speeds, untimed = [], list[str]()
    for phase in ("prefill", "decode"):
        timed = [(model, model.moment.speed[phase], loss) for model, loss in losses if phase in model.moment.speed]
        ways = Counter((rate.batch, rate.context) for _, rate, _ in timed)
        if not timed:
            continue
        batch, context = ways.most_common(1)[0][0]
        alike = [(model, rate, loss) for model, rate, loss in timed if (rate.batch, rate.context) == (batch, context)]
        names = {model.name for model, _, _ in alike}
        if len(alike) > 1:
            points = [_point(model, rate.median, loss, rate.low, rate.high) for model, rate, loss in alike]
            speeds.append(ParetoPanel(phase, "tokens/s", points, more_is_better=True))
            others = [model.name for model, _ in losses if model.name not in names]
            untimed.append(left_out(f"{phase} not timed with {batch} x {context:,} tokens", others))
        elif len(timed) > 1:
            notes.append(left_out(f"{phase} timed in different ways", [model.name for model, _, _ in timed]))
    note = joined(*notes)
    figures = {"quality_against_bytes": Drawn(pareto_plot(sizes, title=f"{title} against size", **labels), note)}
    if speeds:
        figure = pareto_plot(speeds, title=f"{title} against speed", **labels)
        figures["quality_against_speed"] = Drawn(figure, joined(note, *untimed))
    return figures


def _measured(candidates: Sequence[Candidate]) -> tuple[str, list[tuple[Candidate, Interval]]] | None:
    """Return the first measure that all candidates have, or perplexity of those that have it."""
    for measure in MEASURES:
        losses = [(model, loss_of(model.moment, model.before, measure)) for model in candidates]
        known = [(model, loss) for model, loss in losses if loss is not None]
        if len(known) > 1 and (len(known) == len(losses) or measure == "perplexity"):
            return measure, known
    return None


def _point(
    model: Candidate, x: float, loss: Interval, x_low: float | None = None, x_high: float | None = None
) -> ParetoPoint:
    ends = [end if math.isfinite(end) else None for end in (loss.low, loss.high)]
    return ParetoPoint(model.name, x, loss.value, ends[0], ends[1], x_low, x_high, model.group, model.look)
