"""Time whole Mixtrals: the eight rows of 2406.02500's Table 3, and novices, against two baselines.

    python benchmarks/full_model.py --output benchmarks/results                  # a GPU with more than 100 GiB
    python benchmarks/full_model.py --scale 64 --threads 1 --context 256         # anywhere

The weights are random, integers are random words: speed and memory do not depend on them, only on who is routed where,
and random routers route evenly. Every model is compared with a slow computation of what its weights say before it is
timed. Quality is another matter: `moe-lightning compress -c mixtral-8x7b/...` makes such models of real weights.

The paper's figures are against a loop over experts in Python, as transformers' `eager` is; a fused baseline,
`grouped_mm`, stands beside it here. Where the models fit together they take turns in every repeat, otherwise each is
alone on the device; the JSON says which. Integers are those of the experts; the paper rounds attention as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig

from moe_lightning.architectures import architecture_named
from moe_lightning.evaluation.benchmark import (
    OURS,
    ceilings_of,
    described_model,
    described_run,
    entrants_of,
    run_benchmark,
)
from moe_lightning.evaluation.benchmark_rows import BenchmarkRecord, Settings, TimedRow, told_context
from moe_lightning.experts import Int4
from moe_lightning.experts.kernel_path import use_kernels
from moe_lightning.files import write_atomically
from moe_lightning.plan import CompressionPlan, DropBlock, DropMoE, Edit, KeepExperts, NoviceExperts, Quantize
from moe_lightning.surgery import build

BASE = "base"
PAPER = {
    BASE: (1.0, 87.7),
    "int4": (5.08, 24.4),
    "E2/8": (1.06, 66.7),
    "E2/8 + int4": (5.28, 20.1),
    "L8/32": (1.19, 66.6),
    "L8/32 + int4": (6.05, 20.0),
    "B5/32": (1.17, 74.1),
    "B5/32 + int4": (5.94, 21.9),
}
"""Times as fast as the base, and GB, in 2406.02500 Table 3."""

VARIANTS = (*PAPER, "novices 25 %", "novices 25 % + int4")
BASELINES = ("eager", "grouped_mm")
SHARE_OF_MEMORY = 0.5
"""Of the device's free memory that all models together may take to be timed in turn."""


