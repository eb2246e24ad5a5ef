"""Compile kernels before they are needed: so that no first call is slow, and none compiles while a graph is recorded.

Kernels are launched, not only compiled: the GPU loads a kernel at its first launch, which a recording must not see.

Legend: N tokens, H hidden, E experts, K top-k, S slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from moe_kernels.experts import ABSENT
from moe_kernels.triton_kernels.block import device_of, moe_block_op
from moe_kernels.triton_kernels.dispatch import Device, Format, format_of, limits
from moe_kernels.triton_kernels.int4_layout import GROUPS
from moe_kernels.triton_kernels.weight_forms import Form, empty_weights


@dataclass(frozen=True)
class Warmup:
    """What was made ready.

    Attributes:
        kernels: Names of the kernels that were compiled, one for each specialisation; none in the interpreter, and none
            that were there already. Those that triton's cache on disk held count.
        seconds: How long it took.
        tokens: Numbers of tokens that were tried: between them lies every choice.
        reason: Why nothing was done; None where something was.
    """

    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    tokens: tuple[int, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        """Say it in a line."""
        if self.reason is not None:
            return f"nothing to warm up: {self.reason}"
        tokens = ", ".join(map(str, self.tokens))
        return f"{len(self.kernels)} kernels compiled in {self.seconds:.1f} s for {tokens} tokens"


def tokens_of_choices(form: Format, device: Device, tokens: Sequence[int]) -> tuple[int, ...]:
    """Leave one number of tokens for each row of a table that any of them falls into, the largest of them.

    Args:
        form: Format of the weights and activations.
        device: From `device_of`.
        tokens: Numbers of tokens.
    """
    found: dict[int, int] = {}
    rows = limits(form, device)
    for number in sorted(tokens):
        row = next(place for place, limit in enumerate(rows) if limit is None or number <= limit)
        found[row] = number
    return tuple(found.values())


def tokens_up_to(form: Format, device: Device, most: int) -> tuple[int, ...]:
    """Return one number of tokens for each row of a table that calls with up to so many tokens fall into.

    Args:
        form: Format of the weights and activations.
        device: From `device_of`.
        most: Tokens.
    """
    ends = [limit for limit in limits(form, device) if limit is not None and limit < most]
    return tuple(sorted({*ends, most}))


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Note the kernels that are compiled inside a ``with`` block.

    Yields:
        Their names, one for each specialisation, so far.
    """
    names: list[str] = []
    runtime = triton.knobs.runtime
    before = runtime.jit_post_compile_hook

    def note(**compiled: Any) -> Any:
        names.append(compiled["fn"].name)
        return before(**compiled) if before is not None else None

    runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before


def warm_up(run: Callable[[int], object], tokens: Sequence[int]) -> Warmup:
    """Call something with numbers of tokens, and wait for the GPU.

    Args:
        run: What launches the kernels for a number of tokens.
        tokens: Numbers of tokens.
    """
    began = time.perf_counter()
    with compiled_kernels() as names, torch.no_grad():
        for number in tokens:
            run(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return Warmup(tuple(names), time.perf_counter() - began, tuple(tokens))


def warmup_kernels(
    hidden: int,
    inner: int,
    top_k: int,
    experts: int,
    form: Form = "dense",
    tokens: Sequence[int] = (1, 8, 16, 32, 64, 512),
    dtype: torch.dtype = torch.bfloat16,
    group: int = GROUPS[0],
    device: torch.device | str = "cuda",
    residual: bool = True,
) -> Warmup:
    """Compile all that a mixture-of-experts block of these sizes launches, its router included.

    No token reaches an expert, so no weight is read; but memory for one layer is taken meanwhile.

    Args:
        hidden: H.
        inner: Intermediate size.
        top_k: K.
        experts: E, all of them real.
        form: ``dense``, ``int4`` or ``sparse24``.
        tokens: Numbers of tokens of the calls to come; one of each row of the table is tried.
        dtype: Of the activations.
        group: Weights of an int4 scale: 128 or 64.
        device: Where to.
        residual: With the residual added in the same kernel.

    Returns:
        What was compiled; on a machine without a GPU (and outside of the interpreter) why nothing was.

    Raises:
        ValueError: Sizes that the kernels do not know.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return Warmup(reason="there is no GPU")
    shapes = ((2 * inner, hidden), (hidden, inner))
    gate_up, down = (empty_weights(form, experts, *shape, dtype, group, device) for shape in shapes)
    router_EH = torch.zeros(experts, hidden, dtype=dtype, device=device)
    nobody_E = torch.full((experts,), ABSENT, dtype=torch.int64, device=device)

    def run(number: int) -> None:
        hidden_NH = torch.zeros(number, hidden, dtype=dtype, device=device)
        added_NH = hidden_NH if residual else None
        moe_block_op(hidden_NH, router_EH, top_k, True, nobody_E, gate_up, down, [], None, added_NH)

    return warm_up(run, tokens_of_choices(format_of(form, dtype), device_of(device), tokens))
