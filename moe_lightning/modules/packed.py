"""Packed weights under DistributedDataParallel."""

from __future__ import annotations

from torch import nn

from moe_lightning.experts.stacks import packed_buffers


def ignore_packed_buffers(module: nn.Module) -> None:
    """Tell DistributedDataParallel to leave packed weights alone: it would send all of them at every forward pass.

    They are the same on all processes anyway: read from one file, or taken from rank 0 when ``ml.compress`` made them
    (``compression.ranks``); not later, as optimizers keep the moments of what is stored where.

    Args:
        module: The module that will be wrapped, after its last change of structure.
    """
    module._ddp_params_and_buffers_to_ignore = packed_buffers(module)  # type: ignore[assignment]
