"""Which models are measured at all, what is said of them, and of those that are broken."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.callbacks import last_checkpoint
from moe_lightning.callbacks.quality.reference import RunReference
from moe_lightning.evaluation.quality import Text
from tests.callbacks.small_fit import fit, tiny_module
from tests.callbacks.test_quality import HELD_OUT, acts, compress, go, quality, record
from tests.models import SIZES, random_batches

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


# ---------------------------------------------------------------- operations


class Favour(Callback):
    """Let one kind of experts win every token: of two opposite rows of a router one is above those that are zero."""

    def __init__(self, novices: bool) -> None:
        super().__init__()
        self.novices = novices

    def after_compression(self, trainer: Any, module: Any) -> None:
        architecture = architecture_of(module.model)
        shape = architecture.shape(module.model)
        for layer, layout in zip(architecture.moe_layers(module.model), shape.layouts, strict=True):
            real = [expert for expert in range(6) if expert not in layout.novices]
            one, other = layout.novices if self.novices else real[:2]
            with torch.no_grad():
                rows = layer.router.weight
                row = rows[0].clone()
                rows.zero_()
                rows[one], rows[other] = row, -row


@pytest.mark.parametrize(("top_k", "novices", "picks"), [(1, True, 0), (1, False, 1), (2, True, 1)])
def test_operations_are_those_of_the_experts_that_are_picked(
    top_k: int, novices: bool, picks: int, tmp_path: Path
) -> None:
    """By hand, for 16 tokens through 3 layers with hidden size 32, 4 heads of 8 (2 for keys), experts of 48."""
    module = ml.MixtralModule(model={**SIZES, "num_experts_per_tok": top_k}, warmup_steps=1)
    method = ml.Novices(keep=4, novice="zero")
    fit(module, tmp_path, [Favour(novices), quality(divergence_tokens=96), compress("end", method)], steps=1)
    before, compressed, end = record(tmp_path).moments
    attention, router, expert, head = 2 * 32 * 32 + 2 * 32 * 16, 6 * 32, 3 * 32 * 48, 64 * 32

    def by_hand(picked: int, vectors: int) -> int:
        return 2 * 16 * (3 * (attention + router + vectors + picked * expert) + head) + 3 * 4 * 16 * 16 * 32

    assert before.flops == by_hand(top_k, 0)
    assert compressed.flops == end.flops == by_hand(picks, 2 * 32)


# ---------------------------------------------------------------- which moments there are


def said(folder: Path) -> list[tuple[str, int]]:
    return [(moment.name, moment.step) for moment in record(folder).moments]


def test_a_schedule_is_measured_after_its_last_act(tmp_path: Path) -> None:
    def acts() -> Any:
        return compress(1, ml.Novices(ratio=ml.RatioSchedule(0, 0.5, 6, every=2)))

    fit(tiny_module(), tmp_path / "last", [quality(), acts()], steps=8)
    assert said(tmp_path / "last") == [("before", 3), ("compressed", 7), ("end", 8)]
    fit(tiny_module(), tmp_path / "each", [quality(every_act=True), acts()], steps=8)
    names = ["before", "compressed", "compressed-2", "compressed-3", "end"]
    assert said(tmp_path / "each") == list(zip(names, (3, 3, 5, 7, 8), strict=True))
    last, each = record(tmp_path / "last").moments, record(tmp_path / "each").moments
    assert last[1].what == each[3].what == "Novices(ratio=0.5, of='original'), act 3 of 3"
    for one, other in ((last[1], each[3]), (last[2], each[4])):
        assert torch.equal(one.texts["test"].scores.divergence[:4], other.texts["test"].scores.divergence[:4])
        assert (one.bytes, one.layer_errors) == (other.bytes, other.layer_errors)


def test_of_acts_that_change_nothing_the_one_before_is_the_last(tmp_path: Path) -> None:
    """4 of 6 experts stay at 30 % and at 40 %: the second act does not happen."""
    method = ml.ExpertDrop(ratio=ml.RatioSchedule(0.3, 0.4, 2, every=2))
    fit(tiny_module(), tmp_path, [quality(), compress(1, method)], steps=4)
    assert said(tmp_path) == [("before", 1), ("compressed", 1), ("end", 4)]


class StopAfter(Callback):
    """Be interrupted at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_between_two_acts_has_no_stale_end(tmp_path: Path) -> None:
    """The model before and the one at the end are not the same, though nothing was measured between them."""

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    module = tiny_module()
    module.on_train_batch_start = lambda *_: -1 if module.trainer.should_stop else None  # no further batch
    schedule = compress(3, ml.Novices(ratio=ml.RatioSchedule(0.2, 0.5, 4, every=2)))
    fit(module, tmp_path, [quality(), schedule, Stop()], steps=9, min_steps=1)
    before, end = record(tmp_path).moments
    assert (before.name, before.step, end.name, end.step) == ("before", 3, "end", 3)
    assert end.bytes < before.bytes


