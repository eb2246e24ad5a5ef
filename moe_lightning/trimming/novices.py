"""Novices: experts give way to constants or low-rank maps, the router stays."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from moe_lightning.criteria.counts import Scope
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ModelShape, NoviceExperts
from moe_lightning.schedules import RatioSchedule
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.statistics.low_rank import TOKENS_PER_RANK
from moe_lightning.trimming.budget import (
    Compatible,
    ExpertBudget,
    Of,
    Room,
    check_of,
    ratio_at_end,
    refuse_schedule,
)
from moe_lightning.trimming.whole_experts import WholeExperts, trial_options

NoviceKind = Literal["mean", "zero", "gate2_mean", "low_rank"]

NOVICE_NEEDS: dict[str, frozenset[str]] = {
    "mean": frozenset({"outputs"}),
    "zero": frozenset(),
    "gate2_mean": frozenset({"routing", "outputs"}),
    "low_rank": frozenset({"routing", "outputs"}),
}

DEFAULT_RANK = 16


def _check_kind(kind: str) -> None:
    if kind not in NOVICE_NEEDS:
        raise ValueError(f"unknown novice {kind!r}: choose one of {', '.join(NOVICE_NEEDS)}")


def _vectors(kind: str, statistics: Statistics, layer: int, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the vectors of :func:`novice_values`, and what their means are over: zero where no token came."""
    row, columns = statistics.row(layer), list(experts)
    if kind == "mean":
        return statistics["output_mean"][row, columns], statistics["output_count"][row, columns]
    weight = statistics["gate_square_sum"][row, columns]
    sums = statistics["gate2_output_sum"][row, columns]
    return torch.where(weight.unsqueeze(-1) > 0, sums / weight.clamp(min=1e-300)[:, None], 0.0), weight


def novice_values(kind: str, statistics: Statistics, layer: int, experts: tuple[int, ...]) -> Tensor:
    """Compute the vectors that stand for experts.

    Args:
        kind: ``mean`` (``sum E / N``), ``zero``, or ``gate2_mean`` (``sum g^2 E / sum g^2``, the constant with the
            least squared error of the weighted output), which ``low_rank`` falls back to as well.
        statistics: What was measured.
        layer: Number of the layer in the original model.
        experts: Original numbers of the experts.

    Returns:
        ``[len(experts), hidden]`` float64. An expert that no token reached gets zeros, and a warning.

    Raises:
        ValueError: Unknown kind.

    Source: 2507.00390 (``mean``); ``gate2_mean`` is ours.
    """
    _check_kind(kind)
    if kind == "zero":
        return torch.zeros(len(experts), statistics.shape.hidden_size, dtype=torch.float64, device="cpu")
    values, weight = _vectors(kind, statistics, layer, experts)
    unreached = [expert for expert, amount in zip(experts, weight.tolist(), strict=True) if amount == 0]
    if unreached:
        warnings.warn(
            f"layer {layer}: no calibration token reached experts {unreached}; their novices are zero. "
            "More calibration batches would reach them",
            stacklevel=2,
        )
    return values


def low_rank_wants(edits: Iterable[Edit]) -> dict[int, tuple[tuple[int, int], ...]]:
    """Return whose maps are to be fitted: for each layer pairs of expert and rank, for ranks above zero."""
    wants: dict[int, tuple[tuple[int, int], ...]] = {}
    for edit in edits:
        if isinstance(edit, NoviceExperts) and edit.ranks:
            pairs = tuple((expert, rank) for expert, rank in zip(edit.experts, edit.ranks, strict=True) if rank)
            if pairs:
                wants[edit.layer] = wants.get(edit.layer, ()) + pairs
    return wants


def settle_ranks(edits: Iterable[Edit], statistics: Statistics) -> tuple[Edit, ...]:
    """Set the rank of every novice to that of its fit: zero where the constant was better or safer.

    Args:
        edits: What was proposed.
        statistics: Their ``fits``; novices without a fit keep the rank that they have.
    """
    settled = []
    for edit in edits:
        if isinstance(edit, NoviceExperts) and edit.ranks:
            ranks = tuple(
                statistics.fits[edit.layer, expert].rank if (edit.layer, expert) in statistics.fits else rank
                for expert, rank in zip(edit.experts, edit.ranks, strict=True)
            )
            edit = dataclasses.replace(edit, ranks=ranks if any(ranks) else ())
        settled.append(edit)
    return tuple(settled)


