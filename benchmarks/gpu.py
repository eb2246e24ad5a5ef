"""Time one MoE layer of Mixtral-8x7B on a GPU: our kernels against transformers, and against what the machine allows.

    python benchmarks/gpu.py --output benchmarks/results
    python benchmarks/gpu.py --dry-run

First the machine's ceilings: a copy and a large product. Then a layer, router included, for all numbers of tokens,
formats and routings. An output is compared with a loop over experts in float32 before it is timed: the very buffers
that are timed, poisoned before. What differs is refused and makes the run fail in the end. Times are medians of replays
of a CUDA graph (loops over experts wait for the GPU and cannot be recorded), in which several sets of weights and
inputs take turns, so that no weight is in a cache. The floor of a call is the larger of its bytes at the speed of the
copy and its operations at the speed of the product: weights of the experts that its tokens reach, inputs, outputs. Then
training steps with LoRA, whose output and gradients are compared with float32 autograd.

Needs torch, triton and 60 GB on the GPU; transformers where it is to be compared. A dry run does everything on a CPU
with tiny sizes, kernels in triton's interpreter: its times mean nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_layers import (
    DRY,
    EXPERTS,
    FORMATS,
    GPU,
    ROUTINGS,
    SETS,
    THEIRS,
    Call,
    Weights,
    make_call,
    ours,
    transformers_block,
)
from int4_loop import int4_loop
from tables import INT4_LOOP, document
from timing import Unavailable, environment, measure, measured_ceilings
from torch import Tensor
from training_step import training_rows

Layer = Callable[[Tensor], Tensor]

OTHERS = {**{name: ("bf16", most, name != "eager") for name, most in THEIRS.items()}, INT4_LOOP: ("int4", 8192, False)}
"""Whom ours is timed against: on which format, up to how many tokens, and whether a graph can record it."""


def opponents(weights: list[Weights]) -> dict[str, list[Layer] | str]:
    """Return everybody else's layers, one for each set of weights, or why there are none."""
    blocks: dict[str, list[Layer] | str] = {}
    for name in THEIRS:
        try:
            blocks[name] = [transformers_block(each, name) for each in weights]
        except ImportError as error:
            blocks[name] = str(error)
    try:
        blocks[INT4_LOOP] = [int4_loop(each) for each in weights]
    except Unavailable as reason:
        blocks[INT4_LOOP] = str(reason)
    return blocks


@torch.inference_mode()
def rows_of(
    calls: list[Call], blocks: dict[str, list[Layer] | str], ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Time all formats, and everybody else, on the same inputs."""
    sizes, tokens, rows = calls[0].weights.sizes, calls[0].hidden.shape[0], []
    for name, (form, novices) in FORMATS.items():
        real = EXPERTS - novices
        expected = [call.oracle(form, real) for call in calls]
        floors = [call.floor(form, real, ceilings) for call in calls]
        held = itertools.chain(*calls[0].weights.for_kernels(form, real))
        common = {
            "format": name,
            "floor_microseconds": statistics.mean(floor for floor, _ in floors) * 1e6,
            "bound_by": statistics.mode(bound for _, bound in floors),
            "weight_bytes": sum(part.numel() * part.element_size() for part in held),
        }
        found = measure(lambda form=form, real=real: [ours(call, form, real) for call in calls], expected, sizes, True)
        rows.append({**common, "implementation": "ours", **found})
        for implementation, (their_format, most, record) in OTHERS.items():
            if name != their_format or tokens > most:
                continue
            theirs = blocks[implementation]
            if isinstance(theirs, str):
                found = {"unavailable": theirs}
            else:
                found = measure(lambda theirs=theirs: _runs(theirs, calls), expected, sizes, record)
            rows.append({**common, "implementation": implementation, **found})
    for row in rows:
        if "microseconds" in row:
            row["share_of_floor"] = row["floor_microseconds"] / row["microseconds"]
    return rows


def _runs(layers: list[Layer], calls: list[Call]) -> list[Callable[[], Tensor]]:
    return [partial(layers[number % len(layers)], call.hidden) for number, call in enumerate(calls)]


def keep(result: dict[str, Any], target: Path | None, began: float) -> None:
    """Write what was measured so far, whatever comes."""
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**result, "seconds": time.monotonic() - began}, indent=2) + "\n")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return how many measurements were refused, 1 at most."""
    parser = argparse.ArgumentParser(description="Time one MoE layer on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: the times mean nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no other case after this time")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="numbers of tokens; all where left out")
    parser.add_argument("--routings", choices=ROUTINGS, nargs="+", default=ROUTINGS, help="who chooses which expert")
    parser.add_argument("--output", default=None, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: on a CPU, make bench; --dry-run tries this script out")
    began, sizes = time.monotonic(), DRY if options.dry_run else GPU
    result: dict[str, Any] = {**environment(sizes), "ceilings": measured_ceilings(sizes), "rows": []}
    result |= {"training": [], "left_out": []}
    print(
        f"{result['device']}, {result['dtype']}, torch {result['torch']}, triton {result['triton']}, transformers "
        f"{result['transformers']}\ncopy {result['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, product "
        f"{result['ceilings']['flops_per_second'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    weights = [Weights(sizes, seed) for seed in range(SETS)]
    blocks = opponents(weights)
    target = Path(options.output) / f"gpu-{result['device'].lower().replace(' ', '-')}.json" if options.output else None
    for routing in options.routings:
        for tokens in options.tokens or sizes.tokens:
            if time.monotonic() - began > 60 * options.minutes:
                result["left_out"].append({"tokens": tokens, "routing": routing})
                continue
            # Few tokens reach other experts in every input: more of them, for a fair mean.
            inputs = SETS if tokens > 64 else 2 * SETS
            if options.dry_run:
                inputs = 1 + (tokens == 1)
            calls = [make_call(weights[number % SETS], tokens, routing, number) for number in range(inputs)]
            rows = [{"tokens": tokens, "routing": routing, **row} for row in rows_of(calls, blocks, result["ceilings"])]
            result["rows"] += rows
            mine = {
                row["format"]: f"{row['share_of_floor']:.0%}"
                for row in rows
                if row["implementation"] == "ours" and "share_of_floor" in row
            }
            print(f"{time.monotonic() - began:.0f} s: {tokens} tokens, {routing}: ours / floor {mine}", flush=True)
            keep(result, target, began)
        if routing != options.routings[0]:
            continue
        # After the first routing, so that the others, and not this, are left out where time is short.
        for tokens in sizes.steps:
            if time.monotonic() - began > 60 * options.minutes:
                result["left_out"].append({"tokens": tokens, "routing": "training step"})
                continue
            result["training"] += training_rows(weights[0], tokens, result["ceilings"], 1 if options.dry_run else 10)
            print(f"{time.monotonic() - began:.0f} s: training step, {tokens} tokens", flush=True)
            keep(result, target, began)
    print("\n" + document(result))
    if target is not None:
        print(f"wrote {target}")
    return int(any("refused" in row for row in [*result["rows"], *result["training"]]))


if __name__ == "__main__":
    sys.exit(main())
