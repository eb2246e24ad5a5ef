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
from moe_lightning.statistics.groups import ENTRIES, GROUPS, MAY_BE_NAN, TABLE, known_experts, mark_absent, sizes_of
from moe_lightning.statistics.metrics import merge_moments
from moe_lightning.statistics.registry import criterion_named

FORMAT_VERSION = "2"


@dataclass
class Statistics:
    """Sums over calibration tokens, float64, for every layer and expert.

    Rows are the MoE layers (``shape.moe_layers``), columns the experts of the *original* model; a column of an expert
    that the router no longer knows is NaN. The tensors are described in the metrics: :class:`RoutingStatistics`,
    :class:`OutputStatistics`, :class:`PairStatistics`, :class:`ChannelStatistics`, :class:`LayerSimilarity`,
    :class:`BlockSimilarity`, :class:`HiddenSimilarity`; those that are no sums stand below.

    * ``channel_weight_square [L, E, I]``: ``|W_down[:, j]|^2`` of every channel of a real expert.
    * ``low_rank_error [L, E, R + 1]``: mean of ``g^2 |E - map|^2`` over the held-out tokens, of which there are
      ``low_rank_tokens [L, E]``, for maps of rank 0 to R.
    * ``expert_divergence [L, E]``: KL in nats per token (over ``divergence_tokens [1]``) of the intact model to the one
      in which the router cannot choose that expert.
    * ``layer_divergence [L]``: the same where a method trims that layer alone; only ``compress`` measures it.

    Attributes:
        shape: Shape of the model that was observed.
        tensors: Statistics by name.
        info: Where they come from (data, seed, versions), plain types.
        fits: What a method asked to be fitted to the same batches, by (layer, expert). It is not saved.
    """

    shape: ModelShape
    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    fits: dict[tuple[int, int], Any] = field(default_factory=dict, compare=False)

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
        return known_experts(self.shape)

    @property
    def moe_cosine(self) -> Tensor:
        """Mean cosine of the residual stream before and after each MoE layer, ``[layers]``."""
        return self["moe_cosine_sum"] / self["moe_tokens"]

    @property
    def block_cosine(self) -> Tensor:
        """Mean cosine of input and output of each decoder layer, ``[blocks]``."""
        return self["block_cosine_sum"] / self["block_tokens"]

    @property
    def hidden_cosine(self) -> Tensor:
        """Mean cosine of the hidden states at all pairs of places between blocks, ``[blocks + 1, blocks + 1]``."""
        return self["hidden_cosine_sum"] / self["similarity_tokens"]

    def hidden_angle(self, tokens: str = "last") -> Tensor:
        """Return the mean angle of the hidden states at all pairs of places between blocks, in units of pi.

        Args:
            tokens: ``last`` (of each sequence) or ``all``.

        Returns:
            ``[blocks + 1, blocks + 1]``.

        Raises:
            ValueError: Another word.
        """
        if tokens == "all":
            return self["hidden_angle_sum"] / self["similarity_tokens"]
        if tokens == "last":
            return self["hidden_last_angle_sum"] / self["similarity_sequences"]
        raise ValueError(f"tokens must be 'last' or 'all', not {tokens!r}")

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
            ValueError: Not a statistics file, a truncated or damaged one, or one of another version.
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
        loaded = cls(ModelShape.from_dict(json.loads(metadata["shape"])), tensors, json.loads(metadata["info"]))
        bad = loaded._not_finite()
        if bad:
            raise ValueError(f"{path} is damaged: {', '.join(bad)} hold values that are no numbers: collect them again")
        return loaded

    def _not_finite(self) -> list[str]:
        """Return the sums that are not finite for an expert that is there."""
        holes = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        mark_absent(self.shape, holes)
        return [
            name
            for name, tensor in self.tensors.items()
            if name not in MAY_BE_NAN and not bool((torch.isfinite(tensor) | torch.isnan(holes[name])).all())
        ]

    @classmethod
    def synthetic(cls, shape: ModelShape, seed: int = 0) -> Statistics:
        """Make statistics of the right form without a model, to try out a decision before anything is measured.

        All layers have the same values, so that a budget over all layers spreads as evenly as it can.

        Args:
            shape: Shape of the model.
            seed: Seed of the values.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for name, entry in ENTRIES.items():
            # Nobody's decision depends on how wide outputs are.
            size = sizes_of(shape, entry.dims.replace("H", "1"))
            each_row = torch.rand(size[1:], dtype=torch.float64, generator=generator, device="cpu")
            tensors[name] = (2 + each_row).expand(size).clone()
        # More rank, less error.
        tensors["low_rank_error"] = tensors["low_rank_error"].sort(-1, descending=True).values
        tensors |= _synthetic_similarity(shape)
        mark_absent(shape, tensors)
        return cls(shape, tensors, {"synthetic": True})


def _synthetic_similarity(shape: ModelShape) -> dict[str, Tensor]:
    """Return cosines as of hidden states that turn by the same angle, to the same side, in every block."""
    step = 0.4
    (places,) = sizes_of(shape, "C")
    number = torch.arange(places, dtype=torch.float64, device="cpu")
    angle = (step * (number[:, None] - number[None, :]).abs()).clamp(max=torch.pi / 2)
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    values = {
        "similarity_tokens": one,
        "similarity_sequences": one.clone(),
        "hidden_cosine_sum": angle.cos(),
        "hidden_angle_sum": angle / torch.pi,
        "hidden_last_angle_sum": angle / torch.pi,
    }
    for dims, count, cosine in (("L", "moe_tokens", "moe_cosine_sum"), ("B", "block_tokens", "block_cosine_sum")):
        values[count] = torch.ones(sizes_of(shape, dims), dtype=torch.float64, device="cpu")
        values[cosine] = values[count] * angle.new_tensor(step).cos()
    return values


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
        merged = _merged(merged, part.tensors)
    info = dict(parts[0].info)
    if all("batches" in part.info for part in parts):
        info["batches"] = sum(part.info["batches"] for part in parts)
    return Statistics(parts[0].shape, merged, info)


def _merged(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name in one:
        kind, _, counted = ENTRIES[name].merge.partition(" ")
        if kind == "sum":
            values[name] = one[name] + other[name]
        elif kind == "max":
            values[name] = torch.maximum(one[name], other[name])
        elif kind == "same":
            values[name] = one[name].clone()
        elif kind == "mean":
            if counted not in one:
                raise ValueError(f"{name!r} cannot be merged without {counted!r}: collect it over all batches at once")
            values[name] = _weighted_mean(one[name], other[name], one[counted], other[counted])
    for entries in TABLE.values():
        names = [name for name, entry in entries.items() if entry.merge == "moments" and name in one]
        if names:
            merged = merge_moments(*(one[name] for name in names), *(other[name] for name in names))
            values.update(zip(names, merged, strict=True))
    return values


def _weighted_mean(one: Tensor, other: Tensor, count: Tensor, other_count: Tensor) -> Tensor:
    """Average two means; what only one of them knows is taken from that one."""
    wide = count.shape + (1,) * (one.ndim - count.ndim)
    count, other_count = count.reshape(wide), other_count.reshape(wide)
    share = other_count / (count + other_count).clamp(min=1)
    mean = one + (other - one) * share
    return torch.where(one.isnan(), other, torch.where(other.isnan(), one, mean))
