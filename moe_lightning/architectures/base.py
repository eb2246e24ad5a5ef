"""What every architecture tells about a model of its family."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

from moe_kernels import NoviceMaps, RoutedPairs
from moe_kernels.experts import Activation
from torch import Tensor, nn

from moe_lightning.experts import Dense, Packed
from moe_lightning.experts.lora import whole_weights
from moe_lightning.plan import CompressionPlan, ModelShape

CONFIG_KEY = "moe_lightning"
"""Key of ``config.json`` under which a compressed model's plan stands."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a live model.

    Attributes:
        index: Number of the decoder layer in the original model.
        name: Name of the block in ``model.named_modules()``; layers count from 0 there, whatever went before.
        block: The sparse block: its forward takes the hidden states after the norm.
        router: Its forward returns ``(logits [tokens, experts], weights [tokens, k], index [tokens, k])``.
        experts: Its forward takes ``(hidden [tokens, hidden], index [tokens, k], weight [tokens, k])``.
        decoder_layer: The layer around the block.
        norm: The norm before the block.
    """

    index: int
    name: str
    # Modules of the family's own classes: only its architecture knows their attributes.
    block: Any
    router: Any
    experts: Any
    decoder_layer: Any
    norm: Any


@dataclass(frozen=True)
class OpenExperts:
    """The weights inside an experts module, whatever class it is.

    Attributes:
        storage: What holds the weights; a view of transformers' where the experts are still its own. Of a packed one
            the weights in floating point are made when they are first asked for, and live as long as this object; so
            are weights with the low-rank terms beside them, which belong to what is returned.
        slot_map: Slot, novice or ``ABSENT`` of each router row, int64 ``[experts]``.
        novices: ``[novices, hidden]`` or None.
        activation: Activation of the gate half.
        maps: Low-rank maps of the novices, or None.
    """

    storage: Dense | Packed
    slot_map: Tensor
    novices: Tensor | None
    activation: Activation
    maps: NoviceMaps | None = None

    @property
    def packed(self) -> bool:
        """Whether the weights are stored packed."""
        return isinstance(self.storage, Packed)

    @cached_property
    def gate_up_proj(self) -> Tensor:
        """Gate rows, then up rows, ``[slots, 2 * intermediate, hidden]``."""
        return whole_weights(self.storage.gate_up_proj, self.storage.gate_up_lora)

    @cached_property
    def down_proj(self) -> Tensor:
        """Down matrices, ``[slots, hidden, intermediate]``."""
        return whole_weights(self.storage.down_proj, self.storage.down_lora)

    @property
    def bias(self) -> Tensor | None:
        """Bias of each slot, ``[slots, hidden]``, or None."""
        return self.storage.bias

    @property
    def num_slots(self) -> int:
        """Real experts, without making their weights."""
        return self.storage.num_slots

    @property
    def num_weights(self) -> int:
        """Weights of all real experts, without making them."""
        return self.storage.num_weights

    def channels(self, hidden_NH: Tensor, pairs: RoutedPairs) -> Tensor:
        """Compute the inner activations of routed pairs, ``[pairs, intermediate]``."""
        return self.storage.channels(hidden_NH, pairs, self.activation)

    def project(self, channels_PI: Tensor, pairs: RoutedPairs) -> Tensor:
        """Compute the outputs of routed pairs from their inner activations, ``[pairs, hidden]``."""
        return self.storage.project(channels_PI, pairs)


class Changes(Protocol):
    """How a structure is changed so that it can be undone."""

    def set(self, module: Any, name: str, value: object) -> None:
        """Set an attribute and remember the old one."""

    def drop(self, prefix: str, *modules: tuple[str, nn.Module]) -> None:
        """Remember that the parameters of modules, given with their names under a prefix, are gone."""


class Architecture(ABC):
    """Where things are in the models of one family, and how they are computed there."""

    model_type: ClassVar[str]
    compressed_model_type: ClassVar[str]
    layers_prefix: ClassVar[str]
    """Name of the list of decoder layers in ``model.named_modules()``."""
    attention_name: ClassVar[str]
    """Name of the attention inside a decoder layer."""
    attention_inputs: ClassVar[tuple[tuple[str, ...], ...]]
    """Names of the linear layers of an attention: those that read the same input together, in the order of the data."""

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError where the model is not laid out as this architecture expects."""

    @abstractmethod
    def shape_of_config(self, config: Any) -> ModelShape:
        """Return the shape that a config describes, its plan applied."""

    @abstractmethod
    def moe_layers(self, model: nn.Module) -> list[MoELayer]:
        """Return the MoE layers that a live model has, ascending."""

    @abstractmethod
    def open_experts(self, layer: MoELayer) -> OpenExperts:
        """Return the weights of a layer's experts."""

    @abstractmethod
    def plain_experts(self, layer: MoELayer) -> Any:
        """Return the family's own experts module with the weights of a layer, which has every expert whole."""

    @abstractmethod
    def decoder_layers(self, model: nn.Module) -> Sequence[Any]:
        """Return the list of decoder layers that a live model has; ``shape(model).blocks`` are their numbers."""

    @abstractmethod
    def attention_of(self, decoder_layer: Any) -> Any:
        """Return the attention module of a decoder layer, whose children hold :attr:`attention_inputs`."""

    @abstractmethod
    def attention_norm(self, decoder_layer: Any) -> Any:
        """Return the norm before the attention of a decoder layer."""

    def attention_linears(self, decoder_layer: Any) -> dict[str, Any]:
        """Return the linear layers of the attention of a decoder layer, by name, in the order of the data flow."""
        attention = self.attention_of(decoder_layer)
        return {name: getattr(attention, name) for names in self.attention_inputs for name in names}

    @abstractmethod
    def drop_moe(self, layer: MoELayer, change: Changes) -> None:
        """Take the MoE sub-layer of a layer out with its norm; the layer then adds nothing after its attention."""

    @abstractmethod
    def keep_blocks(self, model: Any, layers: Sequence[Any], change: Changes) -> None:
        """Make ``layers`` the decoder layers of a model, numbered anew for the key/value cache."""

    @abstractmethod
    def fuse_layers(self, model: Any, change: Changes) -> None:
        """Let the decoder layers of a compressed model run their MoE half as one operation, where kernels are used."""

    @abstractmethod
    def route(self, layer: MoELayer, logits_NR: Tensor) -> tuple[Tensor, Tensor]:
        """Do what a layer's router does with its logits.

        Args:
            layer: The layer.
            logits_NR: ``[tokens, router rows]``; minus infinity for a row that must not be chosen.

        Returns:
            Routing weights ``[tokens, k]`` and the rows chosen, int64 ``[tokens, k]``.
        """

    def shape(self, model: nn.Module) -> ModelShape:
        """Return the shape of a live model: its config with its plan applied, and the type of its weights."""
        shape = self.shape_of_config(model.config)
        weight = next(iter(model.parameters()))
        return dataclasses.replace(shape, weight_bytes=weight.element_size())

    @staticmethod
    def plan_of_config(config: Any) -> CompressionPlan:
        """Return the plan that a config carries, or an empty one.

        Raises:
            ValueError: The entry is there but is not a plan.
        """
        entry = getattr(config, CONFIG_KEY, None) or {}
        if not isinstance(entry, dict):
            entry = {}
        if entry.get("plan"):
            return CompressionPlan.from_dict(entry["plan"])
        # A plain folder of a model that was compressed before: a model of its own, that knows where it comes from.
        return CompressionPlan(origin={"lineage": entry["lineage"]} if entry.get("lineage") else {})
