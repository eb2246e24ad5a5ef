"""Affine maps of low rank in the place of experts, in closed form.

``E(x) ~ v + (x - x_mean) P Q`` with ``P [H, r]`` and ``Q [r, H]``: between a constant (r = 0) and a linear expert.
Fitted by reduced-rank ridge regression with the weight ``g(x)^2``, which is what the error of the block's output asks
for where the cross terms between experts are dropped. How strong the ridge is, and whether the map is better than the
constant at all, is decided by cross-validation.

Legend: H hidden, r and R ranks, L MoE layers, E experts of the original model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.plan import ModelShape
from moe_lightning.statistics.second_moments import (
    MAX_BYTES,
    FoldMoments,
    SecondMoments,
    iterate_second_moments,
)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in units of the mean variance of an input feature; the constant is always a choice, too."""

EXACT_HIDDEN_SIZE = 1024
"""Up to here all eigenvectors are computed; beyond, only as many as the rank asks for, by iteration."""

SUBSPACE_STEPS = 12

TOKENS_PER_RANK = 4.0
"""An expert with fewer tokens than this times the rank stays a constant."""

MAX_CURVE_RANK = 64


@dataclass(frozen=True)
class LowRankFit:
    """What stands for one expert: ``constant + (x @ novice_in.T) @ novice_out``.

    Attributes:
        layer: Original number of the layer.
        expert: Original number of the expert.
        rank: Rank of the map, as asked for, or 0 where the constant was better or safer.
        constant: ``[H]`` float64; what is to be stored as the novice's vector (the mean input is in it already).
        novice_in: ``[rank, H]`` float64.
        novice_out: ``[rank, H]`` float64.
        ridge: Ridge chosen, in units of the mean variance of an input feature; None for a constant.
        tokens: Calibration tokens that reached the expert, in all folds.
        held_out_error: ``[asked rank + 1]`` float64: mean over all tokens of the layer of ``g^2 |E - map|^2`` with the
            maps of rank 0, 1, ... that were fitted on the other folds, with the ridge chosen for the rank asked for.
            NaN where nothing was tried.
        status: Outcome in words.
    """

    layer: int
    expert: int
    rank: int
    constant: Tensor
    novice_in: Tensor
    novice_out: Tensor
    ridge: float | None
    tokens: int
    held_out_error: Tensor
    status: str


