"""A training step with LoRA of the sum over experts: forward and backward, base frozen, each expert with its own terms.

The step ends in gradients for the input, the routing weights and the low-rank matrices; the router itself, which is the
same for everybody, and the optimizer are not in it. Compared: the operation given; plain torch; and the way of peft
(0.21) with a stack of experts in one parameter, which adds the product of the low-rank matrices to all weights, reached
or not, before it multiplies. Output and gradients are compared with float32 autograd over single experts before a time
is taken.

Legend: N tokens, H hidden, I intermediate, E experts, K top-k, R rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from gpu_layers import EXPERTS, Call, Weights, make_call
from moe_kernels import (
    GroupedLora,
    RoutedPairs,
    combine_pairs,
    grouped_linear,
    int4_grouped_linear,
    lora_term,
    sort_pairs,
)
from timing import Unavailable, first_line, relative_error
from torch import Tensor
from torch.nn.functional import linear, silu

RANK, SCALE = 16, 2.0
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class Inputs(NamedTuple):
    """What gradients are wanted of.

    Attributes:
        hidden_NH: Input of the experts.
        weight_NK: Routing weights, fp32.
        gate_up_reads_ERH: LoRA's A of gate and up.
        gate_up_gives_E2IR: LoRA's B.
        down_reads_ERI: A of down.
        down_gives_EHR: B.
    """

    hidden_NH: Tensor
    weight_NK: Tensor
    gate_up_reads_ERH: Tensor
    gate_up_gives_E2IR: Tensor
    down_reads_ERI: Tensor
    down_gives_EHR: Tensor

    @property
    def lora(self) -> tuple[GroupedLora, GroupedLora]:
        """The terms of gate and up, and of down."""
        return GroupedLora(*self[2:4], SCALE), GroupedLora(*self[4:6], SCALE)


Sum = Callable[["Case", Inputs], Tensor]
"""Computes the sum over experts of a case, ``[N, H]``."""


@dataclass(frozen=True)
class Case:
    """One step: a layer, its input, and where the gradient comes from.

    Attributes:
        weights: The frozen base.
        form: ``dense`` or ``int4``.
        call: Input and routing.
    """

    weights: Weights
    form: str
    call: Call

    @cached_property
    def index_NK(self) -> Tensor:
        """Experts chosen."""
        return self.call.chosen[0]

    @cached_property
    def slot_map_E(self) -> Tensor:
        """Every expert is its own slot."""
        return torch.arange(EXPERTS, device=self.call.hidden.device)

    @cached_property
    def inputs(self) -> Inputs:
        """Input and low-rank matrices, which wait for gradients."""
        sizes, hidden = self.weights.sizes, self.call.hidden
        draw = torch.Generator(hidden.device).manual_seed(0)

        def matrix(rows: int, columns: int, scale: float) -> Tensor:
            numbers = torch.randn(EXPERTS, rows, columns, generator=draw, device=hidden.device)
            return (numbers * scale).to(sizes.dtype)

        # Terms about half as large as what they are added to.
        tensors = [
            hidden,
            self.call.chosen[1],
            matrix(RANK, sizes.hidden, sizes.hidden**-0.5),
            matrix(2 * sizes.inner, RANK, 0.06),
            matrix(RANK, sizes.inner, sizes.inner**-0.5),
            matrix(sizes.hidden, RANK, 0.06),
        ]
        return Inputs(*(tensor.detach().clone().requires_grad_() for tensor in tensors))

    @cached_property
    def gradient_NH(self) -> Tensor:
        """Gradient of the output."""
        draw = torch.Generator(self.call.hidden.device).manual_seed(1)
        size = self.call.hidden.shape
        return torch.randn(size, generator=draw, device=draw.device).to(self.weights.sizes.dtype)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """The base in the type of the input, int4 dequantised once."""
        if self.form == "dense":
            return self.weights.dense[0], self.weights.dense[1]
        dtype = self.weights.sizes.dtype
        both = [self.weights.in_float32(self.form, expert) for expert in range(EXPERTS)]
        gate_up, down = (torch.stack([part.to(dtype) for part in half]) for half in zip(*both, strict=True))
        return gate_up, down

    def step(self, compute: Sum) -> list[Tensor]:
        """Return the output and all gradients."""
        output_NH = compute(self, self.inputs)
        return [output_NH, *torch.autograd.grad(output_NH, self.inputs, self.gradient_NH)]

    def expected(self) -> list[Tensor]:
        """Return the same from float32 autograd, one expert after another."""
        inputs = Inputs(*(tensor.detach().float().requires_grad_() for tensor in self.inputs))
        output_NH = torch.zeros_like(inputs.hidden_NH)
        totals = [torch.zeros_like(tensor) for tensor in inputs]
        for expert in range(EXPERTS):
            tokens, place = (self.index_NK == expert).nonzero(as_tuple=True)
            if not tokens.shape[0]:
                continue
            gate_up, down = self.weights.in_float32(self.form, expert)
            rows = inputs.hidden_NH[tokens]
            reads, gives = inputs.gate_up_reads_ERH[expert], inputs.gate_up_gives_E2IR[expert]
            gate, up = (linear(rows, gate_up) + SCALE * linear(linear(rows, reads), gives)).chunk(2, -1)
            inner = silu(gate) * up
            reads, gives = inputs.down_reads_ERI[expert], inputs.down_gives_EHR[expert]
            result = linear(inner, down) + SCALE * linear(linear(inner, reads), gives)
            result = result * inputs.weight_NK[tokens, place, None]
            # The sum over experts is linear in what each gives: gradients add up, one expert in memory at a time.
            parts = torch.autograd.grad(result, inputs, self.gradient_NH.float()[tokens])
            for total, part in zip(totals, parts, strict=True):
                total += part
            output_NH.index_add_(0, tokens, result.detach())
        return [output_NH, *totals]

    def floor(self, ceilings: dict[str, float]) -> float:
        """Return the least seconds of a step: base weights read, and multiplied, once forwards and once backwards."""
        seconds, _ = self.call.floor(self.form, EXPERTS, ceilings)
        return 2 * seconds


def plain_torch(case: Case, inputs: Inputs) -> Tensor:
    """Multiply rows sorted by expert with the base and with the low-rank matrices, one after another."""
    pairs = sort_pairs(case.index_NK, case.slot_map_E, EXPERTS)

    def product(rows: Tensor, weight: Tensor, lora: GroupedLora) -> Tensor:
        return grouped_linear(rows, weight, pairs.offsets) + lora_term(rows, pairs.offsets, lora)

    return _sum_over(case, inputs, pairs, product)


def whole_stack(case: Case, inputs: Inputs) -> Tensor:
    """Add the product of the low-rank matrices to the weights of all experts, then multiply, as peft does."""
    pairs = sort_pairs(case.index_NK, case.slot_map_E, EXPERTS)

    def product(rows: Tensor, weight: Tensor, lora: GroupedLora) -> Tensor:
        delta = torch.bmm(lora.gives_SOR, lora.reads_SRX) * lora.scale
        return grouped_linear(rows, weight + delta, pairs.offsets)

    return _sum_over(case, inputs, pairs, product)


def _sum_over(
    case: Case, inputs: Inputs, pairs: RoutedPairs, product: Callable[[Tensor, Tensor, GroupedLora], Tensor]
) -> Tensor:
    (first, second), (gate_up, down) = inputs.lora, case.dense
    gate_PI, up_PI = product(inputs.hidden_NH[pairs.tokens], gate_up, first).chunk(2, -1)
    outputs_PH = product(silu(gate_PI) * up_PI, down, second)
    return combine_pairs(outputs_PH, pairs, inputs.weight_NK).to(inputs.hidden_NH.dtype)


def kernels(case: Case, inputs: Inputs) -> Tensor:
    """Compute with the Triton kernels, int4 from its packed form."""
    try:
        from moe_kernels.triton_kernels.training.operation import train_experts
    except ImportError as error:
        raise Unavailable(first_line(error)) from error
    gate_up, down = case.weights.for_kernels(case.form, EXPERTS)
    hidden_NH, weight_NK, *lora = inputs
    scales = [SCALE, SCALE]
    mixed_NH = train_experts(hidden_NH, case.index_NK, weight_NK, case.slot_map_E, gate_up, down, lora, scales)
    return mixed_NH.to(hidden_NH.dtype)


def packed_torch(case: Case, inputs: Inputs) -> Tensor:
    """Multiply with int4 weights from their packed form in plain torch, tile by tile, and add the low-rank terms."""
    pairs = sort_pairs(case.index_NK, case.slot_map_E, EXPERTS)
    hidden_NH, rows_PH = inputs.hidden_NH, inputs.hidden_NH[pairs.tokens]
    sizes = case.weights.sizes
    (first, second), (gate_up, down) = inputs.lora, case.weights.stored
    both_P2I = int4_grouped_linear(rows_PH, pairs.offsets, *gate_up, sizes.hidden)
    gate_PI, up_PI = (both_P2I + lora_term(rows_PH, pairs.offsets, first)).chunk(2, -1)
    inner_PI = silu(gate_PI) * up_PI
    outputs_PH = int4_grouped_linear(inner_PI, pairs.offsets, *down, sizes.inner)
    outputs_PH = outputs_PH + lora_term(inner_PI, pairs.offsets, second)
    return combine_pairs(outputs_PH, pairs, inputs.weight_NK).to(hidden_NH.dtype)


def weight_bytes(case: Case, compute: Sum) -> int:
    """Return the bytes of the frozen weights that an implementation holds."""
    if compute is kernels:
        held = [tensor for half in case.weights.for_kernels(case.form, EXPERTS) for tensor in half]
    elif compute is packed_torch:
        held = [tensor for half in case.weights.stored for tensor in half]
    else:
        held = [*case.dense]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def check_step(case: Case, compute: Sum, expected: list[Tensor]) -> dict[str, Any]:
    """Compare one way to make a step with float32, and measure its memory; say what went wrong where something did."""
    names = ("output", *Inputs._fields)
    try:
        errors = {
            name: relative_error(got, want) for name, got, want in zip(names, case.step(compute), expected, strict=True)
        }
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= TOLERANCE[case.weights.sizes.dtype]:
            return {"refused": f"relative error of {worst} {errors[worst]:.2e}"}
        peak = None
        if case.weights.sizes.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.step(compute)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:  # whatever it is, the other measurements go on
        return {"refused": f"{type(error).__name__}: {first_line(error)}"}
    return {
        "relative_error": errors[worst],
        "relative_errors": errors,
        "peak_bytes": peak,
        "weight_bytes": weight_bytes(case, compute),
        "graph": False,
        "why_no_graph": "training steps are not recorded",
    }


Ways = dict[str, dict[str, Sum]]

WAYS: Ways = {
    form: {"ours": kernels, "plain torch": plain_torch, "whole stack": whole_stack} for form in ("dense", "int4")
}
"""What is compared on a GPU, for each form of the base."""


@torch.enable_grad()
def training_rows(
    weights: Weights,
    tokens: int,
    ceilings: dict[str, float],
    repeats: int,
    ways: Ways = WAYS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Time all ways in turn on a dense and an int4 base, routed uniformly.

    Args:
        weights: The base; made outside of inference mode.
        tokens: N.
        ceilings: Of the machine.
        repeats: Steps timed of each.
        ways: What to compare.
        clock: Tells the time.
    """
    rows = []
    for form, compared in ways.items():
        case = Case(weights, form, make_call(weights, tokens, "uniform", 0))
        expected = case.expected()
        found = {name: check_step(case, compute, expected) for name, compute in compared.items()}
        times: dict[str, list[float]] = {name: [] for name, row in found.items() if "relative_error" in row}
        for _ in range(repeats):
            for name, took in times.items():
                start = clock()
                case.step(compared[name])
                if weights.sizes.device == "cuda":
                    torch.cuda.synchronize()
                took.append(clock() - start)
        floor = case.floor(ceilings)
        for name, row in found.items():
            common = {"tokens": tokens, "format": "bf16" if form == "dense" else form, "implementation": name}
            timed = {}
            if name in times:
                seconds = statistics.median(times[name])
                timed = {"microseconds": seconds * 1e6, "share_of_floor": floor / seconds, "repeats": repeats}
            rows.append({**common, "rank": RANK, "floor_microseconds": floor * 1e6, **row, **timed})
    return rows
