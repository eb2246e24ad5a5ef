"""Run directories made by hand, as large as wanted, whose numbers are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.evaluation.records import QualityMoment, QualityRecord, Rate, Routing, Sample, TextScores
from moe_lightning.plan import CompressionPlan, ExpertLayout, ModelShape, NoviceExperts, Quantize
from moe_lightning.statistics import Statistics

NASTY = "<script>alert('x')</script> | a pipe, *stars*, `ticks` and\na second line <b>&amp;"
"""What a user's text may hold."""


def shape_of(layers: int = 3, experts: int = 4) -> ModelShape:
    """Return the shape of a small Mixtral."""
    everyone = tuple(range(experts))
    layouts = tuple(ExpertLayout(layer, everyone) for layer in range(layers))
    return ModelShape("mixtral", layers, 32, 48, 64, 4, 2, 8, False, experts, 2, layouts)


def scores(blocks: int, nats: float, seed: int, compared: bool = True) -> BlockScores:
    """Return scores of blocks of 15 predicted tokens, about so many nats each; every fourth block is compared."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.full((blocks,), 15, dtype=torch.int64)
    noise = torch.rand(blocks, generator=draw, dtype=torch.float64)
    wide = torch.full((blocks,), torch.nan, dtype=torch.float64)
    divergence, agreement = wide.clone(), wide.clone()
    if compared:
        divergence[::4], agreement[::4] = 15 * 0.05 * (1 + noise[::4]), torch.floor(10 + 4 * noise[::4])
    text = torch.rand(blocks, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return BlockScores(15 * (nats + text) + noise, tokens, 3 * tokens, divergence, agreement)


def moment(
    name: str, step: int, nats: float, share: float, layers: int, experts: int, prompt: str, **changes: Any
) -> QualityMoment:
    """Return a moment with everything in it; the model has that share of its parameters."""
    texts = {
        place: TextScores(scores(12, nats + worse, seed=step + round(100 * nats)), calibrated, f"blocks of {place}")
        for place, calibrated, worse in (("test", True, 0.0), ("python-topics", False, 0.4))
    }
    before = name == "before"
    mass = [[1 / experts] * experts for _ in range(layers)]
    values: dict[str, Any] = {
        "name": name,
        "step": step,
        "what": "",
        "texts": texts,
        "parameters": int(1e6 * share),
        "bytes": int(4e6 * share),
        "bytes_on_disk": int(4e6 * share),
        "flops": int(2e9 * share),
        "speed": {
            "prefill": Rate(5000 / share, 4900 / share, 5100 / share, 8, 256),
            "decode": Rate(200 / share, 190 / share, 204 / share, 1, 128),
        },
        "routing": Routing(
            list(range(layers)), mass, mass, [[] if before else list(range(experts // 2)) for _ in range(layers)]
        ),
        "layer_errors": {} if before else {layer: 0.01 * (layer + 1) for layer in range(layers)},
        "samples": [Sample(prompt, f"{name} says: {NASTY}"), Sample("import os\n\ndef f(", f"self):\n    # {name}\n")],
    }
    return QualityMoment(**{**values, **changes})


def write_run(
    folder: Path,
    layers: int = 3,
    experts: int = 4,
    bits: int | None = None,
    worse: float = 0.2,
    prompt: str = NASTY,
    fingerprint: str | None = None,
) -> Path:
    """Write a run directory with every file that there is; half of the experts become novices at step 600.

    Args:
        folder: The folder.
        layers: Decoder layers.
        experts: Experts of each.
        bits: Quantise the other experts as well.
        worse: Nats per token that compressing costs.
        prompt: The first prompt.
        fingerprint: Of the blocks of ``test``; the same for all runs when not given.
    """
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    before = shape_of(layers, experts)
    novices = tuple(range(experts // 2))
    edits: list[Any] = [NoviceExperts(layer, novices, "mean") for layer in range(layers)]
    if bits is not None:
        edits += [Quantize(layer, bits=bits, group_size=16, method="gptq") for layer in range(layers)]
    calibration = {"step": 600, "calibration_batches": 16, "data": describe()}
    history = {"method": "Novices", "ratio": 0.5, "criterion": "mone", "calibration": calibration, "edits": layers}
    plan = CompressionPlan(tuple(edits), {"history": [{**history, "versions": {"torch": "2.13.0"}}]})
    after = plan.check(before)
    claimed = before.parameters - after.parameters
    modules = {f"model.layers.{layer}.mlp.experts": f"{experts - len(novices)} experts real" for layer in range(layers)}
    summary: dict[str, Any] = {
        "step": 600,
        "methods": ["Novices(ratio=0.5, criterion='mone')"],
        "criterion": "mone",
        "seed": 0,
        "before": {"parameters": 10**6, "bytes": 4 * 10**6, "flops": 2 * 10**9, "bytes_on_disk": 4 * 10**6},
        "after": {"parameters": 6 * 10**5, "bytes": 24 * 10**5, "flops": 12 * 10**8, "bytes_on_disk": 24 * 10**5},
        "touched_parameters": claimed,
        "claimed_parameters": claimed,
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "modules": modules,
        "tokens": {name: {str(expert): 100 * expert for expert in range(experts)} for name in modules},
        "shape_before": before.to_dict(),
        "shape_after": after.to_dict(),
        "seconds": {"observe": 3.5, "decide": 0.01, "fill": 12.0},
    }
    if bits is not None:
        summary["methods"].append(f"GPTQ(bits={bits})")
        real = range(len(novices), experts)
        names = [f"{expert}.{matrix}" for expert in real for matrix in ("gate_up_proj", "down_proj")]
        summary["matrices"] = {
            module: {name: "rtn fallback: 3 tokens" if name == names[0] else "gptq damp x1.5" for name in names}
            for module in modules
        }
        summary["errors"] = {module: dict.fromkeys(names, 0.0123) for module in modules}
    (results / "compression-600.json").write_text(json.dumps(summary))
    (results / "compression-600.plan.json").write_text(plan.to_json())
    Statistics.synthetic(before).save(results / "compression-600.statistics.safetensors")
    write_quality(folder, layers, experts, worse, prompt, fingerprint)
    write_numbers(results)
    for command in ("fit", "test"):
        (folder / f"config.{command}.yaml").write_text(f"model:\n  learning_rate: {0.001 * (1 + worse)}\nrun_dir: x\n")
    return folder


def describe() -> dict[str, Any]:
    return {
        "sources": ["python-stdlib"],
        "seed": 0,
        "block_size": 16,
        "fingerprint": "ba0553133a",
        "splits": {"calibration": {"documents": 6, "blocks": 128, "tokens": 32768, "fingerprint": "10cb53398668"}},
    }


def write_quality(
    folder: Path, layers: int, experts: int, worse: float, prompt: str, fingerprint: str | None = None
) -> None:
    """Write ``quality.json``: before, compressed, end."""
    moments = [
        moment("before", 600, 3.0, 1.0, layers, experts, prompt),
        moment("compressed", 600, 3.0 + worse, 0.6, layers, experts, prompt),
        moment("end", 700, 3.0 + worse / 4, 0.6, layers, experts, prompt),
    ]
    if fingerprint is not None:
        changed = [
            {name: dataclasses.replace(text, fingerprint=fingerprint) for name, text in item.texts.items()}
            for item in moments
        ]
        moments = [dataclasses.replace(item, texts=texts) for item, texts in zip(moments, changed, strict=True)]
    context = {"data": describe(), "device": "cpu", "dtype": "float32", "threads": 1, "versions": {"torch": "2.13.0"}}
    QualityRecord(moments, context).save(folder / "results" / "quality.json")


def write_numbers(results: Path) -> None:
    """Write tasks, times, recovery, logged numbers and a benchmark."""
    tasks = {
        "arc_easy": {"metric": "acc_norm", "value": 0.5, "stderr": 0.01, "samples": 100, "num_fewshot": 0},
        "wikitext": {"metric": "word_perplexity", "value": 24.5, "stderr": None, "samples": 62, "num_fewshot": 0},
    }
    names = (("before", 600), ("compressed", 600), ("end", 700))
    moments = [{"name": name, "step": step, "limit": 100, "tasks": tasks, "mean": 0.5} for name, step in names]
    boundaries = [
        {"step": 600, "event": "compressed", "loss": 3.7, "recovered_share": 0.0, "tokens": 960, "added": 0.2},
        {"step": 700, "event": "NoviceTuning", "loss": 3.55, "recovered_share": 0.75, "tokens": 960},
    ]
    recovery = {"before": 3.5, "compressed": 3.7, "lost": 0.2, "lost_interval": [0.15, 0.25], "tokens": 960}
    spread = {"median": 1000.0, "low": 900.0, "high": 1100.0}
    row: dict[str, Any] = {
        "model": "small",
        "implementation": "moe_lightning",
        "phase": "prefill",
        "batch": 8,
        "context": 128,
        "tokens_per_second": spread,
        "milliseconds": {"median": 10.0, "low": 9.0, "high": 11.0},
        "floor_milliseconds": 2.5,
        "peak_bytes": None,
        "weight_bytes": 24 * 10**5,
        "relative_error": 1e-6,
        "refused": None,
    }
    nothing = {"tokens_per_second": None, "milliseconds": None, "floor_milliseconds": None}
    refused = {"implementation": "grouped_mm", "relative_error": 0.3, "refused": "outputs differ by 0.3"}
    files = {
        "lm_eval": {"version": 1, "harness": "0.4.13", "moments": moments},
        "time": {"total_seconds": 100.0, "parts": {"training": 70.0, "compression": 20.0, "other": 10.0}},
        "recovery": {**recovery, "boundaries": boundaries},
        "test": {"test/perplexity": 21.5, "test/bits_per_byte": 1.5},
        "validate": {"val/perplexity": 22.5},
        "benchmark": {
            "version": 1,
            "context": {"device": "cpu", "threads": 1, "dtype": "float32", "versions": {"torch": "2.13.0"}},
            "models": {
                "small": {"folder": "runs/small", "parameters": 600000, "bytes": 24 * 10**5, "flops": 12 * 10**8}
            },
            "rows": [row, {**row, "phase": "decode"}, {**row, **nothing, **refused}],
        },
    }
    for name, content in files.items():
        (results / f"{name}.json").write_text(json.dumps(content))


def write_compressed_folder(folder: Path) -> Path:
    """Write what ``moe-lightning compress`` leaves beside a model."""
    run = write_run(folder.parent / "as-a-run", layers=2)
    folder.mkdir(parents=True)
    summary = json.loads((run / "results" / "compression-600.json").read_text())
    row = {"perplexity": 20.0, "bits_per_byte": 1.5, "tokens": 100, "tokens_per_second": 1000.0, **summary["before"]}
    after = {**row, "perplexity": 22.0, **summary["after"]}
    numbers = {
        "model": "models/original",
        "sequence_length": 16,
        "before": row,
        "after": after,
        "compression": {name: value for name, value in summary.items() if name not in ("step", "before", "after")},
        "compression_seconds": 12.5,
        "loaded_again_max_logit_difference": 0.0,
    }
    (folder / "compression.json").write_text(json.dumps(numbers))
    (folder / "plan.json").write_text((run / "results" / "compression-600.plan.json").read_text())
    return folder
