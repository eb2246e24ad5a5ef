"""The number of parameters that all cells of one ratio may have."""

from __future__ import annotations

from moe_lightning.criteria.selection import round_half_up
from moe_lightning.plan import ModelShape


def parameter_budget(shape: ModelShape, ratio: float) -> int:
    """Return the number of parameters that a model may have which gives up a share of its experts.

    It is that of Expert Drop at the ratio with the same number of experts in every layer, plus a router row and a
    vector for each expert that goes (``2 H`` of its ``3 H I`` parameters). With that room a constant novice stands for
    each dropped expert; a low-rank novice is larger, and more experts must go for it.

    Args:
        shape: Shape of the model.
        ratio: Share of the experts, in (0, 1); counts round as ``floor(x + 0.5)`` in each layer.
    """
    gone = sum(round_half_up(ratio * len(layout.real)) for layout in shape.layouts)
    # Dropping takes the expert and its router row; the room gives back the row and a vector.
    return shape.parameters - gone * (shape.expert_parameters - shape.hidden_size)