def novice_parameters(edit: NoviceExperts, statistics: Statistics) -> dict[str, Tensor]:
    """Return the values of everything that novices store.

    Args:
        edit: Who becomes a novice, and with what ranks.
        statistics: What was measured; ``fits`` for ranks above zero.

    Returns:
        ``novices`` ``[n, hidden]``; where any rank is above zero also ``novice_in`` and ``novice_out``
        ``[sum of ranks, hidden]``, in the order of the edit's experts. A map whose fit fell back to the constant gives
        zero. Float64.

    Raises:
        ValueError: Unknown kind of novice, or a map was not fitted.
    """
    ranks = edit.ranks or (0,) * len(edit.experts)
    fits: dict[int, Any] = {}
    for expert, rank in zip(edit.experts, ranks, strict=True):
        if rank:
            if (edit.layer, expert) not in statistics.fits:
                raise ValueError(
                    f"layer {edit.layer}: no low-rank map was fitted for expert {expert}: fit it by collect_low_rank, "
                    "or set its rank to 0"
                )
            fits[expert] = statistics.fits[edit.layer, expert]
    constant = tuple(expert for expert in edit.experts if expert not in fits)
    values = dict(zip(constant, novice_values(edit.novice, statistics, edit.layer, constant), strict=True))
    hidden_size = statistics.shape.hidden_size
    inputs, outputs = [], []
    for expert, rank in zip(edit.experts, ranks, strict=True):
        if expert in fits:
            fit = fits[expert]
            values[expert] = fit.constant
            # Rows that the plan has and the fit has not give nothing, and can learn: only one factor is zero.
            reading = torch.eye(rank, hidden_size, dtype=torch.float64, device="cpu")[fit.rank :]
            inputs += [fit.novice_in, reading]
            outputs += [fit.novice_out, torch.zeros_like(reading)]
    result = {"novices": torch.stack([values[expert] for expert in edit.experts])}
    if inputs:
        result |= {"novice_in": torch.cat(inputs), "novice_out": torch.cat(outputs)}
    return result


