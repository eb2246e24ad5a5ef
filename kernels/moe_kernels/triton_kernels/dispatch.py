"""Which kernels a call takes, and the sizes of their tiles: a pure function of sizes and device, from shipped tables.

Nothing is tried out while a model runs. Tables lie in ``configs/``: one for each architecture, and one for each device
and version of triton on which the kernels were tuned, which goes first where it is there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

FOLDER = Path(__file__).parent / "configs"

Format = Literal["dense", "int4", "sparse24", "dense fp32", "int4 fp32", "sparse24 fp32"]
"""Of the weights; fp32 where the activations are, which have no tensor cores and take twice the memory."""


@dataclass(frozen=True)
class Device:
    """What decides about a table.

    Attributes:
        arch: 80, 90, 100; 0 for the interpreter.
        name: As the driver says it.
        triton: Version of triton, ``3.9``.
    """

    arch: int
    name: str = ""
    triton: str = ""


@dataclass(frozen=True)
class Tiles:
    """Sizes for one kernel.

    Attributes:
        block_out: Rows of the weights in a tile.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at a time.
        block_in: Inputs of a tile; int4 weights take one group.
        splits: Programs among which the inputs are split.
    """

    block_out: int
    num_warps: int
    num_stages: int
    block_in: int = 64
    splits: int = 1


@dataclass(frozen=True)
class Choice:
    """The kernels for a call.

    Attributes:
        path: ``decode``: one tile holds all tokens. ``grouped``: pairs are sorted, int4 weights dequantised first.
        block_tokens: Tokens, or sorted pairs, of a tile.
        gate_up: Sizes for the gate and up projections.
        down: Sizes for the down projection.
    """

    path: Literal["decode", "grouped"]
    block_tokens: int
    gate_up: Tiles
    down: Tiles


def choose(tokens: int, form: Format, hidden_size: int, inner_size: int, device: Device) -> Choice:
    """Choose kernels and tiles.

    Args:
        tokens: N.
        form: Format of the weights and activations.
        hidden_size: H.
        inner_size: I.
        device: From `device_of`.

    Returns:
        What fits the sizes: int4 weights want tiles that divide their rows.

    Raises:
        ValueError: int4 weights with sizes that 16 does not divide.
    """
    row = next(row for row in _table(device)[form] if row["up_to_tokens"] is None or tokens <= row["up_to_tokens"])
    choice = Choice(row["path"], row["block_tokens"], Tiles(**row["gate_up"]), Tiles(**row["down"]))
    if not form.startswith("int4"):
        return choice
    return replace(
        choice,
        gate_up=_dividing(choice.gate_up, inner_size, "intermediate"),
        down=_dividing(choice.down, hidden_size, "hidden"),
    )


def _dividing(tiles: Tiles, rows: int, what: str) -> Tiles:
    """Halve tiles until they divide the rows."""
    block_out = tiles.block_out
    while rows % block_out:
        block_out //= 2
    if block_out < 16:
        raise ValueError(f"{what} size {rows}: int4 kernels want a multiple of 16")
    return replace(tiles, block_out=block_out)


def format_of(form: str, dtype: torch.dtype) -> Format:
    """Return the row of the tables for weights of a form and activations of a type.

    Args:
        form: ``dense``, ``int4`` or ``sparse24``; see `weight_forms.form_of`.
        dtype: Of the activations.

    Raises:
        ValueError: Another form.
    """
    wanted = f"{form} fp32" if dtype == torch.float32 else form
    found = next((known for known in get_args(Format) if known == wanted), None)
    if found is None:
        raise ValueError(f"there are no tables for weights of the form {form}")
    return found


@functools.cache
def _table(device: Device) -> Mapping[str, Any]:
    """Return the table of a device: its own, that of its architecture, or that of the next lower one."""
    own = FOLDER / f"{slug(device.name)}-triton-{device.triton}.json"
    if device.name and own.exists():
        return json.loads(own.read_text(encoding="utf-8"))
    archs = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.json"))
    arch = max((arch for arch in archs if arch <= device.arch), default=archs[0])
    return json.loads((FOLDER / f"sm_{arch}.json").read_text(encoding="utf-8"))


def slug(name: str) -> str:
    """Return a device's name as part of a file's name: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
