"""Merge: groups of experts share one set of weights, the router stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moe_lightning.architectures import OpenExperts
from moe_lightning.criteria.counts import Scope
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ExpertLayout, MergeExperts, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.budget import Compatible, ExpertBudget, Room
from moe_lightning.trimming.merging import ExpertWeights, Groups, cluster, join_cores, merged, sorted_groups
from moe_lightning.trimming.whole_experts import WholeExperts, trial_options

MergeAlgorithm = Literal["mc_smoe", "hc_smoe"]

_DEFAULT_SCOPE: dict[str, Scope] = {"mc_smoe": "global", "hc_smoe": "layer"}
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
    # The groups hold every real expert once: their numbers in order are the slots.
    slots = {expert: slot for slot, expert in enumerate(sorted(expert for group in groups for expert in group))}
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
    weights, each expert weighted by the calibration tokens that picked it. Give exactly one of ratio, keep, parameters
    and bytes. Novices stay as they are.

    Attributes:
        ratio: Share of the real experts that go by merging, in [0, 1).
        keep: Experts with weights of their own to leave a layer; with scope=global and scope=sensitivity the mean over
            layers.
        parameters: Merge as few as leave the model at most this many parameters. In scope=layer the layers may then
            differ by one expert.
        bytes: The same for the bytes of the parameters.
        algorithm: mc_smoe or hc_smoe.
        scope: layer leaves each layer the same number or share; global as many as it has among the most used experts
            of the model; sensitivity weighs use by what merging in each layer alone does to the model. None takes the
            paper's: global for mc_smoe, layer for hc_smoe.
        align: Bring the channels of a group into the same order before the mean. None takes the paper's: true for
            mc_smoe, false for hc_smoe.
        floor: Experts with weights of their own that every layer keeps at least; by default one.
        compatible: uniform refuses what leaves layers with different numbers of experts, for engines that want them
            alike.

    Source: 2310.01334 (MC-SMoE, its merging stage; the low-rank stage is none of this) and 2410.08589 (HC-SMoE; with
    scope=global its option of uneven layers, by use). Use counts all calibration tokens; the released code of MC-SMoE
    counts part of them. HC-SMoE's mean outputs are over all tokens, ours over those routed to the expert, which is what
    one calibration pass sees; an expert that no token reached has a mean of zeros, and no weight in its group.

    Cost: alignment takes a table ``[I, I]`` in float64 for each merged expert, 1.6 GB for Mixtral-8x7B, and a matching
    on one core: 1 s at I = 2048, 5 s at 4096.
    """

    ratio: float | None = None
    keep: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    algorithm: MergeAlgorithm = "mc_smoe"
    scope: Scope | None = None
    align: bool | None = None
    floor: int | None = None
    compatible: Compatible = "any"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.algorithm not in get_args(MergeAlgorithm):
            raise ValueError(f"Merge: unknown algorithm {self.algorithm!r}: choose mc_smoe or hc_smoe")
        self._budget()
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"Merge: keep must be at least 1, got {self.keep:g}: every layer keeps an expert")

    def _budget(self) -> ExpertBudget:
        return ExpertBudget(
            "Merge",
            self.ratio,
            self.keep,
            self.parameters,
            self.bytes,
            "frequency",
            self._scope,
            self.compatible,
            self.floor,
            lowest_floor=1,
        )

    @property
    def _scope(self) -> Scope:
        return self.scope or _DEFAULT_SCOPE[self.algorithm]

    @property
    def aligns(self) -> bool:
        """Whether channels are matched before the mean: ``align``, or the paper's choice."""
        return self.algorithm == "mc_smoe" if self.align is None else self.align

    @property
    def needs(self) -> frozenset[str]:
        """Use, and what the groups are made by."""
        return _GROUPING_NEEDS[self.algorithm]

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the model is to be measured with each layer merged alone."""
        return self._scope == "sensitivity"

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Group the experts; see :meth:`Method.propose`."""
        return self._choice(shape, statistics).edits()

    def trial(self, shape: ModelShape, statistics: Statistics, layer: int) -> tuple[Edit, ...]:
        """Merge experts of one layer alone; see :meth:`Method.trial`."""
        return self._choice(shape, statistics).trial(layer)

    def _choice(self, shape: ModelShape, statistics: Statistics) -> WholeExperts:
        candidates = [layout.real for layout in shape.layouts]

        def edits_of(removed: Sequence[tuple[int, ...]]) -> tuple[Edit, ...]:
            return tuple(
                MergeExperts(layout.layer, self._groups(layout, removed[row], statistics), self.aligns)
                for row, layout in enumerate(shape.layouts)
                if removed[row]
            )

        sizes = [len(experts) for experts in candidates]
        floor = 1 if self.floor is None else self.floor
        reason = "a layer keeps at least one" if self.floor is None else f"floor={floor}"
        advice = "lower the floor, or " if floor > 1 else ""
        room = Room(sizes, [min(floor, size) for size in sizes], reason, advice)
        return WholeExperts(
            self._budget(),
            0,
            shape,
            statistics,
            candidates,
            room,
            edits_of,
            trial_options=trial_options(self.describe()),
        )

    def _groups(self, layout: ExpertLayout, joining: tuple[int, ...], statistics: Statistics) -> Groups:
        row = statistics.row(layout.layer)
        cores = [expert for expert in layout.real if expert not in joining]
        if self.algorithm == "mc_smoe":
            return join_cores(statistics["logit_gram"][row], layout.real, cores)
        places = cluster(statistics["output_mean"][row, list(layout.real)], len(cores))
        return sorted_groups([[layout.real[place] for place in members] for members in places])

    def fill(self, edit: Edit, statistics: Statistics, weights: OpenExperts | None = None) -> dict[str, Tensor]:
        """Return the merged weights; see :meth:`Method.fill`."""
        if not isinstance(edit, MergeExperts):
            return {}
        assert weights is not None
        return merged_weights(edit.groups, statistics, edit.layer, weights, edit.align)

    def describe(self) -> dict[str, Any]:
        """Return the method's name and options as plain types, for the plan's origin."""
        return {**super().describe(), "scope": self._scope, "align": self.aligns}
