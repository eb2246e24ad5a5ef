"""Sizes of tiles that a tuner tries, and what compiling alone says about each.

What needs more shared memory than there is, parks registers in memory or misses the tensor cores is left out before
anything runs; of the rest, those with the fewest instructions go on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moe_kernels.triton_kernels.block import mix_as_chosen
from moe_kernels.triton_kernels.compile_only import SHARED_BYTES_LIMIT, Request, resources
from moe_kernels.triton_kernels.dispatch import Choice, Format, Tiles, format_of
from moe_kernels.triton_kernels.grouped_down import grouped_down
from moe_kernels.triton_kernels.grouped_gate_up import grouped_gate_up
from moe_kernels.triton_kernels.launches import recorded_launches
from moe_kernels.triton_kernels.schedule import Schedule
from moe_kernels.triton_kernels.weight_forms import Form, empty_weights

Way = Literal["decode", "grouped"]
Projection = Literal["gate_up", "down"]

PROJECTIONS: tuple[Projection, ...] = ("gate_up", "down")
DECODE_TOKENS = (8, 16, 32, 64)
"""Tokens of a tile, for few tokens."""

GROUPED_TOKENS = {torch.bfloat16: (64, 128), torch.float16: (64, 128), torch.float32: (32, 64)}
"""Pairs of a tile, for many tokens."""

SPLITS = (2, 4, 8)


@dataclass(frozen=True)
class Problem:
    """A layer to tune for.

    Attributes:
        form: ``dense``, ``int4`` or ``sparse24``.
        hidden: Hidden size.
        inner: Intermediate size.
        experts: Experts, all of them real.
        top_k: Experts of a token.
        dtype: Of the activations.
        group: Weights of an int4 scale.
    """

    form: Form
    hidden: int
    inner: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    group: int = 128

    @property
    def format(self) -> Format:
        """Name of the rows in the tables."""
        return format_of(self.form, self.dtype)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Outputs and inputs of both projections."""
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)


@dataclass(frozen=True)
class Figures:
    """What compiling alone says about one kernel.

    Attributes:
        path: Kernels for few tokens, or for many.
        block_tokens: Tokens of a tile.
        projection: Which of the two products.
        tiles: Its sizes.
        per_weight: Instructions of all threads for each weight that is read (for many tokens, for each of a row).
        registers: Of a thread.
        shared_bytes: Of a block.
        refused: Why it is not tried; None where it may be.
    """

    path: Way
    block_tokens: int
    projection: Projection
    tiles: Tiles
    per_weight: float = 0.0
    registers: int = 0
    shared_bytes: int = 0
    refused: str | None = None


def candidates(problem: Problem, path: Way, projection: Projection) -> list[Tiles]:
    """Return sizes to try; splits are left to the GPU, since they change no instruction.

    Args:
        problem: The layer.
        path: Kernels for few tokens, or for many.
        projection: Which of the two products.
    """
    rows = problem.inner if projection == "gate_up" else problem.hidden
    splits = 4 if path == "decode" and projection == "down" else 1
    inputs: tuple[int, ...]
    if path == "grouped":
        inputs = (32,) if problem.dtype == torch.float32 else (64,)
        sizes = itertools.product((64, 128, 256), (4, 8), (2, 3, 4), inputs)
    elif problem.form == "int4":
        sizes = itertools.product((32, 64, 128), (2, 4, 8), (3, 4), (64,))
    else:
        inputs = (32,) if problem.dtype == torch.float32 else (64, 128)
        sizes = itertools.product((32, 64, 128), (2, 4, 8), (3, 4), inputs)
    found = [Tiles(out, warps, stages, block_in, splits) for out, warps, stages, block_in in sizes]
    if problem.form == "int4" and path == "decode":
        found = [tiles for tiles in found if rows % tiles.block_out == 0]
    return [tiles for tiles in found if tiles.block_out <= max(rows, 16)]


