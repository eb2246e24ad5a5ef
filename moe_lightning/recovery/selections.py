"""Which parameters of a model a rung of recovery trains, and how many these are by arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.experts import is_lora
from moe_lightning.plan import ModelShape, WeightFormat
from moe_lightning.recovery.lora import Targets
from moe_lightning.surgery import is_novice


class Selection(ABC):
    """A part of a model's parameters, found twice: in the live tensors and by arithmetic on the model's shape.

    Attributes:
        words: What these are, for people, behind "the".
    """

    words: str

    @abstractmethod
    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the model."""

    @abstractmethod
    def claimed(self, shape: ModelShape) -> int:
        """Say how many numbers these are in a model of a shape: the claim that tensors are counted against."""


class Routers(Selection):
    """The weights of all routers."""

    words = "routers"

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return them; see :class:`Selection`."""
        layers = architecture_of(model).moe_layers(model)
        routers = {id(parameter) for layer in layers for parameter in layer.router.parameters()}
        return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in routers}

    def claimed(self, shape: ModelShape) -> int:
        """Count a row for each expert that a router knows; see :class:`Selection`."""
        return sum(len(layout.router) for layout in shape.layouts) * shape.hidden_size


class Novices(Selection):
    """The vectors and low-rank maps of all novices."""

    words = "novices"

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return them; see :class:`Selection`."""
        return {name: parameter for name, parameter in model.named_parameters() if is_novice(name)}

    def claimed(self, shape: ModelShape) -> int:
        """Count a vector for each, and two for each rank of a map; see :class:`Selection`."""
        return sum(len(layout.novices) + 2 * layout.stored_rank for layout in shape.layouts) * shape.hidden_size


class Adapters(Selection):
    """The low-rank terms beside matrices.

    Args:
        targets: Beside those of the experts, those of attention, or both.
    """

    words = "low-rank terms"

    def __init__(self, targets: Targets = "experts+attention") -> None:
        self.targets = targets

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return them; see :class:`Selection`."""
        layers = architecture_of(model).moe_layers(model)
        in_blocks = {id(parameter) for layer in layers for parameter in layer.block.parameters()}
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if is_lora(name) and ("experts" if id(parameter) in in_blocks else "attention") in self.targets
        }

    def claimed(self, shape: ModelShape) -> int:
        """Count both factors of each; see :class:`Selection`."""
        found = 0
        if "experts" in self.targets:
            sizes = shape.hidden_size, shape.intermediate_size
            found += sum(layout.lora_parameters(*sizes) for layout in shape.layouts)
        if "attention" in self.targets:
            found += sum(map(shape.attention_lora_parameters, shape.blocks))
        return found


class Everything(Selection):
    """Every weight that can move: neither integers nor zeros of pruned matrices."""

    words = "weights that can move"

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """Return them; see :class:`Selection`."""
        return dict(model.named_parameters())

    def claimed(self, shape: ModelShape) -> int:
        """Count all but what is packed and no parameter; see :class:`Selection`."""
        fixed = 0
        for layout in shape.layouts:
            sizes = shape.expert_sizes(layout).values()
            fixed += len(layout.real) * sum(_fixed(layout.format, *size) for size in sizes)
        for block in shape.blocks:
            format = shape.attention_format(block)
            fixed += sum(_fixed(format, *size) for size in shape.attention_sizes.values())
        return shape.parameters - fixed


def _fixed(format: WeightFormat | None, outputs: int, inputs: int) -> int:
    """Return how many weights of a matrix are no entry of a parameter.

    Zeros anywhere stand in the parameter, where a mask keeps them zero.
    """
    if format is None or format.kind == "sparse":
        return 0
    return outputs * inputs if format.quantized else outputs * inputs - format.kept(outputs, inputs)
