"""Sizes of tiles for the training kernels: a pure function of format and device, from shipped tables.

Sizes do not depend on the number of tokens: what the forward pass returns for the way back must have a size that is
known while a compiler traces with any number of them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal

import triton

from moe_kernels.triton_kernels.dispatch import FOLDER, Device, Tiles

TrainingFormat = Literal["dense", "fp32"]
"""Of what is multiplied: int4 weights are dequantised first. fp32 has no tensor cores and takes twice the memory."""


@dataclass(frozen=True)
class OuterTiles:
    """Sizes for the gradients of matrices.

    Attributes:
        block: Rows and columns of a tile; fewer for matrices that have fewer.
        block_pairs: Pairs that are added up at a time.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.
    """

    block: int
    block_pairs: int
    num_warps: int
    num_stages: int

    def of(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the sizes of a tile for a matrix of some size, never under the least of a product."""
        block_rows, block_columns = (min(self.block, max(triton.next_power_of_2(size), 16)) for size in (rows, columns))
        return block_rows, block_columns


@dataclass(frozen=True)
class TrainingChoice:
    """Sizes for a step.

    Attributes:
        block_rows: Sorted pairs of a tile.
        gate_up: Of the gate and up projections.
        down: Of the down projection.
        down_backward: Of the way back through it and SwiGLU.
        gate_up_backward: Of the way back through gate and up.
        outer: Of the gradients of matrices.
    """

    block_rows: int
    gate_up: Tiles
    down: Tiles
    down_backward: Tiles
    gate_up_backward: Tiles
    outer: OuterTiles


@functools.cache
def choose_training(form: TrainingFormat, device: Device) -> TrainingChoice:
    """Choose tiles.

    Args:
        form: Format of what is multiplied.
        device: From `block.device_of`.

    Returns:
        The sizes for its architecture, or for the next lower one that a table is shipped for.
    """
    archs = sorted(int(path.stem[len("training_sm_") :]) for path in FOLDER.glob("training_sm_*.json"))
    arch = max((arch for arch in archs if arch <= device.arch), default=archs[0])
    row = json.loads((FOLDER / f"training_sm_{arch}.json").read_text(encoding="utf-8"))[form]
    kernels = {name: Tiles(**sizes) for name, sizes in row.items() if name not in ("block_rows", "outer")}
    return TrainingChoice(row["block_rows"], outer=OuterTiles(**row["outer"]), **kernels)
