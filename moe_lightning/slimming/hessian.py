"""The inverse Hessian that optimal brain surgery asks for, and the walk over columns that uses it.

``H = sum x x^T`` of the inputs of a matrix; the error of its output is ``tr(D H D^T)`` for a change D of its weights.

Legend: S matrices, O outputs, I inputs. Weights that are walked over are transposed, ``[S, I, O]``: a column of the
matrix is then contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lightning.statistics.moment_memory import AT_ONCE

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to the diagonal."""

MAX_GROWTHS = 8
"""How often the damping grows tenfold before a matrix does without its Hessian."""

SMALL = 1 << 22
"""Weights, or entries of Hessians, of a portion on a CPU: matrices as large keep it busy one by one."""

_INVERTED = 128
"""Size of a triangle that is inverted as a whole."""

_LEAF = 8
"""Columns between two products in a walk; a multiple of every n:m group."""


class InverseFactor(NamedTuple):
    """Inverses of a stack of damped Hessians, in units of the mean of each one's diagonal.

    Attributes:
        factor: U, upper triangular, ``H^-1 = U^T U``, ``[S, I, I]``.
        dampings: Of each, in units of the mean of the diagonal.
        growths: How often the damping of each had to grow tenfold.
        reasons: For each why it is the identity instead, or None.
    """

    factor: Tensor
    dampings: tuple[float, ...]
    growths: tuple[int, ...]
    reasons: tuple[str | None, ...]

    def statuses(self, method: str, fallback: str) -> tuple[str, ...]:
        """Say for each matrix what was done.

        Damping is told of in units of the default: where it had to grow, and where it outweighs what was measured,
        because fewer tokens than inputs came.

        Args:
            method: Name of the method where there is a Hessian.
            fallback: What it comes down to without one.
        """
        found = []
        for damping, growths, reason in zip(self.dampings, self.growths, self.reasons, strict=True):
            if reason is not None:
                found.append(f"{fallback} fallback: {reason}")
            elif growths or damping > 1:
                # Steps of about three, so that experts with few tokens are counted together: 10, 30, 100.
                step = round(2 * math.log10(damping / DAMPING))
                found.append(f"{method} damp x{(3 if step % 2 else 1) * 10 ** (step // 2)}")
            else:
                found.append(method)
        return tuple(found)


