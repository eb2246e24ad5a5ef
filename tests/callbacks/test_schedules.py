"""Sparsity that grows while a model trains, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.plan import ModelShape, Sparsify
from moe_lightning.surgery import plan_of
from tests.callbacks.slimming_runs import Watch, compress, gradual
from tests.callbacks.small_fit import fit, tiny_module


def ml_shape(module: Any) -> ModelShape:
    return architecture_of(module.model).shape(module.model)


@pytest.mark.parametrize("method", ["Magnitude", "Wanda", "SparseGPT"])
def test_a_schedule_prunes_step_by_step(method: str, tmp_path: Path) -> None:
    watch, module = Watch(), tiny_module()
    schedule = gradual(end=0.75, steps=6, every=2)
    callback = compress(1, getattr(ml, method)(sparsity=schedule))
    fit(module, tmp_path, [callback, watch], steps=9)
    shares = [{round(1 - float(mask.float().mean()), 6) for mask in masks.values()} or {0.0} for masks in watch.masks]
    expected = [0.75 - 0.75 * (1 - min(max(step - 1, 0) // 2 * 2, 6) / 6) ** 3 for step in range(10)]
    for step, (found, wanted) in enumerate(zip(shares, expected, strict=True)):
        for inputs, share in zip((32, 48), sorted(found) if len(found) == 2 else [*found] * 2, strict=True):
            assert share == pytest.approx(wanted, abs=0.5 / 32), (step, inputs)
    for before, after in zip(watch.masks[3:-1], watch.masks[4:], strict=True):
        assert all(not (after[name] & ~before[name]).any() for name in after), "a mask that is nested"
    for masks, dense in zip(watch.masks, watch.dense, strict=True):
        assert all(not dense[name][~mask].any() for name, mask in masks.items())
    edits = plan_of(module.model).edits
    assert [type(edit) for edit in edits] == [Sparsify] * 9
    assert [edit.sparsity for edit in edits[2::3]] == [schedule.at(step) for step in (2, 4, 6)]
    assert callback.done and callback.state_dict()["acts"] == 3
    assert callback.next_step == callback.last_step == 7
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {f"compression-{step}.{kind}" for step in (3, 5, 7) for kind in ("json", "plan.json")}
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    found = {event.step: event.value for event in events.Scalars("compression/sparsity")}
    assert found == pytest.approx({step + 1: schedule.at(step) for step in (2, 4, 6)})
    sizes = [event.value for event in events.Scalars("compression/bytes_on_disk")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (ml.Novices(ratio=ml.RatioSchedule(0, 0.5, 6, every=2)), {3: [5] * 3, 5: [4] * 3, 7: [3] * 3}),
        (
            ml.Novices(ratio=ml.RatioSchedule(0, 0.5, 6, every=3), scope="global", criterion="residual"),
            {4: 18 - 5, 7: 18 - 9},
        ),
        # The second moment rounds to as many experts as the first: nothing happens then.
        (ml.ExpertDrop(ratio=ml.RatioSchedule(0.3, 0.5, 4, every=1)), {1: [4] * 3, 4: [3] * 3}),
    ],
)
def test_a_ratio_grows_step_by_step(method: Any, left: dict[int, Any], tmp_path: Path) -> None:
    module = tiny_module()
    module.configure_model()
    assert [layout.router for layout in ml_shape(module).layouts] == [tuple(range(6))] * 3
    found: dict[int, Any] = {}

    class Count(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts = [len(layout.real) for layout in ml_shape(pl_module).layouts]
            found[trainer.global_step] = counts

    fit(module, tmp_path, [compress(1, method), Count()], steps=8)
    wanted: Any = [6] * 3
    for step in range(1, 9):
        wanted = left.get(step - 1, wanted)
        assert (found[step] if isinstance(wanted, list) else sum(found[step])) == wanted, step
    files = (tmp_path / "results").glob("compression-?.json")
    acted = {int(path.stem.split("-")[1]) for path in files}
    assert acted == set(left)


def test_a_ratio_that_grows_wants_a_run() -> None:
    method = ml.Novices(ratio=ml.RatioSchedule(0, 0.5, 6, every=2))
    module = tiny_module()
    module.configure_model()
    with pytest.raises(ValueError, match=r"ratio is a schedule.*callback Compress in fit.*ratio=0\.5"):
        ml.compress(module.model, [], method)
    with pytest.raises(ValueError, match=r"unknown of=.some.: choose one of left, original"):
        ml.Novices(ratio=0.5, of="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"set ratio, or leave of out"):
        ml.ExpertDrop(keep=4, of="original")


def test_other_methods_of_the_list_act_once_at_the_first_step(tmp_path: Path) -> None:
    """Before any weight is pruned, or behind the first pruning, as they stand in the list; integers come later."""
    module, watch = tiny_module(), Watch()
    callbacks = [
        compress(1, ml.ChannelDrop(ratio=1 / 3), ml.Wanda(sparsity=gradual(start=0.25)), ml.Novices(keep=4)),
        compress(5, ml.RTN(group_size=32)),
        watch,
    ]
    fit(module, tmp_path, callbacks, steps=7)
    edits = plan_of(module.model).edits
    kinds = [type(edit).__name__ for edit in edits]
    assert kinds == [
        name for name in ("KeepChannels", "Sparsify", "NoviceExperts", *["Sparsify"] * 2, "Quantize") for _ in range(3)
    ]
    assert [edit.sparsity for edit in edits if isinstance(edit, Sparsify)][::3] == [
        0.25,
        gradual(start=0.25).at(2),
        0.5,
    ]
    # Zeros are zeros among the integers too.
    for name, mask in watch.masks[5].items():
        assert not watch.dense[-1][name][~mask].any() and (~mask).float().mean() >= 0.5


def test_a_schedule_that_starts_at_nothing_lets_the_others_act_first(tmp_path: Path) -> None:
    module = tiny_module()
    fit(module, tmp_path, [compress(1, ml.Wanda(sparsity=gradual()), ml.ChannelDrop(ratio=0.25))], steps=6)
    kinds = [type(edit).__name__ for edit in plan_of(module.model).edits]
    assert kinds == ["KeepChannels"] * 3 + ["Sparsify"] * 6


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([(4, ml.Wanda(sparsity=gradual()))], "at_step=4 begins a schedule that ends at step 8, beyond the run, which"),
        ([(8, ml.Wanda(sparsity=gradual()))], "at_step=8 lies beyond the run"),
        (
            [(1, ml.Wanda(sparsity=gradual())), (3, ml.RTN(group_size=16))],
            "cannot prune the experts again, their weights are int4",
        ),
        (
            [(1, ml.Magnitude(sparsity=0.6)), (2, ml.Wanda(sparsity=gradual()))],
            r"step 4: layer 0: .* zeros asks for fewer zeros than there are in its experts",
        ),
        ([(1, ml.Wanda(sparsity=gradual(start=0.1))), (2, ml.ChannelDrop(ratio=0.25))], "ChannelDrop"),
        ([(1, ml.GPTQ())], r"group_size 128 does not divide the input size 32"),
        ([(1, ml.RTN(group_size=16)), (2, ml.RTN(group_size=16))], "again, their weights are int4"),
    ],
)
def test_what_cannot_work_is_found_before_the_first_step(
    callbacks: list[tuple[int, Any]], message: str, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        fit(tiny_module(), tmp_path, [*(compress(*item) for item in callbacks), watch], steps=8)
    assert not watch.parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compress("end", ml.Wanda(sparsity=gradual())), "a schedule needs training between its steps"),
        (
            lambda: compress(1, ml.Wanda(sparsity=gradual()), ml.GPTQ()),
            "GPTQ stores integers.*give GPTQ a Compress of its own, 4 steps later or more",
        ),
        (lambda: compress(1, ml.RTN(), ml.Wanda(sparsity=gradual())), "RTN stores integers"),
        (
            lambda: compress(1, ml.Wanda(sparsity=gradual()), ml.SparseGPT(sparsity=gradual())),
            "Wanda and SparseGPT have a schedule each",
        ),
        (lambda: compress(1, ml.RTN(), min_tokens=-1), "Compress: min_tokens must be"),
        (lambda: compress(1, ml.RTN(), starved="maybe"), "Compress: starved must be one of warn, top_up"),
        (lambda: compress(1, ml.RTN(), max_fallback=2), "Compress: max_fallback must be a share"),
        (lambda: compress(1, ml.RTN(), max_moment_bytes=0), "Compress: max_moment_bytes must be a positive"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_in_the_middle_of_a_schedule_goes_on_with_it_only() -> None:
    half = compress(1, ml.Wanda(sparsity=gradual()))
    half.acts_done = 1
    same = compress(1, ml.Wanda(sparsity=gradual()))
    same.load_state_dict(half.state_dict())
    assert (same.acts_done, same.done, same.next_step) == (1, False, 5)
    other = compress(1, ml.Wanda(sparsity=gradual(end=0.6)))
    with pytest.raises(ValueError, match=r"lies in the middle of Wanda\(.*start from an earlier checkpoint"):
        other.load_state_dict(half.state_dict())
    half.acts_done, half.done = 2, True
    with pytest.warns(UserWarning, match="is not applied"):
        other.load_state_dict(half.state_dict())
    assert other.done
