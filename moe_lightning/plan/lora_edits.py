"""The changes of a plan that put low-rank terms beside the matrices of a layer, and fold them into the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from moe_lightning.plan.edits import Edit, Target, has
from moe_lightning.plan.shape import LoraRank, ModelShape


@dataclass(frozen=True)
class AddLora(Edit):
    """Put a low-rank term beside each matrix: ``y = W x + alpha / rank * B A x`` (2106.09685, eq. 3).

    Attributes:
        layer: Number of the decoder layer in the original model.
        target: The matrices of its real experts, a term of its own for each, or those of its attention.
        rank: Rank of each term.
        alpha: Numerator of the factor.
    """

    kind: ClassVar[str] = "add_lora"
    layer: int
    target: Target = "experts"
    rank: int = 16
    alpha: float = 32.0

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        if shape.lora(self.layer, self.target) is not None:
            raise ValueError(
                f"layer {self.layer}: its {self.target} {has(self.target)} low-rank terms already: merge them first "
                "(MergeLoRA)"
            )
        if self.target == "experts" and not shape.layout(self.layer).real:
            raise ValueError(f"layer {self.layer} has no real expert to put low-rank terms beside: leave the edit out")
        if self.rank < 1:
            raise ValueError(f"layer {self.layer}: the rank of low-rank terms must be 1 or more, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"layer {self.layer}: alpha must be positive, not {self.alpha}")
        return _with_lora(shape, self.layer, self.target, LoraRank(self.rank, float(self.alpha)))


@dataclass(frozen=True)
class MergeLora(Edit):
    """Fold the low-rank terms of a layer into its weights; integers are rounded again.

    Attributes:
        layer: Number of the decoder layer in the original model.
        target: The matrices of its real experts, or those of its attention.
        dequantize: Leave weights that were integers in floating point, for a method behind that rounds them better.
    """

    kind: ClassVar[str] = "merge_lora"
    layer: int
    target: Target = "experts"
    dequantize: bool = False

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        if shape.lora(self.layer, self.target) is None:
            raise ValueError(
                f"layer {self.layer}: its {self.target} {has(self.target)} no low-rank terms to merge: leave the edit "
                "out"
            )
        shape = _with_lora(shape, self.layer, self.target, None)
        experts = self.target == "experts"
        old = shape.layout(self.layer).format if experts else shape.attention_format(self.layer)
        if not self.dequantize or old is None or not old.quantized:
            return shape
        new = old.without_bits()
        if experts:
            return shape.with_layout(dataclasses.replace(shape.layout(self.layer), format=new))
        return shape.with_attention_format(self.layer, new)


def _with_lora(shape: ModelShape, layer: int, target: str, lora: LoraRank | None) -> ModelShape:
    if target == "experts":
        return shape.with_layout(dataclasses.replace(shape.layout(layer), lora=lora))
    terms = {block: term for block, term in shape.attention_lora if block != layer}
    if lora is not None:
        terms[layer] = lora
    return dataclasses.replace(shape, attention_lora=tuple(sorted(terms.items(), key=lambda pair: pair[0])))
