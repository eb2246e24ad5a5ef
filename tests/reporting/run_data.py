"""What a run could have left, made up: for figures of any size."""

from __future__ import annotations

from typing import Any

import torch

from moe_lightning.architectures import MixtralArchitecture
from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.evaluation.records import QualityMoment, QualityRecord, Rate, Routing, TextScores
from moe_lightning.plan import CompressionPlan, ModelShape
from moe_lightning.reporting.run_records import CompressionRecord
from moe_lightning.statistics import Statistics
from moe_lightning.trimming import Novices
from tests.models import tiny_config

TEXTS = {"python-stdlib": True, "python-topics": False}


def shape_of(layers: int, experts: int) -> ModelShape:
    """Return the shape of an uncompressed model."""
    return MixtralArchitecture().shape_of_config(tiny_config(num_hidden_layers=layers, num_local_experts=experts))


def scores(seed: int, loss: float, compared: bool = True, blocks: int = 24) -> BlockScores:
    """Return sums of blocks that are as hard in all models, and to which a loss in nats per token is added."""
    hard = torch.Generator().manual_seed(0)
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.full((blocks,), 128)
    nats = 2.0 + 0.4 * torch.randn(blocks, generator=hard, dtype=torch.float64)
    nats += loss * (1 + 0.4 * torch.randn(blocks, generator=noise, dtype=torch.float64))
    unknown = torch.full((blocks,), float("nan"), dtype=torch.float64)
    divergence = 128 * loss * torch.rand(blocks, generator=noise, dtype=torch.float64) if compared else unknown
    agreement = 128 * (1 - loss * torch.rand(blocks, generator=noise, dtype=torch.float64)) if compared else unknown
    return BlockScores(nats * 128, tokens, tokens * 4, divergence, agreement)


def routing_of(shape: ModelShape, seed: int) -> Routing:
    """Return where tokens go in a model of a shape, with numbers that add up."""
    generator = torch.Generator().manual_seed(seed)
    tables: list[list[list[float | None]]] = [[], []]
    for layout in shape.layouts:
        for table in tables:
            drawn = torch.rand(len(layout.router), generator=generator, dtype=torch.float64) + 0.1
            known = dict(zip(layout.router, (drawn / drawn.sum()).tolist(), strict=True))
            table.append([known.get(expert) for expert in range(shape.num_experts)])
    novices = [list(layout.novices) for layout in shape.layouts]
    return Routing(list(shape.moe_layers), tables[0], tables[1], novices)


def moment(name: str, shape: ModelShape, loss: float, seed: int, **changes: Any) -> QualityMoment:
    """Return a model at a moment."""
    speed = 1000.0 * (1 + shape.num_experts / (1 + sum(len(layout.real) for layout in shape.layouts)))
    generator = torch.Generator().manual_seed(seed)
    errors = (0.02 * loss * torch.rand(len(shape.blocks), generator=generator).cumsum(0)).tolist()
    values: dict[str, Any] = {
        "name": name,
        "step": {"before": 600, "end": 700}.get(name, 600),
        "what": name,
        "texts": {
            text: TextScores(scores(seed + place, loss * (1 + place), name != "before"), calibrated, text)
            for place, (text, calibrated) in enumerate(TEXTS.items())
        },
        "parameters": shape.parameters,
        "bytes": shape.parameters * 4,
        "bytes_on_disk": shape.bytes,
        "flops": shape.parameters * 100,
        "speed": {
            "prefill": Rate(speed * 9, speed * 8.6, speed * 9.2, 8, 256),
            "decode": Rate(speed, speed * 0.9, speed * 1.1, 1, 128),
        },
        "routing": routing_of(shape, seed),
        "layer_errors": dict(zip(shape.blocks, errors, strict=True)) if loss else {},
    }
    return QualityMoment(**{**values, **changes})


