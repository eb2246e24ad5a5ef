"""Time a statistics pass against a plain forward pass over the same tokens, in one run.

    python benchmarks/statistics_pass.py
    python benchmarks/statistics_pass.py --device cuda --output benchmarks/results

Passes of all kinds take turns, so that what else the machine does hits all of them; the ratio of each turn is to the
plain pass of the same turn, and the median over turns is shown. Only ratios inside one run mean anything on a shared
machine; beside them stand those of this process's processor time, which other processes disturb less. The JSON says on
what it ran.
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
import transformers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import moe_lightning as ml

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
}
CHEAP = ("blocks", "layers", "outputs", "routing")
GROUPS = {
    "default": CHEAP,
    "with similarity": (*CHEAP, "similarity"),
    "with pairs": (*CHEAP, "pairs", "similarity"),
    "with channels": (*CHEAP, "channels", "similarity"),
    "everything in one pass": (*CHEAP, "channels", "pairs", "similarity"),
}
LIMIT = 1.3


def seconds_of(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return how long one call takes, and how much processor time."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, start_of_process = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - start_of_process


def measure(device: str, dtype: torch.dtype, repeats: int, batches: int, tokens: int) -> list[dict[str, Any]]:
    """Return one row for each set of groups: ratios to the plain pass."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES)).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(SIZES["vocab_size"], (1, tokens), generator=generator)} for _ in range(batches)]

    @torch.no_grad()
    def plain() -> Tensor:
        for batch in data:
            states = model.model(input_ids=batch["input_ids"].to(device), use_cache=False).last_hidden_state
        return states

    def observed(groups: tuple[str, ...]) -> Callable[[], object]:
        return lambda: ml.collect(model, data, groups, progress=False)

    runs = {"plain": plain, **{name: observed(groups) for name, groups in GROUPS.items()}}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            seconds = seconds_of(run, device)
            if turn:  # the first turn warms up
                took[name].append(seconds)
    rows = []
    for name, groups in GROUPS.items():
        # Wall clock, processor.
        ratios = [
            [this[clock] / base[clock] for this, base in zip(took[name], took["plain"], strict=True)]
            for clock in range(2)
        ]
        rows.append(
            {
                "pass": name,
                "groups": list(groups),
                "ratio": statistics.median(ratios[0]),
                "smallest": min(ratios[0]),
                "largest": max(ratios[0]),
                "processor_ratio": statistics.median(ratios[1]),
                "seconds": statistics.median(wall for wall, _ in took[name]),
                "plain_seconds": statistics.median(wall for wall, _ in took["plain"]),
            }
        )
    return rows


def commit() -> str:
    """Return the commit that is timed."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Time, print a table, and fail where everything in one pass is over the limit."""
    parser = argparse.ArgumentParser(description="Time a statistics pass against a plain forward pass.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count, 5 or more")
    parser.add_argument("--batches", type=int, default=2, help="batches in a pass")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch, one sequence")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", default=None, help="folder for the JSON file")
    options = parser.parse_args()
    if options.repeats < 5:
        raise SystemExit("--repeats must be 5 or more: a median of fewer says nothing on a busy machine")
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = measure(options.device, dtype, options.repeats, options.batches, options.tokens)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{name}, {options.threads} thread(s), {options.dtype}, {options.batches} x {options.tokens} tokens, "
        f"hidden {SIZES['hidden_size']}, median of {options.repeats} turns; torch {torch.__version__}\n"
    )
    print("| pass | time of a plain forward pass | smallest to largest | processor time |\n|---|--:|--:|--:|")
    for row in rows:
        spread = f"{row['smallest']:.3f} to {row['largest']:.3f}"
        print(f"| {row['pass']} | {row['ratio']:.3f}x | {spread} | {row['processor_ratio']:.3f}x |")
    if options.output:
        target = Path(options.output) / f"statistics_pass-{options.device}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "device": name,
            "threads": options.threads,
            "dtype": options.dtype,
            "batches": options.batches,
            "tokens": options.tokens,
            "repeats": options.repeats,
            "sizes": SIZES,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")
    if rows[-1]["ratio"] > LIMIT:
        raise SystemExit(f"everything in one pass costs more than {LIMIT} times a plain forward pass")


if __name__ == "__main__":
    main()
