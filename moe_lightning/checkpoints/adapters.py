"""Low-rank terms in a folder of their own, beside the model that they were trained for.

The weights file is that of peft 0.21: names, and stacks of experts laid out as its wrapper of parameters has them.
Where peft can put the terms beside the same matrices, its config is there too, and ``PeftModel.from_pretrained`` reads
the folder. Packed matrices, and experts among novices, it cannot wrap: then there is none, so that nobody loads half of
the terms without a word, and only :func:`load_adapters` reads the folder.

Legend: S matrices (slots), O outputs, X inputs, R rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_lightning.architectures import Architecture, architecture_of
from moe_lightning.checkpoints.folders import check_format
from moe_lightning.compression.adapters import places_of
from moe_lightning.experts import LoraStack
from moe_lightning.experts.lora import LORA_PARAMETERS
from moe_lightning.files import check_output_folder, written_folder
from moe_lightning.plan import AddLora, CompressionPlan, LoraRank, ModelShape
from moe_lightning.plan.edits import Target
from moe_lightning.recovery.lora import LoRA
from moe_lightning.statistics.fingerprint import fingerprint, same_weights
from moe_lightning.surgery import apply_plan, plan_of

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "moe_lightning_adapters.json"
VERSION = 1
_PREFIX = "base_model.model."
_OTHER_TYPE = 1e-2
"""By how much sums of squares may differ, of the same weights in another type: bf16 rounds each to three digits."""
_OTHER_KINDS = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save", "use_qalora", "use_bdlora")
"""Options of peft's config that, when they are set, mean another computation than ours."""


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix, or a stack of them, that may have a term beside it.

    Attributes:
        layer: Original number of its decoder layer.
        target: ``experts`` or ``attention``.
        name: As `places_of` knows it.
        module: Name of the module or parameter in a plain model, as peft's patterns are compared with.
        key: Beginning of the names of its tensors in the weights file.
        slots: S; 0 for a linear layer, whose tensors have no axis for it.
        outputs: O.
        inputs: X.
    """

    layer: int
    target: Target
    name: str
    module: str
    key: str
    slots: int
    outputs: int
    inputs: int

    def sizes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Return the sizes of both tensors in the file."""
        columns = rank * max(self.slots, 1)
        first, second = (f"{self.key}.{parameter}.weight" for parameter in LORA_PARAMETERS)
        return {first: (columns, self.inputs), second: (self.outputs, columns)}

    def to_file(self, stack: LoraStack) -> dict[str, Tensor]:
        """Return both tensors as peft lays them out: ranks inside experts in A, experts inside ranks in B."""
        first_SRX, second_SOR = stack.lora_A.detach(), stack.lora_B.detach()
        flat = first_SRX.flatten(0, 1), second_SOR.permute(1, 2, 0).flatten(1)
        names = self.sizes(stack.rank)
        return {name: tensor.cpu().contiguous().clone() for name, tensor in zip(names, flat, strict=True)}

    def from_file(self, stack: LoraStack, tensors: Mapping[str, Tensor]) -> None:
        """Fill a term with what `to_file` made of one."""
        first, second = (tensors[name] for name in self.sizes(stack.rank))
        slots, rank = stack.lora_A.shape[:2]
        stack.lora_A.copy_(first.unflatten(0, (slots, rank)))
        stack.lora_B.copy_(second.unflatten(1, (rank, slots)).permute(2, 0, 1))


def _matrices(architecture: Architecture, shape: ModelShape) -> list[_Matrix]:
    """Return every matrix of a model that may have a term beside it; layers count from 0 in the names."""
    found = []
    for place, block in enumerate(shape.blocks):
        layer = f"{architecture.layers_prefix}.{place}"
        for name, (outputs, inputs) in shape.attention_sizes.items():
            module = f"{layer}.{architecture.attention_name}.{name}"
            found.append(_Matrix(block, "attention", name, module, _PREFIX + module, 0, outputs, inputs))
        if block not in shape.moe_layers or not shape.layout(block).real:
            continue
        experts, layout = f"{layer}.mlp.experts", shape.layout(block)
        for name, (outputs, inputs) in shape.expert_sizes(layout).items():
            # One wrapper around the other: that of the parameter that the module names first is inside.
            key = f"{_PREFIX}{experts}" + (".base_layer" if name == "gate_up_proj" else "")
            found.append(_Matrix(block, "experts", name, f"{experts}.{name}", key, len(layout.real), outputs, inputs))
    return found