def statistics_of(shape: ModelShape, seed: int = 0) -> Statistics:
    """Return statistics in which layers differ."""
    statistics = Statistics.synthetic(shape)
    generator = torch.Generator().manual_seed(seed)
    experts = (len(shape.layouts), shape.num_experts)
    spread = torch.empty(experts, dtype=torch.float64).log_normal_(0, 0.7, generator=generator)
    count = 4000 * spread
    found = statistics.tensors
    found |= {"count": count.round(), "gate_sum": count * 0.5, "tokens": count.sum(1) / 2}
    found["output_m2"] = found["output_m2"] * torch.empty(experts, dtype=torch.float64).log_normal_(
        0, 0.5, generator=generator
    ).unsqueeze(-1)
    turned = torch.rand(len(shape.blocks), generator=generator, dtype=torch.float64)
    found["block_cosine_sum"] = found["block_tokens"] * (1 - 0.3 * turned)
    found["moe_cosine_sum"] = found["moe_tokens"] * (1 - 0.2 * turned)
    return statistics


def compression(layers: int, experts: int, method: Novices | None = None, step: int = 600) -> CompressionRecord:
    """Return what a compression of such a model leaves."""
    method = method or Novices(ratio=0.5, criterion="mone", scope="global")
    shape = shape_of(layers, experts)
    statistics = statistics_of(shape)
    plan = CompressionPlan(method.propose(shape, statistics))
    seconds = {"observe": 31.0, "decide": 0.02, "fit": 11.5, "apply": 0.8, "optimizer": 0.1, "other": 0.4}
    summary = {"step": step, "methods": [str(method)], "criterion": method.criterion, "seed": 0, "seconds": seconds}
    return CompressionRecord(f"compression-{step}", step, summary, plan, statistics, shape, plan.check(shape))


def record(layers: int, experts: int, **changes: Any) -> QualityRecord:
    """Return what a run of such a model measured."""
    before = shape_of(layers, experts)
    after = compression(layers, experts).shape_after
    assert after is not None
    moments = [
        moment("before", before, 0.0, 1),
        moment("compressed", after, 0.31, 2),
        moment("end", after, 0.12, 3),
    ]
    return QualityRecord(moments, {"device": "cpu", **changes})


TASKS: dict[str, Any] = {
    "version": 1,
    "harness": "0.4.13",
    "moments": [
        {
            "name": name,
            "step": 600,
            "limit": None,
            "tasks": {
                "arc_easy": {"metric": "acc_norm", "value": value, "stderr": 0.02, "samples": 100, "num_fewshot": 0},
                "boolq": {"metric": "acc", "value": value + 0.1, "stderr": None, "samples": 100, "num_fewshot": 0},
            },
            "mean": value + 0.05,
        }
        for name, value in (("before", 0.5), ("compressed", 0.41), ("end", 0.47))
    ],
}
TIME = {
    "total_seconds": 431.0,
    "parts": {
        "training": 260.0,
        "validation": 40.0,
        "compression": 44.0,
        "evaluation": 70.0,
        "exporting": 3.0,
        "checkpoints": 4.0,
        "other": 10.0,
    },
}


def benchmark() -> dict[str, Any]:
    """Return a benchmark of two models."""
    rows = []
    for model, factor in (("original", 1.0), ("compressed", 1.6)):
        for implementation, speed in (("moe_lightning", 1.0), ("grouped_mm", 0.7)):
            for phase, base in (("prefill", 9000.0), ("decode", 300.0)):
                for batch in (1, 8):
                    rate = base * factor * speed * batch**0.8
                    rows.append(
                        {
                            "model": model,
                            "implementation": implementation,
                            "phase": phase,
                            "batch": batch,
                            "context": 128,
                            "tokens_per_second": {"median": rate, "low": 0.9 * rate, "high": 1.05 * rate},
                            "refused": None,
                        }
                    )
    return {"version": 1, "context": {}, "models": {}, "rows": rows}
