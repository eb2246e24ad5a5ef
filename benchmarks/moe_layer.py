"""Time one MoE layer: transformers' implementations against the compressed layer, in one run.

    python benchmarks/moe_layer.py --device cpu
    python benchmarks/moe_layer.py --device cuda --output benchmarks/results

Every output is compared with a float32 reference before it is timed. Only ratios inside one run mean anything on a
shared machine; the JSON says on what it ran.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moe_lightning.plan import CompressionPlan, NoviceExperts
from moe_lightning.surgery import apply_plan

SIZES = {
    # Mixtral-8x7B's layer on a GPU, a sixteenth of it on a CPU.
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2},
}
TOKENS = {"cuda": (1, 4, 16, 64, 512, 2048, 8192), "cpu": (1, 4, 16, 64, 512)}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def one_layer(device: str) -> MixtralForCausalLM:
    config = MixtralConfig(vocab_size=256, num_hidden_layers=1, max_position_embeddings=128, **SIZES[device])
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(device, DTYPE[device]).eval()


def with_novices(model: MixtralForCausalLM, count: int) -> MixtralForCausalLM:
    model = copy.deepcopy(model)
    apply_plan(model, CompressionPlan((NoviceExperts(0, tuple(range(8 - count, 8))),)))
    torch.nn.init.normal_(model.model.layers[0].mlp.experts.novices, std=0.02)
    return model


def reference(block: Any, hidden: Tensor) -> Tensor:
    """Compute the block in float32, expert by expert, from the weights as they are."""
    _, weight, index = block.gate(hidden)
    experts = block.experts
    slot_map = getattr(experts, "slot_map", tuple(range(8)))
    storage = getattr(experts, "storage", experts)
    result = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, slot in enumerate(slot_map):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if slot >= 0:
            gate, up = (hidden[tokens].float() @ storage.gate_up_proj[slot].float().T).chunk(2, dim=-1)
            output = (torch.nn.functional.silu(gate) * up) @ storage.down_proj[slot].float().T
        else:
            output = experts.novices[-1 - slot].float().expand(tokens.shape[0], -1)
        result.index_add_(0, tokens, output * weight[tokens, place, None].float())
    return result


def median_seconds(run: Callable[[], Tensor], device: str, seconds: float) -> float:
    """Return the median time of a call, warm, over about ``seconds``."""

    def once() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = min(once(), once())
    repeats = max(5, min(200, int(seconds / max(first, 1e-6))))
    return statistics.median(once() for _ in range(repeats))


def floor_seconds(model: MixtralForCausalLM, tokens: int, ceilings: dict[str, float]) -> float:
    """Return the least time that the machine's own ceilings allow for the weights touched under uniform routing."""
    experts = model.model.layers[0].mlp.experts
    storage = getattr(experts, "storage", experts)
    real = storage.gate_up_proj.shape[0]
    one = storage.gate_up_proj[0].numel() + storage.down_proj[0].numel()
    touched = real * (1 - 0.75**tokens)
    by_bytes = touched * one * storage.gate_up_proj.element_size() / ceilings["bytes_per_second"]
    by_flops = 2 * tokens * 2 * (real / 8) * one / ceilings["flops_per_second"]
    return max(by_bytes, by_flops)


def measured_ceilings(device: str) -> dict[str, float]:
    """Measure copy bandwidth and the rate of a large product on this machine, in this run."""
    size = 8192 if device == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=DTYPE[device])
    product = median_seconds(lambda: left @ left, device, 1.0)
    source = torch.empty((2**30 if device == "cuda" else 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), device, 1.0)
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * source.numel() / copy_seconds}


@torch.no_grad()
def run(device: str, seconds: float) -> list[dict[str, Any]]:
    dense = one_layer(device)
    variants = {"dense": dense, "novices 25 %": with_novices(dense, 2), "novices 50 %": with_novices(dense, 4)}
    ceilings = measured_ceilings(device)
    rows = []
    for tokens in TOKENS[device]:
        torch.manual_seed(tokens)
        hidden = torch.randn(1, tokens, dense.config.hidden_size, device=device, dtype=DTYPE[device])
        for name, model in variants.items():
            block = model.model.layers[0].mlp
            expected = reference(block, hidden[0])
            implementations = ["eager", "grouped_mm", "batched_mm"] if name == "dense" else ["ours"]
            if device == "cpu" and tokens > 16 and "batched_mm" in implementations:
                implementations.remove("batched_mm")  # it copies the weights of every token's experts
            for implementation in implementations:
                if implementation != "ours":
                    model.set_experts_implementation(implementation)
                got = block(hidden)[0].float()
                error = float((got - expected).norm() / expected.norm())
                if not error <= TOLERANCE[DTYPE[device]]:
                    raise AssertionError(f"{name}, {implementation}, {tokens} tokens: relative error {error:.2e}")
                took = median_seconds(partial(block, hidden), device, seconds)
                rows.append(
                    {
                        "tokens": tokens,
                        "variant": name,
                        "implementation": implementation,
                        "microseconds": took * 1e6,
                        "floor_microseconds": floor_seconds(model, tokens, ceilings) * 1e6,
                        "relative_error": error,
                    }
                )
    return [{"ceilings": ceilings}, *rows]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = ("dense eager", "dense grouped_mm", "dense batched_mm", "novices 25 % ours", "novices 50 % ours")
    print("microseconds a layer; in brackets the speed relative to transformers' grouped_mm\n")
    print("| tokens | " + " | ".join(columns) + " | floor, 50 % |")
    print("|--:|" + "--:|" * (len(columns) + 1))
    for tokens in sorted({row["tokens"] for row in rows}):
        found = {f"{row['variant']} {row['implementation']}": row for row in rows if row["tokens"] == tokens}
        base = found["dense grouped_mm"]["microseconds"]
        cells = [
            f"{found[name]['microseconds']:,.0f} ({base / found[name]['microseconds']:.2f}x)" if name in found else "-"
            for name in columns
        ]
        print(f"| {tokens} | " + " | ".join(cells) + f" | {found[columns[-1]]['floor_microseconds']:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one MoE layer.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--output", default=None, help="folder for the JSON file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: use --device cpu (make bench)")
    if options.threads:
        torch.set_num_threads(options.threads)
    first, *rows = run(options.device, options.seconds)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    result = {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE[options.device]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": SIZES[options.device],
        **first,
        "rows": rows,
    }
    print(f"{name}, {result['threads']} threads, {result['dtype']}, torch {torch.__version__}")
    print_table(rows)
    if options.output:
        target = Path(options.output) / f"moe_layer-{options.device}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
