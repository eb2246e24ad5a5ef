"""Maps of errors and tokens show what the modules' statuses say."""

import math
from typing import Any

import numpy as np
import pytest

from moe_lightning.compression import ModuleStatus
from moe_lightning.plan import KeepExperts, Quantize, Sparsify
from moe_lightning.reporting import figure_pixels, heat_map, slimming_figures
from moe_lightning.reporting.decisions import roles
from tests.models import tiny_mixtral
from tests.packed import packed_mixtral

MODULES = {
    "model.layers.0.mlp.experts": ModuleStatus(
        "int4",
        {0: 500, 2: 0, 3: 12},
        {
            f"{e}.{k}": "gptq" if e == 0 else "rtn fallback: 0 tokens"
            for e in (0, 2, 3)
            for k in ("gate_up_proj", "down_proj")
        },
        {"0.gate_up_proj": 0.01, "0.down_proj": 0.002, "3.gate_up_proj": 0.2, "3.down_proj": 0.0},
    ),
    "model.layers.0.self_attn": ModuleStatus(
        "int4", {}, {"q_proj": "gptq", "o_proj": "magnitude fallback"}, {"q_proj": 0.05, "o_proj": 0.1}
    ),
    "model.layers.1": ModuleStatus("dropped, the whole layer"),
    "model.layers.2.mlp": ModuleStatus("dropped with its norm"),
    "model.layers.3.mlp.experts": ModuleStatus("4 of 6 experts real", {0: 3}),
}


def shown(figure: Any) -> Any:
    return np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))


def legend(figure: Any) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def numbers(figure: Any) -> list[str]:
    return sorted(text.get_text() for text in figure.axes[0].texts)


def marks(figure: Any) -> list[tuple[float, float]]:
    return [tuple(point) for group in figure.axes[0].collections for point in group.get_offsets().tolist()]


def test_maps_of_a_model_with_gaps() -> None:
    figures = slimming_figures(MODULES, "step 7", [4, 5, 6, 7])
    assert list(figures) == ["error_gate_up_proj", "error_down_proj", "calibration_tokens", "error_attention"]
    up, down, tokens, attention = figures.values()
    np.testing.assert_array_equal(shown(up), [[1.0, np.nan, np.nan, 20.0]])
    # No error at all has the colour of the smallest, and its own number.
    np.testing.assert_array_equal(shown(down), [[0.2, np.nan, np.nan, 0.2]])
    assert numbers(down) == ["0", "0.2"]
    np.testing.assert_array_equal(shown(tokens), [[500, np.nan, 12, 12]])
    assert numbers(tokens) == ["0", "12", "500"]
    np.testing.assert_array_equal(shown(attention), [[5.0, 10.0]])
    assert up.axes[0].images[0].norm.vmin == down.axes[0].images[0].norm.vmin == 0.2
    assert up.axes[0].images[0].norm.vmax == down.axes[0].images[0].norm.vmax == 20.0
    assert marks(up) == marks(down) == marks(tokens) == [(2.5, -0.5), (3.5, -0.5)]
    assert marks(attention) == [(1.5, -0.5)]
    assert legend(up) == {"no matrix of its own", "not measured", "fell back on rounding or magnitudes"}
    assert legend(attention) == {"fell back on rounding or magnitudes"}
    for figure in figures.values():
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["4"]
        assert figure.axes[0].get_title(loc="left").endswith(", step 7")
        height, width, _ = figure_pixels(figure).shape
        assert height > 200 and width > 400
    assert [label.get_text() for label in attention.axes[0].get_xticklabels()] == ["q_proj", "o_proj"]
    assert up.axes[1].get_ylabel() == "squared output error [%]"


def test_nothing_to_draw() -> None:
    trimmed = {name: status for name, status in MODULES.items() if not status.matrices}
    assert slimming_figures({}) == slimming_figures(trimmed) == {}
    unmeasured = {
        "model.layers.0.mlp.experts": ModuleStatus("int4", {}, {"0.down_proj": "rtn", "0.gate_up_proj": "rtn"})
    }
    assert slimming_figures(unmeasured) == {}


def test_errors_that_are_no_numbers_have_no_colour() -> None:
    errors = {"0.down_proj": math.nan, "1.down_proj": 0.5}
    status = ModuleStatus("int4", {}, dict.fromkeys(errors, "gptq"), errors)
    figures = slimming_figures({"model.layers.0.mlp.experts": status})
    assert list(figures) == ["error_down_proj"]
    assert numbers(figures["error_down_proj"]) == ["50"]
    assert legend(figures["error_down_proj"]) == {"not measured"}


def test_names_of_columns_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="1 names of columns for values of 2 columns"):
        heat_map([[1.0, 2.0]], title="t", value_label="v", columns=["a"])
    with pytest.raises(ValueError, match="marked has shape"):
        heat_map([[1.0, 2.0]], title="t", value_label="v", marked=[[True]])


def test_roles_in_a_model_of_packed_matrices() -> None:
    from moe_lightning.architectures import architecture_of

    before = architecture_of(plain := tiny_mixtral()).shape(plain)
    model = packed_mixtral(
        (Quantize(0, group_size=16), KeepExperts(0, (1, 2, 5)), Sparsify(1, "attention", sparsity=0.5))
    )
    now = roles(before, architecture_of(model).shape(model))
    assert now["gone"].nonzero()[1].tolist() == [0, 3, 4]
    assert not now["novice"].any()
