"""Compile the C files beside this one for the CPU that is there, each when it is first asked for, and load them.

The libraries are kept in ``$XDG_CACHE_HOME/moe_kernels`` (``~/.cache/moe_kernels`` without that) under names that hold
the sources, the compiler and the CPU, so that a home shared by several machines serves all of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HEADERS = ("vectors.h", "dense_product.h")

# With OpenMP: threads are those of torch, whose library is loaded already. Without it (clang wants libomp) nothing is
# compiled: one thread would be slower than all of torch's.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno")
_SECONDS = 120
# The kernels are 1.1 to 2.2 times as fast as torch's int4 product with AVX-512, and 0.7 to 0.8 times with AVX2.
_VECTORS = "AVX512"

_LONG, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_DENSE: dict[str, tuple[list[Any], Any]] = {
    "moe_dense_scratch": ([_LONG] * 2, _LONG),
    "moe_dense_product": ([_POINTER] * 5 + [_LONG] * 3 + [_INT], None),
}
_FUNCTIONS: dict[str, dict[str, tuple[list[Any], Any]]] = {
    "pairs": {
        "moe_multiplies_pairs": ([], _INT),
        "moe_sort_pairs": ([_POINTER] * 2 + [_LONG] * 3 + [_POINTER] * 2, _LONG),
        "moe_combine": ([_POINTER] * 8 + [_LONG] * 6 + [_INT] * 4, None),
    },
    "dense": _DENSE,
    "dense_fp32": _DENSE,
    "int4": {
        "moe_int4_scratch": ([_LONG] * 3 + [_INT], _LONG),
        "moe_int4_product": ([_POINTER] * 7 + [_LONG] * 4 + [_INT] * 3, None),
    },
    "int8": {
        "moe_int8_scratch": ([_LONG] * 3 + [_INT] * 2, _LONG),
        "moe_int8_product": ([_POINTER] * 7 + [_LONG] * 4 + [_INT] * 3, None),
    },
    "sparse24": {
        "moe_sparse24_scratch": ([_LONG] * 2 + [_INT], _LONG),
        "moe_sparse24_product": ([_POINTER] * 6 + [_LONG] * 3 + [_INT] * 2, None),
    },
}
NAMES = tuple(_FUNCTIONS)
"""The libraries: each is one C file, compiled when it is first asked for."""

logger = logging.getLogger(__name__)


def why_not() -> str | None:
    """Say why nothing can be compiled for this machine; None where it can be tried."""
    if os.name != "posix":
        return "it is compiled on Linux and the like only"
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors != _VECTORS:
        return f"this CPU has {vectors} and no AVX-512"
    if not compiler():
        return "there is no C compiler: install gcc or clang, or name one in the environment variable CC"
    return None


def compiler() -> list[str]:
    """Return the command of the C compiler: ``$CC``, or the first of cc, gcc and clang; empty where there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in ([given] if given else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return []


def available() -> bool:
    """Say whether something can be compiled here: the shortest of the files was."""
    return library("pairs") is not None


def multiplies_pairs() -> bool:
    """Say whether the compiled products multiply bf16 numbers in pairs: the CPU can, and the compiler knows that."""
    found = library("pairs")
    return found is not None and bool(found.moe_multiplies_pairs())


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the functions of a C file, compiled now if they never were; None, logged with the reason, if they cannot.

    Compiling takes some seconds, once for a machine.

    Args:
        name: One of `NAMES`.
    """
    try:
        reason = why_not()
        if reason is None:
            return _load(_compiled(name), name)
    # A compiler can be anything: it may write no library, one without these functions, or words in no known letters.
    except (OSError, subprocess.SubprocessError, RuntimeError, ValueError, AttributeError) as error:
        reason = _said(error)
    _REASONS[name] = reason
    logger.info(f"no compiled products on this CPU ({name}): {reason}")
    return None


_REASONS: dict[str, str] = {}


def what_failed() -> str:
    """Say why nothing could be compiled, once that was tried."""
    return _REASONS.get("pairs", "nothing was tried")


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        lines = [line for line in lines if "error" in line.lower()] or lines
        return f"{shlex.join(error.cmd[:1])} failed with {error.returncode}: {' '.join(lines[:3])[:500]}"
    return f"{type(error).__name__}: {error}"


def _load(path: Path, name: str) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        # A file that was damaged: made anew, once.
        path.unlink()
        found = ctypes.CDLL(str(_compiled(name)))
    for function_name, (arguments, result) in _FUNCTIONS[name].items():
        function = getattr(found, function_name)
        function.argtypes, function.restype = arguments, result
    return found


def _compiled(name: str) -> Path:
    """Return a library's file; write it if it is not there."""
    command = compiler()
    folder = cache_folder()
    target = folder / f"{name}-{_fingerprint(command, name)}.so"
    if target.is_file():
        return target
    logger.info(f"compiling {name}.c for this CPU, once")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
        # Under its last name only when it is whole: others may compile at the same time.
        made = Path(building) / target.name
        _compile(command, name, made)
        os.replace(made, target)
    logger.info(f"compiled {name}.c in {time.perf_counter() - began:.1f} s: {target}")
    return target


def _compile(command: list[str], name: str, target: Path) -> None:
    source = str(Path(__file__).parent / f"{name}.c")
    subprocess.run(
        [*command, *_FLAGS, source, "-o", str(target)], check=True, capture_output=True, text=True, timeout=_SECONDS
    )


def cache_folder() -> Path:
    """Return the folder of compiled libraries: in the user's cache, or, where that cannot be, among temporary files.

    Raises:
        OSError: Nothing can be written in either.
    """
    reasons = []
    for folder in (_in_cache, _among_temporary):
        try:
            found = folder()
            found.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Others must not be able to put a library there.
            if found.stat().st_uid == os.getuid() and os.access(found, os.W_OK) and not found.stat().st_mode & 0o022:
                return found
            reasons.append(f"{found} is not this user's alone, or cannot be written")
        except (OSError, RuntimeError) as error:
            reasons.append(_said(error))
    raise OSError(f"compiled products can be kept nowhere: {'; '.join(reasons)}; set XDG_CACHE_HOME to a folder")


def _in_cache() -> Path:
    # Without a home this is an error.
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_kernels"


def _among_temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"moe_kernels-{os.getuid()}"


def _fingerprint(command: list[str], name: str) -> str:
    """Return what tells this machine's library from any other."""
    seen = hashlib.sha256()
    for part in (f"{name}.c", *HEADERS):
        seen.update((Path(__file__).parent / part).read_bytes())
    version = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True, timeout=_SECONDS)
    seen.update("\0".join([*command, *_FLAGS, version.stdout, platform.machine(), _cpu()]).encode())
    return seen.hexdigest()[:16]


def _cpu() -> str:
    """Return name and abilities of the CPU as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = {line.split(":")[0].strip(): line for line in lines if line.startswith(("model name", "flags"))}
    return "\n".join(told.values())
