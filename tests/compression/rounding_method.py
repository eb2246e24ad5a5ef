"""A method that rounds and notes what it is shown, for the tests of the driver."""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

import moe_lightning as ml
from moe_lightning.method import Method
from moe_lightning.plan import Edit, ModelShape, Quantize
from moe_lightning.slimming.pruning import Pruned
from moe_lightning.slimming.rounding import Quantized, Scheme, dequantize, round_to_nearest
from moe_lightning.slimming.view import LayerView, SlimmedLayer
from moe_lightning.statistics import Statistics
from tests.layer_reference import HIDDEN
from tests.models import random_batches

LAYERS = 3
BATCHES = random_batches(3, 2, 9)
SCHEME = Scheme(bits=8, group_size="channel", scale_dtype=torch.bfloat16)


def compress(model: Any, methods: Any = None, batches: Any = BATCHES, **options: Any) -> ml.CompressionResult:
    with warnings.catch_warnings():
        if not options.pop("warn", False):
            warnings.simplefilter("ignore")
        return ml.compress(model, batches, methods, **{"progress": False, "max_fallback": 1.0, **options})


@dataclasses.dataclass
class Rounding(Method):
    """Rounds to 8 bits and asks for whatever a test wants to know."""

    moment_kind: str | None = "full"
    targets: str = "experts"
    propagate: str = "compressed"
    gated: bool = False
    status: str = "rounded"
    factor: float = 1.0
    fail_in: int | None = None
    seen: dict[tuple[int, str], Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    views: list[Any] = dataclasses.field(default_factory=list, repr=False, compare=False)

    granularity = "layer"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def propose(self, shape: ModelShape, statistics: Statistics) -> tuple[Edit, ...]:
        edits: list[Edit] = []
        for block in shape.blocks:
            if "attention" in self.targets:
                edits.append(Quantize(block, "attention", 8, "channel", method="rtn"))
            if "experts" in self.targets and block in shape.moe_layers and shape.layout(block).real:
                edits.append(Quantize(block, "experts", 8, "channel", method="rtn"))
        return tuple(edits)

    def describe(self) -> dict[str, Any]:
        return {"method": "Rounding"}

    def slim(self, edit: Any, view: LayerView) -> SlimmedLayer:
        if edit.layer == self.fail_in:
            raise OSError("no memory left")
        self.views.append(view)
        matrices: dict[str, Quantized | Pruned] = {}
        for name in view.matrices:
            weight = view.weight(name)
            if self.moment_kind is not None:
                parts = [
                    view.moments(name, self.moment_kind, slots, gated=self.gated)  # type: ignore[arg-type]
                    for slots in view.groups(name, self.moment_kind)  # type: ignore[arg-type]
                ]
                self.seen[edit.layer, name] = torch.cat(parts)
            factor = self.factor if name in ("gate_up_proj", "q_proj", "k_proj", "v_proj") else 1.0
            matrices[name] = rounded = round_to_nearest(weight * factor, SCHEME)
            view.replace(name, dequantize(rounded) / factor)
        statuses = {name: (self.status,) * len(view.weight(name)) for name in matrices}
        rescale: list[Any] = []
        if self.factor != 1.0:
            scale = torch.full((HIDDEN,), self.factor)
            rescale = [("norm", 1 / scale)]
            rescale += [("router", scale)] if view.router_weight is not None else []
            rescale += [("novice_in", scale)] if view.novice_in is not None else []
        return SlimmedLayer(matrices, statuses, rescale)


def rounded(weight: Tensor) -> Tensor:
    stack = weight if weight.dim() == 3 else weight[None]
    return dequantize(round_to_nearest(stack, SCHEME), weight.dtype).reshape(weight.shape)
