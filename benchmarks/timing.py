"""Check and time implementations of a layer, and measure what the machine allows, in the same run."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
from gpu_layers import EXPERTS, SETS, TOP_K, Sizes
from torch import Tensor

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


class Unavailable(Exception):
    """An implementation of others is not there, or does not take these sizes: nobody's mistake."""


class Timer:
    """Runs of all calls one after another: recorded as a graph where that is possible."""

    def __init__(
        self,
        runs: Sequence[Callable[[], Tensor]],
        sizes: Sizes,
        record: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Warm up, which compiles kernels, and record; the clock is for CPUs."""
        self.clock = clock
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
            times = [self.clock()]
            for _ in range(repeats):
                self.run()
                times.append(self.clock())
            return [after - before for before, after in pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def measured_ceilings(sizes: Sizes, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Measure the speed of a copy and of a large product.

    By the clock of what they are compared with. The package measures both for whole models (`benchmark_floors`), but
    this runs where only torch and triton are installed.
    """
    left = torch.randn(sizes.product, sizes.product, device=sizes.device).to(sizes.dtype)
    right, result = torch.randn_like(left), torch.empty_like(left)
    product = Timer([lambda: torch.mm(left, right, out=result)], sizes, False, clock).seconds()
    source = torch.randint(0, 256, (sizes.copied,), dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    copied = Timer([lambda: target.copy_(source)], sizes, False, clock).seconds()
    return {"flops_per_second": 2 * sizes.product**3 / product, "bytes_per_second": 2 * sizes.copied / copied}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``|got - want| / |want|``; infinite where a number is not finite."""
    error = float((got.detach().float() - want).norm() / want.norm().clamp(min=1e-30))
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
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:  # whatever it is, the other measurements go on
        return {"refused": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def version_of(package: str) -> str | None:
    """Return the version of what is installed, None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(sizes: Sizes) -> dict[str, Any]:
    """Say what this runs on."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name() if sizes.device == "cuda" else f"{platform.machine()} CPU",
        "dtype": str(sizes.dtype),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("triton", "transformers")},
        "commit": os.environ.get("COMMIT") or found.stdout.strip() or "unknown",
        "changed_files": len(changed.stdout.splitlines()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": {"hidden": sizes.hidden, "inner": sizes.inner, "experts": EXPERTS, "top_k": TOP_K, "sets": SETS},
    }