def _without_terms(shape: ModelShape) -> ModelShape:
    layouts = tuple(dataclasses.replace(layout, lora=None) for layout in shape.layouts)
    return dataclasses.replace(shape, layouts=layouts, attention_lora=())


def why_not_peft(shape: ModelShape) -> str | None:
    """Say why peft cannot put the terms of a model beside the same matrices; None where it can.

    Args:
        shape: Shape of the model with its terms.
    """
    packed = [block for block, _ in shape.attention_lora if shape.attention_format(block) is not None]
    if packed:
        return f"attention matrices of layers {packed} are packed"
    base = _without_terms(shape)
    if check_format(base, "auto") == "transformers":
        return None
    everyone = tuple(range(shape.num_experts))
    for layout in shape.layouts:
        if layout.lora is not None and base.layout(layout.layer) != type(layout)(layout.layer, everyone):
            packs = f"stored as {layout.format}" if layout.format else "not all there, or not alone"
            return f"the experts of layer {layout.layer} are {packs}"
    return None


def _structure(shape: ModelShape) -> dict[str, Any]:
    """Return what a model must have in common with that of the terms: layers and experts as they lie."""
    layers = []
    for block in shape.blocks:
        formats = [shape.attention_format(block)]
        entry: dict[str, Any] = {"experts": None}
        if block in shape.moe_layers:
            layout = shape.layout(block)
            formats.append(layout.format)
            entry = {"experts": list(layout.slot_map), "ranks": list(layout.ranks), "width": layout.width}
        layers.append(entry | {"formats": [None if held is None else str(held) for held in formats]})
    sizes = ("architecture", "hidden_size", "intermediate_size", "vocab_size", "top_k")
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return {**{name: getattr(shape, name) for name in (*sizes, *heads)}, "layers": layers}


def _lora_config(shape: ModelShape, matrices: list[_Matrix], base: str | None) -> dict[str, Any]:
    """Return peft's config of the terms of a model."""
    terms = {matrix: shape.lora(matrix.layer, matrix.target) for matrix in matrices}
    held = {matrix: term for matrix, term in terms.items() if term is not None}
    (common, _), *_ = Counter(held.values()).most_common(1)
    others = {matrix.module: term for matrix, term in held.items() if term != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": common.rank,
        "lora_alpha": common.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        # An empty list too: without one peft would choose modules by itself.
        "target_modules": _targets(terms, "attention"),
        "target_parameters": _targets(terms, "experts"),
        "rank_pattern": {module: term.rank for module, term in others.items() if term.rank != common.rank},
        "alpha_pattern": {module: term.alpha for module, term in others.items() if term.alpha != common.alpha},
    }


def _targets(terms: Mapping[_Matrix, LoraRank | None], target: str) -> list[str]:
    """Return how peft is told of the matrices with terms: in short where all of the kind have some."""
    mine = {matrix: term for matrix, term in terms.items() if matrix.target == target}
    if mine and None not in mine.values():
        short = {matrix.name if target == "attention" else f"mlp.experts.{matrix.name}" for matrix in mine}
        return sorted(short)
    return [matrix.module for matrix, term in mine.items() if term is not None]


