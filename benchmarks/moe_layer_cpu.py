"""Time one MoE layer of Mixtral's full width on a CPU in bf16: transformers' block against ours, dense and int4.

    python benchmarks/moe_layer_cpu.py --threads 2 --output benchmarks/results

All blocks compute the same function: the dense weights are the int4 ones, dequantised. Every output is compared with
float32 before it is timed. The implementations take turns, and only ratios inside one run mean anything on a shared
machine; the JSON says on what it ran, with how many threads, and what was found out about the machine. How a CPU does
that only emulates bf16: ONEDNN_MAX_CPU_ISA=AVX512_CORE CC="cc -mno-avx512bf16" on one that does not. Where others use
the cores, one thread and `--clock cpu` (the time that the process itself ran) say more than the time on the wall. Needs
7 GB of memory.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from moe_kernels import dequantize_int4
from moe_kernels.machine import this_machine
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe_lightning.experts import CompressedExperts, Dense, Int4, Packed
from moe_lightning.plan import WeightFormat

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
TOKENS = (1, 4, 16, 64, 256, 512)
THEIRS = ("eager", "grouped_mm")
OURS = ("ours dense", "ours int4")
TOLERANCE = 1e-2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_stack(slots: int, outputs: int, inputs: int, group: int) -> Int4:
    """Make int4 matrices whose products are as large as their inputs."""
    codes = torch.randint(0, 16, (slots, outputs, inputs), dtype=torch.uint8)
    scale = (0.5 + torch.rand(slots, outputs, inputs // group)) * 0.2 * inputs**-0.5
    zero = torch.randint(6, 10, scale.shape, dtype=torch.uint8)
    return Int4.pack(WeightFormat(bits=4, group_size=group), codes, scale, zero, torch.bfloat16)


def make_blocks(sizes: dict[str, int], group: int) -> dict[str, nn.Module]:
    """Make the block as transformers has it, and ours with the same router and the same weights."""
    torch.manual_seed(0)
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(MixtralConfig(**sizes)).bfloat16().eval()
    block.gate.weight = nn.Parameter(torch.randn(block.gate.weight.shape, dtype=torch.bfloat16) * hidden**-0.5)
    storage = Packed(make_stack(8, 2 * intermediate, hidden, group), make_stack(8, hidden, intermediate, group))
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(storage, name)
        dense = torch.empty(stack.slots, stack.outputs, stack.inputs, dtype=torch.bfloat16)
        for slot in range(stack.slots):
            packed = stack.words[slot], stack.scale[slot], stack.zero[slot], stack.inputs
            dense[slot] = dequantize_int4(*packed, torch.bfloat16)
        setattr(block.experts, name, nn.Parameter(dense))
    blocks: dict[str, nn.Module] = {}
    for name in THEIRS:
        blocks[name] = copy.copy(block)
        blocks[name]._modules = dict(block._modules)
        blocks[name].experts = copy.copy(block.experts)
        blocks[name].experts.config = MixtralConfig(**sizes, experts_implementation=name)
    for name, own in zip(OURS, (Dense(block.experts.gate_up_proj, block.experts.down_proj), storage), strict=True):
        blocks[name] = copy.copy(block)
        blocks[name]._modules = dict(block._modules)
        blocks[name].experts = CompressedExperts(own, range(8), None, block.experts.act_fn)
    return blocks


def reference(block: Any, hidden: Tensor) -> Tensor:
    """Compute the block in float32, expert by expert."""
    _, weight, index = block.gate(hidden)
    result = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in range(8):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if not tokens.numel():
            continue
        gate, up = (hidden[tokens].float() @ block.experts.gate_up_proj[expert].float().T).chunk(2, dim=-1)
        output = (nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].float().T
        result.index_add_(0, tokens, output * weight[tokens, place, None].float())
    return result


@torch.inference_mode()
def run(sizes: dict[str, int], group: int, seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    blocks = make_blocks(sizes, group)
    rows = []
    for tokens in TOKENS:
        torch.manual_seed(tokens)
        hidden = torch.randn(1, tokens, sizes["hidden_size"], dtype=torch.bfloat16)
        expected = reference(blocks["eager"], hidden[0])
        errors = {}
        for name, block in blocks.items():
            errors[name] = float((block(hidden)[0].float() - expected).norm() / expected.norm())
            if not errors[name] <= TOLERANCE:
                raise AssertionError(f"{name}, {tokens} tokens: relative error {errors[name]:.2e}")
        times: dict[str, list[float]] = {name: [] for name in blocks}
        started = time.perf_counter()
        while len(times["eager"]) < 5 or time.perf_counter() - started < seconds:
            for name, block in blocks.items():
                start = clock()
                block(hidden)
                times[name].append(clock() - start)
        medians = {name: statistics.median(took) for name, took in times.items()}
        best = min(medians[name] for name in THEIRS)
        for name in blocks:
            rows.append(
                {
                    "tokens": tokens,
                    "implementation": name,
                    "milliseconds": medians[name] * 1e3,
                    "over_transformers_best": best / medians[name],
                    "repeats": len(times[name]),
                    "relative_error": errors[name],
                }
            )
        print_row(rows[-len(blocks) :])
    return rows


def print_row(found: list[dict[str, Any]]) -> None:
    cells = [f"{row['milliseconds']:,.1f} ({row['over_transformers_best']:.2f}x)" for row in found]
    print(f"| {found[0]['tokens']} | " + " | ".join(cells) + f" | {found[0]['repeats']} |", flush=True)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one MoE layer of Mixtral's width on a CPU.")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each number of tokens; at least 5 repeats")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--group", type=int, default=128, help="quantisation group")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--small", action="store_true", help="a quarter of the width, to try it")
    parser.add_argument("--output", default=None, help="folder for the JSON file")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu adds up what all threads ran: give it --threads 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = dict(SIZES, hidden_size=1024, intermediate_size=3584) if options.small else SIZES
    machine = this_machine()
    print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads, bf16, torch {torch.__version__}; {machine}")
    print("milliseconds a layer; in brackets the speed relative to the best of transformers'\n")
    print("| tokens | " + " | ".join((*THEIRS, *OURS)) + " | repeats |\n" + "|--:|" + "--:|" * 5)
    rows = run(sizes, options.group, options.seconds, CLOCKS[options.clock])
    if options.output:
        result = {
            "device": f"{platform.machine()} CPU",
            "clock": options.clock,
            "threads": torch.get_num_threads(),
            "machine": asdict(machine),
            "dtype": "torch.bfloat16",
            "group": options.group,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "sizes": sizes,
            "rows": rows,
        }
        kind = "emulated" if machine.bf16_emulated else "native"
        target = Path(options.output) / f"moe_layer_cpu-bf16-{kind}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
