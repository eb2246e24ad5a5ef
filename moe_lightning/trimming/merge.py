"""Merge: groups of experts share one set of weights, the router stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_lightning.architectures import OpenExperts
from moe_lightning.criteria.selection import Scope, kept_experts
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ExpertLayout, MergeExperts, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.merging import ExpertWeights, Groups, cluster, join_cores, merged, sorted_groups

MergeMethod = Literal["mc_smoe", "hc_smoe"]
MergeScope = Literal["layer", "global"]

_DEFAULT_SCOPE: dict[str, MergeScope] = {"mc_smoe": "global", "hc_smoe": "layer"}
_GROUPING_NEEDS = {"mc_smoe": frozenset({"routing"}), "hc_smoe": frozenset({"routing", "outputs"})}

MERGE_NEEDS = frozenset({"routing"})
"""What the weights of merged experts need: how often each is used."""


def merged_weights(
    groups: Groups, statistics: Statistics, layer: int, weights: OpenExperts, align: bool
) -> dict[str, Tensor]:
    """Compute the weights of the merged experts of a layer.

    Args:
        groups: Original numbers of the experts of each group; together the real experts of the layer.
        statistics: What was measured on the model before the merge: ``count`` of every expert.
        layer: Original number of the layer.
        weights: The layer before the merge, slots in the order of its real experts.
        align: Match channels before the mean; see :func:`merging.merged`.

    Returns:
        ``gate_up_proj [groups, 2I, H]`` and ``down_proj [groups, H, I]``, and ``bias [groups, H]`` where the layer has
        one, in the types of the layer (sums are in fp32 or wider).
    """
    slots = {expert: slot for slot, expert in enumerate(statistics.shape.layout(layer).real)}
    usage_E = statistics["count"][statistics.row(layer)].tolist()
    results = []
    for group in groups:
        experts = [
            ExpertWeights(
                weights.gate_up_proj[slots[expert]].detach(),
                weights.down_proj[slots[expert]].detach(),
                None if weights.bias is None else weights.bias[slots[expert]].detach(),
            )
            for expert in group
        ]
        results.append(merged(experts, [usage_E[expert] for expert in group], align))
    values = {
        "gate_up_proj": torch.stack([result.gate_up for result in results]),
        "down_proj": torch.stack([result.down for result in results]),
    }
    if weights.bias is not None:
        values["bias"] = torch.stack([result.bias for result in results if result.bias is not None])
    return values


@dataclass
class Merge(Method):
    """Merge similar experts: the router keeps all its rows, several of which then lead to the same weights.

    ``mc_smoe``: the experts that most tokens use are the cores (over the whole model, at least one a layer); every
    other expert joins the core of its layer with the largest cosine of router logits; channels are brought into the
    core's order by Hungarian matching. ``hc_smoe``: the experts of a layer are clustered by their mean outputs
    (agglomerative, average linkage, Euclidean); channels stay in their order. Both then take the mean of a group's
    weights, each expert weighted by the calibration tokens that picked it. Give exactly one of the first four options.
    Novices stay as they are.

    Attributes:
        ratio: Share of the real experts that go by merging, in [0, 1).
        keep: Experts with weights of their own to leave a layer; with scope=global the mean over layers.
        parameters: Merge as few as leave the model at most this many parameters.
        bytes: Merge as few as leave the model's parameters at most this many bytes.
        method: mc_smoe or hc_smoe.
        scope: layer leaves each layer the same number or share, global as many as it has among the most used experts
            of the model. None takes the paper's: global for mc_smoe, layer for hc_smoe.
        align: Bring the channels of a group into the same order before the mean. None takes the paper's: true for
            mc_smoe, false for hc_smoe.

    Source: 2310.01334 (MC-SMoE, its merging stage; the low-rank stage is none of this) and 2410.08589 (HC-SMoE).
    Usage counts all calibration tokens; the released code of MC-SMoE counts part of them. HC-SMoE's mean outputs are
    over all tokens, ours over those routed to the expert, which is what one calibration pass sees; an expert that no
    token reached has a mean of zeros, and no weight in the mean of its group.

    Cost: alignment takes a table ``[I, I]`` in float64 for each merged expert, 1.6 GB for Mixtral-8x7B.
    """

    ratio: float | None = None
    keep: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    method: MergeMethod = "mc_smoe"
    scope: MergeScope | None = None
    align: bool | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        given = {
            name: value
            for name in ("ratio", "keep", "parameters", "bytes")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            raise ValueError(
                "Merge needs exactly one of ratio, keep, parameters and bytes: got "
                f"{', '.join(f'{name}={value}' for name, value in given.items()) or 'none'}"
            )
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"Merge: ratio must lie in [0, 1), got {self.ratio}: 0.25 merges a quarter away")
        if self.keep is not None and not 1 <= self.keep < float("inf"):
            raise ValueError(f"Merge: keep must be at least 1, got {self.keep}: every layer keeps an expert")
        for name in ("parameters", "bytes"):
            if name in given and not given[name] > 0:
                raise ValueError(f"Merge: {name} must be more than 0, got {given[name]}: it is what the model may have")
        if self.method not in get_args(MergeMethod):
            raise ValueError(f"Merge: unknown method {self.method!r}: choose one of {', '.join(get_args(MergeMethod))}")
        if self.scope not in (None, *get_args(MergeScope)):
            raise ValueError(f"Merge: unknown scope {self.scope!r}: choose layer or global, or leave it out")
        if self.keep is not None and self._scope == "layer" and self.keep != int(self.keep):
            raise ValueError(f"Merge: keep must be a whole number with scope=layer, got {self.keep}")

    @property
    def _scope(self) -> Scope:
        return self.scope or _DEFAULT_SCOPE[self.method]

    @property
    def aligns(self) -> bool:
        """Whether channels are matched before the mean: ``align``, or the paper's choice."""
        return self.method == "mc_smoe" if self.align is None else self.align

    @property
    def needs(self) -> frozenset[str]:
        """Usage, and what the groups are made by."""
        return _GROUPING_NEEDS[self.method]

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Group the experts; see :meth:`Method.propose`."""
        layouts = [layout for layout in shape.layouts if layout.real]
        if not layouts:
            raise ValueError("Merge: no real expert is left in the model: leave Merge out, or put it first")
        cores = self._cores(shape, layouts, statistics)
        return tuple(
            MergeExperts(layout.layer, self._groups(layout, leading, statistics))
            for layout, leading in zip(layouts, cores, strict=True)
            if len(leading) < len(layout.real)
        )

    def _cores(
        self, shape: ModelShape, layouts: Sequence[ExpertLayout], statistics: Statistics
    ) -> list[tuple[int, ...]]:
        usage_LE = statistics["count"][[statistics.row(layout.layer) for layout in layouts]]
        candidates = [layout.real for layout in layouts]
        if self.ratio is None and self.keep is None:
            return self._cores_for_target(shape, layouts, usage_LE)
        try:
            return kept_experts(usage_LE, candidates, ratio=self.ratio, keep=self.keep, scope=self._scope, floor=1)
        except ValueError as error:
            raise ValueError(f"Merge: {error}") from None

    def _cores_for_target(
        self, shape: ModelShape, layouts: Sequence[ExpertLayout], usage_LE: Tensor
    ) -> list[tuple[int, ...]]:
        name = "parameters" if self.parameters is not None else "bytes"
        target = getattr(self, name)
        counts = [len(layout.real) for layout in layouts]

        def kept(gone: int) -> list[tuple[int, ...]]:
            if self._scope == "global":
                candidates = [layout.real for layout in layouts]
                keep = (sum(counts) - gone) / len(counts)
                return kept_experts(usage_LE, candidates, keep=keep, scope="global", floor=1)
            # The same number goes from each layer that has it, so that equal layers stay equal.
            chosen = []
            for row, layout in enumerate(layouts):
                keep = max(1, len(layout.real) - gone)
                chosen += kept_experts(usage_LE[row : row + 1], [layout.real], keep=keep, scope="layer")
            return chosen

        def size(gone: int) -> int:
            after = shape
            for layout, stay in zip(layouts, kept(gone), strict=True):
                if len(stay) < len(layout.real):
                    joined = [expert for expert in layout.real if expert not in stay[1:]]
                    after = MergeExperts(layout.layer, sorted_groups([joined, *([e] for e in stay[1:])])).apply(after)
            return getattr(after, name)

        low, high = 0, sum(counts) - len(counts) if self._scope == "global" else max(counts, default=1) - 1
        if size(high) > target:
            raise ValueError(
                f"Merge: {name}={target} is out of reach: with one expert left in each layer the model still has "
                f"{size(high)}: raise {name} to that, or combine Merge with another method"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if size(middle) <= target else (middle + 1, high)
        return kept(low)

    def _groups(self, layout: ExpertLayout, cores: tuple[int, ...], statistics: Statistics) -> Groups:
        row = statistics.row(layout.layer)
        if self.method == "mc_smoe":
            return join_cores(statistics["logit_gram"][row], layout.real, cores)
        places = cluster(statistics["output_mean"][row, list(layout.real)], len(cores))
        return sorted_groups([[layout.real[place] for place in members] for members in places])

    def fill(self, edit: Edit, statistics: Statistics, weights: OpenExperts | None = None) -> dict[str, Tensor]:
        """Return the merged weights; see :meth:`Method.fill`."""
        if not isinstance(edit, MergeExperts):
            return {}
        assert weights is not None
        return merged_weights(edit.groups, statistics, edit.layer, weights, self.aligns)

    def describe(self) -> dict[str, Any]:
        """Return the method's name and options as plain types, for the plan's origin."""
        options = {**vars(self), "scope": self._scope, "align": self.aligns}
        return {"method": "Merge", "merge_method": options.pop("method"), **options}
