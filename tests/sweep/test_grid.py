"""Grids: every combination once, each at the same number of parameters, and mistakes named before any work."""

import re

import pytest

import moe_lightning as ml
from moe_lightning.architectures import MixtralArchitecture
from moe_lightning.compression import trial_edits
from moe_lightning.sweep import Grid, cells_of
from moe_lightning.sweep.budget import parameter_budget
from moe_lightning.sweep.operators import operator_method, usual_operator
from moe_lightning.trimming import LayerDrop
from tests.models import tiny_config

SHAPE = MixtralArchitecture().shape_of_config(tiny_config(num_local_experts=8))


def test_a_grid_is_a_product() -> None:
    grid = Grid(criteria=["residual", "random"], operators=["delete", "mean"], scopes=["layer", "global"], seeds=[0, 1])
    cells = cells_of([grid], SHAPE)
    names = [cell.name for cell in cells]
    # Two ratios, two operators, two scopes; seeds for random alone.
    assert len(cells) == 2 * (2 * 2 + 2 * 2 * 2)
    assert len(set(names)) == len({cell.key for cell in cells}) == len(cells)
    assert "residual mean global 25%" in names
    assert "random delete layer 50% seed 1" in names


def test_a_cell_that_is_listed_twice_is_done_once() -> None:
    one = Grid(criteria=["residual"], operators=["gate2_mean"], ratios=[0.5])
    again = Grid(criteria=["mone", "residual"], operators=["usual"], ratios=[0.5])
    assert [cell.name for cell in cells_of([one, again], SHAPE)] == [
        "residual gate2_mean layer 50%",
        "mone mean layer 50%",
    ]


def test_the_key_is_that_of_the_settings_alone() -> None:
    by_grid = cells_of([Grid(operators=["layer_drop"], ratios=[0.5])], SHAPE)[0]
    method = LayerDrop(parameters=parameter_budget(SHAPE, 0.5))
    by_hand = cells_of([Grid(methods=[method], name="mine")], SHAPE)[0]
    assert by_grid.key == by_hand.key
    assert by_hand.name == "mine"
    assert by_hand.key != cells_of([Grid(methods=[LayerDrop(count=1)], name="mine")], SHAPE)[0].key


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("operator", ["delete", "keep_router", "mean", "zero", "gate2_mean", "low_rank:4"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_all_operators_get_the_same_budget(ratio: float, operator: str, scope: str) -> None:
    """Constants stand for as many experts as deletion takes; what stores more takes more; nobody exceeds the budget."""
    target = parameter_budget(SHAPE, ratio)
    dropped = trial_edits(SHAPE, [ml.ExpertDrop(ratio=ratio)])[1]
    removed = sum(8 - len(layout.real) for layout in dropped.layouts)
    assert target == dropped.parameters + removed * 2 * SHAPE.hidden_size
    after = trial_edits(SHAPE, [operator_method(operator, "residual", scope, target, 0)])[1]
    assert target - SHAPE.expert_parameters < after.parameters <= target
    gone = sum(8 - len(layout.real) for layout in after.layouts)
    assert gone > removed if operator.startswith("low_rank") else gone == removed


def test_usual_operators() -> None:
    assert usual_operator("mone") == "mean"
    assert usual_operator("residual:8") == "low_rank:8"
    assert usual_operator("residual:0") == usual_operator("residual") == "gate2_mean"
    assert usual_operator("soft_routing") == usual_operator("naee") == "delete"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": ["residual"]}, "needs operators"),
        ({"criteria": ["magic"], "operators": ["delete"]}, "unknown criterion 'magic'"),
        ({"criteria": ["mone"], "operators": ["melt"]}, "unknown operator 'melt': choose from delete"),
        ({"criteria": ["mone"], "operators": ["low_rank"]}, "name a rank, e.g. low_rank:16"),
        ({"criteria": ["mone"], "operators": ["mean:3"]}, "mean has no options"),
        ({"criteria": ["mone"], "operators": ["layer_drop"]}, "ranks by itself: put it into an item without criteria"),
        ({"operators": ["delete"]}, "needs criteria"),
        ({"criteria": ["mone"], "operators": ["mean"], "scopes": ["galaxy"]}, "unknown scope 'galaxy'"),
        ({"criteria": ["mone"], "operators": ["mean"], "ratios": [1.0]}, r"ratios must lie in \(0, 1\), got 1.0"),
        ({"criteria": ["mone"], "operators": ["mean"], "ratios": []}, "ratios is empty"),
        ({"methods": [LayerDrop(count=1)]}, "need a name"),
        ({"methods": [LayerDrop(count=1)], "name": "x", "operators": ["delete"]}, "exclude criteria and operators"),
    ],
)
def test_mistakes_in_a_grid(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**options)  # type: ignore[arg-type]


def test_a_budget_out_of_reach_names_the_cell() -> None:
    with pytest.raises(ValueError, match=re.escape("--grids: residual delete layer 90%: ")):
        cells_of([Grid(criteria=["residual"], operators=["delete"], ratios=[0.9])], SHAPE)
    with pytest.raises(ValueError, match="--grids: too deep: LayerDrop"):
        cells_of([Grid(methods=[LayerDrop(count=9)], name="too deep")], SHAPE)
    with pytest.raises(ValueError, match="--grids is empty"):
        cells_of([], SHAPE)
