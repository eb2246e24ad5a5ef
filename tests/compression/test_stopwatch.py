"""Where the time of a compression goes."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

import moe_lightning as ml
from moe_lightning.compression import stopwatch
from moe_lightning.compression.stopwatch import Stopwatch
from tests.models import random_batches, tiny_mixtral


def test_every_moment_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch("training")
    now[0] += 1
    with watch.spending("compression"):
        now[0] += 2
        with watch.spending("evaluation"):
            now[0] += 4
            with watch.spending("compression"):
                now[0] += 8
        now[0] += 16
    with pytest.raises(KeyError), watch.spending("evaluation"):
        now[0] += 32
        raise KeyError
    now[0] += 64
    assert watch.seconds == {"compression": 26, "evaluation": 36, "training": 65}
    assert list(watch.seconds)[-1] == "training"


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (ml.Novices(ratio=0.5, novice="low_rank", rank=2), {"observe", "decide", "fit", "apply"}),
        (ml.GPTQ(bits=4, group_size=16), {"observe", "decide", "fit", "solve", "apply"}),
        (ml.LoRA(rank=2), {"observe", "decide", "fit", "apply"}),
    ],
)
def test_parts_of_a_compression_add_up(method: Any, parts: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that ticks whenever somebody looks at it.
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    result = ml.compress(tiny_mixtral(), random_batches(2), [method], progress=False, min_tokens=1)
    assert result.seconds.keys() == parts | {"optimizer", "other"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert sum(result.seconds.values()) == next(ticks) - 1
    assert result.summary()["seconds"] == result.seconds
    # Each expert matrix and each attention is measured on its way: far more looks than at the beginnings of phases.
    assert (result.seconds["observe"] > 10) == ("solve" in parts)
