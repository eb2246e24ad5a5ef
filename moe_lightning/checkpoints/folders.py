"""Hugging Face folders: written whole or not at all, loaded without a missing or an unexpected key."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from moe_lightning.architectures import architecture_of
from moe_lightning.checkpoints.card import model_card
from moe_lightning.checkpoints.inspect import check_checkpoint
from moe_lightning.compression.layerwise import is_layerwise
from moe_lightning.experts import WeightStack
from moe_lightning.files import check_output_folder, written_folder
from moe_lightning.method import Method
from moe_lightning.plan import ModelShape
from moe_lightning.surgery import as_config, plan_of, register_with_transformers

Format = Literal["auto", "native", "transformers"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_FOLDERS = ("additional_chat_templates",)

MOST_NAMED = 8
"""Layers named in a message."""


def _why_not_plain(shape: ModelShape) -> str | None:
    """Say why a shape cannot be written as a plain Mixtral, or None where it can."""
    reasons = {
        "have novices": [layout.layer for layout in shape.layouts if layout.novices],
        "have router rows without an expert": [layout.layer for layout in shape.layouts if layout.absent],
        "have experts that share weights": [layout.layer for layout in shape.layouts if layout.merged],
        "have lost channels": [layout.layer for layout in shape.layouts if layout.width is not None],
        "have experts of integers": [
            layout.layer for layout in shape.layouts if layout.real and layout.format and layout.format.quantized
        ],
        "have attention matrices of integers": [block for block, packed in shape.attention if packed.quantized],
        "have low-rank terms that are not merged (MergeLoRA)": sorted(
            {layout.layer for layout in shape.layouts if layout.lora} | {block for block, _ in shape.attention_lora}
        ),
        "have fewer experts than the router picks": [
            layout.layer for layout in shape.layouts if len(layout.router) < shape.top_k
        ],
        "have lost their MoE": [
            block for block in shape.blocks if block in shape.original_moe_layers and block not in shape.moe_layers
        ],
    }
    for reason, layers in reasons.items():
        if layers:
            more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
            return f"layers {layers[:MOST_NAMED]}{more} {reason}"
    counts = sorted({len(layout.router) for layout in shape.layouts})
    if len(counts) > 1:
        return f"its layers have different numbers of experts ({', '.join(map(str, counts))})"
    return None


def _has_zeros(shape: ModelShape) -> bool:
    """Say whether weights were pruned: a plain folder would hold their zeros one by one."""
    return any(layout.format is not None for layout in shape.layouts) or bool(shape.attention)


def check_format(shape: ModelShape, format: Format) -> Literal["native", "transformers"]:
    """Decide in which format a model of a shape is written.

    Args:
        shape: Shape of the model to write.
        format: ``native`` (loads after ``import moe_lightning``), ``transformers`` (a plain Mixtral that transformers
            alone loads; zeros of pruned weights are written out), or ``auto``: the plain one wherever the model can be
            written so without growing.

    Raises:
        ValueError: Unknown format, or ``transformers`` where the model cannot be written so; the message says why.
    """
    if format not in ("auto", "native", "transformers"):
        raise ValueError(f"unknown format {format!r}: choose auto, native or transformers")
    reason = _why_not_plain(shape)
    if format == "transformers" and reason:
        raise ValueError(f"the model cannot be written as a plain Mixtral because {reason}: use format=native or auto")
    if format == "native" or reason or (format == "auto" and _has_zeros(shape)):
        return "native"
    return "transformers"


def may_be_uneven(method: Method) -> bool:
    """Say whether a method may leave layers with different numbers of experts, which a plain Mixtral cannot have.

    Args:
        method: The method, before it has decided.
    """
    return not is_layerwise(method) and getattr(method, "scope", "layer") != "layer"


def written_shape(shape: ModelShape, format: Literal["native", "transformers"]) -> ModelShape:
    """Return the shape that a folder of a format holds: to a plain Mixtral, zeros are weights like all others.

    Args:
        shape: Shape of the model.
        format: As :func:`check_format` returns it.
    """
    if format == "native":
        return shape
    layouts = tuple(dataclasses.replace(layout, format=None) for layout in shape.layouts)
    return dataclasses.replace(shape, layouts=layouts, attention=())


def plain_structure(model: PreTrainedModel) -> MixtralForCausalLM:
    """Return the plain Mixtral that a model is written as, without weights (on the device ``meta``).

    Args:
        model: A compressed model with the same experts in every layer, on any device.
    """
    # The numbers in the plan are those of the model before: it is lineage here, not something to apply.
    config = as_config(model.config, MixtralConfig, {"lineage": plan_of(model).to_dict()})
    config.num_local_experts = len(architecture_of(model).shape(model).layouts[0].router)
    with torch.device("meta"):
        return MixtralForCausalLM(config)


def _plain_model(model: PreTrainedModel) -> MixtralForCausalLM:
    """Return a plain Mixtral that shares the tensors of a compressed one."""
    plain = plain_structure(model)
    state = {}
    for name, value in _plain_state(model).items():
        state[name.replace(".experts.storage.", ".experts.")] = value
    plain.load_state_dict(state, strict=True, assign=True)
    plain.generation_config = model.generation_config
    return plain


def _plain_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict of a model with the weights of its packed matrices in their place."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, WeightStack)}
    state = model.state_dict()
    for prefix, stack in stacks.items():
        for name in stack.state_dict():
            del state[f"{prefix}.{name}"]
        dense = stack.dense().detach()
        linear = prefix.endswith(".stack")
        state[f"{prefix.removesuffix('.stack')}.weight" if linear else prefix] = dense[0] if linear else dense
    return state


def _check_tokenizer_folder(source: Path) -> None:
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"tokenizer={source}: there is no folder with tokenizer files: nothing was written")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for name in TOKENIZER_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    format: Format = "auto",
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model as a Hugging Face folder, whole or not at all.

    The folder holds the config with the plan, sharded safetensors, the generation config, the tokenizer and a model
    card with the lineage.

    Args:
        model: A Mixtral, compressed or not.
        directory: Folder to write.
        tokenizer: Tokenizer to save, or a folder whose tokenizer files (chat template included) are copied as they are.
        format: ``auto`` writes a plain Mixtral, which transformers alone loads, where whole experts were dropped
            uniformly and nothing else; ``native`` and ``transformers`` force one.
        overwrite: Replace a folder that holds something.
        max_shard_size: Largest size of a weight file.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds something and ``overwrite`` is not set.
        FileNotFoundError: ``tokenizer`` names a folder without tokenizer files.
        ValueError: The format cannot hold the model, or a parameter is not finite.
    """
    shape = architecture_of(model).shape(model)
    chosen = check_format(shape, format)
    check_output_folder(directory, overwrite, "overwrite=True")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        _check_tokenizer_folder(Path(tokenizer))
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} is not finite: nothing was written")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            raise ValueError(f"{name} is not finite: nothing was written")
    compressed = bool(plan_of(model))
    written: PreTrainedModel = _plain_model(model) if compressed and chosen == "transformers" else model
    with written_folder(directory, overwrite) as folder:
        bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            written.save_pretrained(folder, max_shard_size=max_shard_size)
        finally:
            if bar:
                transformers_logging.enable_progress_bar()
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(folder)
        elif tokenizer is not None:
            _copy_tokenizer(Path(tokenizer), folder)
        (folder / "README.md").write_text(model_card(written, plan_of(model), written_shape(shape, chosen), chosen))
    return Path(directory)


def from_pretrained(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a plain or compressed Mixtral folder, in eval mode.

    Per-expert tensors (``block_sparse_moe.experts.N.w1|w2|w3``) and fused ones both load.

    Args:
        directory: Folder in Hugging Face layout.
        dtype: Type of the weights; None keeps the one they were saved in.
        device: Where the model goes.

    Returns:
        The model; a compressed folder gives the compressed class.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: Another family, a damaged file, or weights that do not fit the config (missing, unexpected or of
            another size): nothing is ever filled with random values.
    """
    check_checkpoint(directory)
    register_with_transformers()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype or "auto", output_loading_info=True, local_files_only=True
        )
    except RuntimeError as error:
        # transformers prints a table of the sizes and says here only that there is one.
        raise ValueError(f"the weights in {directory} do not fit its config, see the report above ({error})") from error
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    problems = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    if problems:
        raise ValueError(f"the weights in {directory} do not fit its config: {problems}")
    return model.to(device).eval()
