"""What the streaming sums have in common: float64 states, and the merging of moments.

They are torchmetrics that stand outside the module that is trained: ``bf16-true`` would cast their states.

Legend: L MoE layers, E experts of the original model (columns), H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def merge_moments(
    count: Tensor, mean: Tensor, m2: Tensor, other_count: Tensor, other_mean: Tensor, other_m2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge counts, means and sums of squared deviations of two samples.

    Args:
        count: ``[...]``.
        mean: ``[..., H]``.
        m2: ``[..., H]``.
        other_count: ``[...]``.
        other_mean: ``[..., H]``.
        other_m2: ``[..., H]``.

    Returns:
        The same three of both samples together; zeros where both are empty.

    Source: Chan, Golub and LeVeque (1979), the pairwise update; symmetric, unlike the recurrence in the code of
    2507.00390.
    """
    total = count + other_count
    share = torch.where(total > 0, other_count / total.clamp(min=1), torch.zeros_like(total)).unsqueeze(-1)
    delta = other_mean - mean
    merged_mean = mean + delta * share
    merged_m2 = m2 + other_m2 + delta.square() * (count.unsqueeze(-1) * share)
    return total, merged_mean, merged_m2


class SumMetric(Metric):
    """A torchmetric of named float64 sums.

    States in ``moments`` (count, mean, sum of squared deviations) are no sums: ranks' own are gathered and merged in
    :meth:`compute`.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    moments: tuple[str, ...] = ()

    def __init__(self) -> None:
        """Start without states."""
        super().__init__()
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def update_called(self) -> bool:
        """Always true: a process that saw nothing has a result, too, and torchmetrics would warn of it."""
        return True

    def add_zeros(self, name: str, *shape: int, reduce: str = "sum") -> None:
        """Add a state of zeros.

        Args:
            name: Its name.
            *shape: Its shape.
            reduce: How those of several ranks become one, ``sum`` or ``max``; not read for ``moments``.
        """
        # A meta default device (a model under construction) must not make the sums meta tensors.
        zeros = torch.zeros(*shape, dtype=torch.float64, device="cpu")
        self.add_state(name, zeros, dist_reduce_fx=None if name in self.moments else reduce)
        self._shapes[name] = shape

    def add_sample(self, at: tuple[int, int], count: int, mean_H: Tensor, m2_H: Tensor) -> None:
        """Merge the moments of a sample into those of an expert.

        Args:
            at: Row and column of the expert.
            count: Size of the sample, 1 or more.
            mean_H: Its mean.
            m2_H: Its sum of squared deviations.
        """
        counts, means, squares = (getattr(self, name) for name in self.moments)
        merged = merge_moments(counts[at], means[at], squares[at], counts.new_tensor(count), mean_H, m2_H)
        counts[at], means[at], squares[at] = merged

    def compute(self) -> dict[str, Tensor]:
        """Return the states by name, ranks merged."""
        values = {name: getattr(self, name).clone() for name in self._shapes}
        if self.moments and values[self.moments[0]].ndim > len(self._shapes[self.moments[0]]):  # [ranks, L, E]
            ranks = [[values[name][rank] for name in self.moments] for rank in range(len(values[self.moments[0]]))]
            merged = ranks[0]
            for other in ranks[1:]:
                merged = list(merge_moments(*merged, *other))
            values.update(zip(self.moments, merged, strict=True))
        return values

    def sums(self) -> dict[str, Tensor]:
        """Return :meth:`compute` with every sum in its full shape: torchmetrics squeezes what holds one number."""
        return {name: tensor.reshape(self._shapes[name]) for name, tensor in self.compute().items()}
