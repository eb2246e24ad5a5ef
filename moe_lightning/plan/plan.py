"""The plan: a tuple of edits and where they come from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moe_lightning.plan.edits import Edit
from moe_lightning.plan.shape import ModelShape

PLAN_VERSION = 1


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

        A plan without such a history (written by hand) is cut where an edit follows another one in the same layer: it
        is about what that one left.
        """
        history = self.origin.get("history", [])
        counts = [step.get("edits") if isinstance(step, dict) else None for step in history]
        numbers = [count for count in counts if isinstance(count, int) and count >= 0]
        if len(numbers) < len(counts) or sum(numbers) != len(self.edits):
            return tuple(CompressionPlan(edits, self.origin) for edits in self.rounds())
        ends = list(itertools.accumulate(numbers, initial=0))
        parts = zip(itertools.pairwise(ends), history, strict=True)
        return tuple(CompressionPlan(self.edits[start:end], step) for (start, end), step in parts if end > start)

    def rounds(self) -> tuple[tuple[Edit, ...], ...]:
        """Return the edits cut so that no layer occurs twice in a round: what is filled into a layer starts from it."""
        found: list[list[Edit]] = [[]]
        for edit in self.edits:
            if any(edit.layer == other.layer for other in found[-1]):
                found.append([])
            found[-1].append(edit)
        return tuple(map(tuple, found)) if found[0] else ()

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
