"""Which models are measured at all, what is said of them, and of those that are broken."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import moe_lightning as ml
from moe_lightning.callbacks.quality.reference import RunReference
from moe_lightning.evaluation.quality import Text
from moe_lightning.evaluation.records import QualityMoment
from tests.callbacks.small_fit import fit, tiny_module
from tests.callbacks.test_quality import HELD_OUT, compress, quality, record

WORD = int(HELD_OUT[2]["input_ids"][1, 0])


class Break(Callback):
    """Give one word of the vocabulary no number, behind the compression."""

    def after_compression(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.model.get_input_embeddings().weight[WORD] = math.nan


def test_a_broken_model_does_not_read_as_a_good_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [bool((row == WORD).any()) for batch in HELD_OUT for row in batch["input_ids"]]
    assert 0 < sum(broken) < 6
    given = [Break(), quality(), compress("end", ml.ExpertDrop(keep=4))]
    told = rf"QualityEvaluation, compressed: the model gives NaN or infinity on {sum(broken)} of 6 blocks of test: "
    with pytest.warns(UserWarning, match=told):
        fit(tiny_module(), tmp_path, given, steps=1)
    before, compressed, _ = record(tmp_path).moments
    assert (~compressed.texts["test"].scores.finite).tolist() == broken
    assert before.texts["test"].scores.finite.all()
    line = next(line for line in capsys.readouterr().out.splitlines() if "quality compressed" in line)
    assert ": perplexity not finite on test; " in line and not re.search("KL|agree|nan", line)


def said(moments: list[QualityMoment]) -> list[tuple[str, str]]:
    return [(moment.name, moment.what) for moment in moments]


# ---------------------------------------------------------------- the reference's size


@pytest.mark.parametrize("limit", [0, 3_000, 9_000, 12_000, 20_000, 28_000, 40_000, 60_000, 70_000])
@pytest.mark.parametrize(("predicted", "hidden"), [(64, 32), (90, 1), (64, 96), (0, 96), (5, 0)])
def test_every_advice_about_the_size_of_the_reference_helps(
    limit: int, predicted: int, hidden: int, tmp_path: Path
) -> None:
    texts = [Text(name, HELD_OUT, None) for name in ("test", "prose")]
    module = tiny_module()
    module.configure_model()

    def check(**options: int) -> None:
        RunReference(**options).check(texts, module.model, str(tmp_path))

    given = {"divergence_tokens": predicted, "layer_tokens": hidden, "max_bytes": limit}
    try:
        check(**given)
    except ValueError as error:
        advice = str(error).rpartition(": ")[2]
        ways = [dict(re.findall(r"(\w+_tokens|\w+_bytes) to (\d+)", way)) for way in advice.split(", or ")]
        assert ways and all(ways)
        for way in ways:
            numbers = {name.replace("max_reference_bytes", "max_bytes"): int(value) for name, value in way.items()}
            assert all(value % 16 == 0 for name, value in numbers.items() if name != "max_bytes")
            check(**{**given, **numbers})
            for name, value in numbers.items():  # and a block more does not
                more = {"max_bytes": value - 1} if name == "max_bytes" else {**numbers, name: value + 16}
                with pytest.raises(ValueError, match="more than max_reference_bytes"):
                    check(**{**given, **more})
    else:
        assert RunReference(**given).bytes(texts, module.model) <= limit
