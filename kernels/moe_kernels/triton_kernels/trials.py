"""Run kernels with given tiles on a GPU: check what they say, then time them.

A kernel of 40 microseconds is over before the gaps between launches are, so graphs are replayed; several sets of random
weights take turns, since one would stay in the cache (and zeros run faster than numbers); and outputs are full of NaN
before a run is checked.

Legend: N tokens, H hidden, K top-k, S slots, O outputs, I inputs.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_kernels.packing import pack_24_kept
from moe_kernels.triton_kernels.block import mix_as_chosen, mix_experts_twin
from moe_kernels.triton_kernels.dispatch import Choice
from moe_kernels.triton_kernels.int4_layout import to_tiles
from moe_kernels.triton_kernels.tuning_candidates import Problem

LEAST_SETS = 4

# Norm of the error over that of the result. With many tokens int4 weights are rounded to the type of the activations.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}


class WrongOutput(RuntimeError):
    """Kernels with some tiles do not say what their twin says."""


class Trials:
    """Layers with random weights on a device, to run with any tiles.

    Attributes:
        problem: Their sizes.
        device: Where they are.
    """

    def __init__(
        self, problem: Problem, device: torch.device, sets: int = LEAST_SETS, seconds: float = 0.1, seed: int = 0
    ) -> None:
        """Draw weights.

        Args:
            problem: Sizes of a layer.
            device: A GPU; or a CPU, with triton's interpreter, for tests: times mean nothing there.
            sets: Sets of weights that take turns.
            seconds: Time to spend on each measurement.
            seed: Of everything random.

        Raises:
            ValueError: Fewer than four sets.
        """
        if sets < LEAST_SETS:
            raise ValueError(f"{sets} sets of weights: fewer than {LEAST_SETS} would stay in the cache")
        self.problem, self.device = problem, device
        self._budget = seconds
        self._held_inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._held_expected: dict[tuple[int, int], Tensor] = {}
        self._draw = torch.Generator(device).manual_seed(seed)
        self._weights = [[self._matrices(*shape) for shape in problem.shapes] for _ in range(sets)]
        self._slot_map = torch.arange(problem.experts, device=device)

    def seconds(self, choice: Choice, tokens: int) -> float:
        """Return the median time of a layer's call, after its outputs were compared with the twin's.

        Args:
            choice: Kernels and tiles.
            tokens: N.

        Raises:
            WrongOutput: They differ.
        """
        runs = [functools.partial(self._mix, choice, tokens, number) for number in range(len(self._weights))]
        run_all, outputs = self._recorded(runs)
        for output in outputs:
            output.fill_(torch.nan)
        outputs = run_all()
        for number, output in enumerate(outputs):
            error = _relative_error(output, self._expected(tokens, number))
            if not error <= TOLERANCE[self.problem.dtype]:
                raise WrongOutput(f"{choice} at {tokens} tokens: relative error {error:.2e}")
        repeats = 1
        if self.device.type == "cuda":
            repeats = max(5, min(100, int(self._budget / min(self._times(run_all, 2)))))
        return statistics.median(self._times(run_all, repeats)) / len(runs)

    def _mix(self, choice: Choice, tokens: int, number: int) -> Tensor:
        hidden_NH, index_NK, weight_NK = self._inputs(tokens)
        gate_up, down = self._weights[number]
        return mix_as_chosen(choice, hidden_NH, index_NK, weight_NK, self._slot_map, gate_up, down, [])

    def _recorded(self, runs: Sequence[Callable[[], Tensor]]) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        """Return what runs all calls, as a graph on a GPU, and the buffers that it writes."""

        def run_all() -> list[Tensor]:
            return [run() for run in runs]

        if self.device.type != "cuda":
            return run_all, []
        run_all()  # compiles
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run_all()

        def replay() -> list[Tensor]:
            graph.replay()
            return held

        return replay, held

    def _times(self, run_all: Callable[[], list[Tensor]], repeats: int) -> list[float]:
        if self.device.type != "cuda":
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                run_all()
                times.append(time.perf_counter() - began)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run_all()
            event.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]

    def _inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an input, experts drawn uniformly and routing weights, the same at every call."""
        if tokens not in self._held_inputs:
            problem = self.problem
            hidden_NH = self._normal(tokens, problem.hidden)
            score_NE = torch.rand(tokens, problem.experts, generator=self._draw, device=self.device)
            weight_NK, index_NK = score_NE.topk(problem.top_k)
            self._held_inputs[tokens] = (hidden_NH, index_NK, weight_NK / weight_NK.sum(-1, keepdim=True))
        return self._held_inputs[tokens]

    def _expected(self, tokens: int, number: int) -> Tensor:
        if (tokens, number) not in self._held_expected:
            gate_up, down = self._weights[number]
            expected = mix_experts_twin(*self._inputs(tokens), self._slot_map, gate_up, down, [])
            self._held_expected[tokens, number] = expected
        return self._held_expected[tokens, number]

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._draw, device=self.device).to(self.problem.dtype)

    def _matrices(self, outputs: int, inputs: int) -> list[Tensor]:
        """Return random matrices in the form of the kernels, whose products are about as large as their inputs."""
        problem, slots = self.problem, self.problem.experts
        if problem.form == "dense":
            return [torch.stack([self._normal(outputs, inputs) * inputs**-0.5 for _ in range(slots)])]
        if problem.form == "sparse24":
            packed = [self._sparse24(outputs, inputs) for _ in range(slots)]
            return [torch.stack(list(tensors)) for tensors in zip(*packed, strict=True)]
        groups = inputs // problem.group
        words = torch.randint(
            -(2**31), 2**31, (slots, outputs, inputs // 8), dtype=torch.int32, generator=self._draw, device=self.device
        )
        scale = torch.rand(slots, outputs, groups, generator=self._draw, device=self.device) + 0.5
        zero = torch.randint(
            0, 256, (slots, outputs, (groups + 1) // 2), dtype=torch.uint8, generator=self._draw, device=self.device
        )
        tiles = to_tiles(words, (scale * inputs**-0.5 / 5).bfloat16(), zero, inputs)
        return [tiles.words_SGOW, tiles.pairs_SGO]

    def _sparse24(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        score = torch.rand(outputs, inputs // 4, 4, generator=self._draw, device=self.device)
        keep = score.argsort(-1).argsort(-1).lt(2).flatten(-2)
        packed = pack_24_kept(self._normal(outputs, inputs) * (inputs / 2) ** -0.5, keep)
        return packed.values, packed.metadata


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Return ``|got - want| / |want|``, not a number where one of them is not."""
    wide = got.to(want.dtype)
    return float((wide - want).norm() / want.norm().clamp(min=1e-30))
