"""Which kernels a call takes, and the sizes of their tiles: a pure function of sizes and device, from shipped tables.

Nothing is tried out while a model runs. Tables lie in ``configs/``: one for each architecture, and one for each device
and version of triton on which the kernels were tuned, which goes first where it is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import warnings
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


def limits(form: Format, device: Device) -> tuple[int | None, ...]:
    """Return the largest number of tokens of each row of a table, from the lowest up; None for no limit.

    Args:
        form: Format of the weights and activations.
        device: From `device_of`.
    """
    return tuple(row["up_to_tokens"] for row in _table(device)[form])


@functools.cache
def _table(device: Device) -> Mapping[str, Any]:
    """Return the table of a device: that of its architecture, or of the next lower one, and over it its own."""
    archs = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.json"))
    arch = max((arch for arch in archs if arch <= device.arch), default=archs[0])
    table = json.loads((FOLDER / f"sm_{arch}.json").read_text(encoding="utf-8"))
    return table | _tuned(FOLDER / table_name(device)) if device.name else table


def _tuned(path: Path) -> dict[str, Any]:
    """Return the forms that a tuned table holds; what cannot be read is said and left out."""
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"it holds a {type(held).__name__}")
    except (OSError, ValueError) as error:
        _say_unread(path, "", error)
        return {}
    table = {}
    for form in get_args(Format):
        if form not in held:
            continue
        try:
            check_rows(held[form])
        except ValueError as error:
            _say_unread(path, f" for {form}", error)
        else:
            table[form] = held[form]
    return table


def _say_unread(path: Path, what: str, error: Exception) -> None:
    warnings.warn(f"{path.name}{what}: {error}; the tiles of the architecture are taken: tune again", stacklevel=2)


def check_rows(rows: Any) -> None:
    """Check the rows of a table for one form.

    Args:
        rows: As they are in the file.

    Raises:
        ValueError: They do not hold a choice for every number of tokens.
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError("there are no rows")
    before = 0
    for number, row in enumerate(rows):
        last = number == len(rows) - 1
        try:
            limit, path, block_tokens = row["up_to_tokens"], row["path"], row["block_tokens"]
            tiles = [Tiles(**row[name]) for name in ("gate_up", "down")]
        except (KeyError, TypeError) as error:
            raise ValueError(f"row {number} is not whole ({error})") from error
        if (limit is None) != last or (not last and not (_is_size(limit) and limit > before)):
            raise ValueError(f"row {number} is for up to {limit} tokens: limits rise, and only the last one is null")
        sizes = [size for tile in tiles for size in dataclasses.astuple(tile)]
        if path not in ("decode", "grouped") or not all(map(_is_size, [block_tokens, *sizes])):
            raise ValueError(f"row {number} holds sizes that are no positive integers, or the path {path!r}")
        if path == "decode" and (last or block_tokens < limit):
            raise ValueError(f"row {number}: a tile of {block_tokens} tokens does not hold {limit or 'any number of'}")
        before = limit or before


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def table_name(device: Device) -> str:
    """Return the name of the file of a device's own table: ``nvidia-h200-triton-3.9.json``."""
    return f"{slug(device.name)}-triton-{device.triton}.json"


def slug(name: str) -> str:
    """Return a device's name as part of a file's name: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
