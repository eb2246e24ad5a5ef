"""Sizes of a model, and who stands where in its MoE layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.plan.formats import WeightFormat, format_of

ABSENT = -(2**31)
"""Entry of a slot map: the router still knows the expert, and it contributes nothing."""


@dataclass(frozen=True)
class LoraRank:
    """Low-rank terms beside matrices.

    Attributes:
        rank: Rank of each.
        alpha: Numerator of their factor, ``alpha / rank``.
    """

    rank: int
    alpha: float

    def parameters(self, slots: int, sizes: Iterable[tuple[int, int]]) -> int:
        """Count the parameters of the terms beside so many matrices of each of some sizes (outputs, inputs)."""
        return slots * self.rank * sum(outputs + inputs for outputs, inputs in sizes)


@dataclass(frozen=True)
class ExpertLayout:
    """Who stands where in one MoE layer.

    Attributes:
        layer: Number of the decoder layer in the original model.
        router: Original numbers of the experts that the router still knows, ascending: one router row each.
        novices: Those of them that are novices, ascending.
        ranks: Rank of the low-rank map of each novice, in the order of ``novices``; empty where all are constants.
        absent: Those of ``router`` that contribute nothing, ascending.
        merged: Pairs ``(expert, owner)``, ascending: the expert is computed by the weights of the owner.
        width: Channels that are left in each real expert, which then has a bias; None where all are there.
        format: How the matrices of the real experts are stored; None for floating-point numbers.
        lora: Low-rank terms beside the matrices of the real experts, or None.
    """

    layer: int
    router: tuple[int, ...]
    novices: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    merged: tuple[tuple[int, int], ...] = ()
    width: int | None = None
    format: WeightFormat | None = None
    lora: LoraRank | None = None

    def __post_init__(self) -> None:
        """Write ranks that are all zero as none, so that equal layouts compare equal."""
        if self.ranks and not any(self.ranks):
            object.__setattr__(self, "ranks", ())

    @property
    def real(self) -> tuple[int, ...]:
        """Original numbers of the experts whose weights are stored, ascending."""
        gone = {*self.novices, *self.absent, *(expert for expert, _ in self.merged)}
        return tuple(expert for expert in self.router if expert not in gone)

    @property
    def novice_ranks(self) -> tuple[int, ...]:
        """Rank of each novice's map, 0 for a constant."""
        return self.ranks or (0,) * len(self.novices)

    @property
    def stored_rank(self) -> int:
        """Ranks of all novices together: rows of the two stacks of their maps."""
        return sum(self.ranks)

    @property
    def novice_map(self) -> tuple[int, ...]:
        """For each row of the stacks of maps the number of the novice that it belongs to."""
        return tuple(number for number, rank in enumerate(self.novice_ranks) for _ in range(rank))

    @property
    def slot_map(self) -> tuple[int, ...]:
        """For each router row: the slot of a real expert (``>= 0``), ``-1 - number`` of a novice, or ``ABSENT``."""
        slots = {expert: slot for slot, expert in enumerate(self.real)}
        places = {**slots, **{expert: -1 - number for number, expert in enumerate(self.novices)}}
        places |= {expert: slots[owner] for expert, owner in self.merged}
        return tuple(places.get(expert, ABSENT) for expert in self.router)

    def parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Count the parameters of the router, the experts, their biases and the novices."""
        width = intermediate_size if self.width is None else self.width
        one = 3 * hidden_size * width + (hidden_size if self.width is not None else 0)
        vectors = len(self.router) + len(self.novices) + 2 * self.stored_rank
        return len(self.real) * one + vectors * hidden_size + self.lora_parameters(hidden_size, intermediate_size)

    def sizes(self, hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of the matrices of one real expert, by name."""
        width = intermediate_size if self.width is None else self.width
        return {"gate_up_proj": (2 * width, hidden_size), "down_proj": (hidden_size, width)}

    def lora_parameters(self, hidden_size: int, intermediate_size: int) -> int:
        """Count the parameters of the low-rank terms beside the experts."""
        sizes = self.sizes(hidden_size, intermediate_size).values()
        return 0 if self.lora is None else self.lora.parameters(len(self.real), sizes)

    def same_for_all(self) -> tuple[object, ...]:
        """Return what engines that want all layers alike compare: rows, numbers of experts, width, format, terms."""
        counts = tuple(map(len, (self.router, self.real, self.novices, self.absent, self.merged)))
        return (*counts, self.width, self.format, self.lora)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a mixture-of-experts language model and the experts that it has now.

    Attributes:
        architecture: Name of the family, e.g. ``mixtral``.
        num_layers: Decoder layers of the original model.
        hidden_size: H.
        intermediate_size: I, of one expert of the original model.
        vocab_size: V.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads.
        head_dim: Size of one head.
        tie_word_embeddings: Whether the head shares the embedding's weights.
        num_experts: Experts of an MoE layer in the original model.
        top_k: Experts that the router picks for a token; all of them in a layer that has fewer.
        layouts: One entry for each MoE layer that is left, ascending by layer.
        original_moe_layers: Numbers of the MoE layers of the original model; none given: those of ``layouts``.
        blocks: Original numbers of the decoder layers that are left; none given: all.
        weight_bytes: Bytes of one parameter. It is no part of the shape when shapes are compared.
        attention: Formats of the attention matrices that are no floating-point numbers any more: pairs of the number of
            the decoder layer and its format, ascending.
        attention_lora: Low-rank terms beside the attention matrices: pairs of the number of the decoder layer and the
            terms, ascending.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    num_experts: int
    top_k: int
    layouts: tuple[ExpertLayout, ...]
    original_moe_layers: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    weight_bytes: int = field(default=4, compare=False)
    attention: tuple[tuple[int, WeightFormat], ...] = ()
    attention_lora: tuple[tuple[int, LoraRank], ...] = ()

    def __post_init__(self) -> None:
        """Fill in what an uncompressed model leaves out."""
        if not self.original_moe_layers:
            object.__setattr__(self, "original_moe_layers", self.moe_layers)
        if not self.blocks:
            object.__setattr__(self, "blocks", tuple(range(self.num_layers)))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Original numbers of the MoE layers that are left, ascending."""
        return tuple(layout.layer for layout in self.layouts)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one whole expert (gate, up and down matrices)."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def block_parameters(self) -> int:
        """Parameters of a decoder layer without its MoE sub-layer and that one's norm."""
        width, hidden = self.head_dim, self.hidden_size
        return hidden * width * (2 * self.num_attention_heads + 2 * self.num_key_value_heads) + hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model by arithmetic on the sizes: the claim that tensors are counted against."""
        hidden = self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        # Each MoE sub-layer has a norm of its own.
        experts = sum(layout.parameters(hidden, self.intermediate_size) + hidden for layout in self.layouts)
        beside = sum(self.attention_lora_parameters(block) for block in self.blocks)
        return len(self.blocks) * self.block_parameters + embeddings + hidden + experts + beside

    def attention_lora_parameters(self, block: int) -> int:
        """Count the parameters of the low-rank terms beside the attention of a decoder layer."""
        term = dict(self.attention_lora).get(block)
        return 0 if term is None else term.parameters(1, self.attention_sizes.values())

    @property
    def attention_sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the attention matrices of a decoder layer, by name."""
        queries, keys = (heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads))
        hidden = self.hidden_size
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }

    def expert_sizes(self, layout: ExpertLayout) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of the matrices of one expert of a layer, by name."""
        return layout.sizes(self.hidden_size, self.intermediate_size)

    def lora(self, layer: int, target: str) -> LoraRank | None:
        """Return the low-rank terms beside the experts or the attention of a layer, or None.

        Raises:
            ValueError: The model has no such layer.
        """
        if target == "experts":
            return self.layout(layer).lora
        self._check_block(layer)
        return dict(self.attention_lora).get(layer)

    def attention_format(self, block: int) -> WeightFormat | None:
        """Return how the attention matrices of a decoder layer are stored; None for floating-point numbers."""
        return dict(self.attention).get(block)

    def with_attention_format(self, block: int, new: WeightFormat | None) -> ModelShape:
        """Return the same shape with the attention matrices of a decoder layer in another format."""
        formats = {number: packed for number, packed in self.attention if number != block}
        if new is not None:
            formats[block] = new
        return dataclasses.replace(self, attention=tuple(sorted(formats.items(), key=lambda pair: pair[0])))

    @property
    def bytes(self) -> int:
        """Bytes of all parameters as they are written to disk: packed ones packed, the rest in the model's type."""
        total = self.parameters * self.weight_bytes
        stacks = [(len(layout.real), layout.format, self.expert_sizes(layout)) for layout in self.layouts]
        stacks += [(1, packed, self.attention_sizes) for _, packed in self.attention]
        for slots, packed, sizes in stacks:
            for outputs, inputs in sizes.values() if packed is not None else ():
                dense = slots * outputs * inputs * self.weight_bytes
                total += packed.stored_bytes(slots, outputs, inputs, self.weight_bytes) - dense if packed else 0
        return total

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a layer.

        Raises:
            ValueError: The layer is not an MoE layer of this model, or no longer.
        """
        for layout in self.layouts:
            if layout.layer == layer:
                return layout
        raise ValueError(f"layer {layer} is not an MoE layer of this model: its MoE layers are {list(self.moe_layers)}")

    def with_layout(self, layout: ExpertLayout) -> ModelShape:
        """Return the same shape with one layer's layout replaced."""
        self.layout(layout.layer)
        layouts = tuple(layout if old.layer == layout.layer else old for old in self.layouts)
        return dataclasses.replace(self, layouts=layouts)

    def without_moe(self, layer: int) -> ModelShape:
        """Return the same shape without the MoE sub-layer of a layer."""
        self.layout(layer)
        return dataclasses.replace(self, layouts=tuple(layout for layout in self.layouts if layout.layer != layer))

    def without_block(self, layer: int) -> ModelShape:
        """Return the same shape without a decoder layer.

        Raises:
            ValueError: There is no such layer.
        """
        self._check_block(layer)
        layouts = tuple(layout for layout in self.layouts if layout.layer != layer)
        return dataclasses.replace(
            self,
            layouts=layouts,
            blocks=tuple(block for block in self.blocks if block != layer),
            attention=tuple(pair for pair in self.attention if pair[0] != layer),
            attention_lora=tuple(pair for pair in self.attention_lora if pair[0] != layer),
        )

    def _check_block(self, layer: int) -> None:
        if layer not in self.blocks:
            raise ValueError(f"layer {layer} is not a decoder layer of this model: it has layers {list(self.blocks)}")

    def uncompressed(self) -> ModelShape:
        """Return the shape with every layer, and every expert of every layer, back in its place."""
        everyone = tuple(range(self.num_experts))
        layouts = tuple(ExpertLayout(layer, everyone) for layer in self.original_moe_layers)
        return dataclasses.replace(
            self, layouts=layouts, blocks=tuple(range(self.num_layers)), attention=(), attention_lora=()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Read what :meth:`to_dict` wrote."""
        fields = dict(values)
        for name in ("original_moe_layers", "blocks"):
            fields[name] = tuple(fields.get(name, ()))
        fields["layouts"] = tuple(ExpertLayout(**_with_tuples(item)) for item in values["layouts"])
        pairs = ((block, format_of(packed)) for block, packed in fields.get("attention", ()))
        fields["attention"] = tuple((block, packed) for block, packed in pairs if packed is not None)
        terms = fields.get("attention_lora", ())
        fields["attention_lora"] = tuple((block, LoraRank(**term)) for block, term in terms)
        return cls(**fields)


def sizes_of_model(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes of the original model: what a plan must agree with to be meant for it."""
    names = ("architecture", "num_layers", "hidden_size", "intermediate_size", "num_experts", "top_k")
    return {name: getattr(shape, name) for name in names}


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    found = {name: tuples(value) for name, value in values.items()}
    lora = values.get("lora")
    return {**found, "format": format_of(values.get("format")), "lora": None if lora is None else LoraRank(**lora)}


def tuples(value: Any) -> Any:
    """Turn lists, nested ones too, into tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
