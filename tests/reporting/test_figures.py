"""Figures show the data that they were given, with labelled axes; tables say who stands where."""

from pathlib import Path

import numpy as np
import pytest

from moe_lightning.plan import CompressionPlan, KeepExperts, NoviceExperts, plan_table
from moe_lightning.reporting import figure_pixels, heat_map, layer_curves, save_figure, step_curves
from tests.models import tiny_config


def test_heat_map_shows_its_values() -> None:
    values = np.arange(12, dtype=float).reshape(3, 4)
    values[1, 2] = np.nan
    novices = np.zeros((3, 4), dtype=bool)
    novices[0, 1] = True
    figure = heat_map(values, title="Load", value_label="share", unit="%", layers=[0, 2, 5], novices=novices)
    axes, bar = figure.axes
    shown = axes.images[0].get_array()
    assert np.array_equal(np.asarray(shown.filled(np.nan)), values, equal_nan=True)
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("expert", "layer", "share [%]")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "5"]
    assert axes.get_title(loc="left") == "Load"
    numbers = {text.get_text() for text in axes.texts}
    assert numbers == {str(int(value)) for value in values[np.isfinite(values)]}
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"novice", "not there (dropped)"}


def test_a_cell_without_tokens_is_not_a_dropped_expert() -> None:
    values = np.array([[0.5, np.nan], [0.25, 0.75]])
    figure = heat_map(
        values, title="t", value_label="v", dropped=np.zeros((2, 2), dtype=bool), undefined_label="no token"
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no token"]


def test_large_maps_have_no_numbers_and_few_ticks() -> None:
    figure = heat_map(np.random.default_rng(0).random((32, 64)), title="t", value_label="v")
    axes = figure.axes[0]
    assert not axes.texts
    assert len(axes.get_xticks()) <= 20
    height, width, _ = figure_pixels(figure).shape
    assert width > 600
    assert height > 300


def test_curves_show_their_values() -> None:
    steps, values = np.array([10, 20, 30]), np.arange(6, dtype=float).reshape(3, 2)
    figure = step_curves(steps, values, title="t", value_label="entropy", events={"compressed": 20})
    lines = figure.axes[0].lines
    assert np.array_equal(lines[0].get_ydata(), values[:, 0])
    assert np.array_equal(lines[1].get_ydata(), values[:, 1])
    figure = layer_curves({"before": [1, 2], "after": [3, 4]}, title="t", value_label="mass")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1, 2], [3, 4]]
    assert figure.axes[0].get_xlabel() == "layer"


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"values \[layers, experts\]"):
        heat_map([1.0, 2.0], title="t", value_label="v")
    with pytest.raises(ValueError, match="novices has shape"):
        heat_map([[1.0, 2.0]], title="t", value_label="v", novices=[[True]])
    with pytest.raises(ValueError, match="cannot be told apart"):
        layer_curves({str(number): [1.0] for number in range(7)}, title="t", value_label="v")


def test_files_are_whole(tmp_path: Path) -> None:
    save_figure(heat_map([[1.0, 2.0]], title="t", value_label="v"), tmp_path / "a" / "map.png")
    assert (tmp_path / "a" / "map.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_plan_table() -> None:
    from moe_lightning.architectures import MixtralArchitecture

    plan = CompressionPlan((KeepExperts(0, (0, 2, 3)), NoviceExperts(1, (1, 4))))
    shape = plan.check(MixtralArchitecture().shape_of_config(tiny_config()))
    rows = plan_table(plan, shape).splitlines()
    assert "| 0 | 0 2 3 | - | 1 4 5 |" in rows
    assert "| 1 | 0 2 3 5 | 1 4 | - |" in rows
    assert "| 2 | 0 1 2 3 4 5 | - | - |" in rows


def test_numbers_of_novices_are_not_hatched_through() -> None:
    """Behind each number of a hatched cell lies a box in the colour of the cell, without a hatch."""
    novices = [[True, False], [False, True]]
    figure = heat_map([[1.0, 2.0], [3.0, 4.0]], title="t", value_label="v", novices=novices)
    boxes = {text.get_text(): text.get_bbox_patch() for text in figure.axes[0].texts}
    assert [boxes[name] is not None for name in ("1", "2", "3", "4")] == [True, False, False, True]
    image = figure.axes[0].images[0]
    for name in ("1", "4"):
        box = boxes[name]
        assert box.get_facecolor() == image.cmap(image.norm(float(name)))
        assert not box.get_hatch() and box.get_alpha() in (None, 1.0)
