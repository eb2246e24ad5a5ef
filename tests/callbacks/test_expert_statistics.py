"""ExpertStatistics against numpy counts of what the routers gave, read back from the event file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_lightning as ml
from moe_lightning.callbacks import Compress, ExpertStatistics
from tests.callbacks.small_fit import batches, fit, tiny_module
from tests.models import SIZES, random_batches


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def scalar(found: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in found.Scalars(tag)}


class Recorder(torch.nn.Module):
    """Keeps what the routers gave in training mode, batch by batch."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.seen: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for row, layer in enumerate(module.model.model.layers):
            layer.mlp.gate.register_forward_hook(lambda mod, args, out, row=row: self.keep(row, mod, out))

    def keep(self, row: int, router: Any, output: Any) -> None:
        if not router.training:
            return
        if row == 0:
            self.seen.append([])
        self.seen[-1].append((output[0].detach().double().numpy(), output[2].numpy()))


def test_scalars_equal_numpy(tmp_path: Path) -> None:
    module = tiny_module()
    module.configure_model()
    recorder = Recorder(module)
    fit(module, tmp_path, [ExpertStatistics(every_n_steps=4, figures_every_n_steps=4)], train=batches(8, padded=True))
    found = events(tmp_path)
    keep = batches(1, padded=True)[0]["attention_mask"].reshape(-1).bool().numpy()
    assert not keep.all()
    for window, step in ((recorder.seen[:4], 4), (recorder.seen[4:], 8)):
        load, entropy, dead = [], [], 0
        for row in range(3):
            logits = np.concatenate([batch[row][0][keep] for batch in window])
            index = np.concatenate([batch[row][1][keep] for batch in window])
            counts = np.bincount(index.reshape(-1), minlength=6)
            load.append(counts / counts.sum())
            dead += int((counts == 0).sum())
            probability = np.exp(logits - logits.max(1, keepdims=True))
            probability /= probability.sum(1, keepdims=True)
            entropy.append(-(probability * np.log(probability)).sum(1).mean() / math.log(6))
        variation = [shares.std() / shares.mean() for shares in load]
        expected = {
            "load_max": np.max(load),
            "load_min": np.min(load),
            "load_variation": np.mean(variation),
            "load_variation/layer_1": variation[1],
            "routing_entropy": np.mean(entropy),
            "routing_entropy/layer_2": entropy[2],
            "dead_experts": dead,
        }
        for name, value in expected.items():
            assert scalar(found, f"experts_train/{name}")[step] == pytest.approx(value, rel=1e-5), name
    assert "experts_train/novice_mass" not in found.Tags()["scalars"]


def test_figures_and_layout_are_in_the_event_file(tmp_path: Path) -> None:
    statistics = ExpertStatistics(every_n_steps=2, figures_every_n_steps=4)
    fit(tiny_module(), tmp_path, [statistics], validation=batches(2), val_check_interval=4)
    found = events(tmp_path)
    images = found.Tags()["images"]
    assert set(images) == {
        f"experts_{stage}/{name}" for stage in ("train", "val") for name in ("load", "routing_weight")
    }
    assert [event.step for event in found.Images("experts_val/load")] == [4, 8]
    assert [event.step for event in found.Images("experts_train/load")] == [2, 4, 8]
    assert found.Images("experts_train/load")[0].width > 300
    assert "custom_scalars__config__" in found.Tags()["tensors"]


@pytest.mark.parametrize("first", ["statistics", "compress"])
@pytest.mark.parametrize("method", [ml.Novices(ratio=0.5), ml.ExpertDrop(keep=3)], ids=["novices", "drop"])
def test_survives_a_compression_in_mid_run(first: str, method: Any, tmp_path: Path) -> None:
    statistics = ExpertStatistics(every_n_steps=2, figures_every_n_steps=2)
    compress = Compress([method], at_step=4, batches=random_batches())
    order = [statistics, compress] if first == "statistics" else [compress, statistics]
    fit(tiny_module(), tmp_path, order, validation=batches(2), val_check_interval=8)  # type: ignore[arg-type]
    found = events(tmp_path)
    assert set(scalar(found, "experts_train/routing_entropy")) == {2, 4, 6, 8}
    novices = isinstance(method, ml.Novices)
    assert ("experts_train/novice_mass" in found.Tags()["scalars"]) == novices
    if novices:
        mass = scalar(found, "experts_val/novice_mass")
        assert set(mass) == {8}
        assert 0 < mass[8] < 1
    assert "compression/plan/text_summary" in found.Tags()["tensors"]


