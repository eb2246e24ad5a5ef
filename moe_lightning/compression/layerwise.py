"""Methods that make matrices smaller: one layer after another, each measured as the ones before it left it.

view (what the method sees, measured on demand) -> slim (the method) -> stacks (packed) -> apply (surgery) -> rescale
-> check (finite) -> statuses -> propagate (what enters the next layer).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.compression.filling import undo
from moe_lightning.compression.precision import full_float32
from moe_lightning.compression.ranks import take_from_first_rank
from moe_lightning.compression.starved import REMEDIES, enough_batches, in_words
from moe_lightning.compression.stopwatch import Stopwatch
from moe_lightning.compression.walk import SlimmingEdit, View, Walk
from moe_lightning.experts.stacks import Int4, Int8, Masked, Sparse24, WeightStack
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ExpertLayout, ModelShape, WeightFormat
from moe_lightning.slimming.policy import SlimmingPolicy, TooFewTokens
from moe_lightning.slimming.pruning import Pruned
from moe_lightning.slimming.rounding import Quantized
from moe_lightning.slimming.view import FALLBACKS, SlimmedLayer
from moe_lightning.statistics.batches import Batches, size_in_words
from moe_lightning.surgery import Surgery, apply_plan, plan_of


def is_layerwise(method: Method) -> bool:
    """Say whether a method goes through the model layer by layer."""
    return method.granularity == "layer"


def measures(method: Any) -> bool:
    """Say whether a method goes through the model layer by layer and asks for what enters the matrices."""
    return is_layerwise(method) and method.moment_kind is not None


def need_batches(methods: Iterable[Method]) -> bool:
    """Say whether any of some methods reads calibration data: those of whole models do, of the others some."""
    return any(method.granularity == "model" or measures(method) for method in methods)


_THEN = ", then "
"""Between what several methods did to a matrix."""


def _fell_back(status: str) -> bool:
    return any(part.startswith(FALLBACKS) for part in status.split(_THEN))


@dataclass
class SlimmingReport:
    """What became of every matrix.

    Attributes:
        matrices: Status by layer and name: ``3.gate_up_proj`` of an expert by its original number, or ``q_proj``.
        errors: Squared error of the outputs in units of their squares, by the same keys, where the last method that
            changed the matrix measured it: against the weights that this method found, not the original ones.
        tokens: Calibration tokens that reached each expert, by layer and original number.
        losses: Share of the squared low-rank term that rounding took when it was folded into a matrix, by the same
            keys.
    """

    matrices: dict[int, dict[str, str]] = field(default_factory=dict)
    errors: dict[int, dict[str, float]] = field(default_factory=dict)
    tokens: dict[int, dict[int, int]] = field(default_factory=dict)
    losses: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, edit: SlimmingEdit, layout: ExpertLayout | None, slimmed: SlimmedLayer) -> None:
        """Take over what a method says of an edit."""
        for name, statuses in slimmed.statuses.items():
            found = (slimmed.errors or {}).get(name)
            for slot, status in enumerate(statuses):
                key = name if layout is None else f"{layout.real[slot]}.{name}"
                self.matrices.setdefault(edit.layer, {})[key] = status
                if found is not None and math.isfinite(float(found[slot])):
                    self.errors.setdefault(edit.layer, {})[key] = float(found[slot])

    @property
    def fallbacks(self) -> dict[int, list[str]]:
        """Matrices that were made without the measurement that the method asks for, by layer."""
        found = {
            layer: [key for key, status in statuses.items() if _fell_back(status)]
            for layer, statuses in self.matrices.items()
        }
        return {layer: keys for layer, keys in found.items() if keys}

    def merge(self, later: SlimmingReport) -> None:
        """Put what a later method did behind this."""
        for layer, statuses in later.matrices.items():
            mine = self.matrices.setdefault(layer, {})
            for key, status in statuses.items():
                mine[key] = f"{mine[key]}{_THEN}{status}" if key in mine else status
                # That of the method before is none of these weights.
                self.errors.get(layer, {}).pop(key, None)
        for layer, errors in later.errors.items():
            self.errors.setdefault(layer, {}).update(errors)
        for layer, losses in later.losses.items():
            self.losses.setdefault(layer, {}).update(losses)
        for layer, tokens in later.tokens.items():
            self.tokens.setdefault(layer, {}).update(tokens)


def ascending_runs(edits: Sequence[Edit]) -> list[list[SlimmingEdit]]:
    """Cut edits into runs that one walk through the layers can do: ascending, and attention before experts.

    Raises:
        TypeError: An edit that is none of formats.
    """
    runs: list[list[SlimmingEdit]] = []
    last: tuple[int, bool] | None = None
    for edit in edits:
        if not isinstance(edit, SlimmingEdit):
            raise TypeError(f"{edit} is no edit of formats: only Sparsify and Quantize are made layer by layer")
        key = (edit.layer, edit.target == "experts")
        if last is None or key <= last:
            runs.append([])
        runs[-1].append(edit)
        last = key
    return runs


@dataclass
class Slimmed:
    """What a method did to a model.

    Attributes:
        surgeries: In order.
        report: What became of every matrix.
        batches: The calibration batches, with those that were drawn for starved experts.
    """

    surgeries: list[Surgery]
    report: SlimmingReport
    batches: Batches


def slim_layers(
    model: PreTrainedModel,
    batches: Batches,
    method: Any,
    edits: Sequence[Edit],
    policy: SlimmingPolicy,
    origin: Mapping[str, Any] | None = None,
    progress: bool = True,
    clock: Stopwatch | None = None,
) -> Slimmed:
    """Extend a model's plan by edits of formats and fill in what a method makes, or leave the model as it was.

    Methods that ask for no moments need no batches, and do not run the model.

    Args:
        model: The live model.
        batches: Calibration batches, to be iterated more than once.
        method: A method with ``slim``.
        edits: Its edits.
        policy: What holds for measurements.
        origin: Entry of the plan's history.
        progress: Show progress bars.
        clock: Told what the time is spent on; None where nobody asks.

    Returns:
        What was done.

    Raises:
        ValueError: There is no calibration data, or the layers of the model cannot be measured one by one.
        TooFewTokens: An expert is starved and that is an error, or too many matrices fell back.
        RuntimeError: A value is not finite, or what the method made does not fit.
    """
    clock = clock or Stopwatch()
    runs = ascending_runs(edits)
    target = plan_of(model).extended(edits, None if origin is None else dict(origin))
    report = SlimmingReport()
    surgeries: list[Surgery] = []
    total = _num_matrices(model, edits, target)
    done = len(target.edits) - len(edits)
    named: frozenset[tuple[int, int]] = frozenset()
    bar = tqdm(total=len(edits), desc=str(method), unit="edit", disable=None if progress else True, leave=False)
    try:
        # What is made here is trained later: no inference tensors, whatever mode the caller is in.
        with torch.inference_mode(False), torch.no_grad(), full_float32(), bar:
            if measures(method):
                layers = sorted({edit.layer for run in runs for edit in run if edit.target == "experts"})
                with clock.spending("observe"):
                    batches, named = enough_batches(model, batches, layers, policy, progress)
            for run in runs:
                original = measures(method) and method.propagate == "original"
                walk = Walk(model, batches, policy, original, clock)
                for layer, group in itertools.groupby(run, key=lambda edit: edit.layer):
                    of_layer = list(group)
                    walk.go_to(layer)
                    walk.before(of_layer, last=layer == run[-1].layer)
                    for edit in of_layer:
                        done += 1
                        plan = CompressionPlan(target.edits[:done], target.origin)
                        _slim(walk, method, edit, plan, named, surgeries, report)
                        _check_fallbacks(report, total, method, policy)
                        bar.set_postfix_str(f"{size_in_words(walk.memory)} of inputs" if walk.memory else "")
                        bar.update()
    except BaseException:
        undo(surgeries)
        raise
    return Slimmed(surgeries, report, batches)


def _num_matrices(model: PreTrainedModel, edits: Sequence[Edit], target: CompressionPlan) -> int:
    shape = target.check(_shape(model).uncompressed())
    layouts = [shape.layout(edit.layer) for edit in edits if getattr(edit, "target", "") == "experts"]
    experts = sum(len(layout.real) * len(shape.expert_sizes(layout)) for layout in layouts)
    return experts + (len(edits) - len(layouts)) * len(shape.attention_sizes)


def _slim(
    walk: Walk,
    method: Any,
    edit: SlimmingEdit,
    plan: CompressionPlan,
    named: frozenset[tuple[int, int]],
    surgeries: list[Surgery],
    report: SlimmingReport,
) -> None:
    """Do one edit."""
    view = View(walk, edit)
    if measures(method):
        _look_for_starved(view, walk, named, report)
    # Autocast would make the products narrow that a method computes with.
    autocast = torch.autocast(next(walk.model.parameters()).device.type, enabled=False)
    with autocast, walk.clock.spending("solve"):
        slimmed = method.slim(edit, view)
    _check_fit(view, slimmed, method)
    format = _format_after(walk.model, edit)
    stacks = {(edit.layer, name): _stack(view, name, slimmed.matrices[name], format) for name in view.matrices}
    # Before an optimizer's moments are cut to the places of what is kept.
    take_from_first_rank(tensor for stack in stacks.values() for tensor in (*stack.parameters(), *stack.buffers()))
    for (layer, name), stack in stacks.items():
        _check_stored(f"layer {layer}: {name} made by {edit}", dict(stack.state_dict()))
    surgery = apply_plan(walk.model, plan, stacks=stacks)
    surgeries.append(surgery)
    for what, factor in slimmed.rescale:
        parameter = view.rescaled(what)  # as it is now: surgery may have put another one in its place
        factor = factor.to(parameter.device, copy=True)
        take_from_first_rank([factor])
        surgery.rescale(parameter, factor)
        _check_stored(f"layer {edit.layer}: {what} rescaled by {edit}", {what: parameter})
    walk.changed()
    report.add(edit, view.layout, slimmed)


def _look_for_starved(view: View, walk: Walk, named: frozenset[tuple[int, int]], report: SlimmingReport) -> None:
    """Count the tokens of each expert, and say where they are few, unless it was said before."""
    policy, layout = walk.policy, view.layout
    if layout is not None:
        report.tokens[view.layer] = dict(zip(layout.real, view.tokens.tolist(), strict=True))
    few = view.starved.nonzero().flatten().tolist()
    if layout is not None:
        few = [slot for slot in few if (view.layer, layout.real[slot]) not in named]
    if not few or policy.starved == "fallback":
        return
    if layout is None:
        message = f"{int(view.tokens)} calibration tokens reach the attention of layer {view.layer}"
    else:
        owners = [(view.layer, layout.real[slot]) for slot in few]
        message = f"fewer calibration tokens reach {in_words(owners, view.tokens[few].tolist())}"
    message = f"min_tokens={policy.min_tokens}, but {message}: {REMEDIES}"
    if policy.starved == "error":
        raise TooFewTokens(message)
    warnings.warn(message, stacklevel=2)


def _shape(model: PreTrainedModel) -> ModelShape:
    return architecture_of(model).shape(model)


def _format_after(model: PreTrainedModel, edit: SlimmingEdit) -> WeightFormat:
    after = edit.apply(_shape(model))
    format = after.attention_format(edit.layer) if edit.target == "attention" else after.layout(edit.layer).format
    assert format is not None
    return format


def _check_fit(view: View, slimmed: SlimmedLayer, method: Any) -> None:
    for names, what in ((slimmed.matrices, "matrices"), (slimmed.statuses, "statuses")):
        if set(names) != set(view.matrices):
            raise RuntimeError(f"{method} gave {what} {sorted(names)} for layer {view.layer}: it has {view.matrices}")
    for name, matrix in slimmed.matrices.items():
        shape = tuple((matrix.codes if isinstance(matrix, Quantized) else matrix.weight).shape)
        expected = tuple(view.weight(name).shape)
        if shape != expected or len(slimmed.statuses[name]) != expected[0]:
            raise RuntimeError(f"{method} made {name} of the shape {shape} in layer {view.layer}, not {expected}")


def _stack(view: View, name: str, matrix: Quantized | Pruned, format: WeightFormat) -> WeightStack:
    """Pack what a method made."""
    source = view.source(name)
    if isinstance(matrix, Quantized):
        if not format.quantized:
            raise RuntimeError(f"layer {view.layer}: {name} was quantised, but the edit says {format}")
        keep = view.keep(name)
        if keep is not None and bool(((matrix.codes != _spread(matrix.zero, matrix.codes)) & ~keep).any()):
            raise RuntimeError(f"layer {view.layer}: pruned weights of {name} came back when they were quantised")
        packed: type[Int4] | type[Int8] = Int4 if format.kind == "int4" else Int8
        return packed.pack(format, *matrix, source.dtype)
    if format.quantized:
        raise RuntimeError(f"layer {view.layer}: {name} was pruned, but the edit says {format}")
    weight = matrix.weight.to(source.dtype)
    sparse: type[Sparse24] | type[Masked] = Sparse24 if format.kind == "sparse24" else Masked
    return sparse.pack(format, weight, matrix.keep)


def _spread(zero_SOG: Tensor, codes_SOI: Tensor) -> Tensor:
    return zero_SOG.repeat_interleave(codes_SOI.shape[-1] // zero_SOG.shape[-1], dim=-1)


def _check_stored(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        meaningful = tensor.is_floating_point() and tensor.device.type != "meta"
        if meaningful and not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(f"{what} is not finite in {tensor.dtype} ({name})")


def _check_fallbacks(report: SlimmingReport, total: int, method: Any, policy: SlimmingPolicy) -> None:
    """Raise as soon as more matrices fell back than the policy allows."""
    found = report.fallbacks
    number = sum(map(len, found.values()))
    # 0.29 * 100 is less than 29.
    if number <= policy.max_fallback * total + 1e-6:
        return
    where = "; ".join(f"layer {layer}: {', '.join(keys)}" for layer, keys in found.items())
    raise TooFewTokens(
        f"{method}: {number} of {total} matrices ({number / total:.1%}) fell back to what needs no calibration data, "
        f"more than max_fallback={policy.max_fallback} allows ({where}): give more calibration data, let "
        "starved='top_up' draw more, set a lower min_tokens, or allow a larger max_fallback"
    )
