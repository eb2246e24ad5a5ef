"""What this machine's CPU is good at, measured once, and which way a product takes because of it.

Some CPUs multiply bf16 numbers twice as fast as fp32 ones, some emulate them at a quarter of fp32's speed; torch's
product with int4 weights has a fast form for some vector units and a very slow one elsewhere. Names of machines do not
tell, so short products do. On an idle machine the answers lie far from the thresholds (factors of two and more). Where
other work or few measured CPUs could tip them, and every run must round alike, the environment variable
``MOE_KERNELS_CPU`` says the answers instead: ``native`` or ``emulated`` for bf16, ``op`` or ``tiles`` for torch's int4
product, both in ``MOE_KERNELS_CPU=native,op``. What is left out is measured. What holds is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one expert from which tiles of bf16 weights in fp32 are faster than an emulated product in bf16. Measured on
# 4096 x 4096: 1.0 times as fast at 4 rows, 1.1 at 8, 1.2 at 16, 1.8 at 32, 2.0 at 64 and 128, 2.3 at 512.
_UPCAST_ROWS = 8
# Rows up to which torch's int4 product is faster than to dequantise tiles and multiply them. It works in fp32: where
# bf16 is native, tiles are 0.7 to 1.0 times as fast at 64 rows (4096 x 14336, 14336 x 4096, 4096 x 4096), 1.0 to 1.1 at
# 80, 1.1 to 1.2 at 96, 1.6 at 256, twice at 512; where it is not, they never are on AVX-512. Larger tiles gain nothing.
_OP_ROWS_NATIVE = 80
_OP_ROWS_EMULATED = 512

VARIABLE = "MOE_KERNELS_CPU"
"""Environment variable that fixes the answers; read at the first product."""

logger = logging.getLogger(__name__)

_PROBE_SIZE = 1024
_PROBE_ROWS = 64
_PROBE_OP_ROWS = 4
_PROBE_REPEATS = 7


@dataclass(frozen=True)
class Machine:
    """What was found out about a CPU.

    Attributes:
        bf16_emulated: Products in bf16 are slower than in fp32.
        int4_op: torch's product with int4 weights is there and is fast.
        bf16_over_fp32: Time of a product in bf16 over that of the same in fp32, 64 rows; nan where not measured.
        op_over_fp32: Time of the int4 product over that of the same in fp32, 4 rows; infinite where there is none, nan
            where not measured.
    """

    bf16_emulated: bool
    int4_op: bool
    bf16_over_fp32: float = float("nan")
    op_over_fp32: float = float("nan")


DenseRoute = Literal["product", "fp32 tiles"]
Int4Route = Literal["op", "bf16 tiles", "fp32 tiles", "exact tiles"]


def dense_route(rows: int, dtype: torch.dtype, machine: Machine) -> DenseRoute:
    """Say how rows of one expert are multiplied with dense weights on a CPU.

    Args:
        rows: Rows that reached the expert.
        dtype: Of rows and weights.
        machine: From :func:`this_machine`.

    Returns:
        ``product``: as they are. ``fp32 tiles``: a few rows of the weights at a time, in fp32.
    """
    emulated = dtype == torch.bfloat16 and machine.bf16_emulated
    return "fp32 tiles" if emulated and rows >= _UPCAST_ROWS else "product"


def int4_route(rows: int, dtype: torch.dtype, machine: Machine) -> Int4Route:
    """Say how rows of one expert are multiplied with int4 weights on a CPU.

    Args:
        rows: Rows that reached the expert.
        dtype: Of the rows.
        machine: From :func:`this_machine`.

    Returns:
        ``op``: torch's int4 product. ``bf16 tiles``, ``fp32 tiles``: a few rows of the weights at a time, dequantised
        to that type. ``exact tiles``: the same in the type of the rows.
    """
    if dtype != torch.bfloat16:
        return "exact tiles"
    if machine.int4_op and rows <= (_OP_ROWS_EMULATED if machine.bf16_emulated else _OP_ROWS_NATIVE):
        return "op"
    return "fp32 tiles" if machine.bf16_emulated else "bf16 tiles"


# Two threads that measure at once would disturb one another, and could find different answers.
_LOCK = threading.Lock()


def this_machine() -> Machine:
    """Say what this machine is good at: as ``MOE_KERNELS_CPU`` says, or measured, once in a process, in about 20 ms.

    Raises:
        ValueError: ``MOE_KERNELS_CPU`` holds an unknown word, or two that contradict one another.
    """
    with _LOCK:
        return found_out()


@functools.cache
def found_out() -> Machine:
    """Do the work of :func:`this_machine`."""
    emulated, op = _said(os.environ.get(VARIABLE, ""))
    bf16_over_fp32 = op_over_fp32 = float("nan")
    if emulated is None or op is None:
        bf16_over_fp32, op_over_fp32 = _measure()
    # Found: 0.33 to 0.48 with instructions for bf16, 1.9 to 4 without; 0.2 to 0.6 with vector units, from 13 without.
    machine = Machine(
        bf16_over_fp32 > 1 if emulated is None else emulated,
        op_over_fp32 < 3 if op is None else op,
        bf16_over_fp32,
        op_over_fp32,
    )
    words = f"{'emulated' if machine.bf16_emulated else 'native'},{'op' if machine.int4_op else 'tiles'}"
    if emulated is None or op is None:
        logger.info(
            f"CPU products: bf16 takes {bf16_over_fp32:.2f} of the time of fp32, torch's int4 product"
            f" {op_over_fp32:.2f}; decided as with {VARIABLE}={words}, which makes every run decide so"
        )
    else:
        logger.info(f"CPU products: not measured, {VARIABLE}={words}")
    return machine


def _said(words: str) -> tuple[bool | None, bool | None]:
    """Read the environment variable: is bf16 emulated, is torch's int4 product fast; None where it does not say."""
    given = {word.strip() for word in words.split(",")} - {""}
    unknown = given - {"native", "emulated", "op", "tiles"}
    if unknown or given >= {"native", "emulated"} or given >= {"op", "tiles"}:
        raise ValueError(
            f"{VARIABLE}={words}: give native or emulated (products in bf16), op or tiles (int4), or one of each with a"
            " comma, as native,op"
        )
    emulated = "emulated" in given if given & {"native", "emulated"} else None
    return emulated, "op" in given if given & {"op", "tiles"} else None


