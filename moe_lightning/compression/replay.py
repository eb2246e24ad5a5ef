"""Which methods do again what a plan says."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.compression.walk import SlimmingEdit
from moe_lightning.method import Method
from moe_lightning.plan import AddLora, CompressionPlan, Edit, MergeLora, ModelShape
from moe_lightning.recovery.lora import LoRA
from moe_lightning.slimming.balancing import AWQ
from moe_lightning.slimming.base import Slimming
from moe_lightning.slimming.pruners import Magnitude, SparseGPT, Wanda
from moe_lightning.slimming.quantizers import GPTQ, RTN
from moe_lightning.slimming.view import LayerView, MomentKind, SlimmedLayer
from moe_lightning.statistics import Statistics
from moe_lightning.trimming import Replay

METHODS: dict[str, Any] = {kind.__name__.lower(): kind for kind in (Magnitude, Wanda, SparseGPT, RTN, GPTQ, AWQ)}
"""Classes of methods by the names in edits."""

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"router_wanda": ("wanda", {"router_weighted": True})}
"""Names in edits that are not a class's own: the class, and the options that make the difference."""


@dataclass
class SlimmingReplay(Replay):
    """Apply edits of formats once more; the weights are made anew by the method that made them.

    Attributes:
        plan: The edits, and where they come from.
        method: The method.
    """

    method: Slimming

    @property
    def granularity(self) -> Any:
        """That of the method."""
        return self.method.granularity

    @property
    def moment_kind(self) -> MomentKind | None:
        """That of the method."""
        return self.method.moment_kind

    @property
    def propagate(self) -> Any:
        """That of the method, where it measures."""
        return getattr(self.method, "propagate", None)

    def slim(self, edit: Edit, view: LayerView) -> SlimmedLayer:
        """Let the method do the work; see :meth:`Slimming.slim`."""
        return self.method.slim(edit, view)

    def __str__(self) -> str:
        """Return the method with its options."""
        return str(self.method)


@dataclass
class AdapterReplay(LoRA):
    """Apply edits of low-rank terms once more. What the terms learnt is in no plan: they begin anew.

    Attributes:
        plan: The edits, and where they come from.
    """

    plan: CompressionPlan = field(default_factory=CompressionPlan)

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        """Return the plan's edits; see :meth:`Method.propose`."""
        return self.plan.edits

    def describe(self) -> dict[str, Any]:
        """Return the origin of the plan."""
        return {"method": "Replay", "origin": self.plan.origin}


def _options_of(plan: CompressionPlan) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of the method that the history says made a step; empty where it does not say."""
    entry = plan.origin
    while isinstance(entry, dict) and entry.get("method") == "Replay":
        entry = entry.get("origin") or {}
    name = entry.get("method") if isinstance(entry, dict) else None
    return (name.lower(), entry) if isinstance(name, str) else ("", {})


def method_of(edit: SlimmingEdit, plan: CompressionPlan) -> Slimming:
    """Return the method that makes the weights of an edit.

    Args:
        edit: The edit: what it says holds.
        plan: The step of a plan that it stands in. What its history says beyond the edit holds too; the defaults, where
            it says nothing.

    Raises:
        ValueError: No method of that name.
    """
    kind, options = _VARIANTS.get(edit.method, (edit.method, {}))
    if kind not in METHODS:
        known = ", ".join(sorted([*METHODS, *_VARIANTS]))
        raise ValueError(f"layer {edit.layer}: unknown method {edit.method!r} in the plan: known are {known}")
    names = {item.name for item in dataclasses.fields(METHODS[kind])}
    recorded, history = _options_of(plan)
    values = {name: history[name] for name in names if recorded == kind and name in history}
    values |= {name: value for name, value in vars(edit).items() if name in names}
    return METHODS[kind](**{**values, **options})


def _recipe(edit: Edit) -> Any:
    """Return what edits of one method have in common; None for edits of whole experts and layers."""
    if isinstance(edit, AddLora | MergeLora):
        return AddLora
    if not isinstance(edit, SlimmingEdit):
        return None
    return type(edit), tuple((name, value) for name, value in vars(edit).items() if name not in ("layer", "target"))


def replays(plan: CompressionPlan) -> list[Method]:
    """Return methods that apply a plan step by step.

    Each step measures the model as the ones before it left it, as the methods did.

    Args:
        plan: The whole plan.

    Warns:
        UserWarning: The plan has low-rank terms: what they learnt is not in it.

    Raises:
        ValueError: An edit names a method that is not known, or options that it does not take.
    """
    found: list[Method] = []
    for step in plan.steps():
        for recipe, group in itertools.groupby(step.edits, key=_recipe):
            part = CompressionPlan(tuple(group), step.origin)
            if recipe is None:
                found.append(Replay(part))
                continue
            first = part.edits[0]
            if recipe is AddLora:
                found.append(AdapterReplay(plan=part))
                continue
            assert isinstance(first, SlimmingEdit)
            found.append(SlimmingReplay(part, method_of(first, part)))
    if any(isinstance(edit, AddLora) for edit in plan.edits):
        warnings.warn(
            "the plan puts low-rank terms beside matrices, and what they learnt is in no plan: they begin anew, and "
            "merging them changes nothing before they are trained again. For what they learnt load the model's folder, "
            "or the terms with load_adapters",
            stacklevel=3,
        )
    return found or [Replay(plan)]
