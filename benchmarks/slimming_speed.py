"""Time GPTQ and SparseGPT on all experts of a layer at once against one expert after another, in one run.

    python benchmarks/slimming_speed.py
    python benchmarks/slimming_speed.py --device cuda --output benchmarks/results

Both take turns, so that what else the machine does hits both; the ratio of each turn is to the other's time in the same
turn, and the median over turns is shown. Before, both must give the same result in float64. Only ratios inside one run
mean anything on a shared machine. The run fails where working at once is less than 1.5 times (on a GPU 3 times) as fast
at the quickstart's width, or slower anywhere.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe_lightning.slimming import Scheme, Selection, dequantize, prune_by_sparse_gpt, round_by_gptq
from moe_lightning.slimming.hessian import portions

WIDTHS = {
    "quickstart, gate and up": (8, 512, 128),
    "quickstart, down": (8, 128, 256),
    "hidden 512, gate and up": (8, 1024, 512),
    "hidden 512, down": (8, 512, 512),
    "hidden 1024, gate and up": (4, 2048, 1024),
    "hidden 1024, down": (4, 1024, 1024),
    "hidden 1024, wide": (2, 4096, 1024),
}
"""Matrices, outputs, inputs."""

QUICKSTART = {"cpu": 1.5, "cuda": 3.0}
SLACK = 0.9
"""A ratio that is not slower: on a shared machine, the same work twice differs by some percent."""


def methods(size: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Callable[[int | None], Any]]:
    """Return what is timed: each takes how many matrices to work on at once, None for its own choice."""
    slots, outputs, inputs = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(slots, outputs, inputs, generator=generator).to(device, dtype)
    tokens = torch.randn(slots, 2 * inputs, inputs, generator=generator).to(device, dtype)
    hessian = tokens.mT @ tokens
    scheme = Scheme(4, 128)
    return {
        "GPTQ": lambda at_once: round_by_gptq(weight, hessian, scheme, at_once=at_once),
        "SparseGPT 2:4": lambda at_once: prune_by_sparse_gpt(
            weight, hessian, Selection(pattern="2:4"), at_once=at_once
        ),
    }


def check_same(size: tuple[int, int, int], device: str) -> None:
    """Raise unless both ways give the same result."""
    for name, run in methods(size, device, torch.float64).items():
        at_once, one = run(None), run(1)
        if name == "GPTQ":
            same = torch.equal(at_once.quantized.codes, one.quantized.codes)
            close = torch.allclose(dequantize(at_once.quantized), dequantize(one.quantized), rtol=1e-9)
        else:
            same = torch.equal(at_once.keep, one.keep)
            close = torch.allclose(at_once.weight, one.weight, rtol=1e-7, atol=1e-9)
        if not (same and close):
            raise SystemExit(f"{name} on {size}: all at once and one after another differ")


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return how long one call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(device: str, repeats: int, widths: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Return one row for each width and method."""
    rows = []
    for name, size in widths.items():
        if size[1] * size[2] <= 1 << 19:
            check_same(size, device)
        for method, run in methods(size, device, torch.float32).items():
            ratios, times = [], []
            for turn in range(repeats + 1):
                one = seconds_of(lambda run=run: run(1), device)
                together = seconds_of(lambda run=run: run(None), device)
                if turn:  # the first turn warms up
                    ratios.append(one / together)
                    times.append(together)
            portion = portions(torch.empty(size, device=device), None)[0]
            rows.append(
                {
                    "width": name,
                    "size": list(size),
                    "method": method,
                    "at_once": min(portion.stop, size[0]),
                    "times_faster": statistics.median(ratios),
                    "smallest": min(ratios),
                    "largest": max(ratios),
                    "seconds": statistics.median(times),
                }
            )
            row = rows[-1]
            spread = f"{row['smallest']:.2f} to {row['largest']:.2f}"
            print(
                f"| {name} {size} | {method} | {row['at_once']} | {row['times_faster']:.2f}x | {spread} | "
                f"{row['seconds']:.3f} |",
                flush=True,
            )
    return rows


def commit() -> str:
    """Return the commit that is timed."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Time, print a table, and fail where working at once does not pay."""
    parser = argparse.ArgumentParser(description="Time slimming methods on all experts at once.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count, 5 or more")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", default="", help="widths whose name contains this")
    parser.add_argument("--output", default=None, help="folder for the JSON file")
    options = parser.parse_args()
    if options.repeats < 5:
        raise SystemExit("--repeats must be 5 or more: a median of fewer says nothing on a busy machine")
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{device}, {options.threads} thread(s), float32, median of {options.repeats} turns; torch "
        f"{torch.__version__}\n\n| width (matrices, outputs, inputs) | method | at once | times as fast as one by one "
        "| smallest to largest | seconds |\n|---|---|--:|--:|--:|--:|",
        flush=True,
    )
    rows = measure(
        options.device, options.repeats, {name: size for name, size in WIDTHS.items() if options.only in name}
    )
    if options.output:
        target = Path(options.output) / f"slimming_speed-{options.device}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "device": device,
            "threads": options.threads,
            "repeats": options.repeats,
            "torch": torch.__version__,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")
    slow = [
        f"{row['method']} at {row['width']}: {row['times_faster']:.2f}x"
        for row in rows
        if row["times_faster"] < (QUICKSTART[options.device] if "quickstart" in row["width"] else SLACK)
    ]
    if slow:
        raise SystemExit(f"working at once does not pay: {'; '.join(slow)}")


if __name__ == "__main__":
    main()