def test_validation_is_a_window_of_its_own(tmp_path: Path) -> None:
    module = tiny_module(load_balancing_coefficient=0.0)
    module.learning_rate = 1e-12
    validation = batches(3, seed=5)
    fit(module, tmp_path, [ExpertStatistics(every_n_steps=2)], steps=2, validation=validation, val_check_interval=2)
    shares = []
    with torch.no_grad():
        for layer in module.model.model.layers:
            counts: list[Any] = []
            handle = layer.mlp.gate.register_forward_hook(
                lambda mod, args, out, counts=counts: counts.append(torch.bincount(out[2].reshape(-1), minlength=6))
            )
            for batch in validation:
                module.model.eval()(input_ids=batch["input_ids"])
            handle.remove()
            total = torch.stack(counts).sum(0).double()
            shares.append(total / total.sum())
    assert scalar(events(tmp_path), "experts_val/load_max")[2] == pytest.approx(
        float(torch.stack(shares).max()), rel=1e-5
    )


def test_watching_changes_nothing(tmp_path: Path) -> None:
    watched, alone = tiny_module(), tiny_module()
    fit(watched, tmp_path / "a", [ExpertStatistics(every_n_steps=2)], validation=batches(2), val_check_interval=4)
    fit(alone, tmp_path / "b", [], validation=batches(2), val_check_interval=4)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    for with_hooks, without in zip(watched.model.model.layers, alone.model.model.layers, strict=True):
        assert len(with_hooks.mlp.gate._forward_hooks) == len(without.mlp.gate._forward_hooks)  # transformers' own


def test_a_layer_that_runs_twice_counts_once(tmp_path: Path) -> None:
    module, plain = tiny_module(), tiny_module()
    module.configure_model()
    module.model.gradient_checkpointing_enable()
    fit(module, tmp_path / "a", [ExpertStatistics(every_n_steps=4)], steps=4)
    fit(plain, tmp_path / "b", [ExpertStatistics(every_n_steps=4)], steps=4)
    for name in ("load_max", "load_variation", "routing_entropy"):
        tag = f"experts_train/{name}"
        assert scalar(events(tmp_path / "a"), tag) == pytest.approx(scalar(events(tmp_path / "b"), tag), rel=1e-4)


def test_works_without_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    from tests.callbacks.small_fit import loader

    trainer = Trainer(
        max_steps=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ExpertStatistics(every_n_steps=1)],
    )
    trainer.fit(tiny_module(), loader(batches(2)))
    assert trainer.global_step == 2


def test_a_step_count_that_is_not_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more, got 0"):
        ExpertStatistics(every_n_steps=0)


def test_a_model_in_eval_mode_is_watched_too(tmp_path: Path) -> None:
    module, plain = tiny_module(), tiny_module()
    module.configure_model()
    module.model.eval()
    compress = Compress([ml.Novices(ratio=0.5)], at_step=4, batches=random_batches())
    fit(module, tmp_path / "a", [ExpertStatistics(every_n_steps=2), compress], steps=6)
    other = Compress([ml.Novices(ratio=0.5)], at_step=4, batches=random_batches())
    fit(plain, tmp_path / "b", [ExpertStatistics(every_n_steps=2), other], steps=6)
    for name in ("load_max", "novice_mass"):
        tag = f"experts_train/{name}"
        assert scalar(events(tmp_path / "a"), tag) == scalar(events(tmp_path / "b"), tag)


def test_a_model_with_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ml.MixtralModule(model={**SIZES, "num_hidden_layers": 1}, warmup_steps=1)
    fit(module, tmp_path, [ExpertStatistics(every_n_steps=2)], steps=2)
    assert "experts_train/routing_entropy/layer_0" in events(tmp_path).Tags()["scalars"]
