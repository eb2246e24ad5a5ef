"""Train, compress and recover mixture-of-experts language models in one resumable PyTorch Lightning run.

Importing this package is light: names are looked up when they are used, and transformers learns of the compressed model
classes when it is imported itself (before or after), so that ``AutoModelForCausalLM.from_pretrained`` loads a
compressed folder after ``import moe_lightning``, and ``set_experts_implementation("moe_kernels")`` is known.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

# Public name -> module that defines it.
_HOMES = {
    "AWQ": "slimming",
    "AddLora": "plan",
    "Angular": "trimming",
    "BlockDrop": "trimming",
    "ChannelDrop": "trimming",
    "CompressionPlan": "plan",
    "CompressionResult": "compression",
    "DropBlock": "plan",
    "DropMoE": "plan",
    "ExpertDrop": "trimming",
    "GPTQ": "slimming",
    "KeepChannels": "plan",
    "KeepExperts": "plan",
    "LayerDrop": "trimming",
    "Likelihood": "evaluation",
    "LoRA": "recovery",
    "Magnitude": "slimming",
    "Merge": "trimming",
    "MergeExperts": "plan",
    "MergeLoRA": "recovery",
    "MergeLora": "plan",
    "MixtralModule": "modules",
    "ModelShape": "plan",
    "ModelSize": "sizes",
    "NoviceExperts": "plan",
    "Novices": "trimming",
    "RTN": "slimming",
    "RatioSchedule": "schedules",
    "SparseGPT": "slimming",
    "SparsitySchedule": "schedules",
    "Statistics": "criteria",
    "TextDataModule": "data",
    "Wanda": "slimming",
    "build": "surgery",
    "collect": "criteria",
    "compress": "compression",
    "evaluate": "evaluation",
    "from_pretrained": "checkpoints",
    "load_adapters": "checkpoints",
    "measure": "sizes",
    "merge_statistics": "statistics",
    "save_adapters": "checkpoints",
    "save_pretrained": "checkpoints",
    "warmup": "architectures.kernel_warmup",
}
_PACKAGES = ("callbacks",)

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "AddLora",
    "Angular",
    "BlockDrop",
    "ChannelDrop",
    "CompressionPlan",
    "CompressionResult",
    "DropBlock",
    "DropMoE",
    "ExpertDrop",
    "KeepChannels",
    "KeepExperts",
    "LayerDrop",
    "Likelihood",
    "LoRA",
    "Magnitude",
    "Merge",
    "MergeExperts",
    "MergeLoRA",
    "MergeLora",
    "MixtralModule",
    "ModelShape",
    "ModelSize",
    "NoviceExperts",
    "Novices",
    "RatioSchedule",
    "SparseGPT",
    "SparsitySchedule",
    "Statistics",
    "TextDataModule",
    "Wanda",
    "__version__",
    "build",
    "callbacks",
    "collect",
    "compress",
    "evaluate",
    "from_pretrained",
    "load_adapters",
    "measure",
    "merge_statistics",
    "save_adapters",
    "save_pretrained",
    "warmup",
]

if TYPE_CHECKING:
    from moe_lightning import callbacks
    from moe_lightning.architectures.kernel_warmup import warmup
    from moe_lightning.checkpoints import from_pretrained, load_adapters, save_adapters, save_pretrained
    from moe_lightning.compression import CompressionResult, compress
    from moe_lightning.criteria import Statistics, collect
    from moe_lightning.data import TextDataModule
    from moe_lightning.evaluation import Likelihood, evaluate
    from moe_lightning.modules import MixtralModule
    from moe_lightning.plan import (
        CompressionPlan,
        DropBlock,
        DropMoE,
        KeepChannels,
        KeepExperts,
        MergeExperts,
        ModelShape,
        NoviceExperts,
    )
    from moe_lightning.schedules import RatioSchedule, SparsitySchedule
    from moe_lightning.sizes import ModelSize, measure
    from moe_lightning.slimming import AWQ, GPTQ, RTN, Magnitude, SparseGPT, Wanda
    from moe_lightning.statistics import merge_statistics
    from moe_lightning.surgery import build
    from moe_lightning.trimming import Angular, BlockDrop, ChannelDrop, ExpertDrop, LayerDrop, Merge, Novices


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"moe_lightning.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'moe_lightning' has no attribute {name!r}")
    module = importlib.import_module(f"moe_lightning.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register(_: object) -> None:
    importlib.import_module("moe_lightning.surgery.models")
    importlib.import_module("moe_lightning.experts.implementation")


wrapt.register_post_import_hook(_register, "transformers")