def figures(problem: Problem, path: Way, block_tokens: int, projection: Projection, tiles: Tiles, arch: int) -> Figures:
    """Compile one kernel and say what it takes.

    Args:
        problem: The layer.
        path: Kernels for few tokens, or for many.
        block_tokens: Tokens of a tile.
        projection: Which of the two products.
        tiles: Its sizes.
        arch: 80, 90 or 100.
    """
    about = Figures(path, block_tokens, projection, tiles)
    try:
        request = product_request(problem, Choice(path, block_tokens, tiles, tiles), projection, arch)
        found = resources(request)
    except Exception as error:  # whatever a compiler says of sizes that it does not like
        return dataclasses.replace(about, refused=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    inputs = problem.group if problem.form == "int4" and path == "decode" else tiles.block_in
    weights = tiles.block_out * inputs * (2 if projection == "gate_up" else 1)
    per_weight = found.per_weight(tiles.num_warps, weights) / (block_tokens if path == "grouped" else 1)
    about = dataclasses.replace(
        about, per_weight=per_weight, registers=found.registers, shared_bytes=found.shared_bytes
    )
    refused = None
    if found.shared_bytes > SHARED_BYTES_LIMIT[arch]:
        refused = f"{found.shared_bytes} bytes of shared memory"
    elif found.spills:
        refused = f"{found.spills} spills"
    elif problem.dtype != torch.float32 and not found.has_mma:
        refused = "no tensor cores"
    elif path == "grouped" and arch == 90 and problem.dtype != torch.float32 and not found.has_wgmma:
        refused = "no wgmma"
    return dataclasses.replace(about, refused=refused)


def best(found: Iterable[Figures], keep: int) -> list[Figures]:
    """Return those that may run, with the fewest instructions first, the smaller shared memory first among equals.

    Args:
        found: Of one projection.
        keep: Most of them.
    """
    able = [figure for figure in found if figure.refused is None]
    return sorted(able, key=lambda figure: (round(figure.per_weight, 3), figure.shared_bytes))[:keep]


def product_request(problem: Problem, choice: Choice, projection: Projection, arch: int) -> Request:
    """Return the kernel of a projection as the code that runs on a GPU launches it.

    Args:
        problem: The layer.
        choice: Kernels and tiles.
        projection: Which of the two products.
        arch: 80, 90 or 100.
    """
    meta = torch.device("meta")
    tokens = choice.block_tokens
    hidden = torch.empty(tokens, problem.hidden, dtype=problem.dtype, device=meta)
    weight = torch.empty(tokens, problem.top_k, dtype=torch.float32, device=meta)
    with recorded_launches(arch) as launches:
        if choice.path == "decode":
            slot_map = torch.empty(problem.experts, dtype=torch.int64, device=meta)
            stacks = [
                empty_weights(problem.form, problem.experts, *shape, problem.dtype, problem.group, meta)
                for shape in problem.shapes
            ]
            mix_as_chosen(choice, hidden, weight.long(), weight, slot_map, stacks[0], stacks[1], [])
        else:
            _launch_grouped(problem, choice, arch, hidden, weight)
    return next(launch.request for launch in launches if launch.name.endswith(f"{projection}_kernel"))


def _launch_grouped(problem: Problem, choice: Choice, arch: int, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Launch both products for many tokens, with tensor descriptors where that GPU takes them."""

    def numbers(*size: int) -> torch.Tensor:
        return hidden.new_empty(*size, dtype=torch.int32)

    pairs, slots = weight.numel(), problem.experts
    schedule = Schedule(
        numbers(*weight.shape),
        numbers(pairs),
        numbers(slots),
        numbers(pairs),
        numbers(pairs),
        numbers(1),
        choice.block_tokens,
    )
    gate_up, down = (hidden.new_empty(slots, *shape) for shape in problem.shapes)
    first, second, descriptors = choice.gate_up, choice.down, arch >= 90
    inner = grouped_gate_up(
        hidden,
        gate_up,
        schedule,
        first.block_out,
        first.block_in,
        num_warps=first.num_warps,
        num_stages=first.num_stages,
        descriptors=descriptors,
    )
    grouped_down(
        inner,
        down,
        weight,
        schedule,
        second.block_out,
        second.block_in,
        num_warps=second.num_warps,
        num_stages=second.num_stages,
        descriptors=descriptors,
    )


def as_lines(found: Sequence[Figures]) -> list[str]:
    """Return a table for people: what may run first, then what was left out and why."""
    lines = [f"{'out':>4} {'in':>4} {'warps':>5} {'stages':>6} {'per weight':>10} {'registers':>9} {'shared':>7}"]
    for figure in [*best(found, len(found)), *(figure for figure in found if figure.refused is not None)]:
        tiles = figure.tiles
        numbers = f"{figure.per_weight:10.3f} {figure.registers:9d} {figure.shared_bytes:7d}"
        line = f"{tiles.block_out:4d} {tiles.block_in:4d} {tiles.num_warps:5d} {tiles.num_stages:6d} {numbers}"
        lines.append(line if figure.refused is None else f"{line}  left out: {figure.refused}")
    return lines
