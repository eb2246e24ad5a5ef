"""Angular layer removal: one run of decoder layers goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moe_lightning.method import Method
from moe_lightning.plan import DropBlock, Edit, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.block_drop import best_run
from moe_lightning.trimming.depth import DepthBudget, means

AngularTokens = Literal["last", "all"]

_SUMS = {
    "last": ("hidden_last_angle_sum", "similarity_sequences"),
    "all": ("hidden_angle_sum", "similarity_tokens"),
}


@dataclass
class Angular(Method):
    """Delete the run of decoder layers whose output points most nearly where its input points.

    With ``h_i`` the input of block ``i`` and ``h_L`` the output of the last, blocks ``i* ... i* + n - 1`` go, where
    ``i* = argmin over i in [0, L - n] of mean arccos(cos(h_i, h_(i + n))) / pi``; of equal ones the first. At least one
    block stays. Give exactly one of the first four options.

    Attributes:
        count: Decoder layers to drop, n.
        ratio: Share of the decoder layers that are there to drop, in [0, 1].
        parameters: Drop as few as leave the model at most this many parameters.
        bytes: Drop as few as leave the model's parameters at most this many bytes.
        tokens: The mean is over the last token of each calibration sequence, or over all tokens.

    Source: 2403.17887 (Gromov et al.), eq. 6 and 7, where it is the last token. Their healing is a recovery and no part
    of this.
    """

    count: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    tokens: AngularTokens = "last"

    def __post_init__(self) -> None:
        """Check the options."""
        self._budget()
        if self.tokens not in get_args(AngularTokens):
            raise ValueError(f"Angular: unknown tokens {self.tokens!r}: choose last or all")

    def _budget(self) -> DepthBudget:
        return DepthBudget("Angular", "decoder layers", self.count, self.ratio, self.parameters, self.bytes)

    @property
    def needs(self) -> frozenset[str]:
        """The angles between all hidden states."""
        return frozenset({"similarity"})

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Drop the best run; see :meth:`Method.propose`."""
        total, amount = _SUMS[self.tokens]
        angle_BB = means("Angular", statistics[total], statistics[amount])

        def edits_of(number: int) -> tuple[Edit, ...]:
            start = best_run(-angle_BB, number) if number else 0
            return tuple(DropBlock(block) for block in shape.blocks[start : start + number])

        return edits_of(self._budget().number(shape, len(shape.blocks), len(shape.blocks) - 1, edits_of))
