"""Pruning and quantising in mid-run: what trains on and what stays, the optimizer, the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, Export, NoviceTuning
from moe_lightning.experts import Int4, Masked, WeightStack
from moe_lightning.plan import NoviceExperts, Quantize, Sparsify
from moe_lightning.surgery import plan_of
from tests.callbacks.slimming_runs import INT4, ROOT, Watch, compress, gradual, moved
from tests.callbacks.small_fit import batches, fit, loader, tiny_module
from tests.models import SIZES, random_batches

# What is pruned stays so, what is rounded stays as it is


PRUNERS = {
    "magnitude": lambda: ml.Magnitude(sparsity=0.5, targets="experts+attention"),
    "wanda of whole matrices": lambda: ml.Wanda(sparsity=0.37, scope="matrix", targets="experts+attention"),
    "wanda 2:4": lambda: ml.Wanda(pattern="2:4", targets="experts+attention"),
    "sparsegpt 4:8": lambda: ml.SparseGPT(pattern="4:8"),
    "magnitude 1:4": lambda: ml.Magnitude(pattern="1:4"),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_zeros_stay_zeros_and_what_is_kept_trains(name: str, tmp_path: Path) -> None:
    watch, module = Watch(), tiny_module(weight_decay=0.5)
    method = PRUNERS[name]()
    fit(module, tmp_path, [compress(3, method), watch], steps=7)
    masks, first, last = watch.masks[3], watch.dense[3], watch.dense[-1]
    assert len(masks) == (3 * 2 + 3 * 4 if method.targets != "experts" else 3 * 2)
    for stack, mask in masks.items():
        assert torch.equal(watch.masks[-1][stack], mask)
        share = method.sparsity if method.pattern is None else int(method.pattern[0]) / int(method.pattern[2])
        assert float((~mask).float().mean()) == pytest.approx(share, abs=0.02)
        for weight in (first[stack], last[stack]):
            assert not weight[~mask].any()
        # All of them move, those of experts that no token picks by their weight decay.
        assert float((first[stack] != last[stack])[mask].float().mean()) > 0.99
    # In the open parameter as well, of which a product would read zeros that are none.
    for stack in (item for item in module.modules() if isinstance(item, Masked)):
        assert stack.weight is not None and not stack.weight[~stack.zeros_kept()].any()
    assert moved(watch.parameters[3], watch.parameters[-1]) == set(watch.parameters[3])


@pytest.mark.parametrize("name", ["magnitude", "wanda 2:4"])
def test_moments_of_kept_weights_go_on(name: str, tmp_path: Path) -> None:
    """Picked here by a loop over places, from the moments of a run that is not compressed."""
    alone, watch = Watch(), Watch()
    fit(tiny_module(), tmp_path / "one", [alone], steps=4)
    fit(tiny_module(), tmp_path / "two", [compress(3, PRUNERS[name]()), watch], steps=4)
    assert not moved(alone.parameters[2], watch.parameters[2])
    seen = 0
    for parameter, state in watch.moments[3].items():
        stack, _, kind = parameter.rpartition(".")
        if stack not in watch.masks[3]:
            assert torch.equal(state["exp_avg"], alone.moments[3][parameter]["exp_avg"])
            continue
        source = stack.replace(".storage", "").replace(".stack", ".weight")
        whole = alone.moments[3][source]
        mask = watch.masks[3][stack]
        for key in ("exp_avg", "exp_avg_sq"):
            old = whole[key].reshape(mask.shape)
            if kind == "values":  # 2:4: only what is kept
                rows = [row[keep] for row, keep in zip(old.flatten(0, 1), mask.flatten(0, 1), strict=True)]
                expected = torch.stack(rows).view(*mask.shape[:2], -1)
            else:
                expected = torch.where(mask, old, torch.zeros(()))
            assert torch.equal(state[key], expected)
            assert old.any()
        assert state["step"] == whole["step"] == 3
        seen += 1
    assert seen == len(watch.masks[3]) == 18


@pytest.mark.parametrize("method", ["GPTQ", "AWQ", "RTN"])
def test_integers_stay_bit_for_bit_while_the_rest_trains(method: str, tmp_path: Path) -> None:
    watch, module = Watch(), tiny_module()
    callbacks = [
        compress(2, ml.Novices(keep=4, novice="low_rank", rank=2)),
        compress(3, getattr(ml, method)(**INT4, bits=8 if method == "RTN" else 4)),
        watch,
    ]
    fit(module, tmp_path, callbacks, steps=7)
    assert len(watch.buffers[3]) == 3 * 2 * 3
    assert not moved(watch.buffers[3], watch.buffers[-1])
    assert all(not name.endswith(("gate_up_proj", "down_proj")) for name in watch.parameters[3])
    trains = moved(watch.parameters[3], watch.parameters[-1])
    assert trains == set(watch.parameters[3])
    for part in ("gate.weight", "input_layernorm.weight", "q_proj.weight", "novices", "novice_in", "embed_tokens"):
        assert any(part in name for name in trains), part


def test_only_novices_train_beside_packed_experts(tmp_path: Path) -> None:
    watch, module = Watch(), tiny_module()
    method = ml.Magnitude(pattern="2:4")
    callbacks = [compress(2, ml.Novices(keep=4), method), NoviceTuning(4, learning_rate=0.1), watch]
    fit(module, tmp_path, callbacks, steps=7)
    assert all(name.endswith("novices") for name in moved(watch.parameters[4], watch.parameters[-1]))
    assert not moved(watch.buffers[4], watch.buffers[-1])
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_narrow_types(precision: str, tmp_path: Path) -> None:
    """Trained, tested from its checkpoint, written and loaded: int4 beside 2:4 and masks, and novices."""
    module, watch = tiny_module(), Watch()
    callbacks = [
        compress(2, ml.Novices(keep=4), ml.Wanda(sparsity=0.5, targets="experts+attention")),
        compress(4, ml.GPTQ(**INT4)),
        watch,
        Export("final"),
    ]
    trainer = fit(module, tmp_path, callbacks, steps=6, precision=precision)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {expected}
    stacks = [item for item in module.modules() if isinstance(item, WeightStack)]
    assert {stack.dtype for stack in stacks} == {expected}
    assert {type(stack) for stack in stacks} == {Int4, Masked}
    for name, mask in watch.masks[-1].items():
        assert not watch.dense[-1][name][~mask].any()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ml.MixtralModule(model=dict(module.hparams["model"]))
    tester = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    results = [tester.test(one, loader(batches(2)), str(tmp_path / "a.ckpt"), verbose=False) for one in (again, module)]
    assert results[0][0]["test/loss"] == results[1][0]["test/loss"] > 0
    exported = ml.from_pretrained(tmp_path / "models" / "final")
    assert exported.dtype == expected
    loaded = ml.MixtralModule.load_from_checkpoint(tmp_path / "a.ckpt")
    kept, given = loaded.model.state_dict(), module.model.state_dict()
    assert kept.keys() == given.keys() and all(torch.equal(kept[name].to(given[name]), given[name]) for name in given)
    batch = batches(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(exported(batch).logits, module.model.eval()(batch).logits)


# What is measured, said and written


def test_what_is_said_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tiny_module()
    callback = compress(2, ml.GPTQ(**INT4), starved="fallback", min_tokens=10)
    fit(module, tmp_path, [callback, Export("final")], steps=4)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "compression-2.json").read_text())
    assert record["step"] == 2 and record["methods"] == ["GPTQ(group_size=16)"]
    assert record["after"]["bytes"] < record["before"]["bytes"]
    assert record["after"]["parameters"] == record["before"]["parameters"] == ml.measure(module.model).parameters
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(3)]
    assert list(record["modules"]) == list(record["matrices"]) == layers
    few = 0
    for layer in layers:
        tokens, matrices, errors = (record[name][layer] for name in ("tokens", "matrices", "errors"))
        assert set(tokens) == set(map(str, range(6))) and sum(tokens.values()) == 4 * 2 * 16 * 2
        assert set(matrices) == {f"{expert}.{name}" for expert in range(6) for name in ("gate_up_proj", "down_proj")}
        for name, status in matrices.items():
            starved = tokens[name[0]] < 10
            assert status.startswith(f"rtn fallback: {tokens[name[0]]} tokens" if starved else "gptq")
            assert (name in errors) != starved
            few += starved
    assert f"step 2: 36 matrices: {36 - few} gptq" in said and (f"{few} rtn fallback" in said) == (few > 0)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert "compression/matrices/text_summary" in events.Tags()["tensors"]
    table = events.Tensors("compression/matrices/text_summary")[0].tensor_proto.string_val[0].decode()
    assert len(re.findall(r"^\| model\.layers\.\d\.mlp\.experts \| \d\.\w+ \| \d+ \| ", table, re.M)) == 36
    card = (tmp_path / "models" / "final" / "README.md").read_text()
    assert "weights: int4, group 16, asymmetric: experts of layers 0 1 2" in card
    assert "| 0 | 0 1 2 3 4 5 (int4, group 16, asymmetric) |" in card


def test_top_up_draws_behind_the_calibration_batches(tmp_path: Path) -> None:
    few, more = random_batches(1, batch=1, sequence=4, seed=1), random_batches(8, batch=2, sequence=16, seed=2)
    callback = compress(1, ml.GPTQ(**INT4), batches=few, top_up=more, starved="top_up", min_tokens=8)
    fit(tiny_module(), tmp_path, [callback], steps=2)
    assert callback.result is not None
    assert all(min(module.tokens.values()) >= 8 for module in callback.result.modules.values())
    with pytest.raises(ValueError, match=r"starved='top_up' draws further calibration batches: .* pass top_up=\.\.\."):
        fit(tiny_module(), tmp_path, [compress(1, ml.GPTQ(**INT4), starved="top_up")], steps=2)


def test_methods_that_measure_nothing_need_no_calibration_data(tmp_path: Path) -> None:
    module = tiny_module()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`")
        fit(
            module,
            tmp_path,
            [Compress([ml.Magnitude(pattern="2:4")], 1), Compress([ml.RTN(group_size=16)], 2)],
            steps=3,
        )
    assert {type(edit) for edit in plan_of(module.model).edits} == {Sparsify, Quantize}


def test_exported_folders_give_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    module = tiny_module()
    callbacks = [
        compress(1, ml.BlockDrop(count=1), ml.Novices(keep=4)),
        compress(2, ml.Wanda(sparsity=gradual(steps=2, every=1), targets="experts+attention")),
        Export("sparse", 4),
        compress(4, ml.GPTQ(**INT4)),
        Export("int4"),
    ]
    fit(module, tmp_path, callbacks, steps=6)
    inputs = batches(1)[0]["input_ids"]
    torch.save(inputs, tmp_path / "models" / "inputs.pt")
    subprocess.run([sys.executable, "-m", "tests.fresh_process", str(tmp_path / "models")], check=True, cwd=ROOT)
    results = torch.load(tmp_path / "models" / "logits.pt")
    with torch.no_grad():
        expected = module.model.eval()(inputs).logits
    state, logits = results["int4"]
    assert torch.equal(logits, expected)
    mine = module.model.state_dict()
    assert state.keys() == mine.keys() and all(torch.equal(mine[name], value) for name, value in state.items())
    assert any(name.endswith("values") for name in results["sparse"][0])
    again, watch = ml.MixtralModule(checkpoint=str(tmp_path / "models" / "sparse"), warmup_steps=1), Watch()
    fit(again, tmp_path / "again", [watch], steps=3)
    assert len(watch.masks[0]) == 2 * 2 + 2 * 4
    for name, mask in watch.masks[0].items():
        assert torch.equal(watch.masks[-1][name], mask) and not watch.dense[-1][name][~mask].any()
        assert not torch.equal(watch.dense[0][name], watch.dense[-1][name])
    assert {type(edit) for edit in plan_of(module.model).edits} >= {NoviceExperts, Sparsify, Quantize}


class Pushing(torch.optim.SGD):
    """Updates that are not zero where the gradient is, as Muon's are."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)
        return loss


class PushingModule(ml.MixtralModule):
    def configure_optimizers(self) -> Any:
        return Pushing(self.parameters(), lr=1e-2)


def test_an_optimizer_that_moves_pruned_weights_trains_the_model_that_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, logits = PushingModule(model=dict(SIZES)), []
    batch = batches(1)[0]["input_ids"]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                # Straight after an optimizer step: first the model that works, then the one that is saved.
                with torch.no_grad():
                    logits.append(pl_module.model(batch).logits)
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    pruned = ml.Magnitude(sparsity=0.5, targets="experts+attention")
    fit(module, tmp_path, [compress(2, pruned), Save()], steps=6)
    again = PushingModule.load_from_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(again.model(batch).logits, logits[0])
    for stack in (item for item in module.modules() if isinstance(item, Masked)):
        assert not stack.dense()[~stack.zeros_kept()].any()
