"""``ml.compress``: in place, and all or nothing.

observe (collect what the method needs) -> propose (edits) -> settle (fits) -> check (against the shape) -> apply
(surgery) -> fill (values), once for each method; the second method sees the model as the first left it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.compression.filling import apply_edits, settled_edits, undo
from moe_lightning.compression.provenance import history_step, plain
from moe_lightning.compression.result import CompressionResult
from moe_lightning.compression.sensitivity import SENSITIVITY_TOKENS, layer_divergence
from moe_lightning.compression.statuses import module_statuses
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ModelShape
from moe_lightning.sizes import measure
from moe_lightning.statistics import Statistics, collect, statistics_bytes
from moe_lightning.statistics.fingerprint import fingerprint, same_weights
from moe_lightning.statistics.second_moments import MAX_BYTES, second_moment_bytes
from moe_lightning.surgery import Surgery, check_class, plan_of, planned_carry
from moe_lightning.trimming import Replay

Batches = Iterable[Mapping[str, Any]]


def as_methods(methods: Method | Sequence[Method]) -> list[Method]:
    """Return methods as a list.

    Raises:
        ValueError: There is none.
        TypeError: Something else is among them.
    """
    listed = [methods] if isinstance(methods, Method) else list(methods)
    if not listed:
        raise ValueError("there is nothing to do: give at least one method, e.g. Novices(ratio=0.25)")
    for method in listed:
        if not isinstance(method, Method):
            raise TypeError(f"{method!r} is not a compression method: give objects like Novices(ratio=0.25)")
    return listed


def trial_edits(shape: ModelShape, methods: Sequence[Method]) -> tuple[list[Edit], ModelShape]:
    """Try a list of methods out on a shape, before anything is measured.

    Args:
        shape: Shape of the model as it is.
        methods: The methods, in order.

    Returns:
        Edits of the right number and size (which experts they name is not known yet), and the shape that they lead to.

    Raises:
        ValueError: A method does not fit what the ones before it leave.
    """
    edits: list[Edit] = []
    for method in methods:
        proposed = method.propose(shape, Statistics.synthetic(shape))
        shape = CompressionPlan(proposed).check(shape)
        edits += proposed
    return edits, shape


def calibration_bytes(shape: ModelShape, methods: Sequence[Method], tokens_per_batch: int = 0) -> int:
    """Say how much memory the measurements take at most, beside the model and its forward pass.

    Args:
        shape: Shape of the model as it is.
        methods: The methods, in order.
        tokens_per_batch: Tokens of the largest calibration batch.

    Returns:
        Bytes of the method that needs most.
    """
    most = 0
    for method in methods:
        edits, after = trial_edits(shape, [method])
        needed = statistics_bytes(shape, method.needs, tokens_per_batch) if method.needs else 0
        fitted = sum(len(pairs) for pairs in method.low_rank_wants(edits).values())
        needed += min(MAX_BYTES, second_moment_bytes(shape.hidden_size, fitted))
        if method.measures_sensitivity:
            needed += max(SENSITIVITY_TOKENS, tokens_per_batch) * shape.vocab_size * 4
        most, shape = max(most, needed), after
    return most


def check_methods(shape: ModelShape, methods: Sequence[Method]) -> ModelShape:
    """Return the shape that :func:`trial_edits` leads to, or raise as it does."""
    return trial_edits(shape, methods)[1]


def compress(
    model: PreTrainedModel,
    batches: Batches,
    methods: Method | Sequence[Method] | None = None,
    *,
    plan: CompressionPlan | None = None,
    statistics: Statistics | None = None,
    origin: Mapping[str, Any] | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    reversible: bool = False,
    progress: bool = True,
) -> CompressionResult:
    """Compress a model in place, all or nothing: when anything fails the model is as it was.

    Args:
        model: A Mixtral with its language head, compressed before or not.
        batches: Calibration batches: dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask``.
        methods: Methods in the order in which they are applied.
        plan: A plan to replay instead of methods. It is the whole plan of an uncompressed model.
        statistics: What was measured on the model as it is, for the first method; the later ones measure anew. None
            makes a pass for the first one too.
        origin: Where the calibration data comes from, plain types; kept in the plan.
        optimizers: Optimizers of the model. They are edited in place and go on training what is left, with the state of
            what survives.
        reversible: Keep what goes in memory, so that ``result.undo()`` puts it back.
        progress: Show progress bars.

    Returns:
        The model, its plan, the statistics and the numbers that prove what was done.

    Raises:
        ValueError: The methods or the plan do not fit the model, or there is no calibration data. Found before the
            calibration pass wherever the shape alone tells.
        RuntimeError: The parameters touched differ from those claimed, or a value filled in is not finite.
    """
    check_class(model)
    if (methods is None) == (plan is None):
        raise ValueError("give either methods or a plan to replay, and not both")
    if plan is not None:
        if plan_of(model):
            raise ValueError(
                "the model is compressed already: replay a plan on the uncompressed model that it was made for"
            )
        # Each step measures the model as the ones before it left it, as the methods did.
        methods = [Replay(step) for step in plan.steps()] or [Replay(plan)]
    chosen = as_methods(methods if methods is not None else [])
    architecture = architecture_of(model)
    shape_before = architecture.shape(model)
    check_methods(shape_before, chosen)
    if isinstance(batches, Iterator):
        batches = list(batches)  # methods, fits and trials make passes of their own
    if statistics is not None:
        _check_statistics(statistics, chosen[0], model, shape_before)
    size_before = measure(model)
    first: Statistics | None = None
    surgeries: list[Surgery] = []
    tokens: dict[int, dict[int, int]] = {}
    fits: dict[tuple[int, int], str] = {}
    try:
        for place, method in enumerate(chosen):
            given = statistics if place == 0 else None
            measured = observe(model, batches, method, given, progress)
            edits = method.propose(architecture.shape(model), measured)
            edits = settled_edits(model, batches, method, edits, measured, progress)
            step = history_step(method, shape_before, origin)
            surgeries += apply_edits(model, method, edits, measured, step)
            _count_tokens(tokens, edits, measured)
            fits |= {key: fit.status for key, fit in measured.fits.items()}
            if place == 0 and measured.tensors:
                first = measured
        result = CompressionResult(
            model=model,
            plan=plan_of(model),
            statistics=first,
            touched=sum(surgery.touched for surgery in surgeries),
            claimed=sum(surgery.claimed for surgery in surgeries),
            modules={},
            size_before=size_before,
            size_after=measure(model),
            shape_before=shape_before,
            shape_after=architecture.shape(model),
        )
        result.modules.update(module_statuses(result.plan, shape_before, result.shape_after, tokens, fits))
        _prove(result)
        replaced = [item for surgery in surgeries for item in surgery.replaced]
        # What an optimizer refuses is found before any of them is changed.
        carried = [planned_carry(optimizer, model, replaced) for optimizer in optimizers]
        for commit in carried:
            commit()
    except BaseException:
        undo(surgeries)
        raise
    if reversible:
        result.surgeries += surgeries
    return result


def _check_statistics(statistics: Statistics, method: Method, model: PreTrainedModel, shape: ModelShape) -> None:
    if statistics.shape != shape:
        raise ValueError("statistics= were measured on a model of another shape: collect them from this one")
    weights = statistics.info.get("weights")
    if weights is not None and not same_weights(weights, fingerprint(model)):
        raise ValueError(
            "statistics= were measured on other weights than the model has now: collect them from this model"
        )
    missing = method.needs - statistics.groups
    if missing:
        raise ValueError(
            f"statistics= hold no {', '.join(sorted(missing))}, which {type(method).__name__} needs: "
            f"collect(model, batches, needs={sorted(method.needs)})"
        )


def observe(
    model: PreTrainedModel, batches: Batches, method: Method, given: Statistics | None = None, progress: bool = True
) -> Statistics:
    """Measure what a method needs, its layers' sensitivity included; what is given already is not measured again.

    Args:
        model: The model as it is.
        batches: Calibration batches.
        method: The method.
        given: Statistics of the model as it is, or None. They are not changed.
        progress: Show progress bars.
    """
    if given is not None:
        statistics = dataclasses.replace(
            given, tensors=dict(given.tensors), fits=dict(given.fits), info=dict(given.info)
        )
    elif method.needs:
        statistics = collect(model, batches, method.needs, progress=progress)
    else:
        statistics = Statistics(architecture_of(model).shape(model), {})
    if method.measures_sensitivity and "layer_divergence" not in statistics.tensors:
        statistics.tensors["layer_divergence"] = layer_divergence(model, batches, method, statistics, progress)
        statistics.info["layer_divergence"] = plain(method.describe())
    return statistics


def _count_tokens(tokens: dict[int, dict[int, int]], edits: Sequence[Edit], statistics: Statistics) -> None:
    name = next((name for name in ("count", "output_count") if name in statistics.tensors), None)
    if name is None:
        return
    for edit in edits:
        if edit.layer not in statistics.shape.moe_layers:
            continue
        row = statistics[name][statistics.row(edit.layer)]
        known = statistics.shape.layout(edit.layer).router
        tokens.setdefault(edit.layer, {expert: int(row[expert]) for expert in known})


def _prove(result: CompressionResult) -> None:
    if result.touched != result.claimed:
        raise RuntimeError(f"touched {result.touched} parameters but the plan claims {result.claimed}")
    expected = result.shape_after.parameters - result.shape_before.parameters
    counted = result.size_after.parameters - result.size_before.parameters
    if expected != counted:
        raise RuntimeError(f"the model changed by {counted} parameters, its shape says {expected}")
