"""``moe-lightning plan``: what a method would decide and what that costs, from saved statistics, in seconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lightning.cli.commands import run_command
from moe_lightning.cli.prepared import check_zeros
from moe_lightning.compression import check_methods, history_step
from moe_lightning.files import check_writable, write_atomically
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, Edit, ModelShape, Quantize, Sparsify, formats_of
from moe_lightning.statistics import Statistics, criterion_named
from moe_lightning.sweep.agreement import agreements
from moe_lightning.sweep.what_if import LayerPrediction, edit_in_words, flops_of, predictions

USUAL_CRITERIA = ("mone", "residual", "reap", "soft_routing", "frequency")


def plan_compression(
    statistics: str,
    methods: Sequence[Method],
    output: str | None = None,
    criteria: str | list[str] | None = None,
    sequence_length: int = 2048,
    overwrite: bool = False,
) -> None:
    """Say what methods would decide, from saved statistics and without the model.

    Printed are the decision and the predicted error of every layer, the size before and after, and how far criteria
    agree. One method may read the statistics, the first: a later one would decide on a model that nobody has measured.
    Methods that make matrices smaller (pruning, integers) read none, and the error that they make is not predicted:
    that takes the weights and what enters them.

    Args:
        statistics: File that collect wrote, or compress beside a compressed model.
        methods: Methods in the order in which they are applied, e.g. [{class_path: Novices, init_args: {ratio: 0.25}}].
        output: File for the plan, for compress --plan.
        criteria: Criteria to compare, with commas between them; the usual ones that the file allows when not given.
        sequence_length: Tokens of a sequence, for FLOPs.
        overwrite: Replace a plan that is there.

    Raises:
        FileExistsError: The output is there.
        ValueError: A method does not fit the model or the statistics.
        FileNotFoundError: There is no such file.
    """
    if not methods:
        raise ValueError("there is nothing to plan: give --methods, e.g. [{class_path: Novices, init_args: {keep: 6}}]")
    if output is not None and Path(output).is_dir():
        raise IsADirectoryError(f"--output {output} is a folder: name a file, e.g. {Path(output) / 'plan.json'}")
    if output is not None:
        if Path(output).exists() and not overwrite:
            raise FileExistsError(f"--output {output} is there already: choose another file or pass --overwrite true")
        check_writable(output)
    if sequence_length < 1:
        raise ValueError(f"--sequence_length {sequence_length}: it must be at least 1")
    chosen = list(methods)
    check_only_first_measures(chosen)
    known = Statistics.load(statistics)
    shape = known.shape
    if output is not None and shape != shape.uncompressed():
        raise ValueError(
            f"--output: {statistics} was measured on a model that is compressed already, and compress --plan takes "
            "plans of whole models: give the methods to compress --methods instead"
        )
    compared = _criteria(criteria, chosen[0], known)
    missing = chosen[0].needs - known.groups
    if missing:
        names = ",".join(sorted(missing | known.groups - {"sensitivity"}))
        raise ValueError(
            f"--statistics {statistics} holds no {', '.join(sorted(missing))}, which {type(chosen[0]).__name__} needs: "
            f"moe-lightning collect --needs {names}"
        )
    check_zeros(shape, chosen)
    plan, predicted = CompressionPlan(), []
    after = shape
    for place, method in enumerate(chosen):
        measured = known if place == 0 else Statistics(after, {})
        edits = method.propose(after, measured)
        check_methods(after, [method])  # that it changes something, too
        predicted += predictions(edits, known) if place == 0 else [_unpredicted(edit, after) for edit in edits]
        after = CompressionPlan(edits).check(after)
        plan = plan.extended(edits, _step(method, statistics, known))
    for method in chosen:  # when all of them fit
        print(f"method   {method}")
    _print_layers(predicted, shape, after)
    _print_sizes(shape, after, sequence_length, known if "routing" in known.groups else None)
    _print_agreement(compared, known, after)
    if output is not None:
        write_atomically(output, plan.to_json())
        print(f"wrote {output}: moe-lightning compress --plan {output}")


def check_only_first_measures(methods: Sequence[Method]) -> None:
    """Make sure that no method but the first reads statistics.

    Args:
        methods: In the order in which they are applied.

    Raises:
        ValueError: A later one does.
    """
    for method in methods[1:]:
        if method.needs or method.measures_sensitivity:
            names = ", ".join(sorted(method.needs)) or "sensitivity"
            raise ValueError(
                f"--methods: {type(method).__name__} reads statistics ({names}) of the model as "
                f"{type(methods[0]).__name__} leaves it, which nobody has measured. Plan the first method alone, "
                "or give both to compress --methods, which measures in between"
            )


def _criteria(given: str | list[str] | None, method: Method, statistics: Statistics) -> dict[str, torch.Tensor]:
    """Return the scores of the criteria to compare; those that were asked for by name must be there."""
    if given is None:
        own = getattr(method, "criterion", None)
        names = list(dict.fromkeys([*([own] if isinstance(own, str) else []), *USUAL_CRITERIA]))
        names = [name for name in names if _scores(name, statistics)]
    else:
        # Names of families have commas between their numbers.
        names = re.split(r",(?=\s*[A-Za-z])", given.strip("[] ")) if isinstance(given, str) else given
        names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
        if len(names) < 2:
            raise ValueError(f"--criteria {given}: at least two are needed to compare them, e.g. mone,residual,reap")
    return {name: statistics.score(name) for name in names}


def _scores(name: str, statistics: Statistics) -> bool:
    criterion = criterion_named(name)
    return not criterion.selector and criterion.needs <= statistics.groups


def _step(method: Method, path: str, statistics: Statistics) -> dict[str, Any]:
    calibration = {"statistics": path, **{key: value for key, value in statistics.info.items() if key != "plan"}}
    return history_step(method, statistics.shape, calibration)


def _unpredicted(edit: Edit, shape: ModelShape) -> LayerPrediction:
    if isinstance(edit, Sparsify | Quantize):
        return LayerPrediction(edit.layer, edit_in_words(edit, shape), None, note="error not predicted")
    return LayerPrediction(edit.layer, type(edit).__name__, None, note="not measured after the first method")


def _print_layers(predicted: Sequence[LayerPrediction], before: ModelShape, after: ModelShape) -> None:
    left = {layout.layer: layout for layout in after.layouts}
    print(f"\n{'layer':>5} {'experts':>8}  {'error':>11} {'relative':>9} {'with cross terms':>17}  decision")
    for layout in before.layouts:
        mine = [item for item in predicted if item.layer == layout.layer]
        counts = f"{len(layout.real)}->{len(left[layout.layer].real) if layout.layer in left else 0}"
        if not mine:
            print(f"{layout.layer:>5} {counts:>8}  {'0':>11} {'0':>9} {'':>17}  as it is")
        for item in mine:
            error = "?" if item.error is None else f"{item.error:.4g}"
            relative = _share(item.relative(item.error))
            joint = "-" if item.joint_error is None else _share(item.relative(item.joint_error))
            note = f" ({item.note})" if item.note else ""
            print(f"{layout.layer:>5} {counts:>8}  {error:>11} {relative:>9} {joint:>17}  {item.what}{note}")
    print(
        "error: squared error of the layer's output per token, experts for themselves; relative: as a share of the "
        "mean squared output; -: with cross terms only where the file holds pairs; an error in an early layer is "
        "carried through all later ones"
    )
    if any(item.what.startswith(("experts: ", "attention: ")) for item in predicted):
        print("pruning and integers: their errors take the weights and what enters them; compress measures them")


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.2%}"


def _print_sizes(before: ModelShape, after: ModelShape, sequence_length: int, known: Statistics | None) -> None:
    share = after.parameters / before.parameters
    flops = flops_of(before, sequence_length, known), flops_of(after, sequence_length, known)
    print(f"\nparameters {before.parameters:,} -> {after.parameters:,} ({share:.1%})")
    note = f"({before.weight_bytes} for each parameter)"
    if formats_of(after):
        note = f"({after.bytes / before.bytes:.1%}) on disk, {before.weight_bytes} for each plain parameter"
    print(f"bytes      {before.bytes:,} -> {after.bytes:,} {note}")
    for words in formats_of(after):
        print(f"weights    {words}")
    print(
        f"FLOPs      {flops[0]:,} -> {flops[1]:,} ({flops[1] / flops[0]:.1%}) a sequence of {sequence_length} tokens"
        + (", with the routing that was measured" if known is not None else ", at most: tokens may go to novices")
    )


def _print_agreement(scores: dict[str, torch.Tensor], statistics: Statistics, after: ModelShape) -> None:
    if len(scores) < 2:
        return
    layouts = statistics.shape.layouts
    left = {layout.layer: layout for layout in after.layouts}
    kept = [len(left[layout.layer].real) if layout.layer in left else 0 for layout in layouts]
    found = agreements(scores, [layout.real for layout in layouts], kept)
    names = list(scores)
    width = max(len(name) for name in names)
    print("\nagreement of criteria: Kendall's tau of the scores, mean over layers / experts that both would keep")
    print(" " * width + "".join(f"{name:>{max(width, 13) + 2}}" for name in names[1:]))
    for number, one in enumerate(names[:-1]):
        line = f"{one:<{width}}"
        for place, other in enumerate(names[1:], start=1):
            text = ""
            if place > number:
                tau, share = found[one, other]
                text = f"{tau:.2f} / {share:.0%}" if share == share else f"{tau:.2f} / -"
            line += f"{text:>{max(width, 13) + 2}}"
        print(line)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0, or 2 where the options do not fit.
    """
    return run_command("plan", plan_compression, arguments, flags=("--overwrite",), lists=("--methods",))
