"""The figures of sweeps show the numbers that they were given."""

import numpy as np
import pytest

from moe_lightning.plan import CompressionPlan, DropMoE, KeepExperts, NoviceExperts
from moe_lightning.reporting import figure_pixels
from moe_lightning.reporting.decision_maps import STATES, decision_maps, dropping_order
from moe_lightning.reporting.interval_plots import Curve, RankedValue, interval_curves, interval_ranking
from moe_lightning.reporting.model_maps import frequency_variance, similarity_map

CURVE = Curve([0.0, 20.0, 40.0], [1.0, 1.1, 1.5], [1.0, 1.05, 1.3], [1.0, 1.2, 1.8])


def test_curves_show_numbers_and_intervals() -> None:
    panels = {"delete": {"mone": CURVE, "reap": CURVE}, "mean": {"reap": CURVE}}
    figure = interval_curves(panels, title="t", x_label="removed", x_unit="%", y_label="loss", reference=(1.0, "whole"))
    first, second = figure.axes
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["delete", "mean"]
    assert (first.get_xlabel(), first.get_ylabel()) == ("removed [%]", "loss")
    line = first.containers[0]
    assert list(line.lines[0].get_ydata()) == [1.0, 1.1, 1.5]
    ends = np.asarray([segment[:, 1] for segment in line.lines[2][0].get_segments()])
    assert np.allclose(ends, [[1.0, 1.0], [1.05, 1.2], [1.3, 1.8]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mone", "reap"]
    # The same name has the same colour in every panel.
    assert second.containers[0].lines[0].get_color() == first.containers[1].lines[0].get_color()
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert 4 <= len(labels) <= 9
    assert all(float(label) for label in labels)


def test_a_legend_fits_its_figure() -> None:
    curves = {f"a rather long name, number {number}": CURVE for number in range(6)}
    figure = interval_curves({"": curves}, title="t", x_label="x", y_label="y")
    figure_pixels(figure)
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.get_figwidth() * figure.get_dpi()


def test_rankings_are_in_order() -> None:
    values = [
        RankedValue(f"cell {place}", 1.0 + place, 0.9 + place, 1.2 + place, "ab"[place % 2]) for place in range(5)
    ]
    figure = interval_ranking(values, title="t", value_label="loss", reference=(1.0, "whole"))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [value.name for value in values]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b", "whole"}


def test_decisions_and_orders() -> None:
    maps = {
        ("mone", "layer"): [[0, 2], [3, 1]],
        ("mone", "global"): [[0, 0], [2, 2]],
        ("reap", "layer"): [[0, 0], [0, 0]],
    }
    figure = decision_maps(maps, title="t", layers=[4, 7])
    first = figure.axes[0]
    assert np.array_equal(first.images[0].get_array(), [[0, 2], [3, 1]])
    assert [text.get_text() for text in first.texts] == ["1", "2"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["4", "7"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= set(STATES)
    assert not figure.axes[3].get_visible()
    figure = dropping_order({"one": [[True, True], [False, True]]}, title="t")
    assert np.array_equal(figure.axes[0].images[0].get_array(), [[1, 1], [0, 1]])
    figure_pixels(figure)


def test_states_of_a_plan() -> None:
    from moe_lightning.architectures import MixtralArchitecture
    from moe_lightning.sweep.figures import states_of
    from tests.models import tiny_config

    plan = CompressionPlan((KeepExperts(0, (0, 2, 3)), NoviceExperts(1, (1, 4)), DropMoE(2)))
    states = states_of(plan, MixtralArchitecture().shape_of_config(tiny_config()))
    assert states.tolist() == [[0, 3, 0, 0, 3, 3], [0, 2, 0, 0, 2, 0], [3] * 6]


def test_similarity_and_scatter() -> None:
    figure = similarity_map(np.eye(3), title="t", blocks=[0, 2])
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.eye(3))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "2", "out"]
    use, spread = np.array([[0.1, 0.2, 0.0]]), np.array([[1.0, 3.0, 0.0]])
    figure = frequency_variance(
        use,
        spread,
        use * spread > 0.3,
        title="t",
        frequency_label="use",
        deviation_label="spread",
        boundary=0.3,
    )
    axes = figure.axes[0]
    x, y = axes.lines[0].get_data()
    assert np.allclose(x * y, 0.3)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "1 without a place (never used)" in labels
    points = np.concatenate([part.get_offsets() for part in axes.collections])
    assert sorted(map(tuple, points)) == [(0.1, 1.0), (0.2, 3.0)]


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="no curve"):
        interval_curves({}, title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="cannot be told apart"):
        interval_curves({"": dict.fromkeys("abcdefg", CURVE)}, title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="nothing to rank"):
        interval_ranking([], title="t", value_label="x")
    with pytest.raises(ValueError, match="of one shape"):
        decision_maps({("a", "b"): [[0]], ("a", "c"): [[0, 0]]}, title="t")
    with pytest.raises(ValueError, match="states must be"):
        decision_maps({("a", "b"): [[9]]}, title="t")
    with pytest.raises(ValueError, match="same layers"):
        dropping_order({"a": [[True]], "b": [[True], [False]]}, title="t")
    with pytest.raises(ValueError, match=r"\[places, places\]"):
        similarity_map([[1.0, 2.0]], title="t")
    with pytest.raises(ValueError, match="three arrays"):
        frequency_variance([[1.0]], [[1.0, 2.0]], [[True]], title="t", frequency_label="f", deviation_label="d")
