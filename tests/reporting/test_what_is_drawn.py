"""What figures leave out they name; what is the same model is one point; what cannot be told apart is grey."""

import dataclasses
import math
from typing import Any

import pytest
from matplotlib.colors import to_hex

from moe_lightning.evaluation.records import QualityRecord
from moe_lightning.reporting import ComparedRun, comparison_figures, run_figures
from moe_lightning.reporting.moments import drawn_moments, same_model
from moe_lightning.reporting.pareto import ParetoPanel, ParetoPoint, pareto_plot
from moe_lightning.reporting.style import FAINT
from tests.reporting import run_data
from tests.reporting.drawn import axes_of, cost_figures, errorbars, labels_of

LAYERS, EXPERTS = 3, 6


@pytest.fixture(scope="module")
def quality() -> QualityRecord:
    """What a run measured."""
    return run_data.record(LAYERS, EXPERTS)


FAMILY_METHODS = ("ExpertDrop(x=1)", "Novices(r=1)", "Merge()", "LayerDrop()", "ChannelDrop()", "Wanda()", "GPTQ()")


def test_runs_of_more_families_than_colours(quality: QualityRecord) -> None:
    compression = run_data.compression(LAYERS, EXPERTS)
    runs = {
        f"r{number}": ComparedRun(
            quality,
            [dataclasses.replace(compression, summary={**compression.summary, "methods": [method]})],
            run_data.TASKS,
        )
        for number, method in enumerate(FAMILY_METHODS)
    }
    figures = comparison_figures(runs)
    axes = axes_of(figures["quality_against_bytes"])
    assert {text.get_text() for text in axes.texts} == {"before", *runs}
    colours = [to_hex(line.get_color()) for line, *_ in axes.containers]
    assert len(set(colours)) == 8 and colours[-1] == FAINT
    assert len({line.get_marker() for line, *_ in axes.containers}) == 8
    assert "Grey, for want of colours: r6." in figures["quality_against_bytes"].caption
    for name in ("tasks", "layer_errors"):
        assert "Not drawn (more runs than colours): r6." in figures[name].caption
    assert len(axes_of(figures["layer_errors"]).lines) == 6
    assert len(labels_of(axes_of(figures["damage_by_text"]).yaxis)) == 7


def test_any_number_of_groups_can_be_drawn() -> None:
    points = [ParetoPoint(f"p{place}", 1 + place, 9 - place, group=f"g{place}") for place in range(9)]
    figure = pareto_plot([ParetoPanel("size", "MiB", points)], title="t", y_label="loss")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *(f"g{place}" for place in range(5)),
        "others",
        "Pareto front",
    ]
    assert {text.get_text() for text in figure.axes[0].texts} == {point.name for point in points}
    assert [to_hex(line.get_color()) for line, *_ in figure.axes[0].containers][5:] == [FAINT] * 4


def faster(quality: QualityRecord, factor: float, loss: float = 0.0) -> QualityRecord:
    """Return the same run on another day; or, with a loss, of another original model."""
    moments = []
    for moment in quality.moments:
        speed = {
            name: dataclasses.replace(rate, median=factor * rate.median, low=factor * rate.low, high=factor * rate.high)
            for name, rate in moment.speed.items()
        }
        texts = {
            name: dataclasses.replace(
                text, scores=dataclasses.replace(text.scores, nats=text.scores.nats + loss * text.scores.tokens)
            )
            for name, text in moment.texts.items()
        }
        moments.append(dataclasses.replace(moment, speed=speed, texts=texts))
    return QualityRecord(moments, {})


