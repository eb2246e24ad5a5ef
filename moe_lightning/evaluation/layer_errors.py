"""How far what leaves each block of a model has moved from what left it before compression.

    error = sum |h' - h|^2 / sum |h|^2   over the tokens, h the output of the block in the uncompressed model

Blocks have the numbers of the original model: one that was dropped has no error, and what leaves the blocks behind it
is compared with what left the same blocks before.

B blocks of text, S tokens of each, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.architectures import architecture_of


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Hold what leaves each block of a model in its last forward pass, inside a ``with`` block.

    Args:
        model: A causal language model of a supported family.

    Yields:
        Hidden states ``[B, S, H]`` by the block's number in the original model, ascending; those of the last block
        before the norm behind it. Each forward pass replaces them.
    """
    architecture = architecture_of(model)
    blocks = architecture.shape(model).blocks
    held: dict[int, Tensor] = {}
    handles = [
        block.register_forward_hook(partial(_hold, held, number))
        for number, block in zip(blocks, architecture.decoder_layers(model), strict=True)
    ]
    try:
        yield held
    finally:
        held.clear()
        for handle in handles:
            handle.remove()


def _hold(held: dict[int, Tensor], number: int, _block: nn.Module, _inputs: Any, output: Any) -> None:
    held[number] = output[0] if isinstance(output, tuple) else output


class LayerErrors:
    """Sums of squared errors and of squares, block by block, over batches."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float]] = {}

    def add(self, outputs: Mapping[int, Tensor], reference: Mapping[int, Tensor], mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            outputs: What leaves each block now, ``[B, S, H]``, by its original number.
            reference: What left it before; blocks that only one of them has are left out.
            mask: Which tokens count, ``[B, S]``, 0 for padding; None where all do.
        """
        for number in sorted(outputs.keys() & reference.keys()):
            now = outputs[number]
            before = reference[number].to(now.device)
            keep = None if mask is None else mask.to(now.device).bool()
            if keep is not None:
                now, before = now[keep], before[keep]
            wide = torch.promote_types(torch.promote_types(now.dtype, before.dtype), torch.float32)
            difference = now.to(wide) - before.to(wide)
            error = float(difference.square().sum(dtype=torch.float64))
            squares = float(before.to(wide).square().sum(dtype=torch.float64))
            old_error, old_squares = self._sums.get(number, (0.0, 0.0))
            self._sums[number] = old_error + error, old_squares + squares

    def compute(self) -> dict[int, float]:
        """Return the error of each block by its number, in units of its squares before; NaN where they were zero."""
        return {
            number: error / squares if squares else math.nan for number, (error, squares) in sorted(self._sums.items())
        }
