"""What each process of ``test_quality_texts.py``'s run on two processes executes.

Run as a program it forks both of them, so that torch and transformers are imported only once. No gradient is computed
before a fork.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import moe_lightning as ml
from tests.models import SIZES, random_batches


class KeepMoments(Callback):
    """Save what each process knows at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        quality = next(item for item in trainer.callbacks if isinstance(item, ml.callbacks.QualityEvaluation))  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / f"moments-{trainer.global_rank}.json"
        path.write_text(json.dumps([moment.to_dict() for moment in quality.moments]))


def measure(folder: Path, texts: Path, processes: int) -> None:
    """Compress before the first step, with quality around it.

    Args:
        folder: The run directory.
        texts: Where the texts lie.
        processes: How many processes do it.
    """
    data = ml.TextDataModule(
        sources=f"{texts}/texts/*.txt",
        vocab_size=300,
        block_size=16,
        batch_size=2,
        validation=0,
        test=13,
        calibration=2,
        cache_dir=str(texts / "cache"),
    )
    quality = ml.callbacks.QualityEvaluation(
        divergence_tokens=48, layer_tokens=16, domains={"topics": "python-topics"}, domain_blocks=3, new_tokens=2
    )
    calibration = random_batches(1, sequence=16)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        default_root_dir=folder,
        callbacks=[
            quality,
            ml.callbacks.Compress([ml.ExpertDrop(keep=4), ml.BlockDrop(count=1)], at_step=0, batches=calibration),
            KeepMoments(),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    module = ml.MixtralModule(model={**SIZES, "vocab_size": 300}, warmup_steps=1, learning_rate=1e-2)
    trainer.fit(module, datamodule=data)


def fork(rank: int, folder: Path, texts: Path, port: str) -> int:
    """Start one of two processes, as a launcher would, and return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2") | {"GROUP_RANK": "0"}
        measure(folder, texts, 2)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> str:
    """Return the number of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    port = free_port()
    children = [fork(rank, Path(sys.argv[1]), Path(sys.argv[2]), port) for rank in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, statuses)))
