"""The result of a calibration pass: named sums with the shape of the model that they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from moe_lightning.files import write_atomically
from moe_lightning.plan import ModelShape
from moe_lightning.statistics.metrics import MOMENTS, OUTPUT_SUMS, ROUTING_SUMS, merge_moments
from moe_lightning.statistics.registry import criterion_named

FORMAT_VERSION = "1"

GROUPS: dict[str, tuple[str, ...]] = {"routing": ROUTING_SUMS, "outputs": OUTPUT_SUMS}
"""Statistics that are measured together, by the name that criteria and methods ask for."""


@dataclass
class Statistics:
    """Sums over calibration tokens, float64, for every MoE layer and expert.

    Rows are the MoE layers (``shape.moe_layers``), columns the experts of the *original* model; a column of an expert
    that the router no longer knows is NaN. The tensors are described in :class:`RoutingStatistics` and
    :class:`OutputStatistics`.

    Attributes:
        shape: Shape of the model that was observed.
        tensors: Sums by name.
        info: Where they come from (data, seed, versions), plain types.
    """

    shape: ModelShape
    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return a sum by its name.

        Raises:
            KeyError: It was not collected; the message says which group holds it.
        """
        if name not in self.tensors:
            group = next((group for group, names in GROUPS.items() if name in names), None)
            hint = f": collect with needs={{'{group}'}}" if group else f": known are {sorted(self.tensors)}"
            raise KeyError(f"statistic {name!r} was not collected{hint}")
        return self.tensors[name]

    @property
    def groups(self) -> frozenset[str]:
        """Groups that are complete here."""
        return frozenset(group for group, names in GROUPS.items() if all(name in self.tensors for name in names))

    @property
    def known(self) -> Tensor:
        """Which experts the router knows, bool ``[layers, experts]``."""
        known = torch.zeros(len(self.shape.layouts), self.shape.num_experts, dtype=torch.bool, device="cpu")
        for row, layout in enumerate(self.shape.layouts):
            known[row, list(layout.router)] = True
        return known

    def row(self, layer: int) -> int:
        """Return the row of a layer by its original number."""
        return self.shape.moe_layers.index(layer)

    def score(self, criterion: str, seed: int = 0) -> Tensor:
        """Score every expert.

        Args:
            criterion: Name of a criterion in the registry.
            seed: Seed of the criteria that draw lots (``random``).

        Returns:
            ``[layers, experts]`` float64, larger = keep; NaN for experts that are gone.

        Raises:
            ValueError: Unknown criterion, or one whose statistics were not collected.
        """
        entry = criterion_named(criterion)
        missing = entry.needs - self.groups
        if missing:
            raise ValueError(
                f"criterion {criterion!r} needs the statistics {sorted(missing)}, which were not collected"
            )
        score = entry.function(self, seed).clone()
        score[~self.known] = torch.nan
        return score

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: File to write; its folder is made.
        """
        metadata = {
            "format": "moe-lightning statistics",
            "version": FORMAT_VERSION,
            "shape": json.dumps(self.shape.to_dict()),
            "info": json.dumps(self.info),
        }
        data = save({name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}, metadata)
        write_atomically(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Not a statistics file, a truncated one, or one of another version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no statistics file {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except Exception as error:  # safetensors raises its own class, which is not exported everywhere
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}): collect the statistics again"
            ) from None
        if metadata.get("format") != "moe-lightning statistics" or metadata.get("version") != FORMAT_VERSION:
            raise ValueError(f"{path} holds no statistics of version {FORMAT_VERSION}: collect them again")
        return cls(ModelShape.from_dict(json.loads(metadata["shape"])), tensors, json.loads(metadata["info"]))

    @classmethod
    def synthetic(cls, shape: ModelShape, seed: int = 0) -> Statistics:
        """Make statistics of the right form without a model, to try out a decision before anything is measured.

        All layers have the same values, so that a budget over all layers spreads as evenly as it can.

        Args:
            shape: Shape of the model.
            seed: Seed of the values.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        rows, experts, hidden = len(shape.layouts), shape.num_experts, 1
        sizes = {
            "tokens": (rows,),
            "layer_output_square_sum": (rows,),
            "coactivation": (rows, experts, experts),
            "output_gram": (rows, experts, experts),
        }
        wide = {"output_mean", "output_m2", "gate_output_sum", "gate2_output_sum"}
        tensors = {}
        for name in (name for names in GROUPS.values() for name in names):
            size = sizes.get(name, (rows, experts, hidden) if name in wide else (rows, experts))
            one_layer = 2 + torch.rand(size[1:], dtype=torch.float64, generator=generator, device="cpu")
            tensors[name] = one_layer.expand(size).clone()
        return cls(shape, tensors, {"synthetic": True})


def merge_statistics(parts: Sequence[Statistics] | Iterable[Statistics]) -> Statistics:
    """Merge statistics of the same model over different tokens.

    Args:
        parts: At least one.

    Returns:
        As if all tokens had been in one pass.

    Raises:
        ValueError: No parts, other shapes, or other statistics in them.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge_statistics needs at least one part")
    merged = dict(parts[0].tensors)
    for part in parts[1:]:
        if part.shape != parts[0].shape or part.tensors.keys() != merged.keys():
            raise ValueError("statistics can be merged only for the same model and the same set of sums")
        other = part.tensors
        for name in merged:
            if name == "output_max_abs":
                merged[name] = torch.maximum(merged[name], other[name])
            elif name not in MOMENTS:
                merged[name] = merged[name] + other[name]
        if "output_mean" in merged:
            result = merge_moments(*(merged[name] for name in MOMENTS), *(other[name] for name in MOMENTS))
            merged.update(zip(MOMENTS, result, strict=True))
    info = dict(parts[0].info)
    if all("batches" in part.info for part in parts):
        info["batches"] = sum(part.info["batches"] for part in parts)
    return Statistics(parts[0].shape, merged, info)
