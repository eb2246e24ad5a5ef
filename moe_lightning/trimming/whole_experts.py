"""Which whole experts go: what Expert Drop and novices share, from the options to the edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_lightning.criteria.naee import DenseRanking, SubsetRanking, check_subsets, pair_errors
from moe_lightning.criteria.selection import Ranking, ScoreRanking, layer_weights
from moe_lightning.plan import Edit, ModelShape
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.statistics.subsets import check_subset_experts
from moe_lightning.trimming.budget import ExpertBudget, Room


def trial_options(described: Mapping[str, Any], *unread: str) -> dict[str, Any]:
    """Return the options of a method that its trials depend on.

    Args:
        described: The method's ``describe()``.
        *unread: Options that the trials do not read, besides those that no trial reads.
    """
    ignored = {"scope", "compatible", *unread}
    if described.get("criterion") != "random":
        ignored.add("seed")
    return {name: value for name, value in described.items() if name not in ignored}


@dataclass(frozen=True)
class WholeExperts:
    """A choice among the experts of a model.

    Attributes:
        budget: How many go.
        seed: Seed of ``criterion=random``.
        shape: Shape of the model.
        statistics: What was measured on it, or synthetic ones.
        candidates: For each MoE layer the experts to choose from, ascending.
        room: How many may go.
        edits_of: From the experts that go, row by row, to the edits; rows where nobody goes give none.
        constants_of: From a layer and its candidates to what stands for each, ``[C, hidden]``; None stands for zero.
            Read by criteria that choose whole sets.
        trial_options: The options that decide what :meth:`trial` does: a measured sensitivity must be of the same.
    """

    budget: ExpertBudget
    seed: int
    shape: ModelShape
    statistics: Statistics
    candidates: Sequence[tuple[int, ...]]
    room: Room
    edits_of: Callable[[Sequence[tuple[int, ...]]], tuple[Edit, ...]]
    constants_of: Callable[[int, tuple[int, ...]], Tensor | None] = lambda layer, experts: None
    trial_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there is anything to choose from.

        Raises:
            ValueError: The model has no MoE layers.
        """
        if not self.candidates:
            raise ValueError(
                f"{self.budget.owner}: the model has no MoE layers left at this point: leave {self.budget.owner} out, "
                "or put it first"
            )

    @property
    def _synthetic(self) -> bool:
        return bool(self.statistics.info.get("synthetic"))

    @property
    def _selector(self) -> bool:
        return criterion_named(self.budget.criterion).selector

    def _score_ranking(self) -> ScoreRanking:
        """Sort by score; for a criterion without scores by the numbers of the experts: only counts matter then."""
        if self._selector:
            score = torch.zeros(len(self.candidates), self.shape.num_experts, dtype=torch.float64, device="cpu")
            return ScoreRanking(score, self.candidates)
        score = self.statistics.score(self.budget.criterion, self.seed)
        return ScoreRanking(score, self.candidates, self.budget.criterion)

    def edits(self) -> tuple[Edit, ...]:
        """Solve the budget.

        Returns:
            The edits, ascending by layer.

        Raises:
            ValueError: The budget does not fit the shape, or what it needs was not measured.
        """
        self._check_novices()
        scores = self._score_ranking()
        ranking: Ranking = scores
        if self.budget.scope == "layer":
            if self._selector and not self._synthetic:
                ranking = self._subset_ranking()
            counts = self._layer_counts(scores, ranking)
            if self._selector:
                self._check_subsets(counts)
        else:
            weights = self._weights(scores) if self.budget.scope == "sensitivity" else None
            counts = self.budget.counts_over_layers(
                self.shape, self.room, lambda counts: self._edits(scores, counts), scores, weights
            )
        edits = self._edits(ranking, counts)
        kept = [size - count for size, count in zip(self.room.sizes, counts, strict=True)]
        self.budget.check_uniform(self.shape, edits, kept)
        return edits

    def trial(self, layer: int) -> tuple[Edit, ...]:
        """Trim one layer alone by the layer-wise budget, to measure what that does to the model.

        Args:
            layer: Original number of the layer.

        Returns:
            Its edit: at least one expert goes, and as many as it takes for the removed scores to add up to more than
            zero; empty where none may.
        """
        ranking = self._score_ranking()
        row = self.shape.moe_layers.index(layer)
        removed: list[tuple[int, ...]] = [()] * len(self.candidates)
        removed[row] = ranking.lowest(row, self._trial_counts(ranking)[row])
        return self.edits_of(removed)

    def _edits(self, ranking: Ranking, counts: Sequence[int]) -> tuple[Edit, ...]:
        return self.edits_of([ranking.lowest(row, count) if count else () for row, count in enumerate(counts)])

    def _layer_counts(self, scores: ScoreRanking, ranking: Ranking) -> list[int]:
        # While numbers are solved the scores say who goes: sizes do not depend on who it is, and subsets are dear.
        return self.budget.layer_counts(
            self.shape, self.room, lambda counts: self._edits(scores, counts), ranking.next_cost
        )

    def _trial_counts(self, ranking: ScoreRanking) -> list[int]:
        counts = self._layer_counts_that_fit(ranking)
        return [
            ranking.trial_count(row, count, space)
            for row, (count, space) in enumerate(zip(counts, self.room.removable, strict=True))
        ]

    def _layer_counts_that_fit(self, ranking: ScoreRanking) -> list[int]:
        """Return the layer-wise counts, where a mean over layers need not be whole and may exceed a layer's own."""
        budget, room = self.budget, self.room
        if budget.target is not None:
            return self._layer_counts(ranking, ranking)
        if budget.keep is None:
            counts = [budget.removed_in_layer(size) for size in room.sizes]
        else:
            counts = [budget.removed_in_layer(size) if budget.keep < size else 0 for size in room.sizes]
        return [min(count, space) for count, space in zip(counts, room.removable, strict=True)]

    def _weights(self, ranking: ScoreRanking) -> list[float] | None:
        measured = self.statistics.tensors.get("layer_divergence")
        if measured is None:
            if self._synthetic:
                return None
            raise ValueError(
                f"{self.budget.owner}: scope=sensitivity needs layer_divergence, the KL of the model with one layer "
                "trimmed, which these statistics do not hold: ml.compress measures it on the model, or use scope=global"
            )
        self._check_trials()
        return layer_weights(ranking, self._trial_counts(ranking), measured.tolist())

    def _check_trials(self) -> None:
        """Refuse a sensitivity that was measured by other trials: weights are loss per score that *they* removed."""
        origin = self.statistics.info.get("layer_divergence")
        if not isinstance(origin, Mapping):
            return
        if origin.get("novice") == "low_rank":
            origin = {**origin, "novice": "gate2_mean"}  # what their trials use
        others = {name: origin.get(name) for name, value in self.trial_options.items() if origin.get(name) != value}
        if others:
            raise ValueError(
                f"{self.budget.owner}: scope=sensitivity: the layer_divergence of these statistics was measured by "
                f"trials with {', '.join(f'{name}={value}' for name, value in others.items())}: use the same options, "
                "or measure it anew"
            )

    def _check_novices(self) -> None:
        """Refuse what cannot be said of novices, where some of the candidates are."""
        novices = any(
            set(layout.novices) & set(experts)
            for layout, experts in zip(self.shape.layouts, self.candidates, strict=True)
        )
        budget = self.budget
        if novices and "low_rank" in criterion_named(budget.criterion).needs:
            raise ValueError(
                f"{budget.owner}: criterion={budget.criterion} is measured for real experts only, and some are novices "
                "already: use another criterion, e.g. residual"
            )
        if novices and self._selector and budget.target is not None:
            # Experts of one layer that differ in size: only trying all sets would tell how few reach the target.
            raise ValueError(
                f"{budget.owner}: criterion={budget.criterion} cannot aim at {budget.target[0]} where some experts are "
                "novices already: set keep or ratio, or use another criterion"
            )

    def _subset_ranking(self) -> SubsetRanking | DenseRanking:
        if "subsets" in criterion_named(self.budget.criterion).needs:
            return DenseRanking(self.statistics["subset_error"], self.candidates)
        errors = []
        for row, (layout, experts) in enumerate(zip(self.shape.layouts, self.candidates, strict=True)):
            constants = self.constants_of(layout.layer, experts)
            errors.append(pair_errors(self.statistics, row, experts, constants))
        return SubsetRanking(errors, self.candidates)

    def _check_subsets(self, counts: Sequence[int]) -> None:
        """Refuse sets that are too many; a target asks what the last expert of each layer costs, too."""
        try:
            if "subsets" in criterion_named(self.budget.criterion).needs:
                check_subset_experts(self.shape.num_experts)
            check_subsets(self.room.sizes, counts)
            if self.budget.target is not None:
                check_subsets(self.room.sizes, [max(count - 1, 0) for count in counts])
        except ValueError as error:
            raise ValueError(f"{self.budget.owner}: {error}") from None
