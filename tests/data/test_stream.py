import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from moe_lightning.data import TextDataModule
from moe_lightning.data.packing import Blocks
from moe_lightning.data.stream import BlockLoader, TrainStream


def numbered_blocks(count: int, size: int = 4) -> Blocks:
    """Blocks whose tokens are the number of the block."""
    tokens = np.repeat(np.arange(count)[:, None], size, axis=1)
    return Blocks(tokens, None, np.ones(count, dtype=np.int64), None, None, {})


def numbers(batch: dict[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(batch["input_ids"][:, 0].tolist())


def test_a_batch_is_a_function_of_seed_and_number_only() -> None:
    stream = TrainStream(numbered_blocks(23), 4, seed=3)
    torch.manual_seed(1)
    in_order = [numbers(stream.batch(index)) for index in range(12)]
    other = TrainStream(numbered_blocks(23), 4, seed=3)
    torch.manual_seed(2)
    assert [numbers(other.batch(index)) for index in reversed(range(12))] == in_order[::-1]
    assert [numbers(TrainStream(numbered_blocks(23), 4, seed=4).batch(index)) for index in range(12)] != in_order


def test_a_pass_takes_no_block_twice_and_passes_differ() -> None:
    stream = TrainStream(numbered_blocks(23), 4, seed=0)
    assert stream.batches_per_pass == len(stream) == 5
    passes = [[number for batch in stream for number in numbers(batch)] for _ in range(3)]
    for found in passes:
        assert len(set(found)) == len(found) == 20
    assert len({tuple(found) for found in passes}) == 3


def test_ranks_share_the_batches_of_one_process() -> None:
    whole = TrainStream(numbered_blocks(50), 6, seed=0)
    ranks = [TrainStream(numbered_blocks(50), 2, seed=0, rank=rank, world_size=3) for rank in range(3)]
    for index in range(20):
        assert sum((numbers(rank.batch(index)) for rank in ranks), ()) == numbers(whole.batch(index))


def test_the_state_continues_with_the_next_batch_and_says_what_changed() -> None:
    stream = TrainStream(numbered_blocks(23), 4, seed=0, length=100, fingerprint="a")
    iterator = iter(stream)
    for _ in range(7):
        next(iterator)
    state = stream.state_dict()
    expected = numbers(next(iterator))
    resumed = TrainStream(numbered_blocks(23), 4, seed=0, length=100, fingerprint="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
    assert numbers(next(iter(resumed))) == expected
    with pytest.warns(UserWarning, match=r"--data.seed and --data.batch_size and the training data changed"):
        TrainStream(numbered_blocks(23), 3, seed=1, length=100, fingerprint="b").load_state_dict(state)


def test_too_few_blocks_for_one_step_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"has 7 blocks, but one step takes 4 on each of 2 devices: lower --data.b"):
        TrainStream(numbered_blocks(7), 4, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_block_once_and_all_ranks_equally_often(world_size: int) -> None:
    blocks = numbered_blocks(10)
    loaders = [BlockLoader(blocks, 2, rank=r, world_size=world_size, equal_ranks=True) for r in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    seen = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            real = batch["labels"][:, 0] != -100
            seen += batch["input_ids"][real, 0].tolist()
            assert not batch["token_bytes"][~real].any()
    assert sorted(seen) == list(range(10))


def test_without_equal_ranks_there_is_no_filler() -> None:
    loaders = [BlockLoader(numbered_blocks(10), 2, num_blocks=7, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(number for loader in loaders for batch in loader for number in numbers(batch)) == list(range(7))


# A real trainer


class Recorder(lightning.LightningModule):
    """A linear model that notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch["input_ids"].flatten().tolist()))
        return self.layer(batch["input_ids"].float().mean().reshape(1)).sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("loss", batch["input_ids"].float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class SaveEverywhere(Callback):
    """Saves after every batch, in and after every validation, and at the end of every epoch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []

    def save(self, trainer: lightning.Trainer, module: Any, hook: str) -> None:
        file = self.folder / f"{len(self.saved):03}-{hook}.ckpt"
        trainer.save_checkpoint(file)
        self.saved.append((file, len(module.seen)))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.save(trainer, pl_module, "batch")

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, "validation_batch")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module, "epoch")


@pytest.fixture
def options(text_folder: Path, tmp_path: Path) -> dict[str, Any]:
    # limits keep the run short: 5 batches per pass
    return {
        "sources": str(text_folder / "*" / "*.txt"),
        "vocab_size": 300,
        "block_size": 64,
        "batch_size": 8,
        "validation": 8,
        "test": 0,
        "calibration": 0,
        "max_bytes": 15000,
        "cache_dir": str(tmp_path / "cache"),
    }


def run(
    options: dict[str, Any], folder: Path, ckpt_path: Path | None = None, save: bool = False, **trainer: Any
) -> Any:
    callback = SaveEverywhere(folder)
    module = Recorder()
    lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if save else [],
        default_root_dir=folder,
        **trainer,
    ).fit(module, datamodule=TextDataModule(**options), ckpt_path=ckpt_path, weights_only=True)
    return module.seen, callback.saved


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param({"max_steps": 12, "val_check_interval": 3}, id="stream"),
        pytest.param({"max_steps": 4, "accumulate_grad_batches": 3, "val_check_interval": 4}, id="accumulated"),
        pytest.param({"max_steps": 9, "limit_train_batches": 4}, id="limited-stream"),
        pytest.param({"max_epochs": 2}, id="epochs"),
        pytest.param({"max_epochs": 3, "limit_train_batches": 2}, id="limited-epochs"),
        pytest.param({"max_epochs": 3, "max_steps": 9}, id="epochs-and-steps"),
    ],
)
def test_a_run_resumed_from_any_checkpoint_sees_exactly_the_batches_that_were_left(
    options: dict[str, Any], tmp_path: Path, trainer: dict[str, Any]
) -> None:
    seen, saved = run(options, tmp_path, save=True, **trainer)
    stream = TrainStream(TextDataModule(**options).blocks("train"), 8, seed=0)
    steps = trainer.get("max_steps", 10**9) * trainer.get("accumulate_grad_batches", 1)
    per_epoch = trainer.get("limit_train_batches", stream.batches_per_pass)
    expected = [
        epoch * stream.batches_per_pass + index
        for epoch in range(trainer.get("max_epochs", 0))
        for index in range(per_epoch)
    ][:steps] or list(range(steps))
    assert seen == [tuple(stream.batch(index)["input_ids"].flatten().tolist()) for index in expected]
    assert len(saved) > len(seen)
    for file, count in saved:
        rest, _ = run(options, tmp_path, ckpt_path=file, **trainer)
        assert rest == seen[count:], f"{file.name}, saved after {count} of {len(seen)} batches"


def test_a_finished_run_can_be_extended(options: dict[str, Any], tmp_path: Path) -> None:
    seen, _ = run(options, tmp_path, max_steps=12)
    _, saved = run(options, tmp_path, save=True, max_steps=7)
    rest, _ = run(options, tmp_path, ckpt_path=saved[-1][0], max_steps=12)
    assert rest == seen[7:]


def test_the_checkpoint_callback_of_lightning_works_too(options: dict[str, Any], tmp_path: Path) -> None:
    seen, _ = run(options, tmp_path, max_steps=9)
    module = Recorder()
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_last=True, save_top_k=-1)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**quiet, callbacks=[checkpoint], max_steps=9)
    trainer.fit(module, datamodule=TextDataModule(**options))
    assert module.seen == seen
    file = next((tmp_path / "checkpoints").glob("*step=4.ckpt"))
    rest, _ = run(options, tmp_path, ckpt_path=file, max_steps=9)
    assert rest == seen[4:]


def test_options_of_the_trainer_that_a_stream_cannot_follow_are_errors(options: dict[str, Any], tmp_path: Path) -> None:
    for name in ("overfit_batches", "reload_dataloaders_every_n_epochs"):
        with pytest.raises(ValueError, match=f"--trainer.{name} does not go"):
            run(options, tmp_path, max_steps=2, **{name: 1})


def test_a_checkpoint_of_another_tokenizer_is_an_error(options: dict[str, Any], tmp_path: Path) -> None:
    _, saved = run(options, tmp_path, save=True, max_steps=2)
    with pytest.raises(ValueError, match=r"another tokenizer .*a new one was trained.*--data.tokenizer .*tokenizers"):
        run(options | {"vocab_size": 290}, tmp_path, ckpt_path=saved[0][0], max_steps=4)
    # with its own tokenizer the run goes on, on other data
    folder = TextDataModule(**options).prepare().state_dict()["tokenizer_folder"]
    with pytest.warns(UserWarning, match="the training data changed"):
        run(options | {"tokenizer": folder, "max_bytes": 25000}, tmp_path, ckpt_path=saved[0][0], max_steps=4)