def _measure() -> tuple[float, float]:
    """Return times of products in bf16 and with int4 weights over those in fp32, with as many threads as torch has."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        weight = torch.randn(_PROBE_SIZE, _PROBE_SIZE, generator=generator, dtype=torch.float32, device="cpu")
        rows = torch.randn(_PROBE_ROWS, _PROBE_SIZE, generator=generator, dtype=torch.float32, device="cpu")
        narrow_weight, narrow_rows = weight.bfloat16(), rows.bfloat16()
        fp32, bf16 = _best_seconds(lambda: F.linear(rows, weight), lambda: F.linear(narrow_rows, narrow_weight))
        op_over_fp32 = float("inf")
        few, few_narrow = rows[:_PROBE_OP_ROWS], narrow_rows[:_PROBE_OP_ROWS]
        try:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones_like(weight, dtype=torch.int32), 1)
            scales = torch.ones(_PROBE_SIZE // 128, _PROBE_SIZE, 2, dtype=torch.bfloat16, device="cpu")
            few_fp32, op = _best_seconds(
                lambda: F.linear(few, weight),
                lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(few_narrow, packed, 128, scales),
            )
            op_over_fp32 = op / few_fp32
        except (AttributeError, NotImplementedError, RuntimeError):
            pass  # a build of torch without it
    return bf16 / fp32, op_over_fp32


def _best_seconds(*runs: Callable[[], Tensor]) -> tuple[float, ...]:
    """Return the best time of each, in turn: other work on the machine then spoils the ratio of none."""
    best = [float("inf")] * len(runs)
    for _ in range(_PROBE_REPEATS):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[place] = min(best[place], time.perf_counter() - start)
    return tuple(best)
