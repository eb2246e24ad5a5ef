"""Time one MoE layer on a CPU: the suite of `gpu.py` at a sixteenth of Mixtral's layer, without kernels.

    python benchmarks/cpu.py --threads 2 --output benchmarks/results

What `ours` is here: the compressed layer as a model on a CPU holds it, in bf16. All implementations take turns, so that
what else the machine does hits all of them; only ratios inside one run mean anything. Every output is compared with
float32 before it is timed, the gradients of training steps too. The floor is that of this machine in this run; a copy
writes as well, so reading alone can be faster than it. Where others use the cores, one thread and `--clock cpu` (the
time that the process itself ran) say more than the time on the wall. Needs
4 GB. At Mixtral's full width: `moe_layer_cpu.py`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_layers import EXPERTS, FORMATS, ROUTINGS, THEIRS, Sizes, Weights, make_call, mixtral_block
from int4_loop import int4_loop
from moe_kernels.machine import this_machine
from tables import INT4_LOOP, Row, document
from timing import TOLERANCE, Unavailable, environment, measured_ceilings, relative_error
from torch import Tensor, nn
from training_step import Ways, packed_torch, plain_torch, training_rows, whole_stack

from moe_lightning.experts import CompressedExperts, Dense, Int4, Packed, Sparse24
from moe_lightning.plan import WeightFormat

CPU = Sizes("cpu", torch.bfloat16, 1024, 3584, 128, (1, 4, 16, 64, 256), 2048, 2**27, 0.5, (256,))
SMALL = Sizes("cpu", torch.bfloat16, 64, 64, 64, (1, 20), 64, 2**12, 0.0, (20,))
SETS = 2
"""Sets of weights that take turns: no layer's weights stay in a cache of 32 MiB."""

BATCHED_TOKENS = 4
"""Tokens up to which transformers' batched_mm is timed: it copies the weights of each token's experts."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
REPEATS = 5

WAYS: Ways = {
    "dense": {"ours": plain_torch, "whole stack": whole_stack},
    "int4": {"ours": packed_torch, "dequantised once": plain_torch, "whole stack": whole_stack},
}
"""Training steps: on a dense base, ours is plain torch."""

Layer = Callable[[Tensor], Tensor]


class KeptWeights(Weights):
    """Weights that keep their float32 form, which takes longer to make than to multiply with."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        """Draw them."""
        super().__init__(sizes, seed)
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def in_float32(self, form: str, expert: int) -> tuple[Tensor, Tensor]:
        """See `Weights.in_float32`."""
        if (form, expert) not in self._kept:
            with torch.inference_mode(False):
                self._kept[form, expert] = super().in_float32(form, expert)
        return self._kept[form, expert]


def our_layer(weights: Weights, form: str, real: int) -> tuple[Layer, int]:
    """Return the layer as a compressed model holds it, and the bytes of its experts' weights."""
    if form == "dense":
        gate_up, down = (nn.Parameter(weight[:real], requires_grad=False) for weight in weights.dense)
        storage: Dense | Packed = Dense(gate_up, down)
    elif form == "int4":
        sizes, format = (
            (weights.sizes.hidden, weights.sizes.inner),
            WeightFormat(bits=4, group_size=weights.sizes.group),
        )
        stacks = [
            Int4(format, *(part[:real] for part in stored), inputs, weights.sizes.dtype)
            for stored, inputs in zip(weights.stored, sizes, strict=True)
        ]
        storage = Packed(*stacks)
    else:
        stacks = [
            Sparse24(WeightFormat(pattern="2:4"), nn.Parameter(packed.values[:real], False), packed.metadata[:real])
            for packed in weights.sparse
        ]
        storage = Packed(*stacks)
    places = [*range(real), *(-1 - number for number in range(EXPERTS - real))]
    novices = nn.Parameter(weights.novices[: EXPERTS - real], requires_grad=False) if real < EXPERTS else None
    block: Any = mixtral_block(weights, "eager")
    block.experts = CompressedExperts(storage, places, novices, nn.functional.silu)
    held = [*storage.parameters(), *storage.buffers()]
    return partial(_call, block), sum(part.numel() * part.element_size() for part in held)


def _call(block: Any, hidden: Tensor) -> Tensor:
    return block(hidden[None])[0]


