"""Which kernels a piece of code launches, and how each would be specialised, without a GPU and without compiling.

triton compiles a kernel anew for every set of types, constants and options that it has not seen. To record the launches
says what will be compiled, and what `compile_only` shall look at, from the very code that runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from moe_kernels.triton_kernels.compile_only import Request
from moe_kernels.triton_kernels.interpreting import INTERPRETED


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: Of the kernel.
        key: What triton looks up its compiled kernels by: types, constants and options.
        request: The same kernel for `compile_only`.
    """

    name: str
    key: str
    request: Request


class _NoGpu:
    """The part of a driver that is asked before a kernel is compiled."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        # Kernels of triton keep what they know by number of the device: this one is nobody's.
        return -self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def recorded_launches(arch: int) -> Iterator[list[Launch]]:
    """Record the launches inside a ``with`` block instead of compiling and running kernels.

    Tensors may lie anywhere, on the meta device too: nothing is read or written.

    Args:
        arch: 80, 90 or 100.

    Yields:
        The launches so far.

    Raises:
        RuntimeError: Kernels were imported for the interpreter, which has no types.
    """
    if INTERPRETED:
        raise RuntimeError("kernels were imported under TRITON_INTERPRET=1: record launches in a process without it")
    launches: list[Launch] = []

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(Launch(fn.name, key, _request(fn, compile, arch)))
        return True  # nothing is to be compiled

    driver, runtime = triton.runtime.driver, triton.knobs.runtime
    before, hook = driver._active, runtime.jit_cache_hook
    driver.set_active(_NoGpu(arch))
    runtime.jit_cache_hook = note
    try:
        yield launches
    finally:
        runtime.jit_cache_hook = hook
        driver._active = before


def _request(kernel: Any, given: dict[str, Any], arch: int) -> Request:
    names = list(given["signature"])
    constants = {names[place]: _constant(value) for (place,), value in given["constants"].items()}
    aligned = [names[place] for (place,), attributes in given["configs"][0].items() if attributes]
    return Request(
        f"{kernel.module}:{kernel.name}",
        {name: kind for name, kind in given["signature"].items() if kind != "constexpr"},
        constants,
        given["num_warps"],
        given["num_stages"],
        arch,
        tuple(name for name in aligned if name not in constants),
    )


def _constant(value: Any) -> Any:
    """Return a constant as requests hold it: types by their names."""
    return repr(value).replace("triton.language", "tl") if isinstance(value, tl.dtype) else value
