"""The changes of a plan that leave every weight in its place, and store it in another form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from moe_lightning.plan.edits import Edit, Target, refuse_lora
from moe_lightning.plan.formats import WeightFormat
from moe_lightning.plan.shape import ModelShape


@dataclass(frozen=True)
class Sparsify(Edit):
    """Set weights of a layer to zero and store what is left (2406.02500, Expert Slimming by pruning).

    Attributes:
        layer: Number of the decoder layer in the original model.
        target: The matrices of its experts, or those of its attention.
        sparsity: Share of zeros, or None with a pattern.
        pattern: n zeros in every m neighbours along the input, ``2:4``, ``4:8`` or ``1:4``.
        scope: Whether a sparsity holds in each ``row`` or in each ``matrix``.
        method: How the weights were chosen. Which ones, and the values, are in the weights.
    """

    kind: ClassVar[str] = "sparsify"
    layer: int
    target: Target = "experts"
    sparsity: float | None = None
    pattern: str | None = None
    scope: str = "row"
    method: str = "magnitude"

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(f"layer {self.layer}: give either a sparsity or a pattern, and not both")
        new = WeightFormat(sparsity=self.sparsity, pattern=self.pattern, scope=self.scope)
        return _with_format(shape, self.layer, self.target, new, "prune")


@dataclass(frozen=True)
class Quantize(Edit):
    """Store the weights of a layer as integers with a scale for each group (2406.02500, Expert Slimming).

    Attributes:
        layer: Number of the decoder layer in the original model.
        target: The matrices of its experts, or those of its attention.
        bits: 4 or 8.
        group_size: Inputs that share a scale: a number that divides the input sizes, ``channel`` for a whole row, or
            ``auto`` for the first of 128, 64 and 32 that divides.
        symmetric: No zero points.
        method: How the weights were rounded. The values are in the weights.
    """

    kind: ClassVar[str] = "quantize"
    layer: int
    target: Target = "experts"
    bits: int = 4
    group_size: int | str = 128
    symmetric: bool = False
    method: str = "rtn"

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        new = WeightFormat(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return _with_format(shape, self.layer, self.target, new, "quantise")


def _with_format(shape: ModelShape, layer: int, target: str, new: WeightFormat, verb: str) -> ModelShape:
    if target == "attention":
        if layer not in shape.blocks:
            raise ValueError(f"layer {layer} is not a decoder layer of this model: it has layers {list(shape.blocks)}")
        old = shape.attention_format(layer)
        sizes = shape.attention_sizes
    else:
        layout = shape.layout(layer)
        if not layout.real:
            raise ValueError(f"layer {layer} has no real expert to {verb}: leave the edit out")
        old = layout.format
        sizes = shape.expert_sizes(layout)
    refuse_lora(shape, layer, target, verb)
    if old is not None and old.quantized:
        raise ValueError(
            f"layer {layer}: cannot {verb} the {target} again, their weights are {old}: prune before quantising, and "
            "quantise once"
        )
    if old is not None and old == new:
        more = "leave the method out" if old.quantized else "ask for more zeros, or leave the method out"
        raise ValueError(f"layer {layer}: the weights of its {target} are stored as {old} already: {more}")
    for name, (outputs, inputs) in sizes.items():
        try:
            new.check(outputs, inputs)
        except ValueError as error:
            raise ValueError(f"layer {layer}: cannot {verb} {name} [{outputs}, {inputs}]: {error}") from None
    if old is not None and not new.quantized and any(new.kept(*size) > old.kept(*size) for size in sizes.values()):
        raise ValueError(
            f"layer {layer}: {new} asks for fewer zeros than there are in its {target} ({old}), and pruned weights "
            "do not come back: ask for more"
        )
    if old is not None and new.quantized:
        # Zeros stay zeros among the integers.
        new = dataclasses.replace(new, sparsity=old.sparsity, pattern=old.pattern, scope=old.scope)
    if target == "attention":
        return shape.with_attention_format(layer, new)
    return shape.with_layout(dataclasses.replace(shape.layout(layer), format=new))
