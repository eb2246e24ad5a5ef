"""Layer Drop: MoE sub-layers go, attention stays."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lightning.method import Method
from moe_lightning.plan import DropMoE, Edit, ModelShape
from moe_lightning.statistics import Statistics
from moe_lightning.trimming.depth import DepthBudget, first_highest, means


@dataclass
class LayerDrop(Method):
    """Delete the MoE sub-layers that change the residual stream least, each with its norm; attention stays.

    ``S_l = mean over tokens of cos(x', x' + MoE(norm(x')))`` with ``x'`` the residual stream after attention. The
    highest go; of equal ones the first. Dense layers, and blocks whose MoE sub-layer is gone, are no candidates. Give
    exactly one of the four options. All MoE sub-layers may go.

    Attributes:
        count: MoE sub-layers to drop.
        ratio: Share of the MoE sub-layers that are there to drop, in [0, 1].
        parameters: Drop as few as leave the model at most this many parameters.
        bytes: Drop as few as leave the model's parameters at most this many bytes.

    Source: 2406.02500, Layer Drop; there 8 of Mixtral's 32 and 4 of DeepSeek-MoE's 28. The released code takes cosines
    in the model's type; ours are in fp32 or wider, because bf16 makes ties of what differs.
    """

    count: int | None = None
    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self._budget()

    def _budget(self) -> DepthBudget:
        return DepthBudget("LayerDrop", "MoE sub-layers", self.count, self.ratio, self.parameters, self.bytes)

    @property
    def needs(self) -> frozenset[str]:
        """The cosine of every MoE sub-layer."""
        return frozenset({"layers"})

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Drop the most similar; see :meth:`Method.propose`."""
        cosine_L = means("LayerDrop", statistics["moe_cosine_sum"], statistics["moe_tokens"])
        ranked = [shape.moe_layers[place] for place in first_highest(cosine_L)]

        def edits_of(number: int) -> tuple[Edit, ...]:
            return tuple(DropMoE(layer) for layer in sorted(ranked[:number]))

        return edits_of(self._budget().number(shape, len(ranked), len(ranked), edits_of))