@dataclass
class Novices(Method):
    """Replace the experts that score lowest by novices, weighted by the unchanged router.

    A novice is one vector, or (``novice=low_rank``) an affine map of low rank with ``(2 * rank + 1) * hidden``
    parameters. Give exactly one of ratio, keep, parameters and bytes.

    Attributes:
        ratio: Share of the experts to replace, in [0, 1); in fit also a schedule, {start: 0, end: 0.5, steps: 400,
            every: 100}, of those of the original model.
        keep: Real experts to keep a layer; with scope=global and scope=sensitivity the mean over layers.
        parameters: Replace as few experts as leave the model at most this many parameters, those of the novices
            counted. In scope=layer the layers may then differ by one expert: the extra ones go where the next-lowest
            score is smallest.
        bytes: The same for the bytes of the parameters.
        criterion: How experts are scored. naee tries out all sets of a layer, by the error of its output.
        scope: layer holds the budget in each layer, global over all layers by raw scores, sensitivity over all layers
            by scores weighted with what trimming each layer alone does to the model (with constants in place of maps).
        novice: What stands for an expert: mean (of its outputs), zero, gate2_mean (least squared error), or low_rank
            (least squared error of all affine maps of the rank).
        rank: Rank of the maps of low_rank. An expert that too few tokens reach, or whose map is not better than the
            constant on held-out tokens, gets a constant.
        floor: Real experts that every layer keeps at least.
        compatible: uniform refuses what leaves layers with different numbers of real experts, for engines that want
            them alike.
        seed: Seed of criterion=random.
        of: What ratio is a share of: the experts that are left, or those of the original model.

    Source: 2507.00390; the defaults are the released ones. gate2_mean and low_rank are ours.
    """

    ratio: float | RatioSchedule | None = None
    keep: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    criterion: str = "mone"
    scope: Scope = "layer"
    novice: NoviceKind = "mean"
    rank: int = DEFAULT_RANK
    floor: int = 0
    compatible: Compatible = "any"
    seed: int = 0
    of: Of = "left"

    def __post_init__(self) -> None:
        """Check the options."""
        self._budget()
        check_of("Novices", self.of, self.ratio)
        if self.novice not in get_args(NoviceKind):
            raise ValueError(
                f"Novices: unknown novice {self.novice!r}: choose one of {', '.join(get_args(NoviceKind))}"
            )
        if isinstance(self.rank, bool) or self.rank != int(self.rank) or self.rank < 1:
            raise ValueError(
                f"Novices: rank must be a whole number above 0, got {self.rank}: novice=gate2_mean is rank 0"
            )
        if self.novice != "low_rank" and self.rank != DEFAULT_RANK:
            raise ValueError(f"Novices: rank={self.rank} is of novice=low_rank, got novice={self.novice}: set that")
        if "subsets" in criterion_named(self.criterion).needs:
            raise ValueError(
                f"Novices: criterion={self.criterion} is the error of deleted experts: use criterion=naee, which knows "
                "what stands for them"
            )
        if self._selects and self.novice == "low_rank":
            raise ValueError(
                f"Novices: criterion={self.criterion} knows the error of constants only, not of maps: use "
                "novice=gate2_mean, or another criterion, e.g. residual"
            )

    @property
    def _selects(self) -> bool:
        return criterion_named(self.criterion).selector

    def _budget(self) -> ExpertBudget:
        return ExpertBudget(
            "Novices",
            ratio_at_end(self.ratio),
            self.keep,
            self.parameters,
            self.bytes,
            self.criterion,
            self.scope,
            self.compatible,
            self.floor,
        )

    @property
    def schedule(self) -> RatioSchedule | None:
        """How the ratio grows in a run; None where it is one number."""
        return self.ratio if isinstance(self.ratio, RatioSchedule) else None

    def at_share(self, share: float) -> Self:
        """Return the method with a ratio in the place of its schedule; see :meth:`Method.at_share`."""
        return dataclasses.replace(self, ratio=share, of="original")

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion and the vectors need."""
        pairs = {"pairs"} if self._selects and self.novice != "zero" else set()
        return criterion_named(self.criterion).needs | NOVICE_NEEDS[self.novice] | pairs

    @property
    def measures_sensitivity(self) -> bool:
        """Whether the model is to be measured with each layer trimmed alone."""
        return self.scope == "sensitivity"

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Keep the best real experts; see :meth:`Method.propose`."""
        return self._choice(shape, statistics).edits()

    def trial(self, shape: ModelShape, statistics: Statistics, layer: int) -> tuple[Edit, ...]:
        """Replace experts of one layer alone, by constants; see :meth:`Method.trial`."""
        edits = self._choice(shape, statistics).trial(layer)
        # Second moments for a trial of each layer would cost more than the trials; the constants show what a layer is
        # worth as well.
        return tuple(
            dataclasses.replace(edit, novice="gate2_mean", ranks=())
            if isinstance(edit, NoviceExperts) and edit.novice == "low_rank"
            else edit
            for edit in edits
        )

    def low_rank_wants(self, edits: Sequence[Edit]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Return the maps to fit; see :meth:`Method.low_rank_wants`."""
        return low_rank_wants(edits)

    def settle(self, edits: Sequence[Edit], statistics: Statistics) -> tuple[Edit, ...]:
        """Set ranks to zero where the constant was better; see :meth:`Method.settle`."""
        return settle_ranks(edits, statistics)

    def fill(self, edit: Edit, statistics: Statistics, weights: Any = None) -> dict[str, Tensor]:
        """Return the novices' values; see :meth:`Method.fill`."""
        return novice_parameters(edit, statistics) if isinstance(edit, NoviceExperts) else {}

    def _choice(self, shape: ModelShape, statistics: Statistics) -> WholeExperts:
        refuse_schedule("Novices", self.ratio)
        original = shape.num_experts if self.of == "original" else None
        candidates = [layout.real for layout in shape.layouts]
        if self.novice == "low_rank":
            self._check_rank(shape)

        def edits_of(removed: Sequence[tuple[int, ...]]) -> tuple[Edit, ...]:
            return tuple(
                NoviceExperts(layer, experts, self.novice, self._ranks(statistics, layer, experts))
                for layer, experts in zip(shape.moe_layers, removed, strict=True)
                if experts
            )

        def constants_of(layer: int, experts: tuple[int, ...]) -> Tensor | None:
            return None if self.novice == "zero" else _vectors(self.novice, statistics, layer, experts)[0]

        sizes = [len(experts) for experts in candidates]
        floors = [min(self.floor, size) for size in sizes]
        room = Room(sizes, floors, f"floor={self.floor}", "lower the floor, or " if self.floor else "")
        return WholeExperts(
            dataclasses.replace(self._budget(), original=original),
            self.seed,
            shape,
            statistics,
            candidates,
            room,
            edits_of,
            constants_of,
            self._trial_options(),
        )

    def _trial_options(self) -> dict[str, Any]:
        """Return the options that :meth:`trial` depends on."""
        # The rank says how many experts must go to reach a size, and nothing else of a trial.
        reads_rank = self.novice == "low_rank" and self._budget().target is not None
        options = trial_options(self.describe(), *(() if reads_rank else ("rank",)))
        return {**options, "novice": "gate2_mean" if self.novice == "low_rank" else self.novice}

    def _ranks(self, statistics: Statistics, layer: int, experts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ranks to begin with: zero where the fit would fall back to the constant for want of tokens."""
        if self.novice != "low_rank":
            return ()
        if statistics.info.get("synthetic"):
            return (self.rank,) * len(experts)
        tokens = statistics["output_count"][statistics.row(layer), list(experts)].tolist()
        ranks = tuple(0 if count < TOKENS_PER_RANK * self.rank else self.rank for count in tokens)
        return ranks if any(ranks) else ()

    def _check_rank(self, shape: ModelShape) -> None:
        if self.rank > shape.hidden_size:
            raise ValueError(
                f"Novices: rank={self.rank} is more than the hidden size {shape.hidden_size}: set rank to at most that"
            )
        for layout in shape.layouts:
            width = shape.intermediate_size if layout.width is None else layout.width
            if layout.real and 2 * self.rank + 1 >= 3 * width:
                raise ValueError(
                    f"Novices: a map of rank={self.rank} has at least as many parameters as an expert of layer "
                    f"{layout.layer} with its {width} channels: set rank to at most {(3 * width - 2) // 2}"
                )