def test_models_before_are_one_where_they_are_one_model(quality: QualityRecord) -> None:
    done = [run_data.compression(LAYERS, EXPERTS)]
    runs = {"one": quality, "other": faster(quality, 1.05), "third": faster(quality, 1.0, 0.01)}
    two = {name: ComparedRun(runs[name], done) for name in ("one", "other")}
    figures = comparison_figures(two)
    names = {name: [text.get_text() for text in axes_of(drawn).texts] for name, drawn in figures.items()}
    assert (
        sorted(names["quality_against_bytes"]) == sorted(names["quality_against_speed"]) == ["before", "one", "other"]
    )
    figures = comparison_figures({**two, "third": ComparedRun(runs["third"], done)})
    names["all"] = [text.get_text() for text in axes_of(figures["quality_against_bytes"]).texts]
    assert sorted(names["all"]) == ["before one, other", "before third", "one", "other", "third"]
    # Other blocks tell nothing about it.
    before = quality.moments[0]
    strange = {name: dataclasses.replace(text, fingerprint="other") for name, text in before.texts.items()}
    assert same_model(before, before) and not same_model(before, dataclasses.replace(before, texts=strange))
    assert not same_model(before, dataclasses.replace(before, bytes=before.bytes // 2))


def test_a_test_of_the_same_model_is_no_point_of_its_own(quality: QualityRecord) -> None:
    end = quality.moments[-1]
    test = dataclasses.replace(end, name="test")
    assert [moment.name for moment in drawn_moments(QualityRecord([*quality.moments, test], {}))][-1] == "end"
    figures = run_figures(QualityRecord([*quality.moments, test], {}), [])
    assert "Not drawn (the same model on the same blocks as another moment): test." in figures["layer_errors"].caption
    text = next(iter(end.texts))
    scores = end.texts[text].scores
    worse = dataclasses.replace(scores, nats=scores.nats * 1.01)
    for other in (
        dataclasses.replace(test, step=end.step + 1),
        dataclasses.replace(test, texts={text: dataclasses.replace(end.texts[text], scores=worse)}),
    ):
        assert drawn_moments(QualityRecord([*quality.moments, other], {}))[-1] is other
    alone = QualityRecord([quality.moments[0], test], {})
    assert drawn_moments(alone)[-1] is test


def tasks_of(results: dict[str, tuple[str, float | None]], mean: float | None = None) -> dict[str, Any]:
    """Return what lm_eval.json holds of one moment."""
    tasks = {
        name: {"metric": metric, "value": value, "stderr": None, "samples": 9, "num_fewshot": 0}
        for name, (metric, value) in results.items()
    }
    return {"moments": [{"name": "end", "step": 1, "limit": None, "tasks": tasks, "mean": mean}]}


def test_only_shares_are_in_percent() -> None:
    results: dict[str, tuple[str, float | None]] = {
        "wikitext": ("word_perplexity", 12.3),
        "arc": ("acc", 0.5),
        "boolq": ("acc", None),
        "qa": ("exact_match,none", 0.25),
    }
    tasks = tasks_of(results, mean=3.0)
    figures = run_figures(None, [], tasks)
    assert list(figures) == ["tasks", "tasks_word_perplexity"]
    axes = axes_of(figures["tasks"])
    assert (axes.get_xlabel(), labels_of(axes.yaxis)) == ("score [%]", ["arc (acc)", "qa (exact_match,none)"])
    assert [x for x, _ in errorbars(axes)] == [50, 25]
    assert "Not drawn (without a number): boolq (acc) of end." in figures["tasks"].caption
    other = axes_of(figures["tasks_word_perplexity"])
    assert (other.get_xlabel(), labels_of(other.yaxis)) == ("word_perplexity", ["wikitext (word_perplexity)"])
    assert [x for x, _ in errorbars(other)] == [12.3]
    assert not run_figures(None, [], tasks_of({"boolq": ("acc", None)}))
    both = comparison_figures({name: ComparedRun(None, [], tasks) for name in ("one", "two")})
    assert list(both) == ["tasks", "tasks_word_perplexity"]
    # No mean of nothing, but one of 0.
    shares: dict[str, tuple[str, float | None]] = {"arc": ("acc", 0.0), "boolq": ("acc", 0.0)}
    for mean, rows in ((None, 2), (0.0, 3)):
        assert len(labels_of(axes_of(run_figures(None, [], tasks_of(shares, mean))["tasks"]).yaxis)) == rows


def test_many_models_that_were_timed_have_a_row_each() -> None:
    benchmark = run_data.benchmark()
    decode = next(row for row in benchmark["rows"] if row["phase"] == "decode")
    rows = [{**decode, "model": f"model {number}"} for number in range(9)]
    rows.append({**decode, "model": "large", "tokens_per_second": None, "refused": "too large"})
    figures = run_figures(None, [], None, [{"rows": rows}])
    labels = labels_of(axes_of(figures["speed_decode"]).yaxis)
    assert labels == [f"model {number}, {decode['implementation']}" for number in range(9)]
    assert "Not drawn (refused): large, " in figures["speed_decode"].caption


def test_what_is_not_finite_is_named(quality: QualityRecord) -> None:
    before, compressed, end = quality.moments
    text = "python-stdlib"
    nats = end.texts[text].scores.nats.clone()
    nats[3] = math.nan
    scores = dataclasses.replace(end.texts[text].scores, nats=nats)
    broken = dataclasses.replace(end, texts={**end.texts, text: dataclasses.replace(end.texts[text], scores=scores)})
    figures = run_figures(QualityRecord([before, compressed, broken], {}), [])
    assert len(errorbars(axes_of(figures["quality_against_bytes"]))) == 2
    assert "Not drawn (not finite): end." in figures["quality_against_bytes"].caption
    assert f"Not drawn (not finite): end on {text}." in figures["damage_by_text"].caption


def test_models_timed_in_another_way_are_named(quality: QualityRecord) -> None:
    before, compressed, end = quality.moments
    speed = {name: dataclasses.replace(rate, batch=64) for name, rate in end.speed.items()}
    figures = cost_figures(QualityRecord([before, compressed, dataclasses.replace(end, speed=speed)], {}))
    assert len(errorbars(figures["quality_against_speed"].figure.axes[0])) == 2
    assert "Not drawn (decode not timed with 1 x 128 tokens): end." in figures["quality_against_speed"].note
