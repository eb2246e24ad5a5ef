"""What a compression did, in numbers that are checked against each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.sizes import ModelSize
from moe_lightning.statistics import Statistics
from moe_lightning.surgery import Surgery, plan_of


@dataclass(frozen=True)
class ModuleStatus:
    """What happened to one module.

    Attributes:
        status: In words, e.g. ``4 of 8 experts real, 4 novices (mean)``.
        tokens: Calibration tokens that reached each expert concerned, by original number; empty where none were
            counted.
        matrices: How each matrix was made smaller, by name: ``3.gate_up_proj`` of the expert with that original number,
            ``q_proj`` of attention. E.g. ``gptq damp x10``.
        errors: Squared error of the outputs of each matrix in units of their squares, on the calibration tokens, by the
            same names; empty where it was not measured. Of several methods it is that of the last one, against the
            weights that it found: zeros that the method before made are no error.
        losses: Share of the squared low-rank term that rounding took when it was folded into a matrix, by the same
            names.
    """

    status: str
    tokens: dict[int, int] = field(default_factory=dict)
    matrices: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class CompressionResult:
    """The outcome of :func:`moe_lightning.compress`.

    Attributes:
        model: The model, changed in place.
        plan: Its whole plan, earlier edits included.
        statistics: What was measured on the model before the first method changed it; None where no method measured.
        touched: Parameters that went or came, counted in the tensors.
        claimed: Parameters that the plan says go or come; equal to ``touched``, or compress would have failed.
        modules: Status of every module that was changed, by its name.
        size_before: Parameters, bytes and FLOPs before.
        size_after: The same after.
        shape_before: Shape before.
        shape_after: Shape after.
        seconds: Where the time went, by part; together all that it took. ``observe`` (passes over calibration data),
            ``decide`` (which experts and layers), ``fit`` (low-rank maps), ``solve`` (what is made of matrices layer by
            layer), ``apply`` (structure and values), ``optimizer`` (carried over), ``other`` (sizes, checks).
        surgeries: What :meth:`undo` takes back; empty without ``reversible``. They hold what went.
    """

    model: nn.Module
    plan: CompressionPlan
    statistics: Statistics | None
    touched: int
    claimed: int
    modules: dict[str, ModuleStatus]
    size_before: ModelSize
    size_after: ModelSize
    shape_before: ModelShape
    shape_after: ModelShape
    seconds: dict[str, float] = field(default_factory=dict)
    surgeries: list[Surgery] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the model's structure and weights back as they were before.

        Optimizers that were carried over are not put back. Do not change the model otherwise in between (its type, its
        device, its vocabulary): only its plan is compared.

        Raises:
            RuntimeError: ``reversible`` was not set, another compression followed, or this was done before.
        """
        if not self.surgeries or plan_of(self.model).edits != self.plan.edits:
            raise RuntimeError(
                "cannot undo this compression: compress with reversible=True, and undo once, before others follow"
            )
        while self.surgeries:
            self.surgeries.pop().undo()

    def summary(self) -> dict[str, Any]:
        """Return the numbers as plain types."""
        return {
            "touched_parameters": self.touched,
            "claimed_parameters": self.claimed,
            "parameters_before": self.size_before.parameters,
            "parameters_after": self.size_after.parameters,
            "bytes_before": self.size_before.bytes,
            "bytes_after": self.size_after.bytes,
            "modules": {name: module.status for name, module in self.modules.items()},
            **self._of_modules("tokens"),
            **self._of_modules("matrices"),
            **self._of_modules("errors"),
            **self._of_modules("losses"),
            "seconds": dict(self.seconds),
        }

    def _of_modules(self, what: str) -> dict[str, Any]:
        """Return what is known of some modules, with names as JSON has them."""
        known = {name: getattr(module, what) for name, module in self.modules.items()}
        found = {name: {str(key): value for key, value in values.items()} for name, values in known.items() if values}
        return {what: found} if found else {}

    def __str__(self) -> str:
        before, after = self.size_before, self.size_after
        return (
            f"{self._what()}: {before.parameters:,} -> {after.parameters:,} parameters "
            f"({after.parameters / before.parameters:.1%}), "
            f"{before.bytes / 2**20:,.1f} -> {after.bytes / 2**20:,.1f} MiB; "
            f"touched {self.touched:,} of {self.claimed:,} parameters claimed"
        )

    def _what(self) -> str:
        """Say how many modules changed; where only low-rank terms came or went, nothing was compressed."""
        number = f"{len(self.modules)} modules"
        before, after = (_without_terms(shape) for shape in (self.shape_before, self.shape_after))
        grew = self.size_after.bytes > self.size_before.bytes  # integers that were spelled out
        return f"{number} changed" if before == after or grew else f"compressed {number}"


def _without_terms(shape: ModelShape) -> ModelShape:
    layouts = tuple(dataclasses.replace(layout, lora=None) for layout in shape.layouts)
    return dataclasses.replace(shape, layouts=layouts, attention_lora=())