class Suite:
    """All layers, made once."""

    def __init__(self, sizes: Sizes) -> None:
        """Make them, and turn int4 weights into the form of this machine's CPU."""
        self.sizes, self.weights = sizes, [KeptWeights(sizes, seed) for seed in range(SETS)]
        self.layers: dict[tuple[str, str], list[Layer]] = {}
        self.bytes: dict[str, int] = {}
        for name, (form, novices) in FORMATS.items():
            made = [our_layer(each, form, EXPERTS - novices) for each in self.weights]
            self.layers[name, "ours"] = [layer for layer, _ in made]
            self.bytes[name] = made[0][1]
        for name in THEIRS:
            self.layers["bf16", name] = [partial(_call, mixtral_block(each, name)) for each in self.weights]
        self.missing: Row | None = None
        try:
            self.layers["int4", INT4_LOOP] = [int4_loop(each) for each in self.weights]
        except Unavailable as reason:
            self.missing = {"format": "int4", "implementation": INT4_LOOP, "unavailable": str(reason)}

    @torch.inference_mode()
    def rows(self, tokens: int, routing: str, ceilings: dict[str, float], clock: Callable[[], float]) -> list[Row]:
        """Check all layers on the same inputs, then time them in turn."""
        calls = [make_call(self.weights[number % SETS], tokens, routing, number) for number in range(2 * SETS)]
        rows, timed = [dict(self.missing)] if self.missing else [], {}
        expected = {form: [call.oracle(*_form(form)) for call in calls] for form in FORMATS}
        for (form, implementation), layers in self.layers.items():
            if implementation == "batched_mm" and tokens > BATCHED_TOKENS:
                continue
            floors = [call.floor(*_form(form), ceilings) for call in calls]
            row = {
                "format": form,
                "implementation": implementation,
                "floor_microseconds": statistics.mean(floor for floor, _ in floors) * 1e6,
                "bound_by": statistics.mode(bound for _, bound in floors),
                "weight_bytes": self.bytes[form],
            }
            runs = [partial(layers[number % SETS], call.hidden) for number, call in enumerate(calls)]
            row |= _checked(runs, expected[form], self.sizes)
            rows.append(row)
            if "relative_error" in row:
                timed[form, implementation] = (row, runs, [])
        began = time.perf_counter()
        rounds = 0
        while rounds < (REPEATS if self.sizes.seconds else 1) or time.perf_counter() - began < self.sizes.seconds:
            rounds += 1
            for _, runs, times in timed.values():
                start = clock()
                for run in runs:
                    run()
                times.append((clock() - start) / len(runs))
        for row, _, times in timed.values():
            row |= {"microseconds": statistics.median(times) * 1e6, "repeats": rounds, "graph": False}
            row["share_of_floor"] = row["floor_microseconds"] / row["microseconds"]
        return [{"tokens": tokens, "routing": routing, **row} for row in rows]


def _form(name: str) -> tuple[str, int]:
    form, novices = FORMATS[name]
    return form, EXPERTS - novices


def _checked(runs: list[Callable[[], Tensor]], expected: list[Tensor], sizes: Sizes) -> Row:
    try:
        error = max(relative_error(run(), want) for run, want in zip(runs, expected, strict=True))
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    return {"relative_error": error} if error <= TOLERANCE[sizes.dtype] else {"refused": f"relative error {error:.2e}"}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; return how many measurements were refused, 1 at most."""
    parser = argparse.ArgumentParser(description="Time one MoE layer on a CPU.")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--minutes", type=float, default=4.0, help="begin no other case after this time")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="numbers of tokens; all where left out")
    parser.add_argument("--routings", choices=ROUTINGS, nargs="+", default=ROUTINGS, help="who chooses which expert")
    parser.add_argument("--small", action="store_true", help="tiny, to try it: the times mean nothing")
    parser.add_argument("--output", default=None, help="folder for JSON and tables")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu adds up what all threads ran: give it --threads 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    began, sizes, clock = time.monotonic(), SMALL if options.small else CPU, CLOCKS[options.clock]
    result: dict[str, Any] = {**environment(sizes), "threads": torch.get_num_threads(), "clock": options.clock}
    result |= {"machine": asdict(this_machine()), "load_before": os.getloadavg()[0]}
    result |= {"ceilings": measured_ceilings(sizes, clock), "rows": [], "training": [], "left_out": []}
    result["sizes"]["sets"] = SETS
    suite = Suite(sizes)
    for routing in options.routings:
        for tokens in options.tokens or sizes.tokens:
            if time.monotonic() - began > 60 * options.minutes:
                result["left_out"].append({"tokens": tokens, "routing": routing})
                continue
            result["rows"] += suite.rows(tokens, routing, result["ceilings"], clock)
            print(f"{time.monotonic() - began:.0f} s: {tokens} tokens, {routing}", flush=True)
        if routing == options.routings[0]:
            for tokens in sizes.steps:
                repeats = REPEATS if sizes.seconds else 1
                rows = training_rows(suite.weights[0], tokens, result["ceilings"], repeats, WAYS, clock)
                result["training"] += rows
                print(f"{time.monotonic() - began:.0f} s: training step, {tokens} tokens", flush=True)
    result |= {"seconds": time.monotonic() - began, "load_after": os.getloadavg()[0]}
    print("\n" + document(result))
    if options.output:
        kind = "emulated" if this_machine().bf16_emulated else "native"
        target = Path(options.output) / f"cpu-bf16-{kind}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {target}")
    return int(any("refused" in row for row in [*result["rows"], *result["training"]]))


if __name__ == "__main__":
    raise SystemExit(main())
