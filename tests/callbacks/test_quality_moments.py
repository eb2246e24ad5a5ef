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
