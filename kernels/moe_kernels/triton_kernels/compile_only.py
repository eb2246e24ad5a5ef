"""Compile kernels for a GPU without a GPU, and read what they will cost there.

Triton brings its own compiler, assembler and disassembler, so shared memory, registers, spills, the use of tensor cores
and instructions a weight are known on any machine. What costs time on a GPU costs a test here first.

    python -m moe_kernels.triton_kernels.compile_only < requests.json

reads a list of requests (see `Request`) and writes a list of `Resources`: kernels that were imported for the
interpreter (``TRITON_INTERPRET=1``) cannot be compiled, so tests that use it ask another process.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_BYTES_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that a block may take, by architecture."""

# The start of a line of the disassembly: address and instruction.
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s.*?0x([0-9a-f]+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "QGMMA", "IMMA", "DMMA")


@dataclass(frozen=True)
class Request:
    """A kernel to compile.

    Attributes:
        kernel: ``module:name`` of a function under ``triton.jit``.
        signature: Type of each argument that is not a constant, as triton writes them: ``*bf16``, ``i32``.
        constants: Value of each constant; dtypes by their names in ``triton.language``.
        num_warps: Warps of a block.
        num_stages: Default depth of pipelines.
        arch: 80, 90 or 100.
        aligned: Arguments known to be divisible by 16; pointers always are.
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    arch: int = 90
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        shared_bytes: Shared memory of a block.
        registers: Registers of a thread.
        spills: Loads and stores of registers that did not fit.
        instructions: Instructions of the kernel.
        loop_instructions: Instructions of the innermost loop with the most products on tensor cores; 0 without one.
        loop_products: Tensor-core instructions in that loop.
        opcodes: Instructions of that loop (of the kernel, where there is none) by name.
        has_wgmma: Products of a whole group of four warps, sm_90.
        has_mma: Products on tensor cores, of any kind.
    """

    shared_bytes: int
    registers: int
    spills: int
    instructions: int
    loop_instructions: int
    loop_products: int
    opcodes: dict[str, int]
    has_wgmma: bool
    has_mma: bool

    def per_weight(self, num_warps: int, weights: int) -> float:
        """Return instructions a weight: those of all threads in one pass of the loop over the weights it reads."""
        return self.loop_instructions * num_warps * 32 / weights


def resources(request: Request) -> Resources:
    """Compile a kernel in this process.

    Args:
        request: What to compile.

    Returns:
        What the result takes.

    Raises:
        ValueError: The request does not fit the kernel's arguments.
        RuntimeError: The kernel was imported for the interpreter: use :func:`resources_of` there.
    """
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = list(inspect.signature(kernel.fn).parameters)
    unknown = [given for given in (*request.signature, *request.constants) if given not in names]
    missing = [wanted for wanted in names if wanted not in request.signature and wanted not in request.constants]
    if unknown or missing:
        raise ValueError(f"{name}: no arguments named {unknown}, no types or values for {missing}")
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"{name} was imported under TRITON_INTERPRET=1: compile it in a process without it")
    signature = {place: request.signature.get(place, "constexpr") for place in names}
    constants = {(names.index(given),): _value(value) for given, value in request.constants.items()}
    aligned = [place for place, kind in signature.items() if kind.startswith("*") or place in request.aligned]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(place),): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _value(value: Any) -> Any:
    """Return a constant as triton wants it: names of its dtypes stand for them."""
    import triton.language as tl

    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value


def _read(binary: bytes, shared_bytes: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = _cuobjdump("-res-usage", path)
        listing = _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    code = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(listing)]
    names = [_opcode(text) for _, text in code]
    loop = _product_loop(code)
    counted = Counter(_opcode(text) for text in (loop or [text for _, text in code]))
    return Resources(
        shared_bytes=shared_bytes,
        registers=int(found[1]),
        spills=sum(name in ("STL", "LDL") for name in names),
        instructions=len(code),
        loop_instructions=len(loop),
        loop_products=sum(_opcode(text) in _TENSOR_CORE for text in loop),
        opcodes=dict(counted.most_common()),
        has_wgmma="HGMMA" in names,
        has_mma=any(name in _TENSOR_CORE for name in names),
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout


def _opcode(text: str) -> str:
    return _PREDICATE.sub("", text).split()[0].split(".")[0]


def _product_loop(code: list[tuple[int, str]]) -> list[str]:
    """Return the innermost loop (code that a branch at its end repeats) with the most products on tensor cores."""
    loops = []
    for end, text in code:
        branch = _BRANCH.search(text)
        if branch and (start := int(branch[1], 16)) < end:
            body = [line for address, line in code if start <= address <= end]
            # Code behind the end of the kernel jumps back where something was waited for: that is no loop.
            ends = any(line.startswith("EXIT") for line in body)
            if not ends and (products := sum(_opcode(line) in _TENSOR_CORE for line in body)):
                loops.append((start, end, products, body))
    inner = [
        loop
        for loop in loops
        if not any(other is not loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    return max(inner, key=lambda loop: loop[2], default=(0, 0, 0, []))[3]


def resources_of(requests: Sequence[Request]) -> list[Resources]:
    """Compile kernels in one fresh process, without the interpreter.

    Args:
        requests: What to compile.

    Returns:
        What each takes.

    Raises:
        RuntimeError: One did not compile; the message holds the compiler's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    packages = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, *sys.path]))
    ran = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([dataclasses.asdict(request) for request in requests]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"a kernel did not compile:\n{ran.stderr[-4000:]}")
    return [Resources(**found) for found in json.loads(ran.stdout)]


@functools.cache
def can_compile() -> str | None:
    """Say why kernels cannot be compiled here; None where they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        return "this triton has no cuobjdump"
    return None


def main() -> None:
    """Read requests from standard input, write what they take to standard output."""
    requests = [Request(**request) for request in json.load(sys.stdin)]
    json.dump([dataclasses.asdict(resources(request)) for request in requests], sys.stdout)


if __name__ == "__main__":
    main()