class WeightedRegression:
    """Reduced-rank ridge regression from second moments, for any ridge and rank.

    Minimises ``sum g^2 |y - v - (x - x_mean) B|^2 + ridge |B|^2`` over ``v`` and over ``B`` of a given rank. With ``S``
    the centred moments, ``A = Sxx + ridge`` and ``B* = A^-1 Sxy`` the minimum without a bound on the rank, the cost of
    any other ``B`` is larger by ``|A^(1/2) (B - B*)|^2``, so the best one of rank r keeps the first r right singular
    vectors of ``A^(1/2) B*``: the eigenvectors of ``Sxy^T A^-1 Sxy``.

    Source: Izenman (1975), reduced-rank regression; Mukherjee and Zhu (2011), with a ridge.
    """

    def __init__(self, sums: FoldMoments) -> None:
        """Centre and diagonalise the moments of the inputs.

        Args:
            sums: Moments with ``gate2 > 0``.
        """
        self.mean_x = sums.gate2_input / sums.gate2
        self.mean_y = sums.gate2_output / sums.gate2
        self.hidden_size = self.mean_x.shape[0]
        covariance = sums.gate2_input_square - torch.outer(self.mean_x, sums.gate2_input)
        cross = sums.gate2_cross - torch.outer(self.mean_x, sums.gate2_output)
        # Halves of a difference of large numbers: below this, variance is rounding.
        rounding = torch.finfo(torch.float64).eps * self.hidden_size * sums.gate2_input_square.diagonal().mean()
        values, self.basis = torch.linalg.eigh((covariance + covariance.T) / 2)
        self.values = values.clamp(min=0)
        self.rotated_cross = self.basis.T @ cross
        self.scale = float(self.values.mean())
        self.has_spread = self.scale > float(rounding)

    def directions(self, ridge: float, max_rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors of the best map of every rank up to a largest one.

        Args:
            ridge: In units of the mean variance of an input feature.
            max_rank: R.

        Returns:
            ``P [H, R]`` and ``Q [R, H]``; the first r columns and rows are the best map of rank r. The rows of Q are
            orthonormal.
        """
        damped = self.values + ridge * self.scale
        whitened = self.rotated_cross / damped.sqrt()[:, None]
        rows_RH = _leading_right_vectors(whitened, max_rank).T
        # An eigenvector is free in its sign: the largest entry is positive, so that the same sums give the same map.
        largest = rows_RH.gather(1, rows_RH.abs().argmax(1, keepdim=True))
        rows_RH = rows_RH * torch.where(largest < 0, -1.0, 1.0)
        columns_HR = self.basis @ ((self.rotated_cross @ rows_RH.T) / damped[:, None])
        return columns_HR, rows_RH

    def error_curve(self, columns_HR: Tensor, rows_RH: Tensor, sums: FoldMoments) -> Tensor:
        """Return the squared error on any tokens of the maps of rank 0, 1, ..., R.

        The rows of Q being orthonormal, every rank takes its own share off the error, independently of the others.

        Args:
            columns_HR: P.
            rows_RH: Q.
            sums: Moments of the tokens; of this fit's own, or of others.

        Returns:
            ``[R + 1]``: ``sum g^2 |y - v - (x - x_mean) P_r Q_r|^2``.
        """
        x, y = self.mean_x, self.mean_y
        constant = sums.gate2_norm_square - 2 * sums.gate2_output @ y + sums.gate2 * (y @ y)
        # sum g^2 (x - x_mean) (y - y_mean)^T and so on, around the means of the fit. Never the whole [H, H] once more.
        inner_HR = sums.gate2_cross @ rows_RH.T
        inner_HR = inner_HR - torch.outer(sums.gate2_input, rows_RH @ y) - torch.outer(x, rows_RH @ sums.gate2_output)
        inner_HR = inner_HR + sums.gate2 * torch.outer(x, rows_RH @ y)
        squared_HR = sums.gate2_input_square @ columns_HR
        shift_R, sum_R = x @ columns_HR, sums.gate2_input @ columns_HR
        linear_R = (columns_HR * inner_HR).sum(0)
        square_R = (columns_HR * squared_HR).sum(0) - 2 * shift_R * sum_R + sums.gate2 * shift_R.square()
        gain_R = torch.cat([torch.zeros_like(constant)[None], square_R - 2 * linear_R]).cumsum(0)
        return (constant + gain_R).clamp(min=0)


def _leading_right_vectors(matrix: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of a square matrix, as orthonormal columns."""
    size = matrix.shape[1]
    block = count + max(8, count // 2)
    if size <= EXACT_HIDDEN_SIZE or 4 * block >= size:
        return torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :count]
    # Subspace iteration: of Mixtral's 4096 vectors about a hundred are wanted, and all of them take a minute. Vectors
    # that are not quite the leading ones cost a little of the error, which is computed for those that there are.
    generator = torch.Generator("cpu").manual_seed(0)
    columns = torch.randn(size, block, dtype=matrix.dtype, generator=generator, device="cpu").to(matrix.device)
    for _ in range(SUBSPACE_STEPS):
        columns = torch.linalg.qr(matrix.T @ (matrix @ columns)).Q
    return columns @ torch.linalg.svd(matrix @ columns, full_matrices=False).Vh[:count].T


def _reason_against(folds: SecondMoments, rank: int, tokens_per_rank: float) -> str | None:
    count = sum(int(sums.count) for sums in folds)
    if count == 0:
        return "no calibration token reached it, so it is zero"
    if rank == 0:
        return "rank 0 was asked for"
    if count < tokens_per_rank * rank:
        return f"{count} tokens are fewer than {tokens_per_rank:g} x rank {rank}"
    if sum(float(sums.gate2) > 0 for sums in folds) < 2:
        return f"its {count} tokens are all in one of {len(folds)} folds, so that no map can be judged on other tokens"
    return None


def _held_out_curves(folds: SecondMoments, max_rank: int, ridges: Sequence[float]) -> Tensor:
    """Return the error ``[ridges, R + 1]`` on every fold of the maps that were fitted on the others, summed up."""
    curves = folds[0].gate2.new_zeros(len(ridges), max_rank + 1)
    for number, held_out in enumerate(folds):
        if float(held_out.gate2) <= 0:
            continue
        others = FoldMoments.total(sums for fold, sums in enumerate(folds) if fold != number)
        if float(others.gate2) <= 0:
            # Nothing to fit on: a novice of zeros.
            curves += held_out.gate2_norm_square
            continue
        regression = WeightedRegression(others)
        if not regression.has_spread:
            columns_HR = curves.new_zeros(regression.hidden_size, max_rank)
            curves += regression.error_curve(columns_HR, columns_HR.T, held_out)
            continue
        for row, ridge in enumerate(ridges):
            curves[row] += regression.error_curve(*regression.directions(ridge, max_rank), held_out)
    return curves


def _check_options(ridges: Sequence[float], tokens_per_rank: float) -> None:
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"ridges must be positive and at least one, got {list(ridges)}: the default is {list(RIDGES)}")
    if tokens_per_rank < 1:
        raise ValueError(f"tokens_per_rank must be at least 1, got {tokens_per_rank}: the default is {TOKENS_PER_RANK}")


