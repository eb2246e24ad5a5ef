"""The way through a model's layers, and what a method sees of the one that it has come to.

Legend: S matrices (slots), O outputs, I inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lightning.architectures import MoELayer, OpenExperts, architecture_of
from moe_lightning.compression.stopwatch import Stopwatch
from moe_lightning.experts import PackedLinear, WeightStack
from moe_lightning.plan import ExpertLayout, Quantize, Sparsify
from moe_lightning.slimming.policy import SlimmingPolicy
from moe_lightning.statistics.batches import Batches, size_in_words
from moe_lightning.statistics.layer_inputs import LayerInputs
from moe_lightning.statistics.moment_memory import MomentKind, moment_bytes, slot_groups, solving_bytes

SlimmingEdit = Sparsify | Quantize

EXPERT_MATRICES = ("gate_up_proj", "down_proj")


class Walk:
    """The way through the layers for one run of edits; measures nothing before something is asked for."""

    def __init__(
        self, model: PreTrainedModel, batches: Batches, policy: SlimmingPolicy, original: bool, clock: Stopwatch
    ) -> None:
        """Begin before the first layer.

        Args:
            model: The model.
            batches: Calibration batches.
            policy: What holds for measurements.
            original: Measure later layers on the outputs of the model as this method found it.
            clock: Told when something is measured.
        """
        self.model = model
        self.batches = batches
        self.policy = policy
        self.original = original
        self.clock = clock
        self.architecture = architecture_of(model)
        self.place = 0
        self._inputs: LayerInputs | None = None
        self._replaced: dict[str, Tensor] = {}
        self.memory_warned = False

    @property
    def inputs(self) -> LayerInputs:
        """What enters the current layer; a pass up to there when first asked for."""
        # The layers before are as they were found, or as the edits of this run left them, and what was not asked for
        # there need not be propagated: only the original outputs are those of a model that is no longer there.
        if self._inputs is None:
            self._inputs = LayerInputs(self.model, self.batches, self.place)
            for name, weight_SOI in self._replaced.items():
                self._inputs.replace(name, weight_SOI)
        return self._inputs

    def replace(self, name: str, weight_SOI: Tensor) -> None:
        """Compute inputs of later stacks of the current layer with other weights, if ever they are asked for."""
        if self._inputs is None:
            self._replaced[name] = weight_SOI
        else:
            self._inputs.replace(name, weight_SOI)

    def go_to(self, layer: int) -> None:
        """Go to a layer, given by its original number."""
        self.place = self.architecture.shape(self.model).blocks.index(layer)
        with self.clock.spending("observe"):
            while self._inputs is not None and self._inputs.place < self.place:
                self._inputs.advance()

    def before(self, edits: Sequence[SlimmingEdit], last: bool) -> None:
        """Compute what the edits of a layer would change, where the original outputs are asked for.

        Args:
            edits: All edits of the current layer.
            last: No layer behind it is measured.
        """
        if not self.original:
            return
        with self.clock.spending("observe"):
            if {edit.target for edit in edits} == {"attention", "experts"}:
                self.inputs.expert_inputs()
            if not last:
                self.inputs.run_ahead()

    def changed(self) -> None:
        """Take note that the current layer has the weights that stood in for its own."""
        self._replaced.clear()
        if self._inputs is not None:
            self._inputs.changed()

    @property
    def memory(self) -> int:
        """Bytes that the inputs kept take."""
        return 0 if self._inputs is None else self._inputs.kept_bytes


class View:
    """One edit's matrices in the live model: see :class:`moe_lightning.slimming.view.LayerView`."""

    def __init__(self, walk: Walk, edit: SlimmingEdit) -> None:
        """Look at the matrices of an edit.

        Args:
            walk: The way, which has come to the layer of the edit.
            edit: The edit.
        """
        self._walk = walk
        self.layer: int = edit.layer
        self.target = edit.target
        architecture = walk.architecture
        self._shape = architecture.shape(walk.model)
        self._decoder_layer = architecture.decoder_layers(walk.model)[walk.place]
        self.layout: ExpertLayout | None = None
        self._tokens: Tensor | None = None
        self.matrices: tuple[str, ...]
        if edit.target == "attention":
            self.linears: dict[str, nn.Module] = architecture.attention_linears(self._decoder_layer)
            self.matrices = tuple(self.linears)
            self.slots = 1
        else:
            self.layout = self._shape.layout(edit.layer)
            self.matrices = EXPERT_MATRICES
            self.slots = len(self.layout.real)
            self._opened: OpenExperts = architecture.open_experts(self.moe)

    @property
    def moe(self) -> MoELayer:
        """The MoE layer."""
        layers = self._walk.architecture.moe_layers(self._walk.model)
        return next(layer for layer in layers if layer.index == self.layer)

    def source(self, name: str) -> Any:
        """Return the parameter or the packed stack that holds a stack now."""
        if self.target == "attention":
            linear: Any = self.linears[name]
            return linear.stack if isinstance(linear, PackedLinear) else linear.weight
        return getattr(self._opened.storage, name)

    def weight(self, name: str) -> Tensor:
        """Return a stack as it is now, dense ``[S, O, I]``."""
        source = self.source(name)
        if self.target == "experts":
            return cast(Tensor, getattr(self._opened, name)).detach()
        return source.dense() if isinstance(source, WeightStack) else source.detach()[None]

    def keep(self, name: str) -> Tensor | None:
        """Return which weights of a sparse stack are stored, or None."""
        source = self.source(name)
        return source.zeros_kept() if isinstance(source, WeightStack) else None

    @property
    def tokens(self) -> Tensor:
        """Calibration tokens that reach each slot."""
        if self._tokens is None:
            with self._walk.clock.spending("observe"):
                inputs = self._walk.inputs
                self._tokens = inputs.expert_tokens() if self.target == "experts" else inputs.all_tokens()
        return self._tokens

    @property
    def starved(self) -> Tensor:
        """Slots that too few tokens reach."""
        return self.tokens < self._walk.policy.min_tokens

    @property
    def use_fallback(self) -> bool:
        """Whether those are to be treated as if nothing reached them."""
        return self._walk.policy.starved == "fallback"

    def groups(self, name: str, kind: MomentKind) -> list[list[int]]:
        """Return lists of slots whose moments fit into memory."""
        limit = self._walk.policy.max_moment_bytes
        inputs, weight_bytes = self.weight_inputs(name), self._shape.weight_bytes
        # Several are solved with at once on a GPU only; elsewhere as few as are together still faster, which are small.
        together = self.slots if next(self._walk.model.parameters()).device.type == "cuda" else 1
        one = moment_bytes(inputs, kind, weight_bytes)
        beside = solving_bytes(inputs, kind, weight_bytes, slots=together)
        if one + beside > limit and not self._walk.memory_warned:
            self._walk.memory_warned = True
            warnings.warn(
                f"the moments of one matrix of {name} and what is solved with them take {size_in_words(one + beside)}, "
                f"more than max_moment_bytes="
                f"{limit} ({size_in_words(limit)}) allows: they are measured one matrix at a time and take that much",
                stacklevel=2,
            )
        return slot_groups(self.slots, one, limit - beside)

    def weight_inputs(self, name: str) -> int:
        """Return the inputs of the matrices of a stack."""
        sizes = self._shape.attention_sizes if self.layout is None else self._shape.expert_sizes(self.layout)
        return sizes[name][1]

    def moments(self, name: str, kind: MomentKind, slots: Sequence[int], *, gated: bool = False) -> Tensor:
        """Measure the inputs of some matrices."""
        with self._walk.clock.spending("observe"):
            inputs = self._walk.inputs
            if self.target == "attention":
                found = inputs.attention_moments(name, kind)
            else:
                found = inputs.expert_moments(name, kind, slots, gated=gated)
        if self.use_fallback:
            found[self.starved[list(slots)].to(found.device)] = 0
        return found

    def replace(self, name: str, weight_SOI: Tensor) -> None:
        """Compute the inputs of later stacks with other weights."""
        if not self._walk.original and name != self.matrices[-1]:
            self._walk.replace(name, weight_SOI)

    @property
    def norm_weight(self) -> Tensor:
        """Weight of the norm before the first stacks."""
        return self.rescaled("norm").detach()

    @property
    def router_weight(self) -> Tensor | None:
        """Weight of the router; None for attention."""
        return None if self.target == "attention" else self.rescaled("router").detach()

    @property
    def novice_in(self) -> Tensor | None:
        """What the low-rank maps read, or None."""
        found = None if self.target == "attention" else getattr(self.moe.experts, "novice_in", None)
        return None if found is None else found.detach()

    def rescaled(self, what: str) -> nn.Parameter:
        """Return the parameter that a method may multiply."""
        if self.target == "attention":
            norm = self._walk.architecture.attention_norm(self._decoder_layer)
            found = {"norm": norm.weight}
        else:
            moe = self.moe
            found = {"norm": moe.norm.weight, "router": moe.router.weight}
            found["novice_in"] = getattr(moe.experts, "novice_in", None)
        if found.get(what) is None:
            raise RuntimeError(f"layer {self.layer}: there is no {what!r} to rescale beside the {self.target}")
        return found[what]
