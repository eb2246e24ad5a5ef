"""Folders with the weights of teachers: the one that a run keeps of itself, and what opening one takes."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from moe_lightning.checkpoints import check_checkpoint
from moe_lightning.checkpoints.inspect import read_header
from moe_lightning.files import written_folder

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def keep_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model so that it can be read by memory map: fused experts, in the type that they have.

    The folder is there whole or not at all; what a killed process left of an earlier attempt goes.

    Args:
        model: The model.
        folder: The folder; one that is there is replaced.

    Raises:
        ValueError: A parameter is not finite.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} is not finite: such a model teaches nothing, and is not kept as a teacher")
    for left in (*folder.parent.glob(f".{folder.name}.*.partial"), *folder.parent.glob(f".{folder.name}.*.old")):
        shutil.rmtree(left, ignore_errors=True)
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with written_folder(folder, overwrite=True) as partial:
            # Not as it is written for others, one matrix for each expert: those would have to be copied together.
            model.save_pretrained(partial, save_original_format=False)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def held_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a model's parameters and of the buffers that are saved.

    Args:
        model: The model.
        dtype: Type in which floating-point numbers are held; None for the one that they have.
    """
    sizes = (
        (value, dtype.itemsize if dtype is not None and value.is_floating_point() else value.element_size())
        for value in model.state_dict().values()
    )
    return sum(value.numel() * size for value, size in sizes)


def is_floating(source: Path | PreTrainedModel) -> bool:
    """Say whether all weights of a folder, or of a model, are floating-point numbers, and none packed."""
    if isinstance(source, PreTrainedModel):
        return all(value.is_floating_point() for value in source.state_dict().values())
    entries = (entry for path in source.glob("*.safetensors") for entry in read_header(path).values())
    return all(entry["dtype"] in FLOATS for entry in entries)


@dataclass(frozen=True)
class Opening:
    """What opening a folder takes.

    Attributes:
        bytes: Of the weights in the type wanted.
        mapped: Whether they stay on disk until they are read; otherwise they are held in memory.
    """

    bytes: int
    mapped: bool

    def __str__(self) -> str:
        """Say it."""
        size = f"{self.bytes / 2**20:,.1f} MiB of weights"
        return f"{size}, memory-mapped" if self.mapped else f"{size}, held in memory beside the student"


def opening(folder: Path, dtype: torch.dtype, device: torch.device) -> Opening:
    """Look at what opening a folder takes.

    On the CPU, fused tensors of the type wanted are used where they lie in the file. Tensors of single experts, as
    Mixtral's own folders have them, are copied together; those of another type are converted.

    Args:
        folder: Hugging Face folder.
        dtype: Type that is wanted.
        device: Where the model goes.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: Another family, or a damaged file.
    """
    check_checkpoint(folder)
    count, mapped = 0, device.type == "cpu"
    for path in folder.glob("*.safetensors"):
        for name, entry in read_header(path).items():
            start, end = entry["data_offsets"]
            # Packed matrices have types of their own.
            weight = entry["dtype"] in FLOATS and name.endswith((".weight", "_proj"))
            count += math.prod(entry["shape"]) * dtype.itemsize if weight else end - start
            if weight and (FLOATS[entry["dtype"]] != dtype or ".block_sparse_moe.experts." in name):
                mapped = False
    return Opening(count, mapped)
