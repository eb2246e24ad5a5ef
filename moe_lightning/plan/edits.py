"""The changes that a plan is made of: each says which layer, and leads from one shape to the next."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from moe_lightning.plan.shape import ExpertLayout, ModelShape, tuples

RouterRows = Literal["slice", "keep"]

Target = Literal["experts", "attention"]
"""The matrices of a layer that an edit of their format is about: of all its real experts, or q, k, v and o."""


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
            ValueError: An unknown kind of edit, fields that it does not have, or values of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"an edit in the plan is not an object with a 'kind' but {values!r}")
        fields = dict(values)
        kind = fields.pop("kind", None)
        if kind not in Edit._kinds:
            raise ValueError(f"unknown kind of edit {kind!r} in the plan: known are {sorted(Edit._kinds)}")
        fields = {name: tuples(value) for name, value in fields.items()}
        for name, (fits, wanted) in _FIELD_TYPES.items():
            if name in fields and not fits(fields[name]):
                raise ValueError(f"edit {kind!r} in the plan: {name} must be {wanted}, not {_lists(fields[name])!r}")
        try:
            return Edit._kinds[kind](**fields)
        except TypeError as error:
            raise ValueError(f"edit {kind!r} in the plan has wrong fields: {error}") from None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_whole, value))


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _share(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


_FIELD_TYPES = {
    "layer": (_whole, "a whole number"),
    "width": (_whole, "a whole number"),
    "experts": (_numbers, "a list of whole numbers"),
    "ranks": (_numbers, "a list of whole numbers"),
    "groups": (lambda value: isinstance(value, tuple) and all(map(_numbers, value)), "a list of lists of numbers"),
    "router": (lambda value: value in get_args(RouterRows), "'slice' or 'keep'"),
    "novice": (lambda value: isinstance(value, str), "a name"),
    "align": (lambda value: isinstance(value, bool), "true or false"),
    "allow_fewer_than_top_k": (lambda value: isinstance(value, bool), "true or false"),
    "target": (lambda value: value in get_args(Target), "'experts' or 'attention'"),
    "sparsity": (_share, "a share of zeros"),
    "pattern": (lambda value: value is None or isinstance(value, str), "such as '2:4', in quotes"),
    "scope": (lambda value: isinstance(value, str), "'row' or 'matrix'"),
    "bits": (_whole, "4 or 8"),
    "group_size": (lambda value: _whole(value) or value in ("channel", "auto"), "a number, 'channel' or 'auto'"),
    "symmetric": (lambda value: isinstance(value, bool), "true or false"),
    "method": (lambda value: isinstance(value, str), "a name"),
    "dequantize": (lambda value: isinstance(value, bool), "true or false"),
    "rank": (_whole, "a whole number"),
    "alpha": (lambda value: value is not None and _share(value), "a number"),
}


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


def _refuse_merged(layout: ExpertLayout, verb: str) -> None:
    if layout.merged:
        raise ValueError(
            f"layer {layout.layer}: cannot {verb} experts, because some of them share their weights after a merge: "
            "put Merge behind the methods that choose single experts"
        )


def _refuse_format(layout: ExpertLayout, method: str, what: str) -> None:
    if layout.format is not None and layout.real:
        raise ValueError(
            f"layer {layout.layer}: cannot {what}, because their weights are stored as {layout.format}: put {method} "
            "before the methods that prune or quantise weights"
        )


def refuse_lora(shape: ModelShape, layer: int, target: str, verb: str) -> None:
    """Raise ValueError where low-rank terms stand beside the matrices that an edit is about."""
    if shape.lora(layer, target) is not None:
        raise ValueError(
            f"layer {layer}: cannot {verb} the {target}, because its {target} {has(target)} low-rank terms: fold "
            "those into the weights before, by 'merge: true' of LoRARecovery or by MergeLoRA in front of this method"
        )


def has(target: str) -> str:
    """Return the verb that goes with the name of some matrices."""
    return "has" if target == "attention" else "have"


def _subset(layout: ExpertLayout, kept: set[int], router: tuple[int, ...], absent: tuple[int, ...]) -> ExpertLayout:
    """Return the layout with only some experts left in their roles."""
    pairs = [(expert, rank) for expert, rank in zip(layout.novices, layout.novice_ranks, strict=True) if expert in kept]
    return dataclasses.replace(
        layout,
        router=router,
        novices=tuple(expert for expert, _ in pairs),
        ranks=tuple(rank for _, rank in pairs),
        absent=absent,
    )


@dataclass(frozen=True)
class KeepExperts(Edit):
    """Keep these experts of a layer and delete the others (2406.02500, Expert Drop).

    Attributes:
        layer: Number of the decoder layer in the original model.
        experts: Original numbers of the experts that stay, ascending. Novices may be among them.
        router: ``slice`` deletes the router rows of the others, so that their tokens go to the experts that stay;
            ``keep`` leaves the router as it is, and the others contribute nothing.
        allow_fewer_than_top_k: Let fewer experts stay than the router picks for a token; it then picks all of them.
    """

    kind: ClassVar[str] = "keep_experts"
    layer: int
    experts: tuple[int, ...]
    router: RouterRows = "slice"
    allow_fewer_than_top_k: bool = False

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        _refuse_merged(layout, "drop")
        refuse_lora(shape, self.layer, "experts", "drop")
        known = tuple(expert for expert in layout.router if expert not in layout.absent)
        _checked_experts(self.layer, self.experts, known, "keep")
        if not self.experts:
            raise ValueError(f"layer {self.layer} would keep no expert: keep one, or drop the layer by LayerDrop")
        if len(self.experts) < shape.top_k and not self.allow_fewer_than_top_k:
            raise ValueError(
                f"layer {self.layer} would keep {len(self.experts)} expert(s) but the router picks {shape.top_k}: "
                f"keep at least {shape.top_k}, or set allow_fewer_than_top_k"
            )
        kept = set(self.experts)
        if self.router == "slice":
            # Rows without an expert go as well: the router chooses among those that stay, and nobody else.
            return shape.with_layout(_subset(layout, kept, self.experts, ()))
        absent = tuple(expert for expert in layout.router if expert not in kept)
        return shape.with_layout(_subset(layout, kept, layout.router, absent))


@dataclass(frozen=True)
class NoviceExperts(Edit):
    """Replace these experts of a layer by novices; the router stays as it is (2507.00390).

    Attributes:
        layer: Number of the decoder layer in the original model.
        experts: Original numbers of the experts that become novices, ascending.
        novice: How the novice was made (``mean``, ``zero``, ``gate2_mean``, ``low_rank``). The values are in the
            weights.
        ranks: Rank of each novice's low-rank map, in the order of ``experts``; empty where all are constants.
    """

    kind: ClassVar[str] = "novice_experts"
    layer: int
    experts: tuple[int, ...]
    novice: str = "mean"
    ranks: tuple[int, ...] = ()

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        _refuse_merged(layout, "replace")
        refuse_lora(shape, self.layer, "experts", "replace")
        if not self.experts:
            raise ValueError(f"layer {self.layer}: there is no expert to replace by a novice: leave the edit out")
        _checked_experts(self.layer, self.experts, layout.real, "replace by novices")
        ranks = self.ranks or (0,) * len(self.experts)
        if len(ranks) != len(self.experts) or any(not 0 <= rank <= shape.hidden_size for rank in ranks):
            raise ValueError(
                f"layer {self.layer}: ranks {list(ranks)} must be one number for each of {len(self.experts)} novices, "
                f"from 0 to the hidden size {shape.hidden_size}"
            )
        together = sorted(
            [*zip(layout.novices, layout.novice_ranks, strict=True), *zip(self.experts, ranks, strict=True)]
        )
        novices, every_rank = zip(*together, strict=True)
        return shape.with_layout(dataclasses.replace(layout, novices=novices, ranks=every_rank))


@dataclass(frozen=True)
class MergeExperts(Edit):
    """Let groups of experts share one set of weights; the router stays as it is (2310.01334, MC-SMoE).

    Attributes:
        layer: Number of the decoder layer in the original model.
        groups: Original numbers of the experts that are merged: every real expert of the layer is in one group. The
            first and smallest of a group owns its slot. Values are in the weights.
        align: Whether channels were matched before the mean.
    """

    kind: ClassVar[str] = "merge_experts"
    layer: int
    groups: tuple[tuple[int, ...], ...]
    align: bool = True

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        _refuse_merged(layout, "merge")
        refuse_lora(shape, self.layer, "experts", "merge")
        _refuse_format(layout, "Merge", "merge experts")
        members = sorted(expert for group in self.groups for expert in group)
        ordered = all(group and tuple(sorted(group)) == group for group in self.groups)
        if members != list(layout.real) or not ordered or list(self.groups) != sorted(self.groups):
            raise ValueError(
                f"layer {self.layer}: the groups {_lists(self.groups)} must hold each of the real experts "
                f"{list(layout.real)} once, ascending inside the groups and by their first"
            )
        merged = tuple(sorted((expert, group[0]) for group in self.groups for expert in group[1:]))
        return shape.with_layout(dataclasses.replace(layout, merged=merged))


@dataclass(frozen=True)
class KeepChannels(Edit):
    """Keep this number of channels in each real expert of a layer; a bias stands for the others (2312.11983, FLAP).

    Attributes:
        layer: Number of the decoder layer in the original model.
        width: Channels left in each expert. Which ones, and the bias, are in the weights.
    """

    kind: ClassVar[str] = "keep_channels"
    layer: int
    width: int

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        layout = shape.layout(self.layer)
        now = shape.intermediate_size if layout.width is None else layout.width
        refuse_lora(shape, self.layer, "experts", "take channels out of")
        _refuse_format(layout, "ChannelDrop", "take channels out of experts")
        if not layout.real:
            raise ValueError(f"layer {self.layer} has no real expert whose channels could go: leave the edit out")
        if not 1 <= self.width <= now:
            raise ValueError(f"layer {self.layer}: width {self.width} must lie between 1 and the {now} channels there")
        return shape.with_layout(dataclasses.replace(layout, width=self.width))


@dataclass(frozen=True)
class DropMoE(Edit):
    """Delete the MoE sub-layer of a layer and its norm; attention stays (2406.02500, Layer Drop).

    Attributes:
        layer: Number of the decoder layer in the original model.
    """

    kind: ClassVar[str] = "drop_moe"
    layer: int

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        return shape.without_moe(self.layer)


@dataclass(frozen=True)
class DropBlock(Edit):
    """Delete a whole decoder layer (2406.02500, Block Drop).

    Attributes:
        layer: Number of the decoder layer in the original model.
    """

    kind: ClassVar[str] = "drop_block"
    layer: int

    def apply(self, shape: ModelShape) -> ModelShape:
        """Return the shape after this edit; see :meth:`Edit.apply`."""
        if len(shape.blocks) == 1 and self.layer in shape.blocks:
            raise ValueError(f"layer {self.layer} is the last decoder layer of the model: keep at least one")
        return shape.without_block(self.layer)
