"""Compare the ways to make matrices smaller on one trained model, with intervals.

    python benchmarks/slimming_quality.py runs/quickstart/models/original
    python benchmarks/slimming_quality.py MODEL --only "int4 g128" --output benchmarks/results

For every method: the squared error of what its MoE layers give for the original model's inputs, in units of the squares
of the original outputs, summed over layers and tokens, on the calibration text and on text held out; the same in units
of the plainest method of its family; and held-out perplexity divided by that of the original model. Intervals are
paired bootstrap intervals over blocks of text. The run fails where SparseGPT < Wanda < magnitude, or GPTQ, AWQ < RTN at
4 bits, does not hold for the calibration error.
"""

import argparse
import copy
import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import moe_lightning as ml
from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation import perplexity_ratio_interval
from moe_lightning.evaluation.intervals import Interval, bootstrap
from moe_lightning.slimming import Slimming

Batch = Mapping[str, Any]


class Row(NamedTuple):
    """One method of the table."""

    family: str
    make: Callable[[], Slimming]


def pruning(family: str, **options: Any) -> dict[str, Row]:
    """Return the pruning methods with a sparsity or a pattern; the plainest comes first."""
    makers: dict[str, Callable[[], Slimming]] = {
        "magnitude": lambda: ml.Magnitude(**options),
        "Wanda": lambda: ml.Wanda(**options),
        "Wanda, router-weighted": lambda: ml.Wanda(**options, router_weighted=True),
        "SparseGPT by row": lambda: ml.SparseGPT(**options, scope="row"),
        "SparseGPT": lambda: ml.SparseGPT(**options),
    }
    if "pattern" in options:
        del makers["SparseGPT by row"]
    return {f"{name}, {family}": Row(family, make) for name, make in makers.items()}


def rounding(family: str, **options: Any) -> dict[str, Row]:
    """Return the rounding methods with a grid; the plainest comes first."""
    makers: dict[str, Callable[[], Slimming]] = {
        "RTN": lambda: ml.RTN(**options),
        "GPTQ": lambda: ml.GPTQ(**options),
        "GPTQ desc_act": lambda: ml.GPTQ(**options, desc_act=True),
        "AWQ": lambda: ml.AWQ(**options),
        "AWQ, any scale": lambda: ml.AWQ(**options, power_of_two=False),
        "AWQ, diagonal": lambda: ml.AWQ(**options, loss="diagonal"),
    }
    return {f"{name}, {family}": Row(family, make) for name, make in makers.items()}


ROWS = {
    **pruning("50 %", sparsity=0.5),
    **pruning("2:4", pattern="2:4"),
    **rounding("int4 g128", group_size=128),
    **rounding("int4 g32", group_size=32),
    **rounding("int8 g128", bits=8, group_size=128),
}
ORDERS = [
    *((f"SparseGPT, {family}", f"Wanda, {family}") for family in ("50 %", "2:4")),
    *((f"Wanda, {family}", f"magnitude, {family}") for family in ("50 %", "2:4")),
    *((f"{name}, {family}", f"RTN, {family}") for name in ("GPTQ", "AWQ") for family in ("int4 g128", "int4 g32")),
]
"""Which method must have the smaller calibration error."""


