"""Looking at a checkpoint folder before anything is loaded: is it a Mixtral, and are its files whole?"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from moe_lightning.architectures import architecture_named

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``config.json`` of a folder and make sure that its family is supported.

    Raises:
        FileNotFoundError: No such folder, or no config in it.
        ValueError: Not JSON, or not a supported family.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint folder of transformers")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        architecture_named(str(config.get("model_type")))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index} is damaged ({error!r}): copy the checkpoint again") from None
        return [folder / name for name in names]
    return [folder / SINGLE]


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file and make sure that the file is whole.

    Returns:
        Tensor name -> ``{"dtype", "shape", "data_offsets"}``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged or cut short; the message gives both lengths.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint has no {path.name} in {path.parent} (weights must be safetensors)")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is damaged or cut short ({size} bytes): copy the checkpoint again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path} has a damaged header: copy the checkpoint again") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(
            f"{path} is cut short: it has {size} bytes, its header says {expected}: copy the checkpoint again"
        )
    return header


def check_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Make sure that a folder holds a supported model whose weight files are all there and whole.

    Returns:
        Its ``config.json``.

    Raises:
        FileNotFoundError: The folder, its config or a weight file is missing.
        ValueError: Another family, or a damaged file.
    """
    config = read_config(directory)
    for shard in _shards(Path(directory)):
        read_header(shard)
    return config


def has_weights(directory: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds weight files at all, whole or not."""
    return any((Path(directory) / name).is_file() for name in (INDEX, SINGLE))


def stored_dtype(directory: str | os.PathLike[str]) -> torch.dtype:
    """Return the type of the first floating-point weight of a folder; float32 where there is none."""
    known = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for shard in _shards(Path(directory)):
        for entry in read_header(shard).values():
            if entry["dtype"] in known:
                return known[entry["dtype"]]
    return torch.float32


def stored_bytes(directory: str | os.PathLike[str]) -> int:
    """Return the bytes of all weight files of a folder."""
    return sum(path.stat().st_size for path in _shards(Path(directory)))


def weights_bytes(directory: str | os.PathLike[str]) -> int:
    """Return the bytes of all weights of a folder: those of its files without their tables of contents."""
    headers = (read_header(shard).values() for shard in _shards(Path(directory)))
    return sum(max((entry["data_offsets"][1] for entry in header), default=0) for header in headers)
