"""Time one MoE layer of Mixtral-8x7B on a GPU: our kernels against transformers, and against what the machine allows.

    python benchmarks/gpu.py --output benchmarks/results
    python benchmarks/gpu.py --dry-run

First the machine's ceilings: a copy and a large product. Then a layer, router included, for all numbers of tokens,
formats and routings. An output is compared with a loop over experts in float32 before it is timed: the very buffers
that are timed, poisoned before. What differs is refused and makes the run fail in the end. Times are medians of replays
of a CUDA graph (transformers' eager loop waits for the GPU and cannot be recorded), in which several sets of weights
and inputs take turns, so that no weight is in a cache. The floor of a call is the larger of its bytes at the speed of
the copy and its operations at the speed of the product: weights of the experts that its tokens reach, inputs, outputs.

Needs torch, triton and 40 GB on the GPU; transformers where it is to be compared. A dry run does everything on a CPU
with tiny sizes, kernels in triton's interpreter: its times mean nothing.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
from gpu_layers import (
    DRY,
    EXPERTS,
    FORMATS,
    GPU,
    ROUTINGS,
    SETS,
    THEIRS,
    TOP_K,
    Call,
    Sizes,
    Weights,
    make_call,
    ours,
    transformers_block,
)
from torch import Tensor

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


class Timer:
    """Runs of all calls one after another: recorded as a graph where that is possible."""

    def __init__(self, runs: Sequence[Callable[[], Tensor]], sizes: Sizes, record: bool) -> None:
        """Warm up, which compiles kernels, and record."""
        self.runs, self.sizes, self.graph, self.why_no_graph = runs, sizes, None, ""
        self.outputs: list[Tensor] = []
        if sizes.device != "cuda":
            return  # nothing to compile
        self.outputs = [run() for run in runs]
        if not record:
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = [run() for run in runs]
        except RuntimeError as error:
            self.why_no_graph = first_line(error)
            torch.cuda.synchronize()
            self.outputs = [run() for run in runs]
        else:
            self.graph = graph

    def run(self) -> None:
        """Run all calls."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.outputs = [run() for run in self.runs]

    def checked_outputs(self) -> list[Tensor]:
        """Return what a run writes over buffers full of NaN."""
        for output in self.outputs:
            output.fill_(torch.nan)
        self.run()
        return self.outputs

    def seconds(self) -> float:
        """Return the median time of a call."""
        repeats = 1
        if self.sizes.seconds:
            repeats = max(5, min(100, int(self.sizes.seconds / min(self._times(2)))))
        return statistics.median(self._times(repeats)) / len(self.runs)

    def _times(self, repeats: int) -> list[float]:
        if self.sizes.device != "cuda":
            times = [time.perf_counter()]
            for _ in range(repeats):
                self.run()
                times.append(time.perf_counter())
            return [after - before for before, after in pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def measured_ceilings(sizes: Sizes) -> dict[str, float]:
    """Measure the speed of a copy and of a large product."""
    left = torch.randn(sizes.product, sizes.product, device=sizes.device).to(sizes.dtype)
    right, result = torch.randn_like(left), torch.empty_like(left)
    product = Timer([lambda: torch.mm(left, right, out=result)], sizes, False).seconds()
    source = torch.randint(0, 256, (sizes.copied,), dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    copied = Timer([lambda: target.copy_(source)], sizes, False).seconds()
    return {"flops_per_second": 2 * sizes.product**3 / product, "bytes_per_second": 2 * sizes.copied / copied}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``|got - want| / |want|``; infinite where a number is not finite."""
    error = float((got.float() - want).norm() / want.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def measure(
    make: Callable[[], list[Callable[[], Tensor]]], expected: list[Tensor], sizes: Sizes, record: bool
) -> dict[str, Any]:
    """Check and time one implementation; say what went wrong where something did."""
    try:
        timer = Timer(make(), sizes, record)
        outputs = timer.checked_outputs()
        error = max(relative_error(got, want) for got, want in zip(outputs, expected, strict=True))
        if error > TOLERANCE[sizes.dtype]:
            return {"refused": f"relative error {error:.2e}"}
        found = {"microseconds": timer.seconds() * 1e6, "relative_error": error, "graph": timer.graph is not None}
        return found | ({"why_no_graph": timer.why_no_graph} if timer.why_no_graph else {})
    except Exception as error:  # whatever it is, the other measurements go on
        return {"refused": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def rows_of(
    calls: list[Call], blocks: dict[str, list[Callable[[Tensor], Tensor]]], ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Time all formats, and transformers, on the same inputs."""
    sizes, tokens, rows = calls[0].weights.sizes, calls[0].hidden.shape[0], []
    for name, (form, novices) in FORMATS.items():
        real = EXPERTS - novices
        expected = [call.oracle(form, real) for call in calls]
        floors = [call.floor(form, real, ceilings) for call in calls]
        common = {
            "format": name,
            "floor_microseconds": statistics.mean(floor for floor, _ in floors) * 1e6,
            "bound_by": statistics.mode(bound for _, bound in floors),
        }
        found = measure(lambda form=form, real=real: [ours(call, form, real) for call in calls], expected, sizes, True)
        rows.append({**common, "implementation": "ours", **found})
        if name != "bf16":
            continue
        for implementation, theirs in blocks.items():
            if tokens > THEIRS[implementation]:
                continue

            def runs(theirs: list[Callable[[Tensor], Tensor]] = theirs) -> list[Callable[[], Tensor]]:
                return [
                    lambda block=theirs[number % SETS], call=call: block(call.hidden)
                    for number, call in enumerate(calls)
                ]

            found = measure(runs, expected, sizes, implementation != "eager")
            rows.append({**common, "implementation": implementation, **found})
    for row in rows:
        if "microseconds" in row:
            row["share_of_floor"] = row["floor_microseconds"] / row["microseconds"]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each number of tokens and routing, and what was refused."""
    print("\nmicroseconds a layer; (share of the floor) and, for ours, times as fast as transformers on bf16 weights")
    print("| tokens | routing | " + " | ".join(THEIRS) + " | " + " | ".join(f"ours {name}" for name in FORMATS) + " |")
    print("|--:|---|" + "--:|" * (len(THEIRS) + len(FORMATS)))
    for tokens, routing in dict.fromkeys((row["tokens"], row["routing"]) for row in rows):
        here = [row for row in rows if (row["tokens"], row["routing"]) == (tokens, routing) and "microseconds" in row]
        theirs = {row["implementation"]: row for row in here if row["implementation"] != "ours"}
        mine = {row["format"]: row for row in here if row["implementation"] == "ours"}
        cells = [_cell(theirs.get(name)) for name in THEIRS]
        cells += [
            _cell(mine.get(name), [theirs[other]["microseconds"] if other in theirs else None for other in THEIRS])
            for name in FORMATS
        ]
        print(f"| {tokens} | {routing} | " + " | ".join(cells) + " |")
    for row in rows:
        if "refused" in row:
            print(
                f"REFUSED {row['tokens']} tokens, {row['routing']}, {row['format']}, {row['implementation']}: "
                f"{row['refused']}"
            )


def _cell(row: dict[str, Any] | None, others: Sequence[float | None] = ()) -> str:
    if row is None:
        return "-"
    text = f"{row['microseconds']:,.0f} ({row['share_of_floor']:.0%})"
    ratios = ["-" if other is None else f"{other / row['microseconds']:.1f}" for other in others]
    return f"{text} {' / '.join(ratios)}x" if ratios else text


def environment(sizes: Sizes) -> dict[str, Any]:
    """Say what this runs on."""
    try:
        import transformers

        version = transformers.__version__
    except ImportError:
        version = None
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if sizes.device == "cuda" else f"{platform.machine()} CPU",
        "dtype": str(sizes.dtype),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": version,
        "commit": os.environ.get("COMMIT") or found.stdout.strip() or "unknown",
        "changed_files": len(changed.stdout.splitlines()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": {"hidden": sizes.hidden, "inner": sizes.inner, "experts": EXPERTS, "top_k": TOP_K, "sets": SETS},
    }


@torch.inference_mode()
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
    result: dict[str, Any] = {**environment(sizes), "ceilings": measured_ceilings(sizes), "rows": [], "left_out": []}
    print(
        f"{result['device']}, {result['dtype']}, torch {result['torch']}, triton {result['triton']}, transformers "
        f"{result['transformers']}\ncopy {result['ceilings']['bytes_per_second'] / 1e12:.2f} TB/s, product "
        f"{result['ceilings']['flops_per_second'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    weights = [Weights(sizes, seed) for seed in range(SETS)]
    blocks = {}
    if result["transformers"]:
        blocks = {name: [transformers_block(each, name) for each in weights] for name in THEIRS}
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
            spent = time.monotonic() - began
            mine = {
                row["format"]: f"{row['share_of_floor']:.0%}"
                for row in rows
                if row["implementation"] == "ours" and "share_of_floor" in row
            }
            print(f"{spent:.0f} s: {tokens} tokens, {routing}: ours / floor {mine}", flush=True)
            if target is not None:
                # After each case: what was measured is kept whatever comes.
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps({**result, "seconds": spent}, indent=2) + "\n")
    print_table(result["rows"])
    if result["left_out"]:
        print(f"left out after {options.minutes} minutes: {result['left_out']}")
    if target is not None:
        print(f"wrote {target}")
    return int(any("refused" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
