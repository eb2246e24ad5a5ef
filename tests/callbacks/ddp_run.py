"""What each process of ``test_compress.py``'s run on two processes executes; started by Lightning itself."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import moe_lightning as ml
from moe_lightning.experts import Int4
from tests.models import SIZES


class KeepWeights(Callback):
    """Save the weights of each process at the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Packed weights are not sent around: they are the same anyway, as the test of the weights says.
        wrapped = trainer.strategy.model
        assert wrapped is not None and wrapped.modules_buffers
        sent = {buffer.data_ptr() for buffer in wrapped.modules_buffers}
        packed = [module for module in pl_module.modules() if isinstance(module, Int4)]
        assert packed and not any(stack.words.data_ptr() in sent for stack in packed)
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def main(folder: Path) -> None:
    """Train, trim twice, prune gradually, quantise, and recover in every way on two processes.

    Args:
        folder: Where the texts lie and the weights go.
    """
    data = ml.TextDataModule(
        sources=f"{folder}/texts/*.txt",
        vocab_size=300,
        block_size=16,
        batch_size=2,
        validation=8,
        test=0,
        calibration=8,
        cache_dir=str(folder / "cache"),
    )
    callbacks: list[Callback] = [
        ml.callbacks.Compress([ml.Novices(ratio=0.5)], at_step=2, calibration_batches=3),
        ml.callbacks.Compress([ml.ExpertDrop(keep=5)], at_step=4, calibration_batches=3),
        ml.callbacks.Compress(
            [ml.Wanda(sparsity=ml.SparsitySchedule(0.0, 0.5, steps=2, every=1), targets="experts+attention")],
            at_step=4,
            calibration_batches=3,
            max_fallback=1.0,
        ),
        ml.callbacks.NoviceTuning(at_step=8, steps=2),
        ml.callbacks.RouterDistillation(at_step=10, steps=1),
        ml.callbacks.LoRARecovery(at_step=11, steps=2, rank=2, teacher="before", alpha=0.5),
        ml.callbacks.FullFineTuning(at_step=14),
        ml.callbacks.RecoveredShare(num_batches=2),
        ml.callbacks.Compress(
            [ml.GPTQ(group_size=16)],
            at_step=9,
            calibration_batches=2,
            starved="top_up",
            min_tokens=4,
            max_fallback=1.0,
        ),
    ]
    trainer = Trainer(
        max_steps=16,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        default_root_dir=folder,
        callbacks=[*callbacks, KeepWeights(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    module = ml.MixtralModule(model={**SIZES, "vocab_size": 300}, warmup_steps=1, learning_rate=1e-2)
    trainer.fit(module, datamodule=data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