def fit_low_rank(
    layer: int,
    expert: int,
    folds: SecondMoments,
    rank: int,
    *,
    ridges: Sequence[float] = RIDGES,
    tokens_per_rank: float = TOKENS_PER_RANK,
) -> LowRankFit:
    """Fit what stands for an expert.

    Every ridge is tried on all folds but one and judged on that one, for each fold in turn; with the best one the map
    is fitted again on all of them. Where no map beats the constant on the held-out folds, where too few tokens reached
    the expert, or where its input does not vary, the constant ``sum g^2 E / sum g^2`` is taken.

    Args:
        layer: Original number of the layer.
        expert: Original number of the expert.
        folds: Its moments in each fold.
        rank: Rank of the map, at most H.
        ridges: To choose from, in units of the mean variance of an input feature.
        tokens_per_rank: Fewer tokens than this times the rank give the constant.

    Returns:
        The fit, on the CPU.

    Raises:
        ValueError: A rank outside ``[0, H]``, or options without sense.

    Cost: an eigenvalue problem of size H in float64 for each fold, one more, and as many again for each ridge (beyond
    H = 1024 a few products with ``[H, 1.5 * rank]`` for each ridge instead).
    """
    _check_options(ridges, tokens_per_rank)
    hidden_size = folds[0].gate2_input.shape[0]
    if not 0 <= rank <= hidden_size:
        raise ValueError(f"rank must be between 0 and the hidden size {hidden_size}, got {rank}")
    everything = FoldMoments.total(folds)
    curve = everything.gate2.new_full((rank + 1,), torch.nan)
    reason = _reason_against(folds, rank, tokens_per_rank)
    if reason is None:
        curves = _held_out_curves(folds, rank, ridges)
        # Of equally good ridges the last, which is the strongest.
        best = len(ridges) - 1 - int(curves[:, rank].flip(0).argmin())
        curve = curves[best] / everything.tokens
        if not bool(curve[rank] < curve[0]):
            reason = f"no map of rank {rank} beats it on held-out tokens"
    tokens = int(everything.count)
    if reason is not None:
        constant = everything.gate2_output
        if float(everything.gate2) > 0:
            constant = constant / everything.gate2
        nothing = constant.new_zeros(0, hidden_size).cpu()
        status = f"constant: {reason}"
        return LowRankFit(layer, expert, 0, constant.cpu(), nothing, nothing, None, tokens, curve.cpu(), status)
    regression = WeightedRegression(everything)
    columns_HR, rows_RH = regression.directions(ridges[best], rank)
    constant = regression.mean_y - (regression.mean_x @ columns_HR) @ rows_RH
    # Both factors get the same size, so that one learning rate suits both when they are tuned.
    size_R = columns_HR.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return LowRankFit(
        layer,
        expert,
        rank,
        constant.cpu(),
        (columns_HR / size_R).T.contiguous().cpu(),
        (rows_RH * size_R[:, None]).contiguous().cpu(),
        ridges[best],
        tokens,
        curve.cpu(),
        f"rank {rank}, ridge {ridges[best]:g}",
    )


def low_rank_error(
    folds: SecondMoments,
    max_rank: int,
    *,
    ridges: Sequence[float] = RIDGES,
    tokens_per_rank: float = TOKENS_PER_RANK,
) -> Tensor:
    """Estimate what :func:`fit_low_rank` would lose at every rank.

    Args:
        folds: Moments of an expert in each fold.
        max_rank: R, at most H.
        ridges: To choose from, for every rank by itself.
        tokens_per_rank: Ranks with fewer tokens than this times the rank count as the constant.

    Returns:
        ``[R + 1]`` float64: mean over all tokens of the layer of ``g^2 |E - map|^2``, every fold with the maps fitted
        on the others. The ridge is chosen by the same error, as in the fit, so the estimate leans a little to the good
        side. Zeros for an expert that no token reached.
    """
    _check_options(ridges, tokens_per_rank)
    curves = _held_out_curves(folds, max_rank, ridges)
    error = torch.minimum(curves.amin(0), curves[0, 0])
    count = sum(float(sums.count) for sums in folds)
    starved = count < tokens_per_rank * torch.arange(max_rank + 1, device=error.device)
    return torch.where(starved, curves[0, 0], error) / sum(float(sums.tokens) for sums in folds)