def work_type(tensor: Tensor) -> torch.dtype:
    """Return the type to compute in: fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_stack(weight_SOI: Tensor) -> None:
    """Raise unless this is a stack of finite matrices."""
    if weight_SOI.dim() != 3 or not weight_SOI.is_floating_point():
        raise ValueError(
            f"expected a floating-point stack [matrices, outputs, inputs], got {tuple(weight_SOI.shape)} "
            f"{weight_SOI.dtype}"
        )
    bad = (~weight_SOI.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"weights of matrices {bad} of the stack are not finite: they were broken before compression")


def check_hessian(weight_SOI: Tensor, hessian_SII: Tensor) -> None:
    """Raise unless there is one finite Hessian for each matrix."""
    slots, _, columns = weight_SOI.shape
    if tuple(hessian_SII.shape) != (slots, columns, columns):
        raise ValueError(
            f"Hessians {tuple(hessian_SII.shape)} do not fit weights {tuple(weight_SOI.shape)}: "
            f"expected {(slots, columns, columns)}"
        )
    bad = (~hessian_SII.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"Hessians of matrices {bad} of the stack are not finite: look at the activations")


def damping_for(tokens_S: Tensor, inputs: int) -> Tensor:
    """Return the damping that so few tokens want, in units of the mean of the diagonal: ``I / n``, in float64.

    With fewer tokens than inputs H knows nothing of most directions, and says that errors there cost nothing. Errors
    fed back where it says so are fitted to the tokens: on others they cost more than those of rounding. ``I / n`` is as
    if I tokens of uniform inputs had come along, one for each number that a row can be fitted with; it is half of what
    is known where as many tokens as inputs came, and gone where very many did.

    Args:
        tokens_S: Tokens that each H is the sum over, n.
        inputs: I.

    Source: ours. Measured against no such damping and against oracle approximating shrinkage (0907.4698), with which
    the error on other tokens was up to 1.9 times that of rounding.
    """
    return inputs / tokens_S.double().clamp(min=1)


def inverse_factor(
    hessian_SII: Tensor,
    *,
    damping: float = DAMPING,
    tokens_S: Tensor | None = None,
    order_SI: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> InverseFactor:
    """Factor the inverse of every Hessian, damped as much as it needs.

    With rows and columns in reverse order ``H = L L^T``; read forward again, the inverse of L is upper triangular, and
    it is U. So one Cholesky factor and one triangular inverse do, where inverting H first and factoring that takes
    twice the work and loses the digits of a nearly singular H twice.

    Args:
        hessian_SII: ``sum x x^T`` of each matrix. Zero and rank one are fine.
        damping: Share of the mean of the diagonal to add to the diagonal at least, positive.
        tokens_S: Tokens that each is the sum over: then few of them are damped more, see :func:`damping_for`.
        order_SI: Order in which to take the inputs; None for their own.
        dtype: To compute in.

    Returns:
        The factors. Where there is no Hessian, or no damping helps, the identity, in which the methods that ask for it
        come down to rounding or to magnitudes.

    Raises:
        ValueError: The damping is not positive.

    Source: 2210.17323 (GPTQ), step 3 of section 3.3; the reverse order is ours.
    Cost: ``2/3 S I^3``; memory for 2 more Hessians.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}: the default is {DAMPING}")
    slots, size = hessian_SII.shape[:2]
    mean_S = hessian_SII.diagonal(dim1=-2, dim2=-1).mean(-1)
    empty_S = mean_S <= 0
    unit_S = torch.where(empty_S, 1.0, mean_S)
    least_S = torch.full((slots,), damping, dtype=torch.float64, device=hessian_SII.device)
    if tokens_S is not None:
        least_S = damping_for(tokens_S.to(least_S.device), size).clamp(min=damping)
    dampings, growths = least_S.tolist(), [0] * slots
    reasons: list[str | None] = ["no input reached it" if empty else None for empty in empty_S.tolist()]
    backward_SI = torch.arange(size - 1, -1, -1, device=hessian_SII.device).expand(slots, size)
    if order_SI is not None:
        backward_SI = order_SI.flip(-1)
    factor_SII: Tensor | None = None
    waiting = (~empty_S).nonzero().flatten()
    for growth in range(MAX_GROWTHS + 1):
        if not len(waiting):
            break
        whole = len(waiting) == slots
        damped_SII = _rearranged(hessian_SII if whole else hessian_SII[waiting], backward_SI[waiting])
        # In units of the mean, fp32 neither overflows nor underflows however many tokens there were.
        damped_SII = damped_SII.div_(unit_S[waiting, None, None]).to(dtype)
        damped_SII.diagonal(dim1=-2, dim2=-1).add_(least_S[waiting, None] * 10**growth)
        lower_SII, info_S = torch.linalg.cholesky_ex(damped_SII)
        del damped_SII
        _invert_lower(lower_SII)
        least, most = lower_SII.flatten(1).aminmax(dim=1)
        good_S = (info_S == 0) & least.isfinite() & most.isfinite()
        if whole and bool(good_S.all()):
            factor_SII = lower_SII.flip(-1, -2)
        else:
            if factor_SII is None:
                factor_SII = torch.eye(size, dtype=dtype, device=hessian_SII.device).repeat(slots, 1, 1)
            for slot, place in zip(waiting[good_S].tolist(), good_S.nonzero().flatten().tolist(), strict=True):
                factor_SII[slot] = lower_SII[place].flip(-1, -2)
        del lower_SII
        for slot in waiting[good_S].tolist():
            growths[slot] = growth
            dampings[slot] *= 10**growth
        waiting = waiting[~good_S]
    for slot in waiting.tolist():
        reasons[slot] = "its Hessian is not positive definite with any damping"
    if factor_SII is None:
        factor_SII = torch.eye(size, dtype=dtype, device=hessian_SII.device).repeat(slots, 1, 1)
    return InverseFactor(factor_SII, tuple(dampings), tuple(growths), tuple(reasons))


def _rearranged(hessian_SII: Tensor, order_SI: Tensor) -> Tensor:
    """Return a copy with rows and columns in another order."""
    rows_SII = hessian_SII.gather(1, order_SI[:, :, None].expand_as(hessian_SII))
    return rows_SII.gather(2, order_SI[:, None, :].expand_as(hessian_SII))


def _invert_lower(lower_SII: Tensor) -> None:
    """Invert lower triangular matrices in place: a third of the work of solving for the identity, and no copy."""
    size = lower_SII.shape[-1]
    if size <= _INVERTED:
        eye_II = torch.eye(size, dtype=lower_SII.dtype, device=lower_SII.device)
        lower_SII.copy_(torch.linalg.solve_triangular(lower_SII, eye_II.expand_as(lower_SII), upper=False))
        return
    half = size // 2
    _invert_lower(lower_SII[:, :half, :half])
    _invert_lower(lower_SII[:, half:, half:])
    corner_SXX = lower_SII[:, half:, half:] @ lower_SII[:, half:, :half]
    lower_SII[:, half:, :half] = corner_SXX.neg_() @ lower_SII[:, :half, :half]


