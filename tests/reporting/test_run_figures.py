"""The figures of a run show the numbers that the run left; those of several runs too."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from moe_lightning.evaluation.intervals import perplexity_ratio_interval
from moe_lightning.evaluation.records import QualityMoment, QualityRecord
from moe_lightning.reporting import ComparedRun, comparison_figures, figure_pixels, roles, run_figures
from moe_lightning.reporting.dots import Dot, bars, dot_rows
from moe_lightning.reporting.moments import drawn_moments
from moe_lightning.reporting.pareto import ParetoPanel, ParetoPoint, front, pareto_plot
from moe_lightning.reporting.quality_figures import (
    damage_by_text,
    layer_error_curves,
    load_maps,
    novice_mass,
)
from moe_lightning.reporting.run_figures import FEW_TOKENS, few_tokens
from moe_lightning.reporting.run_records import CompressionRecord
from moe_lightning.reporting.statistics_figures import boundary_of, similarity_curves, use_and_variance
from moe_lightning.reporting.style import LOOKS, family_of, looks
from moe_lightning.statistics import Statistics
from moe_lightning.trimming import ExpertDrop, Novices
from tests.reporting import run_data
from tests.reporting.drawn import axes_of, cost_figures, errorbars, labels_of

LAYERS, EXPERTS = 3, 6


@pytest.fixture(scope="module")
def quality() -> QualityRecord:
    """What a run measured."""
    return run_data.record(LAYERS, EXPERTS)


def decision(compression: CompressionRecord) -> Any:
    """Return the axes of who stays among experts that are used and vary."""
    assert compression.statistics is not None and compression.shape_after is not None
    stays = roles(compression.statistics.shape, compression.shape_after)["stays"]
    return use_and_variance(compression.statistics, stays, "t", compression.criterion).axes[0]


def test_all_figures_that_there_is_data_for(quality: QualityRecord) -> None:
    compression = run_data.compression(LAYERS, EXPERTS)
    figures = run_figures(quality, [compression], run_data.TASKS, [run_data.benchmark()], run_data.TIME)
    assert list(figures) == [
        "quality_against_bytes",
        "quality_against_speed",
        "damage_by_text",
        "tasks",
        "layer_errors",
        "load_before",
        "load_compressed",
        "load_end",
        "novice_mass",
        "importance",
        "use_and_variance",
        "similarity",
        "similarity_by_depth",
        "dropping_order",
        "calibration_tokens",
        "speed_prefill",
        "speed_decode",
        "time",
        "compression_time",
    ]
    assert all(figure.title and figure.caption.endswith(".") for figure in figures.values())
    assert figures["load_end"].title == "Load of the experts: end"
    for name, figure in figures.items():
        assert any(axes.get_xlabel() for axes in figure.figure.axes), name
        assert any(axes.get_ylabel() or labels_of(axes.yaxis) for axes in figure.figure.axes), name
    assert not run_figures(None, [])
    bare = dataclasses.replace(compression, statistics=None, summary={})
    assert not run_figures(QualityRecord([], {}), [bare])


def test_figures_of_several_compressions_have_names_of_their_own() -> None:
    both = [run_data.compression(LAYERS, EXPERTS, step=step) for step in (100, 200)]
    figures = run_figures(None, both)
    assert "compression-100/importance" in figures
    assert figures["compression-200/importance"].title == "Score of the experts: step 200"
    assert "importance" not in figures
    # All compressions together.
    axes = figures["compression_time"].figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([62.0, 23.0, 1.6, 0.8, 0.2, 0.04])


def test_quality_against_cost(quality: QualityRecord) -> None:
    figures = cost_figures(quality)
    disk, memory = figures["quality_against_bytes"].figure.axes
    before, *later = quality.moments
    expected = [1.0]
    for moment in later:
        pair = [item.texts["python-stdlib"].scores.likelihood for item in (moment, before)]
        expected.append(perplexity_ratio_interval(*pair).value)
    assert [y for _, y in errorbars(disk)] == pytest.approx(expected)
    assert [x for x, _ in errorbars(disk)] == pytest.approx([item.bytes_on_disk / 2**20 for item in quality.moments])
    assert [x for x, _ in errorbars(memory)] == pytest.approx([item.bytes / 2**20 for item in quality.moments])
    assert (disk.get_xlabel(), memory.get_xlabel()) == ("weights on disk [MiB]", "weights in memory [MiB]")
    assert disk.get_ylabel() == "perplexity, in units of that before"
    prefill, decode = figures["quality_against_speed"].figure.axes
    assert [x for x, _ in errorbars(decode)] == pytest.approx([item.speed["decode"].median for item in quality.moments])
    assert prefill.get_xlabel() == "prefill [tokens/s]"
    # The same moments look the same there and in other pictures.
    colours = [to_hex(line.get_color()) for line, *_ in disk.containers]
    assert colours == [LOOKS[name].colour.lower() for name in ("before", "compressed", "end")]
    assert [line.get_marker() for line, *_ in decode.containers] == ["o", "s", "^"]


def test_without_a_moment_before_perplexity_itself_is_drawn(quality: QualityRecord) -> None:
    later = QualityRecord(quality.moments[1:], {})
    figures = cost_figures(later)
    axes = axes_of(figures["quality_against_bytes"])
    assert "in pairs" not in figures["quality_against_bytes"].note
    assert axes.get_ylabel() == "KL from the model before [nats per token]"
    unknown = [
        dataclasses.replace(
            moment,
            texts={
                name: dataclasses.replace(text, scores=run_data.scores(3, 0.1 * place, compared=False))
                for name, text in moment.texts.items()
            },
        )
        for place, moment in enumerate(later.moments)
    ]
    figures = cost_figures(QualityRecord(unknown, {}))
    assert axes_of(figures["quality_against_bytes"]).get_ylabel() == "perplexity"
    assert "not in pairs" in figures["quality_against_bytes"].note
    assert damage_by_text(QualityRecord(unknown, {})) is None


def test_the_front_holds_what_no_other_one_beats() -> None:
    points = [
        ParetoPoint(name, x, y) for name, x, y in (("a", 1, 5), ("b", 2, 3), ("c", 2, 4), ("d", 3, 3), ("e", 4, 1))
    ]
    assert [point.name for point in front(points)] == ["a", "b", "e"]
    assert [point.name for point in front(points, more_is_better=True)] == ["e"]
    figure = pareto_plot([ParetoPanel("size", "MiB", points)], title="t", y_label="loss")
    steps = next(line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post")
    assert [*zip(*steps.get_data(), strict=True)] == [(1, 5), (2, 3), (4, 1)]


def test_names_of_points_do_not_cover_each_other() -> None:
    # A crowd in the middle, as of runs that hardly differ.
    points = [ParetoPoint(f"run {place}", 1 + 0.002 * (place % 3), 1 + 0.01 * place) for place in range(7)]
    points.append(ParetoPoint("far away", 2.0, 1.4))
    figure = pareto_plot([ParetoPanel("size", "MiB", points)], title="t", y_label="loss")
    figure_pixels(figure, 100)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(points)
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    frame = figure.axes[0].bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_damage_by_text(quality: QualityRecord) -> None:
    axes = axes_of(damage_by_text(quality))
    assert labels_of(axes.yaxis) == ["python-stdlib", "python-topics (not calibrated on)"]
    drawn = errorbars(axes)
    assert len(drawn) == 4
    before, compressed, _ = quality.moments
    pair = [item.texts["python-topics"].scores.likelihood for item in (compressed, before)]
    expected = perplexity_ratio_interval(*pair)
    assert drawn[2][0] == pytest.approx(expected.value)
    (segment,) = axes.containers[2].lines[2][0].get_segments()
    assert list(segment[:, 0]) == pytest.approx([expected.low, expected.high])
    # On other blocks nothing can be said in pairs.
    strange = {name: dataclasses.replace(text, fingerprint="other") for name, text in before.texts.items()}
    other = QualityRecord([dataclasses.replace(before, texts=strange), compressed], {})
    assert damage_by_text(other) is None


def test_load_and_mass_of_novices(quality: QualityRecord) -> None:
    figures = load_maps(quality)
    before, _, end = quality.moments
    assert before.routing is not None and end.routing is not None
    shown = figures["load_end"].axes[0].images[0]
    assert np.allclose(shown.get_array(), 100 * np.array(end.routing.load, dtype=float))
    ranges = {figures[f"load_{name}"].axes[0].images[0].get_clim() for name in ("before", "compressed", "end")}
    assert len(ranges) == 1
    hatched = [patch for patch in figures["load_end"].axes[0].patches if patch.get_hatch()]
    assert len(hatched) == sum(map(len, end.routing.novices)) > 0
    lines = {line.get_label(): line for line in axes_of(novice_mass(quality)).lines}
    for name, routing in (("before", before.routing), ("end", end.routing)):
        expected = [
            100 * sum(row[expert] or 0.0 for expert in novices)
            for row, novices in zip(routing.mass, end.routing.novices, strict=True)
        ]
        assert list(lines[name].get_ydata()) == pytest.approx(expected)


def test_mass_before_comes_from_calibration_where_nothing_else_is_known(quality: QualityRecord) -> None:
    compression = run_data.compression(LAYERS, EXPERTS)
    later = QualityRecord(quality.moments[1:], {})
    assert {line.get_label() for line in axes_of(novice_mass(later)).lines} == {"compressed", "end"}
    axes = run_figures(later, [compression])["novice_mass"].figure.axes[0]
    line = next(line for line in axes.lines if line.get_label() == "before")
    assert compression.statistics is not None and later.moments[1].routing is not None
    mass = compression.statistics["gate_sum"]
    novices = later.moments[1].routing.novices
    expected = [float(100 * mass[row, list(chosen)].sum() / mass[row].sum()) for row, chosen in enumerate(novices)]
    assert list(line.get_ydata()) == pytest.approx(expected)


def test_experts_and_layers_that_went_are_crossed_out() -> None:
    compression = run_data.compression(LAYERS, EXPERTS, ExpertDrop(keep=4, criterion="mone"))  # type: ignore[arg-type]
    before, after = compression.shape_before, compression.shape_after
    assert before is not None and after is not None
    moments = [run_data.moment("before", before, 0, 1), run_data.moment("end", after, 0.1, 2)]
    load = load_maps(QualityRecord(moments, {}))["load_end"]
    assert int(np.ma.getmaskarray(load.axes[0].images[0].get_array()).sum()) == LAYERS * 2
    assert [text.get_text() for text in load.legends[0].get_texts()] == ["not there (dropped)"]
    # Scores of those that go are shown all the same.
    importance = run_figures(None, [compression])["importance"].figure
    assert not np.ma.getmaskarray(importance.axes[0].images[0].get_array()).any()
    assert [text.get_text() for text in importance.legends[0].get_texts()] == ["goes"]
    assert len(importance.axes[0].collections[0].get_offsets()) == LAYERS * 2


def test_errors_by_depth(quality: QualityRecord) -> None:
    axes = axes_of(layer_error_curves(quality))
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"compressed", "end"}
    assert list(lines["end"].get_ydata()) == pytest.approx(
        [100 * error for error in quality.moments[2].layer_errors.values()]
    )
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "squared error, relative [%]")
    # A block that is gone leaves a gap.
    fewer = dataclasses.replace(quality.moments[2], layer_errors={0: 0.1, 2: 0.2})
    gap = axes_of(layer_error_curves(QualityRecord([quality.moments[1], fewer], {})))
    assert np.isnan(gap.lines[1].get_ydata()[1])


def test_tasks_and_speed() -> None:
    figures = run_figures(None, [], run_data.TASKS, [run_data.benchmark()])
    axes = figures["tasks"].figure.axes[0]
    assert labels_of(axes.yaxis) == ["arc_easy (acc_norm)", "boolq (acc)", "mean"]
    assert [round(x, 6) for x, _ in errorbars(axes)] == [50, 41, 47, 60, 51, 57, 55, 46, 52]
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    assert list(segment[:, 0]) == pytest.approx([48, 52])
    axes = figures["speed_decode"].figure.axes[0]
    assert labels_of(axes.yaxis) == ["1 x 128 tokens", "8 x 128 tokens"]
    assert errorbars(axes)[0][0] == 300.0


def test_time_in_readable_units() -> None:
    axes = run_figures(None, [], None, (), run_data.TIME)["time"].figure.axes[0]
    assert axes.get_xlabel() == "time [min]"
    assert labels_of(axes.yaxis)[:2] == ["training", "evaluation"]
    assert [patch.get_width() * 60 for patch in axes.patches][:2] == pytest.approx([260, 70])
    assert axes.texts[0].get_text() == "4.33 min (60.3%)"
    short = {"total_seconds": 3.0, "parts": {"training": 3.0, "exporting": 0.0}}
    axes = run_figures(None, [], None, (), short)["time"].figure.axes[0]
    assert (axes.get_xlabel(), labels_of(axes.yaxis)) == ("time [s]", ["training"])


def test_boundaries_part_who_stays() -> None:
    score = np.array([[1.0, 4.0], [2.0, 8.0]])
    stays = score > 3
    assert boundary_of(score, stays, ~stays) == pytest.approx(math.sqrt(2 * 4))
    # Each layer has a threshold of its own.
    score = np.array([[1.0, 2.0], [4.0, 8.0], [5.0, 6.0]])
    stays = np.array([[False, True], [False, True], [True, True]])
    found = boundary_of(score, stays, ~stays)
    assert isinstance(found, list)
    assert found[:2] == pytest.approx([math.sqrt(2), math.sqrt(32)]) and math.isnan(found[2])
    # Not by these scores.
    stays[0] = [True, False]
    assert boundary_of(score, stays, ~stays) is None
    everyone = np.ones_like(stays)
    assert boundary_of(score, everyone, ~everyone) is None


@pytest.mark.parametrize(("scope", "lines"), [("global", 1), ("layer", LAYERS)])
def test_the_boundary_of_a_score_that_is_a_product(scope: Any, lines: int) -> None:
    method = Novices(ratio=0.5, criterion="mone", scope=scope)
    compression = run_data.compression(LAYERS, EXPERTS, method)
    axes = decision(compression)
    assert compression.statistics is not None
    score = compression.statistics.score("mone")
    novices = {edit.layer: edit.experts for edit in compression.plan.edits}  # type: ignore[attr-defined]
    boundaries = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(boundaries) == lines
    for row, line in enumerate(boundaries):
        (bound,) = {round(float(x * y), 9) for x, y in zip(*line.get_data(), strict=True)}
        rows = range(LAYERS) if lines == 1 else [row]
        for layer in rows:
            goes = torch.zeros(EXPERTS, dtype=torch.bool)
            goes[list(novices.get(layer, ()))] = True
            assert (score[layer][goes] < bound).all() and (score[layer][~goes] > bound).all()
    assert axes.get_xlabel() == "routing weight, mean over all tokens"
    # Of a score that is none of the axes nothing can be drawn.
    other = run_data.compression(LAYERS, EXPERTS, Novices(ratio=0.5, criterion="reap"))
    axes = decision(other)
    assert not [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert axes.get_xlabel() == "share of the tokens that pick the expert [%]"


def test_similarity_by_depth() -> None:
    statistics = run_data.statistics_of(run_data.shape_of(LAYERS, EXPERTS))
    axes = similarity_curves(statistics, "t").axes[0]
    whole, sub = axes.lines
    assert list(whole.get_ydata()) == pytest.approx(statistics.block_cosine.tolist())
    assert list(sub.get_ydata()) == pytest.approx(statistics.moe_cosine.tolist())
    bare = Statistics(statistics.shape, {})
    with pytest.raises(ValueError, match="hold no cosines"):
        similarity_curves(bare, "t")


def test_tokens_are_drawn_where_some_experts_got_few() -> None:
    compression = run_data.compression(LAYERS, EXPERTS)
    statistics = compression.statistics
    assert statistics is not None
    count = statistics["count"]
    assert compression.shape_after is not None
    became = roles(statistics.shape, compression.shape_after)
    axes = few_tokens(statistics, became)["calibration_tokens"].axes[0]
    assert np.allclose(axes.images[0].get_array(), count.numpy())
    (corners,) = axes.collections
    few = {(column + 0.5, row - 0.5) for row, column in (count < FEW_TOKENS).nonzero().tolist()}
    assert set(map(tuple, corners.get_offsets().tolist())) == few
    statistics.tensors["count"] = count + FEW_TOKENS
    assert not few_tokens(statistics, became)


def test_many_compressions_leave_the_first_two_and_the_last(quality: QualityRecord) -> None:
    names = ["before", "compressed", *(f"compressed-{number}" for number in range(2, 9)), "end"]
    moments = [dataclasses.replace(quality.moments[1], name=name) for name in names]
    record = QualityRecord(moments, {})
    shown = [moment.name for moment in drawn_moments(record)]
    assert shown == ["before", "compressed", "compressed-2", "compressed-8", "end"]
    left = "(between the first two compressions and the last): compressed-3, compressed-4, compressed-5, compressed-6"
    assert left in run_figures(record, [])["layer_errors"].caption


def test_runs_side_by_side(quality: QualityRecord) -> None:
    dropped = run_data.compression(LAYERS, EXPERTS, ExpertDrop(keep=4, criterion="mone"))  # type: ignore[arg-type]
    assert dropped.shape_after is not None
    other = QualityRecord([quality.moments[0], run_data.moment("end", dropped.shape_after, 0.4, 8)], {})
    runs = {
        "novices": ComparedRun(quality, [run_data.compression(LAYERS, EXPERTS)], run_data.TASKS),
        "drop": ComparedRun(other, [dropped], run_data.TASKS),
    }
    figures = comparison_figures(runs)
    costs = ["quality_against_bytes", "quality_against_speed"]
    assert list(figures) == [*costs, "damage_by_text", "tasks", "layer_errors"]
    axes = figures["quality_against_bytes"].figure.axes[0]
    assert [text.get_text() for text in axes.texts].count("before") == 1  # the same model, drawn once
    assert {text.get_text() for text in axes.texts} == {"before", "novices", "drop"}
    ends = [item.bytes_on_disk / 2**20 for item in (quality.moments[0], quality.moments[2], other.moments[1])]
    assert [x for x, _ in errorbars(axes)] == pytest.approx(ends)
    assert "in pairs with the model before" in figures["quality_against_bytes"].caption
    colours = [to_hex(line.get_color()) for line, *_ in axes.containers]
    assert colours[1:] == [LOOKS[name].colour.lower() for name in ("novices", "experts dropped")]
    lines = figures["layer_errors"].figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["novices", "drop"]
    # A run looks the same in all of them.
    assert [to_hex(line.get_color()) for line in lines] == colours[1:]
    axes = figures["tasks"].figure.axes[0]
    assert {to_hex(line.get_color()) for line, *_ in axes.containers} == set(colours[1:])
    legend = axes.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["novices", "drop"]
    assert [to_hex(line.get_color()) for line in legend.get_lines()] == colours[1:]
    assert not comparison_figures({"one": ComparedRun(None)})
    # One run alone can be compared with itself before.
    assert list(comparison_figures({"one": runs["drop"]})) == costs


def test_the_same_things_look_the_same() -> None:
    one, other = looks(["end", "before", "mine"]), looks(["yours", "before"])
    assert one["before"] == other["before"] == LOOKS["before"]
    assert len({look.colour for look in one.values()}) == 3
    assert looks(["low_rank:16"])["low_rank:16"] == LOOKS["low_rank"]
    assert family_of(["Novices(ratio=0.5)", "LoRA(rank=4)"]) == "novices"
    assert family_of(["Wanda(pattern='2:4')", "GPTQ(bits=4)"]) == "several"
    assert family_of([]) == "original"


def test_what_does_not_fit_is_an_error(quality: QualityRecord) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        dot_rows({}, title="t", value_label="v")
    with pytest.raises(ValueError, match="cannot be told apart"):
        dot_rows({"row": {str(number): Dot(1, 1, 1) for number in range(7)}}, title="t", value_label="v")
    with pytest.raises(ValueError, match="at least one number"):
        bars({}, title="t", value_label="v")
    with pytest.raises(ValueError, match="at least one point"):
        pareto_plot([ParetoPanel("x", "", [])], title="t", y_label="y")
    moment: QualityMoment = quality.moments[1]
    assert moment.routing is not None
    torn = dataclasses.replace(moment.routing, load=moment.routing.load[:-1])
    with pytest.raises(ValueError):
        load_maps(QualityRecord([dataclasses.replace(moment, routing=torn)], {}))
