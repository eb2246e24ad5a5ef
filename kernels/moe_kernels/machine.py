"""What this machine's CPU is good at, measured once, and which way a product takes because of it.

Some CPUs multiply bf16 numbers twice as fast as fp32 ones, some emulate them at a quarter of fp32's speed; torch's
product with int4 weights has a fast form for some vector units and a very slow one elsewhere. Names of machines do not
tell, so short products do. On an idle machine the answers lie far from the thresholds (factors of two and more). Where
other work or few measured CPUs could tip them, and every run must round alike, the environment variable
``MOE_KERNELS_CPU`` says the answers instead: ``native`` or ``emulated`` for bf16; for int4 ``kernel`` (what this
package compiles itself), ``op`` (torch's product) or ``tiles`` (neither); both in ``MOE_KERNELS_CPU=native,kernel``.
What is left out is found out: the kernel wherever it can be compiled. What holds is logged once.
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

from moe_kernels.cpu_kernels.build import available, multiplies_pairs, what_failed
from moe_kernels.cpu_kernels.calls import FLOATS

# Rows of one expert from which tiles of bf16 weights in fp32 are faster than an emulated product in bf16. Measured on
# 4096 x 4096: 1.0 times as fast at 4 rows, 1.1 at 8, 1.2 at 16, 1.8 at 32, 2.0 at 64 and 128, 2.3 at 512.
_UPCAST_ROWS = 8
# Rows up to which the compiled product with dense weights is faster than torch's.
# Native bf16, 14336 x 4096: 2.0 times as fast at 1 row, 1.2 to 1.5 at 2 to 8, 1.6 at 16, 1.2 at 32, 1.0 to 1.1 at 64;
# 1024 x 256 and smaller: 3 to 5 times at 1 row, 1.4 to 3 at 8, 0.9 to 1.6 at 32, 0.8 to 1.1 at 64. Where bf16 is
# emulated it always is (3 to 5 times as fast as torch's product, 1.3 to 3.8 times as tiles), but for one row, where
# both read as fast as they can. fp32: 1.0 times as fast at 1 row, 2.8 at 4, 3.1 at 8, 2.4 at 16, 1.7 at 32, 1.3 at 64
# to 128, 1.1 at 256; with 1024 inputs 1.3 at 128; with 256 inputs 1.0 at 16, with 128 1.0 at 8 and 0.7 from 32 on.
_COMPILED_ROWS = 64
_COMPILED_ROWS_NARROW = 32
_NARROW_INPUTS = 512
_COMPILED_ROWS_FP32 = 256
_FP32_INPUTS_A_ROW = 16
# Rows up to which torch's int4 product is faster than to dequantise tiles and multiply them. It works in fp32: where
# bf16 is native, tiles are 0.7 to 1.0 times as fast at 64 rows (4096 x 14336, 14336 x 4096, 4096 x 4096), 1.0 to 1.1 at
# 80, 1.1 to 1.2 at 96, 1.6 at 256, twice at 512; where it is not, they never are on AVX-512. Larger tiles gain nothing.
_OP_ROWS_NATIVE = 80
_OP_ROWS_EMULATED = 512
# Rows up to which the compiled product with int8 weights is faster than to dequantise tiles and multiply them, with few
# inputs; with more it always is. 14336 x 4096, groups of 128, bf16: 9.4 times as fast at 1 row, 7.8 at 4, 5.5 at 8, 4.0
# at 16, 2.7 at 32, 1.9 at 64, 1.5 at 128, 1.2 to 1.4 at 512 to 2048; fp32: 5.9 at 1, 5.6 at 4, 2.8 at 8, 2.3 at 16, 1.7
# at 32, 1.1 to 1.4 at 64, 1.2 at 128, 1.0 to 1.2 from 512 on; bf16 without instructions: 5.8 at 1, 3.2 at 8, 1.3 at 64,
# 1.2 from 128 on. With 1024 inputs 1.0 to 1.1 at 1024 rows in bf16, 0.9 to 1.0 in fp32; with 512 inputs 1.0 and 0.9;
# with 128 and 256 inputs 1.4 to 1.6 at 64 rows, 1.0 at 128, 0.7 at 1024 in bf16; 1.0 to 1.1, 0.8, 0.7 to 0.8 in fp32.
_INT8_ROWS_NARROW = 64
_INT8_INPUTS = {torch.bfloat16: 512, torch.float32: 2048}

# Rows up to which the compiled product with weights of the pattern 2:4 is faster than to spell out tiles and multiply
# them, where bf16 is native and inputs are few; with more inputs, in fp32 and where bf16 is emulated it always is.
# 14336 x 4096, bf16: 4.8 times as fast at 1 row, 8.9 at 2, 7.7 at 4, 5.8 at 8, 3.8 at 16, 2.4 at 32, 1.8 at 64, 1.3 at
# 128, 1.1 at 256, 1.0 at 512 to 2048; 4096 x 14336: 5.7 to 11 up to 8 rows, 1.9 at 128, 1.4 at 512 to 2048; 128 to 1024
# inputs: 7 to 10 at 1 row, 3.5 to 4.4 at 16, 1.8 at 64, 1.0 to 1.1 at 256, 0.7 to 0.9 at 1024. fp32: 2.3 to 6.6 at 1
# row, 1.9 to 2.3 at 128, 1.1 to 1.8 at 1024. bf16 where it is emulated: 2.7, 12 and 6.7 at 1, 2 and 8 rows, 1.5 at 128,
# 1.2 at 512. Torch's product of as many dense weights, zeros among them, is overtaken up to 32 rows in bf16, in fp32
# always.
_SPARSE24_ROWS = 256
_SPARSE24_INPUTS = 4096

# CPUs with units for whole matrices (AMX) multiply bf16 many times as fast as fp32. From so many rows of an expert on
# torch's products, also those of dequantised tiles, should gain from them there. Not measured: none was at hand.
_MATRIX_UNITS = 0.2
_MATRIX_UNIT_ROWS_DENSE = 8
_MATRIX_UNIT_ROWS_INT4 = 64
_MATRIX_UNIT_ROWS_INT8 = 64
_MATRIX_UNIT_ROWS_SPARSE24 = 64

VARIABLE = "MOE_KERNELS_CPU"
"""Environment variable that fixes the answers; read at the first product."""

logger = logging.getLogger(__name__)

_PROBE_SIZE = 1024
_PROBE_ROWS = 64
_PROBE_OP_ROWS = 4
_PROBE_REPEATS = 7


Int4Product = Literal["kernel", "op", "tiles"]


@dataclass(frozen=True)
class Machine:
    """What was found out about a CPU.

    Attributes:
        bf16_emulated: Products in bf16 are slower than in fp32.
        int4: What multiplies with int4 weights: ``kernel``, the product in `moe_kernels.cpu_kernels`; ``op``, that of
            torch, where it is fast; ``tiles``, neither. With ``kernel``, dense weights, int8 ones and those of the
            pattern 2:4 have a compiled product.
        bf16_over_fp32: Time of a product in bf16 over that of the same in fp32, 64 rows; nan where not measured.
        op_over_fp32: Time of the int4 product over that of the same in fp32, 4 rows; infinite where there is none, nan
            where not measured.
    """

    bf16_emulated: bool
    int4: Int4Product
    bf16_over_fp32: float = float("nan")
    op_over_fp32: float = float("nan")

    @property
    def compiled(self) -> bool:
        """Whether the products of `moe_kernels.cpu_kernels` are taken."""
        return self.int4 == "kernel"

    @property
    def has_matrix_units(self) -> bool:
        """Whether torch's products in bf16 are so fast that the CPU must have units for whole matrices.

        Never where that was not measured.
        """
        return self.bf16_over_fp32 < _MATRIX_UNITS


DenseRoute = Literal["product", "kernel", "fp32 tiles"]
Int4Route = Literal["kernel", "op", "bf16 tiles", "fp32 tiles", "exact tiles"]
Int8Route = Literal["kernel", "tiles"]
Sparse24Route = Literal["kernel", "tiles"]


def dense_route(rows: int, inputs: int, dtype: torch.dtype, machine: Machine) -> DenseRoute:
    """Say how rows of one expert are multiplied with dense weights on a CPU.

    Args:
        rows: Rows that reached the expert.
        inputs: Of the weights.
        dtype: Of rows and weights.
        machine: From :func:`this_machine`.

    Returns:
        ``product``: as they are. ``kernel``: by the product in `moe_kernels.cpu_kernels`. ``fp32 tiles``: a few rows of
        the weights at a time, in fp32.
    """
    if dtype == torch.float32 and machine.compiled:
        return "kernel" if rows <= min(_COMPILED_ROWS_FP32, inputs // _FP32_INPUTS_A_ROW) else "product"
    if dtype != torch.bfloat16:
        return "product"
    if machine.compiled:
        if machine.bf16_emulated:
            return "kernel" if rows > 1 else "product"
        most = _COMPILED_ROWS if inputs >= _NARROW_INPUTS else _COMPILED_ROWS_NARROW
        if machine.has_matrix_units:
            most = _MATRIX_UNIT_ROWS_DENSE
        return "kernel" if rows <= most else "product"
    return "fp32 tiles" if machine.bf16_emulated and rows >= _UPCAST_ROWS else "product"


def int4_route(rows: int, dtype: torch.dtype, machine: Machine) -> Int4Route:
    """Say how rows of one expert are multiplied with int4 weights on a CPU.

    Args:
        rows: Rows that reached the expert.
        dtype: Of the rows.
        machine: From :func:`this_machine`.

    Returns:
        ``kernel``: the product of `moe_kernels.cpu_kernels`. ``op``: torch's. ``bf16 tiles``, ``fp32 tiles``: a few
        rows of the weights at a time, dequantised to that type. ``exact tiles``: the same in the type of the rows.
    """
    if machine.compiled and dtype in FLOATS:
        units = dtype == torch.bfloat16 and machine.has_matrix_units
        return "bf16 tiles" if units and rows >= _MATRIX_UNIT_ROWS_INT4 else "kernel"
    if dtype != torch.bfloat16:
        return "exact tiles"
    if machine.int4 == "op" and rows <= (_OP_ROWS_EMULATED if machine.bf16_emulated else _OP_ROWS_NATIVE):
        return "op"
    return "fp32 tiles" if machine.bf16_emulated else "bf16 tiles"


def sparse24_route(rows: int, inputs: int, dtype: torch.dtype, machine: Machine) -> Sparse24Route:
    """Say how rows of one expert are multiplied with weights of the pattern 2:4 on a CPU.

    Args:
        rows: Rows that reached the expert.
        inputs: Length of a row.
        dtype: Of rows and weights.
        machine: From :func:`this_machine`.

    Returns:
        ``kernel``: the product of `moe_kernels.cpu_kernels`. ``tiles``: a few rows of the weights at a time, spelled
        out.
    """
    if not machine.compiled or dtype not in FLOATS:
        return "tiles"
    if dtype == torch.float32 or machine.bf16_emulated:
        return "kernel"
    if machine.has_matrix_units:
        return "kernel" if rows <= _MATRIX_UNIT_ROWS_SPARSE24 else "tiles"
    return "kernel" if rows <= _SPARSE24_ROWS or inputs >= _SPARSE24_INPUTS else "tiles"


def int8_route(rows: int, inputs: int, dtype: torch.dtype, machine: Machine) -> Int8Route:
    """Say how rows of one expert are multiplied with int8 weights on a CPU.

    Args:
        rows: Rows that reached the expert.
        inputs: Of the weights.
        dtype: Of the rows.
        machine: From :func:`this_machine`.

    Returns:
        ``kernel``: the product of `moe_kernels.cpu_kernels`. ``tiles``: a few rows of the weights at a time,
        dequantised.
    """
    if not machine.compiled or dtype not in _INT8_INPUTS:
        return "tiles"
    if dtype == torch.bfloat16 and machine.has_matrix_units:
        return "kernel" if rows < _MATRIX_UNIT_ROWS_INT8 else "tiles"
    return "kernel" if rows <= _INT8_ROWS_NARROW or inputs >= _INT8_INPUTS[dtype] else "tiles"


# Two threads that measure at once would disturb one another, and could find different answers.
_LOCK = threading.Lock()


def this_machine() -> Machine:
    """Say what this machine is good at: as ``MOE_KERNELS_CPU`` says, or found out, once in a process, in about 20 ms.

    The first time on a machine the shortest of the files of `moe_kernels.cpu_kernels` is compiled, to see that it can.

    Raises:
        ValueError: ``MOE_KERNELS_CPU`` holds an unknown word, two that contradict one another, or asks for a kernel
            that cannot be had.
    """
    with _LOCK:
        return found_out()


@functools.cache
def found_out() -> Machine:
    """Do the work of :func:`this_machine`."""
    emulated, int4 = _said(os.environ.get(VARIABLE, ""))
    if int4 == "kernel" and not available():
        raise ValueError(
            f"{VARIABLE}={int4}: there is no kernel, {what_failed()}; leave the word out, or give op or tiles"
        )
    measured = emulated is None or int4 is None
    bf16_over_fp32, op_over_fp32 = _measure() if measured else (float("nan"), float("nan"))
    # Found: 0.33 to 0.48 with instructions for bf16, 1.9 to 4 without; 0.2 to 0.6 with vector units, from 13 without.
    if emulated is None:
        emulated = bf16_over_fp32 > 1
    if int4 is None and available():
        # Compilers older than the CPU do not know its products of bf16 pairs; torch does.
        if emulated or multiplies_pairs():
            int4 = "kernel"
        else:
            logger.info(
                "the C compiler is older than this CPU and knows none of its products in bf16: install a newer one"
            )
    if int4 is None:
        int4 = "op" if op_over_fp32 < 3 else "tiles"
    words = f"{'emulated' if emulated else 'native'},{int4}"
    if measured:
        logger.info(
            f"CPU products: bf16 takes {bf16_over_fp32:.2f} of the time of fp32, torch's int4 product"
            f" {op_over_fp32:.2f}; decided as with {VARIABLE}={words}, which makes every run decide so"
        )
    else:
        logger.info(f"CPU products: not measured, {VARIABLE}={words}")
    return Machine(emulated, int4, bf16_over_fp32, op_over_fp32)


_BF16_WORDS = ("native", "emulated")
_INT4_WORDS: tuple[Int4Product, ...] = ("kernel", "op", "tiles")


def _said(words: str) -> tuple[bool | None, Int4Product | None]:
    """Read the environment variable: is bf16 emulated, what multiplies int4 weights; None where it does not say."""
    given = {word.strip() for word in words.split(",")} - {""}
    bf16, int4 = (given & set(known) for known in (_BF16_WORDS, _INT4_WORDS))
    if given - bf16 - int4 or len(bf16) > 1 or len(int4) > 1:
        raise ValueError(
            f"{VARIABLE}={words}: give native or emulated (products in bf16); kernel, op or tiles (int4); or one of"
            " each with a comma, as native,kernel"
        )
    product = next((word for word in _INT4_WORDS if word in int4), None)
    return "emulated" in bf16 if bf16 else None, product


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