def save_adapters(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the low-rank terms of a model, and nothing else of it, as a folder, whole or not at all.

    Args:
        model: A Mixtral with terms that are not merged.
        directory: Folder to write.
        base: Folder or hub name of the same model without its terms, noted for those who look for it.
        overwrite: Replace a folder that holds something.

    Returns:
        The folder. peft reads it (``PeftModel.from_pretrained``) where it can put terms beside the same matrices;
        :func:`load_adapters` always does.

    Raises:
        FileExistsError: The folder holds something and ``overwrite`` is not set.
        ValueError: The model has no terms, or one is not finite.
    """
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    matrices = _matrices(architecture, shape)
    tensors: dict[str, Tensor] = {}
    for matrix in matrices:
        stack = places_of(model, matrix.layer, matrix.target)[matrix.name].lora
        tensors |= {} if stack is None else matrix.to_file(stack)
    if not tensors:
        raise ValueError("the model has no low-rank terms to save: they were merged, or LoRA never put them there")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite: nothing was written")
    check_output_folder(directory, overwrite, "overwrite=True")
    reason = why_not_peft(shape)
    config = _lora_config(shape, matrices, None if base is None else str(base))
    own: dict[str, Any] = {"version": VERSION, "why_not_peft": reason, "structure": _structure(shape), "config": config}
    own["weights"] = {"dtype": _dtype_name(model), "fingerprint": fingerprint(model, terms=False)}
    with written_folder(directory, overwrite) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / OWN_CONFIG).write_text(json.dumps(own, indent=2) + "\n")
        if reason is None:
            (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Path(directory)


def load_adapters(model: PreTrainedModel, directory: str | os.PathLike[str]) -> CompressionPlan:
    """Put the low-rank terms of a folder beside the matrices of a live model, all of them or none.

    Args:
        model: A Mixtral of the same structure as the one that the terms were saved from, without terms there. Its
            matrices may be packed.
        directory: Folder that :func:`save_adapters` wrote, or that peft wrote of a plain Mixtral (LoRA on attention, on
            the fused parameters of the experts, or both).

    Returns:
        The plan of the model, with the terms.

    Warns:
        UserWarning: The weights are not those that the terms stood beside when they were saved. Routers that trained
            along, or a model that was compressed anew, make that difference too.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The terms do not fit the model, are not LoRA as it is computed here, or the model has terms already.
            Nothing is changed then.
    """
    folder = Path(directory)
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    config = _read_config(folder, shape)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE} is missing: {folder} holds no low-rank terms")
    tensors = load_file(folder / WEIGHTS_FILE)
    matrices = _matrices(architecture, shape)
    found = _terms_in(tensors, matrices, config, folder)
    edits = {(matrix.layer, matrix.target): term for matrix, term in found.items()}
    plan = plan_of(model).extended(
        [AddLora(layer, target, term.rank, term.alpha) for (layer, target), term in edits.items()],
        {"method": "load_adapters", "folder": folder.name},
    )
    surgery = apply_plan(model, plan)
    try:
        with torch.inference_mode(False), torch.no_grad():
            for matrix in (item for item in matrices if (item.layer, item.target) in edits):
                stack = places_of(model, matrix.layer, matrix.target)[matrix.name].lora
                assert stack is not None
                if matrix in found:
                    matrix.from_file(stack, tensors)
                else:  # peft was told of fewer matrices: a term that changes nothing, and can be trained
                    LoRA().begin(stack, matrix.layer, matrix.name)
    except BaseException:
        surgery.undo()
        raise
    _warn_of_other_weights(model, folder)
    return plan


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _warn_of_other_weights(model: PreTrainedModel, folder: Path) -> None:
    """Warn where the weights that terms stand beside now are not those of the model that they were saved from."""
    if not (folder / OWN_CONFIG).is_file() or model.device.type == "meta":
        return
    saved = json.loads((folder / OWN_CONFIG).read_text()).get("weights")
    if saved is None:
        return
    mine, theirs = fingerprint(model, terms=False), saved["fingerprint"]
    tolerance = 1e-9 if saved["dtype"] == _dtype_name(model) else _OTHER_TYPE
    # Routers and experts take turns in a fingerprint.
    parts = {name: (mine[start::2], theirs[start::2]) for start, name in enumerate(("routers", "experts"))}
    others = [name for name, pair in parts.items() if not same_weights(*pair, tolerance)]
    if others:
        warnings.warn(
            f"the low-rank terms in {folder} were saved from a model with other weights than this one has "
            f"({' and '.join(others)} differ): what they learnt may not fit. Load the model that they were trained "
            "beside, with whatever else trained along with them",
            stacklevel=3,
        )


def _read_config(folder: Path, shape: ModelShape) -> dict[str, Any]:
    """Return peft's config of the terms in a folder; what the folder says of their model is compared with a shape."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one that save_adapters or peft wrote")
    if (folder / OWN_CONFIG).is_file():
        own = json.loads((folder / OWN_CONFIG).read_text())
        if own.get("version") != VERSION:
            raise ValueError(
                f"{folder / OWN_CONFIG} has version {own.get('version')!r}, this release reads version {VERSION}"
            )
        _compare(own["structure"], json.loads(json.dumps(_structure(shape))), folder)
        return dict(own["config"])
    if not (folder / PEFT_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds neither {OWN_CONFIG} nor {PEFT_CONFIG}: it holds no low-rank terms")
    config = json.loads((folder / PEFT_CONFIG).read_text())
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        kind = f"{config.get('peft_type')} with bias={config.get('bias')!r}"
        raise ValueError(f"{folder} holds {kind}: only LoRA without biases is read")
    others = [name for name in _OTHER_KINDS if config.get(name)]
    if others:
        raise ValueError(f"{folder} holds LoRA with {', '.join(others)}, which is not what low-rank terms compute here")
    return dict(config)


def _compare(theirs: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    start = f"the low-rank terms in {folder} were saved from a model of another structure"
    for name in {**theirs, **mine}:
        if name != "layers" and theirs.get(name) != mine.get(name):
            raise ValueError(f"{start}: {name} was {theirs.get(name)}, here it is {mine.get(name)}")
    if len(theirs["layers"]) != len(mine["layers"]):
        raise ValueError(f"{start}: it had {len(theirs['layers'])} decoder layers, here are {len(mine['layers'])}")
    for place, (other, own) in enumerate(zip(theirs["layers"], mine["layers"], strict=True)):
        if other != own:
            raise ValueError(f"{start}: decoder layer {place} of it was {other}, here it is {own}")


def _terms_in(
    tensors: Mapping[str, Tensor], matrices: list[_Matrix], config: dict[str, Any], folder: Path
) -> dict[_Matrix, LoraRank]:
    """Return the matrices that tensors stand beside, with rank and factor.

    Raises:
        ValueError: Something is missing, is of another size, or belongs to no matrix.
    """
    terms: dict[_Matrix, LoraRank] = {}
    for matrix in matrices:
        first = tensors.get(f"{matrix.key}.lora_A.weight")
        if first is None:
            continue
        rank, rest = divmod(first.shape[0], max(matrix.slots, 1))
        sizes = {name: tuple(tensors[name].shape) if name in tensors else None for name in matrix.sizes(rank)}
        if rest or not rank or sizes != matrix.sizes(rank):
            wanted = f"[{max(matrix.slots, 1)} * rank, {matrix.inputs}] and [{matrix.outputs}, ...]"
            raise ValueError(f"{folder}: {sizes} do not fit {matrix.module}, which wants {wanted}")
        if not all(bool(torch.isfinite(tensors[name]).all()) for name in sizes):
            raise ValueError(f"{folder}: the low-rank term beside {matrix.module} is not finite")
        terms[matrix] = LoraRank(rank, float(_by_pattern(config, matrix.module)))
    used = {name for matrix, term in terms.items() for name in matrix.sizes(term.rank)}
    strangers = sorted(tensors.keys() - used)
    if strangers or not terms:
        raise ValueError(f"{folder}: {strangers[:4] or 'nothing in it'} belongs to no matrix of this model")
    for place in {(matrix.layer, matrix.target) for matrix in terms}:
        of_place = [matrix for matrix in matrices if (matrix.layer, matrix.target) == place]
        kinds = {matrix.name: terms[matrix] for matrix in of_place if matrix in terms}
        if len(set(kinds.values())) > 1:
            said = ", ".join(f"{name} rank {term.rank} and alpha {term.alpha:g}" for name, term in kinds.items())
            raise ValueError(
                f"{folder}: terms beside the {place[1]} of layer {place[0]} must have one rank and alpha, not {said}"
            )
    return terms


def _by_pattern(config: dict[str, Any], module: str) -> float:
    """Return alpha of a module as peft finds it: the first pattern that its name ends with, or the common one."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config["lora_alpha"])