def output_errors(original: Any, model: Any, batches: Iterable[Batch]) -> Tensor:
    """Sum squared errors and squares of the MoE layers' outputs over each block of text.

    Args:
        original: The model before.
        model: The model after; its layers get what those of the original get, before the norm.
        batches: Text.

    Returns:
        ``[2, blocks]`` float64: squared errors, squares.
    """
    before = architecture_of(original).moe_layers(original)
    after = architecture_of(model).moe_layers(model)
    found = []
    with evaluation_mode(original), evaluation_mode(model):
        for batch in batches:
            sums = torch.zeros(2, len(batch["input_ids"]), dtype=torch.float64)
            seen: dict[int, Tensor] = {}

            def compare(place: int, given: Tensor, sums: Tensor = sums, seen: dict[int, Tensor] = seen) -> None:
                out = after[place].block(after[place].norm(seen.pop(place)))
                error = ((out[0] if isinstance(out, tuple) else out) - given).double()
                sums[0] += error.square().sum((1, 2))
                sums[1] += given.double().square().sum((1, 2))

            handles = []
            for place, layer in enumerate(before):
                handles.append(
                    layer.norm.register_forward_pre_hook(
                        lambda _, args, place=place, seen=seen: seen.__setitem__(place, args[0])
                    )
                )
                handles.append(
                    layer.block.register_forward_hook(
                        lambda _, args, out, place=place: compare(place, out[0] if isinstance(out, tuple) else out)
                    )
                )
            try:
                original.model(input_ids=batch["input_ids"], use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            found.append(sums)
    return torch.cat(found, dim=1)


def ratio(sums: Tensor) -> Interval:
    """Return one sum divided by another, with its interval."""
    return bootstrap(sums, lambda total: total[0] / total[1])


def commit() -> str:
    """Return the commit that is measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def words(interval: Interval) -> str:
    """Return an interval for a table."""
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def main() -> None:
    """Measure, print a table, and fail where an order does not hold."""
    parser = argparse.ArgumentParser(description="Compare the ways to make matrices smaller on one trained model.")
    parser.add_argument("model", help="folder of the model with its tokenizer")
    parser.add_argument("--sources", default="python-stdlib", help="text that it was trained on")
    parser.add_argument("--max_bytes", type=int, default=8_000_000, help="bytes of text to read")
    parser.add_argument("--batches", type=int, default=16, help="calibration batches of 8 blocks")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a block")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", default=None, help="folder for the Markdown and JSON files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="min_tokens")
    data = ml.TextDataModule(
        sources=options.sources,
        tokenizer=options.model,
        block_size=options.block_size,
        batch_size=8,
        max_bytes=options.max_bytes,
        validation=64,
        test=128,
        calibration=8 * options.batches,
    )
    data.prepare_data()
    data.setup("test")
    calibration, held_out = list(data.calibration_batches(options.batches)), list(data.test_dataloader())
    original = ml.from_pretrained(options.model)
    reference = ml.evaluate(original, held_out)
    chosen = {name: row for name, row in ROWS.items() if options.only in name}
    if not chosen:
        raise SystemExit(f"--only {options.only!r} leaves no row: {', '.join(ROWS)}")
    tokens = sum(batch["input_ids"].numel() for batch in calibration)
    size = ml.measure(original)
    head = (
        f"{size.parameters:,} parameters, perplexity {reference.perplexity:.2f} on {len(reference.tokens)} blocks held "
        f"out; {tokens} calibration tokens; 95 % intervals by paired bootstrap over blocks; torch {torch.__version__}, "
        f"commit {commit()}\n"
    )
    table = [
        "| method | calibration error | held-out error | of the plainest | perplexity ratio | bytes | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    print(head, *table, sep="\n", flush=True)
    sums: dict[str, Tensor] = {}
    plainest: dict[str, Tensor] = {}
    rows = []
    for name, (family, make) in chosen.items():
        model = copy.deepcopy(original)
        start = time.perf_counter()
        result = ml.compress(model, calibration, make(), progress=False)
        seconds = time.perf_counter() - start
        sums[name] = output_errors(original, model, calibration)
        later = output_errors(original, model, held_out)
        base = plainest.setdefault(family, sums[name])
        found = {
            "calibration_error": ratio(sums[name]),
            "held_out_error": ratio(later),
            "of_plainest": ratio(torch.stack([sums[name][0], base[0]])),
            "perplexity_ratio": perplexity_ratio_interval(ml.evaluate(model, held_out), reference),
        }
        share = result.shape_after.bytes / result.shape_before.bytes
        cells = [words(interval) for interval in found.values()]
        last = found["perplexity_ratio"]
        cells[-1] = f"{last.value:.4f} [{last.low:.4f}, {last.high:.4f}]"
        table.append(f"| {name} | {' | '.join(cells)} | {share:.1%} | {seconds:.1f} |")
        print(table[-1], flush=True)
        rows.append(
            {
                "method": name,
                "options": str(make()),
                "bytes": share,
                "seconds": seconds,
                **{key: [interval.value, interval.low, interval.high] for key, interval in found.items()},
            }
        )
    print()
    broken = []
    verdicts = []
    for better, worse in ORDERS:
        if better in sums and worse in sums:
            interval = ratio(torch.stack([sums[better][0], sums[worse][0]]))
            verdicts.append(f"* calibration error of {better} / {worse}: {words(interval)}")
            print(verdicts[-1])
            if interval.value >= 1:
                broken.append(f"{better} is no better than {worse}")
    if options.output:
        target = Path(options.output)
        target.mkdir(parents=True, exist_ok=True)
        (target / "slimming-quality.md").write_text("\n".join([head, *table, "", *verdicts, ""]))
        result = {
            "parameters": size.parameters,
            "machine": f"{platform.machine()} CPU",
            "threads": options.threads,
            "calibration_tokens": tokens,
            "perplexity": reference.perplexity,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": rows,
        }
        (target / "slimming-quality.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target / 'slimming-quality.md'}")
    if broken:
        raise SystemExit("; ".join(broken))


if __name__ == "__main__":
    main()
