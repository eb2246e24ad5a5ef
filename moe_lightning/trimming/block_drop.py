"""Block Drop: whole decoder layers go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from moe_lightning.method import Method
from moe_lightning.plan import DropBlock, Edit, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.depth import DepthBudget, first_highest, means

BlockDropMode = Literal["discrete", "consecutive"]

_SUMS = {
    "discrete": ("block_cosine_sum", "block_tokens"),
    "consecutive": ("hidden_cosine_sum", "similarity_tokens"),
}


def best_run(score_BB: Tensor, number: int) -> int:
    """Choose the run of blocks that changes its input least.

    Args:
        score_BB: Similarity of hidden states, ``[blocks + 1, blocks + 1]``, larger = more alike. Row and column ``i``
            are the input of block ``i``; the last is the output of the last block, before the final norm.
        number: Length of the run, at least 1 and at most the number of blocks.

    Returns:
        Where the run starts: ``i`` in ``[0, blocks - number]`` with the highest ``score_BB[i, i + number]``, the first
        of equal ones.

    >>> import torch
    >>> best_run(torch.tensor([[1.0, 0.2, 0.1], [0.2, 1.0, 0.9], [0.1, 0.9, 1.0]]), 1)
    1
    """
    # The input of the run's first block and the output of its last: hidden states ``number`` apart.
    return first_highest(score_BB.diagonal(number))[0]


@dataclass
class BlockDrop(Method):
    """Delete whole decoder layers that change their input least; the key/value cache is renumbered.

    ``discrete``: ``S_l = mean over tokens of cos(block input, block output)``, the highest go, of equal ones the first.
    ``consecutive``: the run of blocks with the highest cosine between its first input and its last output goes. At
    least one block stays. Give exactly one of the first four options.

    Attributes:
        count: Decoder layers to drop.
        ratio: Share of the decoder layers that are there to drop, in [0, 1].
        parameters: Drop as few as leave the model at most this many parameters.
        bytes: Drop as few as leave the model's parameters at most this many bytes.
        mode: discrete chooses single blocks, consecutive one run of blocks.

    Source: 2406.02500, Block Drop; there 5 of Mixtral's 32 and 4 of DeepSeek-MoE's 28. For a run of ``n`` blocks the
    released code compares hidden states ``n + 1`` blocks apart; ours are ``n`` apart.
    """

    count: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    mode: BlockDropMode = "discrete"

    def __post_init__(self) -> None:
        """Check the options."""
        self._budget()
        if self.mode not in get_args(BlockDropMode):
            raise ValueError(f"BlockDrop: unknown mode {self.mode!r}: choose discrete or consecutive")

    def _budget(self) -> DepthBudget:
        return DepthBudget("BlockDrop", "decoder layers", self.count, self.ratio, self.parameters, self.bytes)

    @property
    def needs(self) -> frozenset[str]:
        """The cosine of every block, or of every run of blocks."""
        return frozenset({"blocks" if self.mode == "discrete" else "similarity"})

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Drop the most similar; see :meth:`Method.propose`."""
        total, amount = _SUMS[self.mode]
        cosine = means("BlockDrop", statistics[total], statistics[amount])

        def edits_of(number: int) -> tuple[Edit, ...]:
            if self.mode == "discrete":
                places = sorted(first_highest(cosine)[:number])
            else:
                start = best_run(cosine, number) if number else 0
                places = list(range(start, start + number))
            return tuple(DropBlock(shape.blocks[place]) for place in places)

        return edits_of(self._budget().number(shape, len(shape.blocks), len(shape.blocks) - 1, edits_of))