def test_there_is_no_before_behind_a_compression(tmp_path: Path) -> None:
    """This callback was added when the run was resumed."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        go(tmp_path, Callback(), *acts(), StopAfter(2), steps=5)
    with pytest.warns(UserWarning, match=r"was compressed before step 2, from which the run goes on, and was not meas"):
        go(tmp_path, quality(), *acts(), steps=5, path=last_checkpoint(tmp_path))
    assert said(tmp_path) == [("compressed", 3), ("end", 5)]
    assert not (tmp_path / "quality").exists()


def test_a_model_that_was_compressed_before_the_run_is_said_to_be(tmp_path: Path) -> None:
    module = tiny_module()
    module.configure_model()
    result = ml.compress(module.model, random_batches(1), ml.ExpertDrop(keep=4), progress=False)
    module.set_plan(result.plan)
    fit(module, tmp_path, [quality(), compress(1, ml.RTN(group_size=16))], steps=2)
    assert [moment.what for moment in record(tmp_path).moments][:2] == [
        "1 steps of training; the model had been compressed before this run",
        "RTN(group_size=16)",
    ]


def test_strategies_that_shard_are_refused() -> None:
    class Sharded:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    trainer: Any = Sharded()
    for begin in (quality().on_fit_start, quality().on_test_start):
        with pytest.raises(ValueError, match=r"QualityEvaluation runs the model in one process, and FSDPStrategy shar"):
            begin(trainer, tiny_module())


def test_tensorboard_tells_before_from_compressed(tmp_path: Path) -> None:
    """Both have the same step, and of one tag TensorBoard keeps one number a step."""
    fit(tiny_module(), tmp_path, [quality(), compress(1, ml.ExpertDrop(keep=4))], steps=2)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    before, compressed, end = record(tmp_path).moments
    for tag, moments in (("quality_before", [before]), ("quality", [compressed, end])):
        logged = {event.step: event.value for event in events.Scalars(f"{tag}/perplexity")}
        scores = {moment.step: moment.texts["test"].scores for moment in moments}
        wanted = {step: math.exp(of.nats.sum() / of.tokens.sum()) for step, of in scores.items()}
        assert logged == pytest.approx(wanted)
        assert [event.value for event in events.Scalars(f"{tag}/bytes")] == [moment.bytes for moment in moments]
    assert len(events.Scalars("quality/layer_error/layer_0")) == 2


def test_tensorboards_page_is_there_from_the_first_step(tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tiny_module(), tmp_path, [quality(), compress(1, ml.ExpertDrop(keep=4)), StopAfter(0)], steps=2)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    (page,) = events.Tensors("custom_scalars__config__")
    layout = page.tensor_proto.string_val[0].decode(errors="replace")
    assert "quality(_before)?/(.*/)?perplexity$" in layout


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
