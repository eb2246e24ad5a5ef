"""What was decided, and for what shape of model, as plain data. Imports no torch.

A :class:`CompressionPlan` is a tuple of edits. Layer and expert numbers in it are always those of the *original*
model, so that plans can be re-read, compared and continued. A :class:`ModelShape` is all that a decision needs to know
of a model.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

PLAN_VERSION = 1


@dataclass(frozen=True)
class ExpertLayout:
    """Who stands where in one MoE layer.

    Attributes:
        layer: Number of the decoder layer in the original model.
        router: Original numbers of the experts that the router still knows, ascending: one router row each.
        novices: Those of them that are novices, ascending.
    """

    layer: int
    router: tuple[int, ...]
    novices: tuple[int, ...] = ()

    @property
    def real(self) -> tuple[int, ...]:
        """Original numbers of the experts whose weights are still stored, ascending."""
        gone = set(self.novices)
        return tuple(expert for expert in self.router if expert not in gone)

    @property
    def slot_map(self) -> tuple[int, ...]:
        """For each router row: the slot of a real expert (``>= 0``) or ``-1 - number`` of a novice."""
        slots = {expert: slot for slot, expert in enumerate(self.real)}
        novices = {expert: -1 - number for number, expert in enumerate(self.novices)}
        return tuple(slots[expert] if expert in slots else novices[expert] for expert in self.router)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a mixture-of-experts language model and the experts that it has now.

    Attributes:
        architecture: Name of the family, e.g. ``mixtral``.
        num_layers: Decoder layers.
        hidden_size: H.
        intermediate_size: I, of one expert.
        vocab_size: V.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads.
        head_dim: Size of one head.
        tie_word_embeddings: Whether the head shares the embedding's weights.
        num_experts: Experts of an MoE layer in the original model.
        top_k: Experts that the router picks for a token.
        layouts: One entry for each MoE layer, ascending by layer.
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

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers in the original model, ascending."""
        return tuple(layout.layer for layout in self.layouts)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one real expert (gate, up and down matrices)."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """Parameters of the whole model by arithmetic on the sizes: the claim that tensors are counted against."""
        width, hidden = self.head_dim, self.hidden_size
        attention = hidden * width * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        blocks = self.num_layers * (attention + 2 * hidden)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden
        experts = sum(
            len(layout.real) * self.expert_parameters + (len(layout.router) + len(layout.novices)) * hidden
            for layout in self.layouts
        )
        return blocks + embeddings + hidden + experts

    def layout(self, layer: int) -> ExpertLayout:
        """Return the layout of a layer.

        Raises:
            ValueError: The layer is not an MoE layer of this model.
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

    def uncompressed(self) -> ModelShape:
        """Return the shape with every expert of every layer back in its place."""
        everyone = tuple(range(self.num_experts))
        return dataclasses.replace(self, layouts=tuple(ExpertLayout(layer, everyone) for layer in self.moe_layers))

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Read what :meth:`to_dict` wrote."""
        layouts = tuple(
            ExpertLayout(item["layer"], tuple(item["router"]), tuple(item["novices"])) for item in values["layouts"]
        )
        return cls(**{**values, "layouts": layouts})


class Edit(ABC):
    """One change of a model's structure, as plain values. Children are frozen dataclasses."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Edit]]] = {}
    layer: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Edit._kinds[cls.kind] = cls

    @abstractmethod
    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit.

        Raises:
            ValueError: The edit does not fit the shape; the message says what would.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold, with the kind of the edit."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Edit:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: An unknown kind of edit, fields that it does not have, or numbers that are none.
        """
        if not isinstance(values, dict):
            raise ValueError(f"an edit in the plan is not an object with a 'kind' but {values!r}")
        fields = dict(values)
        kind = fields.pop("kind", None)
        if kind not in Edit._kinds:
            raise ValueError(f"unknown kind of edit {kind!r} in the plan: known are {sorted(Edit._kinds)}")
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(value)
        if not _whole(fields.get("layer", 0)):
            raise ValueError(f"edit {kind!r} in the plan: layer must be a whole number, not {fields['layer']!r}")
        experts = fields.get("experts", ())
        if not isinstance(experts, tuple) or not all(map(_whole, experts)):
            raise ValueError(f"edit {kind!r} in the plan: experts must be a list of whole numbers, not {experts!r}")
        try:
            return Edit._kinds[kind](**fields)
        except TypeError as error:
            raise ValueError(f"edit {kind!r} in the plan has wrong fields: {error}") from None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_experts(layer: int, experts: tuple[int, ...], known: Iterable[int], verb: str) -> None:
    known = set(known)
    if len(set(experts)) != len(experts) or tuple(sorted(experts)) != experts:
        raise ValueError(f"layer {layer}: the experts to {verb} must be ascending and distinct, not {list(experts)}")
    strangers = [expert for expert in experts if expert not in known]
    if strangers:
        raise ValueError(
            f"layer {layer}: cannot {verb} experts {strangers}: "
            f"it has experts {sorted(known)} at this point of the plan"
        )


@dataclass(frozen=True)
class KeepExperts(Edit):
    """Keep these experts of a layer and delete the others with their router rows (2406.02500, Expert Drop).

    Attributes:
        layer: Number of the decoder layer in the original model.
        experts: Original numbers of the experts that stay, ascending. Novices may be among them.
    """

    kind: ClassVar[str] = "keep_experts"
    layer: int
    experts: tuple[int, ...]

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        _checked_experts(self.layer, self.experts, layout.router, "keep")
        if len(self.experts) < shape.top_k:
            raise ValueError(
                f"layer {self.layer} would keep {len(self.experts)} expert(s) but the router picks {shape.top_k}: "
                f"keep at least {shape.top_k}"
            )
        kept = set(self.experts)
        novices = tuple(expert for expert in layout.novices if expert in kept)
        return shape.with_layout(ExpertLayout(self.layer, self.experts, novices))


@dataclass(frozen=True)
class NoviceExperts(Edit):
    """Replace these experts of a layer by novices; the router stays as it is (2507.00390).

    Attributes:
        layer: Number of the decoder layer in the original model.
        experts: Original numbers of the experts that become novices, ascending.
        novice: How the novice's vector was made (``mean``, ``zero``, ``gate2_mean``). The values are in the weights.
    """

    kind: ClassVar[str] = "novice_experts"
    layer: int
    experts: tuple[int, ...]
    novice: str = "mean"

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        if not self.experts:
            raise ValueError(f"layer {self.layer}: there is no expert to replace by a novice: leave the edit out")
        _checked_experts(self.layer, self.experts, layout.real, "replace by novices")
        novices = tuple(sorted((*layout.novices, *self.experts)))
        return shape.with_layout(ExpertLayout(self.layer, layout.router, novices))


@dataclass(frozen=True)
class CompressionPlan:
    """Everything that was decided for a model, in the order in which it holds.

    Attributes:
        edits: The changes of the structure.
        origin: Where the decision comes from: base model, methods, calibration data and seed, versions. Plain types.
    """

    edits: tuple[Edit, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict, compare=False)

    def __bool__(self) -> bool:
        return bool(self.edits)

    def check(self, shape: ModelShape) -> ModelShape:
        """Apply every edit to a shape.

        Args:
            shape: The uncompressed model's shape.

        Returns:
            The shape that the plan leads to.

        Raises:
            ValueError: An edit does not fit; the message names the layer and what would fit.
        """
        for edit in self.edits:
            shape = edit.apply(shape)
        return shape

    def extended(self, edits: Iterable[Edit], origin: dict[str, Any] | None = None) -> CompressionPlan:
        """Return the plan with further edits behind its own, and their origin and number appended to its history."""
        edits = tuple(edits)
        merged = dict(self.origin)
        if origin:
            merged["history"] = [*merged.get("history", []), {**origin, "edits": len(edits)}]
        return CompressionPlan((*self.edits, *edits), merged)

    def steps(self) -> tuple[CompressionPlan, ...]:
        """Return the plan cut where its history says that another method began, which measured the model anew.

        A plan without such a history (written by hand) is one step.
        """
        history = self.origin.get("history", [])
        counts = [step.get("edits") if isinstance(step, dict) else None for step in history]
        numbers = [count for count in counts if isinstance(count, int) and count >= 0]
        if len(numbers) < len(counts) or sum(numbers) != len(self.edits):
            return (self,)
        ends = list(itertools.accumulate(numbers, initial=0))
        parts = zip(itertools.pairwise(ends), history, strict=True)
        return tuple(CompressionPlan(self.edits[start:end], step) for (start, end), step in parts if end > start)

    def starts_with(self, other: CompressionPlan) -> bool:
        """Say whether ``other``'s edits are the beginning of this plan's."""
        return self.edits[: len(other.edits)] == other.edits

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON and ``weights_only`` checkpoints can hold."""
        return {
            "version": PLAN_VERSION,
            "edits": [_plain(edit.to_dict()) for edit in self.edits],
            "origin": _plain(self.origin),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressionPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: Not a plan, a plan of a newer version, or an edit that is not known.
        """
        if not isinstance(values, dict) or not isinstance(values.get("edits"), list | tuple):
            raise ValueError("this is not a compression plan: it needs the keys 'version' and 'edits'")
        if values.get("version") != PLAN_VERSION:
            raise ValueError(
                f"the plan has version {values.get('version')!r}, this release reads version {PLAN_VERSION}: "
                "make the plan again or install the release that wrote it"
            )
        origin = values.get("origin") or {}
        if not isinstance(origin, dict):
            raise ValueError(f"the plan's origin must be an object, not {origin!r}")
        return cls(tuple(Edit.from_dict(edit) for edit in values["edits"]), dict(origin))

    def to_json(self) -> str:
        """Return the plan as JSON text, one edit a line."""
        values = self.to_dict()
        edits = ",\n    ".join(json.dumps(edit) for edit in values["edits"])
        body = f"[\n    {edits}\n  ]" if edits else "[]"
        origin = json.dumps(values["origin"], indent=2).replace("\n", "\n  ")
        return f'{{\n  "version": {PLAN_VERSION},\n  "edits": {body},\n  "origin": {origin}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: Not JSON, or not a plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None
        return cls.from_dict(values)


def _plain(value: Any) -> Any:
    """Turn tuples into lists and keys into strings, so that a plan read back equals the plan written."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
