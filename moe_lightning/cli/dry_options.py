"""What a dry run of ``fit`` makes of the options: no device is asked for, no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import AutoConfig

from moe_lightning.architectures import architecture_named
from moe_lightning.callbacks import Compress, RecoveryStage
from moe_lightning.callbacks.strategies import check_strategy
from moe_lightning.checkpoints import check_checkpoint, has_weights, read_config
from moe_lightning.cli.trainer_options import processes_of
from moe_lightning.data import TextDataModule
from moe_lightning.modules.checks import MODEL_FIELDS

SHARDING = {"fsdp": FSDPStrategy, "deepspeed": DeepSpeedStrategy, "model_parallel": ModelParallelStrategy}
TRUE_TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64": torch.float64, "64-true": torch.float64}
"""Precisions in which weights have another type than float32."""


@dataclass
class Asked:
    """What the options say about the machine and the model, neither of which a dry run needs.

    Attributes:
        model: Folder of the model, or words for a new one.
        only_sizes: The folder holds no weights: neither they nor the text are looked at.
        accelerator: As in the options.
        processes: Devices on all nodes; 1 where that depends on the machine.
        strategy: As in the options.
        dtype: Type of the weights.
        max_steps: As in the options; -1 for none.
        epochs: Passes over the text; None where steps alone count.
        accumulate: Batches of an optimizer step.
    """

    model: str
    only_sizes: bool
    accelerator: str = "auto"
    processes: int = 1
    strategy: Any = "auto"
    dtype: torch.dtype = torch.float32
    max_steps: int = -1
    epochs: int | None = None
    accumulate: int = 1

    @property
    def where(self) -> str:
        """The machine in words."""
        return f"{self.processes} x {self.accelerator}"

    def step_in_words(self, data: TextDataModule, trainer: Trainer) -> str:
        """Say what a step is made of."""
        many = [f"{data.batch_size} blocks of {data.block_size}"]
        many += [f"{self.processes} processes"] if self.processes > 1 else []
        many += [f"{trainer.accumulate_grad_batches} batches"] if trainer.accumulate_grad_batches > 1 else []
        return " x ".join(many)

    def check_strategy(self, trainer: Trainer) -> None:
        """Refuse strategies that shard, as stages and compressions do.

        Args:
            trainer: A trainer with the callbacks of the run.

        Raises:
            ValueError: The strategy is one of them, and a callback changes the model.
        """
        strategy = self.strategy
        if isinstance(strategy, str):
            kinds: list[Any] = [kind for name, kind in SHARDING.items() if strategy.startswith(name)]
            strategy = object.__new__(kinds[0]) if kinds else None  # nothing is set up: the class is all that counts
        stand_in: Any = SimpleNamespace(strategy=strategy)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Compress | RecoveryStage):
                check_strategy(stand_in, type(callback).__name__)

    def read_trainer(self, config: dict[str, Any]) -> None:
        """Take over what the options of the trainer say, and let them ask for no device, logger or checkpoint.

        Args:
            config: Options of the trainer; changed in place.
        """
        self.accelerator, self.strategy = str(config.get("accelerator", "auto")), config.get("strategy", "auto")
        self.processes = processes_of(config)
        self.dtype = TRUE_TYPES.get(str(config.get("precision")), torch.float32)
        self.max_steps = int(config.get("max_steps", -1))
        epochs = config.get("max_epochs")
        if epochs is None and self.max_steps < 0:
            epochs = 1000  # Lightning's default
        self.epochs = None if epochs in (None, -1) else int(epochs)
        self.accumulate = int(config.get("accumulate_grad_batches") or 1)
        config.update(
            {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
            | {"logger": False, "plugins": None, "fast_dev_run": False}
        )


def describe_model(options: Any) -> Asked:
    """Put the sizes of a model in the place of its folder.

    Args:
        options: Options of ``fit``; ``model.checkpoint`` gives way to ``model.model`` and ``model.plan``.

    Returns:
        What is known of the model.

    Raises:
        ValueError: Both a folder and fields, a damaged folder, another family.
        FileNotFoundError: No such folder.
    """
    folder = options.model.checkpoint
    if folder is None or options.model.model is not None:
        return Asked("a new model", only_sizes=False)
    only_sizes = Path(folder).is_dir() and not has_weights(folder)
    try:
        raw = read_config(folder) if only_sizes else check_checkpoint(folder)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"model.checkpoint={folder}: {error}") from None
    config = AutoConfig.from_pretrained(folder)
    architecture = architecture_named(raw["model_type"])
    values = config.to_dict()
    fields = {name: values[name] for name in sorted(MODEL_FIELDS) if name in values}
    fields["num_hidden_layers"] = architecture.shape_of_config(config).num_layers
    plan = architecture.plan_of_config(config)
    options.model.model, options.model.checkpoint = fields, None
    options.model.plan = plan.to_dict() if plan else None
    return Asked(str(folder), only_sizes)