def collect_low_rank(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    wants: Mapping[int, Sequence[tuple[int, int]]],
    *,
    progress: bool = True,
    max_bytes: int = MAX_BYTES,
) -> dict[tuple[int, int], LowRankFit]:
    """Fit low-rank maps for experts of a model.

    Args:
        model: A model with its language head, compressed or not.
        batches: Calibration batches, see :func:`iterate_second_moments`.
        wants: For each layer pairs (real expert, rank), all in original numbers.
        progress: Show a progress bar, which states the memory.
        max_bytes: Largest memory for second moments at a time.

    Returns:
        One fit for each expert, by (layer, expert). An expert that no token reached gets zeros, and a warning.

    Raises:
        ValueError: An expert that is not there or is named twice, a rank outside ``[0, H]``, no tokens, or sums that
            are not finite.

    Source: ours; the constant is that of novices (2507.00390) with the weight ``g^2``.
    """
    ranks = {(layer, expert): rank for layer, pairs in wants.items() for expert, rank in pairs}
    if len(ranks) != sum(len(pairs) for pairs in wants.values()):
        raise ValueError("low-rank novices: an expert is named twice: give one rank for each")
    hidden_size = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    for (layer, expert), rank in ranks.items():
        if not 0 <= rank <= hidden_size:
            raise ValueError(
                f"rank {rank} of expert {expert} in layer {layer} must be between 0 and the hidden size {hidden_size}"
            )
    wanted = {layer: [expert for expert, _ in pairs] for layer, pairs in wants.items()}
    fits: dict[tuple[int, int], LowRankFit] = {}
    for group in iterate_second_moments(model, batches, wanted, progress=progress, max_bytes=max_bytes):
        for (layer, expert), folds in group.items():
            fits[layer, expert] = fit_low_rank(layer, expert, folds, ranks[layer, expert])
        group.clear()
    for layer in sorted(wants):
        unreached = [expert for expert, _ in wants[layer] if not fits[layer, expert].tokens]
        if unreached:
            warnings.warn(
                f"layer {layer}: no calibration token reached experts {unreached}; their novices are zero. "
                "More calibration batches would reach them",
                stacklevel=2,
            )
    return fits


def collect_low_rank_error(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    shape: ModelShape,
    *,
    progress: bool = True,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Tensor]:
    """Estimate for every real expert of a model what a low-rank map in its place loses, at every rank.

    Args:
        model: A model with its language head, compressed or not.
        batches: Calibration batches, see :func:`iterate_second_moments`.
        shape: Its shape.
        progress: Show a progress bar, which states the memory.
        max_bytes: Largest memory for second moments at a time.

    Returns:
        ``low_rank_error`` ``[L, E, R + 1]``, see :func:`low_rank_error`, ``R = min(H, 64)``; ``low_rank_tokens``
        ``[L, E]``: the tokens that it is the mean over, whether they reached the expert or not. Float64, on the CPU;
        NaN where there is no real expert.
    """
    max_rank = min(shape.hidden_size, MAX_CURVE_RANK)
    size = (len(shape.layouts), shape.num_experts)
    error = torch.full((*size, max_rank + 1), torch.nan, dtype=torch.float64, device="cpu")
    tokens = torch.full(size, torch.nan, dtype=torch.float64, device="cpu")
    rows = {layout.layer: row for row, layout in enumerate(shape.layouts)}
    wanted = {layout.layer: layout.real for layout in shape.layouts if layout.real}
    for group in iterate_second_moments(model, batches, wanted, progress=progress, max_bytes=max_bytes):
        for (layer, expert), folds in group.items():
            error[rows[layer], expert] = low_rank_error(folds, max_rank).cpu()
            tokens[rows[layer], expert] = sum(float(sums.tokens) for sums in folds)
        group.clear()
    return {"low_rank_error": error, "low_rank_tokens": tokens}
