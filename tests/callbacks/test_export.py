"""Export in mid-run: what it could not write is found before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moe_lightning as ml
from moe_lightning.callbacks import Export
from moe_lightning.checkpoints import stored_bytes
from tests.callbacks.slimming_runs import INT4, compress, gradual
from tests.callbacks.small_fit import fit, tiny_module


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (lambda: ml.GPTQ(**INT4), "layers [0, 1, 2] have experts of integers"),
        (lambda: ml.Novices(keep=4), "layers [0, 1, 2] have novices"),
        (lambda: ml.ExpertDrop(keep=4, scope="global"), "ExpertDrop with another scope than layer does not promise"),
    ],
)
@pytest.mark.parametrize("step", [3, "end"])
def test_a_format_that_will_not_hold_the_model(method: Any, reason: str, step: Any, tmp_path: Path) -> None:
    module = tiny_module()
    export = Export("plain", step, format="transformers")
    with pytest.raises(ValueError, match=r"^Export 'plain' at (step 3|the end): ") as caught:
        fit(module, tmp_path, [export, compress(2, method())], steps=4)
    assert reason in str(caught.value) and "format=" in str(caught.value)
    assert module.global_step == 0 and not (tmp_path / "models").exists()


def test_only_what_comes_before_it_counts(tmp_path: Path) -> None:
    """At the same step those that stand before it in the list."""
    pruner = ml.Magnitude(sparsity=gradual(steps=2, every=1))
    callbacks = [
        Export("plain", 2, format="transformers"),
        compress(2, ml.GPTQ(**INT4)),
        Export("native", 3, format="native"),
        Export("auto"),
    ]
    fit(tiny_module(), tmp_path / "a", callbacks, steps=4)
    assert stored_bytes(tmp_path / "a" / "models" / "auto") < stored_bytes(tmp_path / "a" / "models" / "plain")
    fit(tiny_module(), tmp_path / "b", [compress(1, pruner), Export("plain", 3, format="transformers")], steps=4)
    with pytest.raises(ValueError, match=r"Export 'plain' at step 2: .* integers"):
        fit(
            tiny_module(),
            tmp_path / "c",
            [compress(2, ml.GPTQ(**INT4)), Export("plain", 2, format="transformers")],
            steps=4,
        )


def test_a_format_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Export 'x' at step 1: unknown format 'plain': choose auto, "):
        fit(tiny_module(), tmp_path, [Export("x", 1, format="plain")], steps=2)  # type: ignore[arg-type]
