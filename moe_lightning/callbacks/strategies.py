"""What a change of structure means for a strategy. The only callback file that touches Lightning's inside."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from moe_lightning.modules.packed import ignore_packed_buffers

REFUSED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_strategy(trainer: Trainer, owner: str) -> None:
    """Refuse strategies that shard the parameters: they cannot be exchanged in mid-run.

    Args:
        trainer: The trainer.
        owner: Who asks, for the message.

    Raises:
        ValueError: The strategy is one of them.
    """
    if isinstance(trainer.strategy, REFUSED):
        raise ValueError(
            f"{owner} cannot change the model in mid-run under {type(trainer.strategy).__name__}, which shards its "
            "parameters: use --trainer.strategy auto or ddp, or compress the checkpoint beforehand with "
            "'moe-lightning compress'"
        )


def check_whole(trainer: Trainer, owner: str) -> None:
    """Refuse strategies that shard the parameters where a process needs the whole model, to measure it by itself.

    Args:
        trainer: The trainer.
        owner: Who asks, for the message.

    Raises:
        ValueError: The strategy is one of them.
    """
    if isinstance(trainer.strategy, REFUSED):
        raise ValueError(
            f"{owner} runs the model in one process, and {type(trainer.strategy).__name__} shards it: use "
            "--trainer.strategy auto or ddp, or run 'moe-lightning test' on an exported folder"
        )


def wrap_again(trainer: Trainer, module: LightningModule) -> None:
    """Let DistributedDataParallel see the parameters that train now; without it ranks drift apart silently.

    Args:
        trainer: The trainer.
        module: Its module, after the change.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.model is not module:
        strategy.model = None  # the old wrapper's hooks go with it
        ignore_packed_buffers(module)
        strategy.model = module
        strategy.configure_ddp()  # communication hooks included
