"""``ml.compress``: in place, and all or nothing.

observe (collect what the method needs) -> propose (edits) -> settle (fits) -> check (against the shape) -> apply
(surgery) -> fill (values), once for each method; the second method sees the model as the first left it. Methods that
make matrices smaller measure, apply and fill layer by layer, see :mod:`moe_lightning.compression.layerwise`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_lightning.architectures import architecture_of
from moe_lightning.compression.adapters import apply_adapters
from moe_lightning.compression.filling import apply_edits, settled_edits, undo
from moe_lightning.compression.layerwise import SlimmingReport, is_layerwise, measures, slim_layers
from moe_lightning.compression.memory import trial_edits
from moe_lightning.compression.provenance import history_step, plain
from moe_lightning.compression.replay import replays
from moe_lightning.compression.result import CompressionResult
from moe_lightning.compression.sensitivity import layer_divergence
from moe_lightning.compression.statuses import module_statuses
from moe_lightning.compression.stopwatch import Stopwatch
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ModelShape
from moe_lightning.recovery.lora import AdapterMethod
from moe_lightning.sizes import measure
from moe_lightning.slimming.policy import SlimmingPolicy, Starved
from moe_lightning.statistics import Statistics, collect
from moe_lightning.statistics.fingerprint import fingerprint, same_weights
from moe_lightning.surgery import Surgery, check_class, plan_of, planned_carry

Batches = Iterable[Mapping[str, Any]]


def as_methods(methods: Method | Sequence[Method]) -> list[Method]:
    """Return methods as a list.

    Raises:
        ValueError: There is none.
        TypeError: Something else is among them.
    """
    one = isinstance(methods, Method | str | type)
    listed: list[Any] = [methods] if one else list(methods)  # type: ignore[arg-type]
    if not listed:
        raise ValueError("there is nothing to do: give at least one method, e.g. Novices(ratio=0.25)")
    for method in listed:
        if not isinstance(method, Method):
            hint = f"{method.__name__}()" if isinstance(method, type) else "Novices(ratio=0.25)"
            raise TypeError(f"{method!r} is not a compression method: give objects like {hint}")
    return listed


def check_methods(shape: ModelShape, methods: Sequence[Method]) -> ModelShape:
    """Return the shape that :func:`trial_edits` leads to, or raise as it does."""
    return trial_edits(shape, methods)[1]


def compress(
    model: PreTrainedModel,
    batches: Batches | None,
    methods: Method | Sequence[Method] | None = None,
    *,
    plan: CompressionPlan | None = None,
    statistics: Statistics | None = None,
    origin: Mapping[str, Any] | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    reversible: bool = False,
    progress: bool = True,
    min_tokens: int = 32,
    starved: Starved = "warn",
    top_up: Batches | None = None,
    max_fallback: float = 0.1,
    max_moment_bytes: int = 4 * 2**30,
    also: Iterable[str] = (),
) -> CompressionResult:
    """Compress a model in place, all or nothing: when anything fails the model is as it was.

    For that, every layer is kept as it was until the last method is done: the weights before and all that is made of
    them are in memory at the same time (:func:`moe_lightning.compression.made_bytes`).

    Args:
        model: A Mixtral with its language head, compressed before or not.
        batches: Calibration batches: dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask``.
            None where no method measures anything.
        methods: Methods in the order in which they are applied.
        plan: A plan to replay instead of methods. It is the whole plan of an uncompressed model.
        statistics: What was measured on the model as it is, for the first method; the later ones measure anew. None
            makes a pass for the first one too.
        origin: Where the calibration data comes from, plain types; kept in the plan.
        optimizers: Optimizers of the model. They are edited in place and go on training what is left, with the state of
            what survives.
        reversible: Keep what goes in memory, so that ``result.undo()`` puts it back.
        progress: Show progress bars.
        min_tokens: For methods that measure the inputs of experts' matrices: an expert that fewer calibration tokens
            reach is starved.
        starved: What becomes of it. ``warn``: it is made from what there is. ``top_up``: further sequences are drawn
            that reach it. ``fallback``: as if no token reached it. ``error``: the compression fails.
        top_up: Further calibration batches, for ``starved="top_up"``; as many of them are read as it takes, once for
            all methods. After 64 batches in a row that reach no starved expert no more are read, and a warning names
            those that are short.
        max_fallback: Largest share of a method's matrices that may be made without measurement, from 0 to 1.
        max_moment_bytes: Memory for the moments of inputs that are measured at a time, in bytes: with less, fewer
            experts are measured at a time.
        also: Groups of statistics to measure beside those that the first method needs, on the model as it is, for
            whoever draws them: in the pass that is made for it. Where it needs none, or ``statistics`` are given, there
            is no such pass, and nothing of this is measured.

    Returns:
        The model, its plan, the statistics and the numbers that prove what was done.

    Raises:
        ValueError: The methods or the plan do not fit the model, or there is no calibration data. Found before the
            calibration pass wherever the shape alone tells.
        TooFewTokens: (a RuntimeError) An expert is starved, and that is an error: found before anything is done, or at
            a later layer, where tokens go other ways than before because those before it are smaller. Or more matrices
            than ``max_fallback`` allows were made without measurement.
        RuntimeError: The parameters touched differ from those claimed, or a value filled in is not finite.
    """
    clock = Stopwatch()
    check_class(model)
    # One way through them for all methods: the second one does not draw again what the first one drew.
    further = None if top_up is None else _once(top_up)
    policy = SlimmingPolicy(min_tokens, starved, further, max_fallback, max_moment_bytes)
    if (methods is None) == (plan is None):
        raise ValueError("give either methods or a plan to replay, and not both")
    if plan is not None:
        if plan_of(model):
            raise ValueError(
                "the model is compressed already: replay a plan on the uncompressed model that it was made for"
            )
        methods = replays(plan)
        _compare_policies(plan, policy)
    chosen = as_methods(methods if methods is not None else [])
    architecture = architecture_of(model)
    shape_before = architecture.shape(model)
    check_methods(shape_before, chosen)
    if batches is None:
        batches = ()
    if isinstance(batches, Iterator):
        batches = list(batches)  # methods, fits and trials make passes of their own
    if statistics is not None:
        _check_statistics(statistics, chosen[0], model, shape_before)
    size_before = measure(model)
    first: Statistics | None = None
    surgeries: list[Surgery] = []
    tokens: dict[int, dict[int, int]] = {}
    fits: dict[tuple[int, int], str] = {}
    report = SlimmingReport()
    enough = batches  # with what was drawn for starved experts
    try:
        for place, method in enumerate(chosen):
            given = statistics if place == 0 else None
            with clock.spending("observe"):
                measured = observe(model, batches, method, given, progress, also if place == 0 else ())
            if place == 0 and measured.tensors:
                first = measured
            with clock.spending("decide"):
                edits = method.propose(architecture.shape(model), measured)
            with clock.spending("fit"):
                edits = settled_edits(model, batches, method, edits, measured, progress)
            step = history_step(method, shape_before, origin)
            if isinstance(method, AdapterMethod):
                with clock.spending("apply"):
                    adapted = apply_adapters(model, method, edits, step)
                surgeries += adapted.surgeries
                report.merge(SlimmingReport(matrices=adapted.statuses, losses=adapted.losses))
                continue
            if is_layerwise(method):
                step |= {"policy": policy.describe()} if measures(method) else {}
                with clock.spending("apply"):
                    slimmed = slim_layers(model, enough, method, edits, policy, step, progress, clock)
                surgeries += slimmed.surgeries
                report.merge(slimmed.report)
                enough = slimmed.batches
                continue
            with clock.spending("apply"):
                surgeries += apply_edits(model, method, edits, measured, step)
            _count_tokens(tokens, edits, measured)
            fits |= {key: fit.status for key, fit in measured.fits.items()}
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
        result.modules.update(module_statuses(result.plan, shape_before, result.shape_after, tokens, fits, report))
        _prove(result)
        replaced = [item for surgery in surgeries for item in surgery.replaced]
        # What an optimizer refuses is found before any of them is changed.
        with clock.spending("optimizer"):
            carried = [planned_carry(optimizer, model, replaced) for optimizer in optimizers]
            for commit in carried:
                commit()
    except BaseException:
        undo(surgeries)
        raise
    if reversible:
        result.surgeries += surgeries
    result.seconds.update(clock.seconds)
    return result


def _once(batches: Batches) -> Iterator[Mapping[str, Any]]:
    """Go through batches once; nothing is asked of them before the first is."""
    yield from batches


def _compare_policies(plan: CompressionPlan, policy: SlimmingPolicy) -> None:
    """Warn where a plan was made under another policy for measurements than it is replayed under."""
    mine = policy.describe()
    recorded = [step.get("policy") for step in plan.origin.get("history", []) if isinstance(step, dict)]
    for other in recorded:
        if isinstance(other, dict) and other != mine:
            words = [", ".join(f"{name}={value!r}" for name, value in sorted(item.items())) for item in (other, mine)]
            warnings.warn(
                f"the plan was made with {words[0]}, and is replayed with {words[1]}: matrices that few tokens "
                "reach may differ. Give the same options for the same weights",
                stacklevel=3,
            )
            return


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
    model: PreTrainedModel,
    batches: Batches,
    method: Method,
    given: Statistics | None = None,
    progress: bool = True,
    also: Iterable[str] = (),
) -> Statistics:
    """Measure what a method needs, its layers' sensitivity included; what is given already is not measured again.

    Args:
        model: The model as it is.
        batches: Calibration batches.
        method: The method.
        given: Statistics of the model as it is, or None. They are not changed.
        progress: Show progress bars.
        also: Further groups of statistics to measure in the same pass. Where the method needs no pass they are left
            out.
    """
    # No pass is made for the sake of a picture: calibration may be the longest part of a compression.
    needs = method.needs.union(also) if method.needs else method.needs
    if given is not None:
        statistics = dataclasses.replace(
            given, tensors=dict(given.tensors), fits=dict(given.fits), info=dict(given.info)
        )
    elif needs:
        statistics = collect(model, batches, needs, progress=progress)
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