def feed_errors_back(weight_SIO: Tensor, factor_SII: Tensor, segment: int, compress: Callable[[int], Tensor]) -> None:
    """Replace column after column, and let the columns that are still free make up for each one's error.

    ``e = (w_j - q_j) / U_jj``, then ``w_k -= U_jk e`` for all k > j. The sums are put off and done in products, halves
    of halves, so that hardly anything is left of the work that moves memory instead of computing.

    When ``compress(j)`` is called, columns from j to the end of the group of eight are up to date, and those to the end
    of the segment where j begins one; it may read them in ``weight_SIO``.

    Args:
        weight_SIO: Weights, transposed; changed in place to the compressed ones.
        factor_SII: U.
        segment: Columns of a segment.
        compress: Takes the number of a column and returns ``[S, O]``: what it becomes.

    Source: 2210.17323 (GPTQ), algorithm 1; 2301.00774 (SparseGPT), algorithm 1.
    Cost: ``S O I^2`` multiply-adds.
    """
    columns = weight_SIO.shape[1]
    for first in range(0, columns, segment):
        last = min(first + segment, columns)
        error_SXO = torch.empty_like(weight_SIO[:, first:last])
        _walk(weight_SIO, factor_SII, error_SXO, first, first, last, compress)
        if last < columns:
            weight_SIO[:, last:].baddbmm_(factor_SII[:, first:last, last:].mT, error_SXO, alpha=-1)


def _walk(
    weight_SIO: Tensor,
    factor_SII: Tensor,
    error_SXO: Tensor,
    origin: int,
    first: int,
    last: int,
    compress: Callable[[int], Tensor],
) -> None:
    length = last - first
    if length <= _LEAF:
        for column in range(first, last):
            result_SO = compress(column)
            step_SO = error_SXO[:, column - origin]
            torch.sub(weight_SIO[:, column], result_SO, out=step_SO)
            step_SO /= factor_SII[:, column, column, None]
            weight_SIO[:, column] = result_SO
            if column + 1 < last:
                row_SX = factor_SII[:, column, column + 1 : last]
                weight_SIO[:, column + 1 : last].baddbmm_(row_SX[:, :, None], step_SO[:, None, :], alpha=-1)
        return
    # The largest power of two below the length, so that leaves begin at multiples of eight from the segment's start.
    middle = first + (1 << ((length - 1).bit_length() - 1))
    _walk(weight_SIO, factor_SII, error_SXO, origin, first, middle, compress)
    done_SXO = error_SXO[:, first - origin : middle - origin]
    weight_SIO[:, middle:last].baddbmm_(factor_SII[:, first:middle, middle:last].mT, done_SXO, alpha=-1)
    _walk(weight_SIO, factor_SII, error_SXO, origin, middle, last, compress)


def portions(weight_SOI: Tensor, at_once: int | None) -> list[slice]:
    """Cut a stack into portions of matrices that are walked over at once.

    Args:
        weight_SOI: Weights.
        at_once: Matrices of a portion; None for what is fastest for their size on a CPU, and for what the memory
            that is counted for solving allows elsewhere.
    """
    slots, outputs, columns = weight_SOI.shape
    if at_once is None:
        on_cpu = weight_SOI.device.type == "cpu"
        at_once = max(1, (SMALL if on_cpu else AT_ONCE) // (max(outputs, columns) * columns))
    if at_once < 1:
        raise ValueError(f"at_once is a number of matrices, at least 1, got {at_once}")
    return [slice(first, first + at_once) for first in range(0, slots, at_once)]


def joined(parts: list[Tensor]) -> Tensor:
    """Put portions together again, without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_errors(weight_SOI: Tensor, other_SOI: Tensor, moment: Tensor) -> Tensor:
    """Return :func:`output_error` of every row, ``[S, O]``."""
    dtype = work_type(weight_SOI)
    change_SOI = weight_SOI.to(dtype) - other_SOI.to(dtype)
    if moment.dim() == 2:
        return (change_SOI.square() @ moment.to(dtype)[:, :, None])[..., 0]
    return torch.einsum("soi,soi->so", change_SOI @ moment.to(dtype), change_SOI)


def output_error(weight_SOI: Tensor, other_SOI: Tensor, moment: Tensor) -> Tensor:
    """Return the squared change of the outputs summed over the inputs: ``tr(D H D^T)``.

    Args:
        weight_SOI: Weights before.
        other_SOI: Weights after.
        moment: H ``[S, I, I]``, or its diagonal ``sum x^2`` ``[S, I]``: the error then leaves out products of inputs.

    Returns:
        ``[S]`` in fp32 or float64.
    """
    dtype = work_type(weight_SOI)
    change_SOI = weight_SOI.to(dtype) - other_SOI.to(dtype)
    if moment.dim() == 2:
        return (change_SOI.square().sum(1) * moment.to(dtype)).sum(1)
    return torch.einsum("soi,soi->s", change_SOI @ moment.to(dtype), change_SOI)