def config_of(scale: int, layers: int, length: int) -> MixtralConfig:
    """Return the config of Mixtral-8x7B with matrices of a part of the size.

    Args:
        scale: How many times fewer weights a layer has; a square.
        layers: Decoder layers.
        length: Longest sequence.

    Raises:
        SystemExit: A scale that does not divide the sizes.
    """
    side = math.isqrt(scale)
    if side**2 != scale or 4096 % side or side > 64:
        raise SystemExit(f"--scale {scale}: give 1, 4, 16, 64, 256, 1024 or 4096")
    return MixtralConfig(
        vocab_size=32000 // side,
        hidden_size=4096 // side,
        intermediate_size=14336 // side,
        num_hidden_layers=layers,
        num_attention_heads=max(1, 32 // side),
        num_key_value_heads=max(1, 8 // side),
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
    )


def plan_of_variant(name: str, layers: int, group_size: int) -> CompressionPlan:
    """Return the plan of a row of the table.

    Args:
        name: One of ``VARIANTS``.
        layers: Decoder layers of the model; as many are dropped of fewer than 32, in proportion.
        group_size: Of int4.
    """
    structure, _, packed = name.partition(" + ")
    every = range(layers)
    # Which ones go makes no difference here; methods choose by what they measure, mostly among the later ones.
    edits: list[Edit] = []
    gone: Sequence[int] = ()
    if structure == "E2/8":
        edits = [KeepExperts(layer, tuple(range(6))) for layer in every]
    elif structure == "novices 25 %":
        edits = [NoviceExperts(layer, (6, 7)) for layer in every]
    elif structure in ("L8/32", "B5/32"):
        count = max(1, round(layers * int(structure[1]) / 32))
        gone = every[-1 - count : -1]
        edits = [DropMoE(layer) if structure[0] == "L" else DropBlock(layer) for layer in gone]
    if packed or structure == "int4":
        edits += [Quantize(layer, group_size=group_size) for layer in every if layer not in gone]
    return CompressionPlan(tuple(edits))


@torch.no_grad()
def random_model(config: MixtralConfig, plan: CompressionPlan, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with random weights, the same ones each time; it is built where it stays.

    Args:
        config: Of the model before.
        plan: What is done to it.
        device: Where.
        dtype: Type of the weights.
    """
    with torch.device("meta"):
        model = build(config, plan).to(dtype)
    model.config.dtype = dtype
    model.to_empty(device=device)
    # Frequencies are in no state dict, and stay in float32.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    draw = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            spread = 1.0 if "embed" in name else 0.1 if "novices" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, spread, generator=draw)
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Int4):
            _fill_int4(module, draw)
    return model.eval()


def _fill_int4(stack: Int4, draw: torch.Generator) -> None:
    """Fill in random codes, zeros in the middle of the grid, and scales that give weights as large as the others."""
    stack.words.random_(-(2**31), 2**31 - 1, generator=draw)
    # Codes spread by 4.6 around their zero.
    stack.scale.uniform_(0.8, 1.2, generator=draw).mul_(stack.inputs**-0.5 / 4.6)
    if stack.zero is not None:
        low, high = (torch.empty_like(stack.zero).random_(6, 10, generator=draw) for _ in range(2))
        stack.zero.copy_(low | high << 4)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(record: BenchmarkRecord) -> str:
    """Return the table of the paper in Markdown, from what was measured.

    Args:
        record: What was measured.
    """
    cells = sorted({(row.phase != "prefill", row.batch, row.context, row.phase) for row in record.rows})
    header = ["model", "weights GB", "GiB", "peak GB", "GiB", "paper GB"]
    header += [f"{phase} {batch} x {context}: tokens/s, x eager, x grouped_mm" for _, batch, context, phase in cells]
    by_cell: dict[tuple[Any, ...], TimedRow] = {
        (row.model, row.implementation, row.phase, row.batch, row.context): row for row in record.rows
    }
    lines = []
    for model in record.models:
        for implementation in (*BASELINES, OURS):
            found = [by_cell.get((model, implementation, phase, *size)) for _, *size, phase in cells]
            rows = [row for row in found if row is not None]
            if rows:
                lines.append([f"{model}, {implementation}", *_memory(rows, model)])
                lines[-1] += ["-" if row is None else _speed(row, by_cell) for row in found]
    rules = "---|" + "--:|" * (len(header) - 1)
    return "\n".join([f"| {' | '.join(header)} |", f"|{rules}", *(f"| {' | '.join(line)} |" for line in lines)])


def _memory(rows: Sequence[TimedRow], model: str) -> list[str]:
    weights = rows[0].weight_bytes
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None and row.phase == "prefill"]
    peak = [f"{max(peaks) / unit:.3g}" if peaks else "-" for unit in (1e9, 2**30)]
    paper = f"{PAPER[model][1]:.1f}" if model in PAPER else "-"
    return [f"{weights / 1e9:.3g}", f"{weights / 2**30:.3g}", *peak, paper]


def _speed(row: TimedRow, by_cell: dict[tuple[Any, ...], TimedRow]) -> str:
    if row.tokens_per_second is None:
        return "refused"
    told = [f"{row.tokens_per_second['median']:,.0f}"]
    for name in BASELINES:
        base = by_cell.get((BASE, name, row.phase, row.batch, row.context))
        rate = None if base is None else base.tokens_per_second
        told.append("-" if rate is None else f"{row.tokens_per_second['median'] / rate['median']:.2f}")
    return ", ".join(told)


def measured(options: argparse.Namespace) -> BenchmarkRecord:
    """Make the models, compare and time them."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    length = max(options.context, options.decode_context) + options.new_tokens
    config = config_of(options.scale, options.layers, length)
    batches = tuple(options.batch_sizes)
    decode = Settings(batches, (options.decode_context,), options.new_tokens, options.repeats, options.warmup)
    decode = replace(decode, phases=("decode",))
    prefill = replace(decode, batch_sizes=(1,), contexts=(options.context,), phases=("prefill",))
    draw = torch.Generator().manual_seed(0)
    ids: Tensor = torch.randint(config.vocab_size, (max(batches), length), generator=draw)
    group = 128 if config.hidden_size % 128 == 0 and config.intermediate_size % 128 == 0 else 32
    plans = {name: plan_of_variant(name, options.layers, group) for name in options.variants}
    shape = replace(architecture_named("mixtral").shape_of_config(config), weight_bytes=dtype.itemsize)
    sizes = {name: plan.check(shape).bytes for name, plan in plans.items()}
    free = free_bytes(device)
    if max(sizes.values()) > 0.9 * free:
        raise SystemExit(
            f"{max(sizes.values()) / 2**30:.0f} GiB of weights do not fit into {free / 2**30:.0f} GiB: try --scale 16"
        )
    together = sum(sizes.values()) < SHARE_OF_MEMORY * free
    source = "random tokens and random routers, seed 0: every expert is as likely as any other"
    context = described_run(device, [options.dtype], source, decode)
    context |= {
        "where": str(device),
        "scale": options.scale,
        "layers": options.layers,
        "in_turn": together,
        "group_size": group,
    }
    print(f"{told_context(context)}\n{'all models in turn' if together else 'one model at a time'}", flush=True)
    record = BenchmarkRecord(context, {}, [])
    for names in [list(plans)] if together else [[name] for name in plans]:
        record.rows.extend(_rows(names, plans, config, (prefill, decode), ids, record))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        keep(record, options)
    return record


def _rows(
    names: Sequence[str],
    plans: dict[str, CompressionPlan],
    config: MixtralConfig,
    settings: Sequence[Settings],
    ids: Tensor,
    record: BenchmarkRecord,
) -> list[TimedRow]:
    device = torch.device(record.context["where"])
    kind = getattr(torch, record.context["dtype"])
    models: dict[str, nn.Module] = {}
    for name in names:
        print(f"making {name}", flush=True)
        models[name] = random_model(config, plans[name], device, kind)
    entrants = [each for name in names for each in entrants_of(name, models[name], (*BASELINES, OURS))]
    ceilings = ceilings_of(entrants)
    for name in names:
        record.models[name] = described_model(models[name], "random weights", settings[0], ceilings[name])

    def progress(what: str) -> None:
        print(what, flush=True)

    return [row for each in settings for row in run_benchmark(entrants, ids, each, ceilings, progress)]


def keep(record: BenchmarkRecord, options: argparse.Namespace) -> None:
    """Write what there is by now."""
    if options.output is None:
        return
    device = record.context["device"].lower().replace(" ", "-")
    target = Path(options.output) / f"full-model-{device}{'' if options.scale == 1 else f'-{options.scale}th'}.json"
    write_atomically(target, json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n")
    write_atomically(target.with_suffix(".md"), document(record))
    print(f"wrote {target}", flush=True)


def document(record: BenchmarkRecord) -> str:
    """Return both tables in Markdown."""
    turns = "All models took turns." if record.context["in_turn"] else "Each model was alone on the device."
    return f"{turns}\n\n{table(record)}\n\n{record.markdown()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return 1 where something was refused."""
    parser = argparse.ArgumentParser(description="Time whole Mixtrals with random weights.")
    parser.add_argument("--scale", type=int, default=1, help="a layer has so many times fewer weights: 4, 16, 64, ...")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prefill, of one sequence")
    parser.add_argument("--decode-context", type=int, default=512, help="tokens before decoding")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="sequences while decoding")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows of the table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU: the times mean nothing")
    parser.add_argument("--output", default=None, help="folder for JSON and tables")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.dry_run:
        options.scale, options.layers, options.device, options.dtype = 4096, 4, "cpu", "float32"
        options.context, options.decode_context, options.batch_sizes, options.new_tokens = 16, 8, [1, 2], 2
        options.repeats, options.warmup = 1, 0
    # Kernels are off by themselves; here they are what is timed where there is a GPU.
    with use_kernels("auto"):
        record = measured(options)
    print("\n" + document(record))
    return int(bool(record.failures))


if __name__ == "__main__":
    sys.exit(main())
