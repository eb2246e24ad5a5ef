"""The training kernels as models of known sizes use them, with every shipped size of tiles, and what each may cost."""

from collections.abc import Iterator
from typing import Any

from moe_kernels.triton_kernels.compile_only import Request
from moe_kernels.triton_kernels.dispatch import Device, Tiles
from moe_kernels.triton_kernels.training.choose import TrainingChoice, choose_training
from moe_kernels.triton_kernels.training.rank_reads import rank_tile
from moe_kernels.triton_kernels.training.tiles import RANK_TILE

from tests.kernels.triton.compiled_kernels import COMPUTE, MIXTRAL, OLMOE, Case, Sizes, named, types

ROOM = "moe_kernels.triton_kernels.training."
PLACES = "order:i32 ends:i32 tile_slot:i32 tile_first:i32 num_tiles:i32"


def product(
    module: str,
    kernel: str,
    arguments: str,
    constants: dict[str, Any],
    tiles: Tiles,
    arch: int,
    dtype: str,
    inputs_first: bool = False,
    numbers: str = "",
) -> Case:
    """Give a kernel whose programs stay; descriptors from Hopper on."""
    signature = types(f"{arguments} {PLACES}", dtype, numbers)
    block = [tiles.block_in, tiles.block_out] if inputs_first else [tiles.block_out, tiles.block_in]
    signature["weights"] = f"tensordesc<{dtype}[{block[0]},{block[1]}]>" if arch >= 90 else f"*{dtype}"
    constants = {
        **constants,
        "BLOCK_RANK": RANK_TILE,
        "BLOCK_OUT": tiles.block_out,
        "BLOCK_IN": tiles.block_in,
        "TILES_TOGETHER": 16,
        "STAGES": tiles.num_stages,
        "DESCRIPTORS": arch >= 90,
        "COMPUTE": COMPUTE[dtype],
    }
    request = Request(f"{ROOM}{module}:{kernel}_kernel", signature, constants, tiles.num_warps, tiles.num_stages, arch)
    tensor_cores = dtype != "fp32"
    name = f"{kernel} {dtype}"
    return Case(name, request, products=tensor_cores, wgmma=tensor_cores and arch == 90)


def step(sizes: Sizes, arch: int, choice: TrainingChoice, dtype: str, rank: int, lora: str = "fp32") -> Iterator[Case]:
    """Give the kernels of a step; matrices of low-rank terms are in a type of their own."""
    both = {"HIDDEN": sizes.hidden, "INNER": sizes.inner, "RANK": rank, "BLOCK_ROWS": choice.block_rows}
    gives = f"reads:T gives:{lora if rank else 'T'}"
    arguments = f"hidden:T {gives} pre:T inner:T"
    constants = both | {"TOP_K": sizes.top_k}
    yield product("gate_up", "training_gate_up", arguments, constants, choice.gate_up, arch, dtype)
    yield product(
        "down_backward",
        "down_backward",
        f"grad:T {gives} pre:T share:fp32 grad_pre:T inner:T grad_share:fp32",
        constants | {"WANT_PRE": True, "WANT_INNER": True, "WANT_SHARE": True},
        choice.down_backward,
        arch,
        dtype,
        True,
        "num_pairs",
    )
    del both["HIDDEN"], both["INNER"]
    arguments = f"rows:T {gives} share:fp32 parts:fp32"
    way = {"INPUTS": sizes.inner, "OUTPUTS": sizes.hidden, "TRANSPOSED": False, "SHARED": True}
    yield product("pairs_product", "pairs_product", arguments, both | way, choice.down, arch, dtype)
    way = {"INPUTS": 2 * sizes.inner, "OUTPUTS": sizes.hidden, "TRANSPOSED": True, "SHARED": False}
    yield product("pairs_product", "pairs_product", arguments, both | way, choice.gate_up_backward, arch, dtype, True)


def outer(sizes: Sizes, arch: int, choice: TrainingChoice, dtype: str, left: int, right: int, gathered: int) -> Case:
    tiles = choice.outer
    block_left, block_right = tiles.of(left, right)
    constants = {
        "LEFT": left,
        "RIGHT": right,
        "TOP_K": sizes.top_k,
        "BLOCK_LEFT": block_left,
        "BLOCK_RIGHT": block_right,
        "BLOCK_PAIRS": tiles.block_pairs,
        "TILES_TOGETHER": 16,
        "LEFT_GATHERED": gathered == 0,
        "RIGHT_GATHERED": gathered == 1,
        "STAGES": tiles.num_stages,
        "COMPUTE": COMPUTE[dtype],
    }
    signature = types("left:T right:T order:i32 ends:i32 out:T", dtype)
    request = Request(ROOM + "slot_outer:slot_outer_kernel", signature, constants, tiles.num_warps, 3, arch)
    tensor_cores = dtype != "fp32"
    # Groups of warps want 64 rows.
    wgmma = tensor_cores and arch == 90 and block_left >= 64
    return Case(f"slot_outer {dtype}", request, products=tensor_cores, wgmma=wgmma)


def outers(sizes: Sizes, arch: int, choice: TrainingChoice, dtype: str, rank: int) -> Iterator[Case]:
    """Give the gradients of both stacks, and of the four matrices of terms."""
    yield outer(sizes, arch, choice, dtype, 2 * sizes.inner, sizes.hidden, 1)
    yield outer(sizes, arch, choice, dtype, sizes.hidden, sizes.inner, 0)
    yield outer(sizes, arch, choice, dtype, rank, sizes.hidden, 1)
    yield outer(sizes, arch, choice, dtype, 2 * sizes.inner, rank, -1)
    yield outer(sizes, arch, choice, dtype, rank, sizes.inner, -1)
    yield outer(sizes, arch, choice, dtype, sizes.hidden, rank, 0)


def reads(sizes: Sizes, arch: int, dtype: str, rank: int, lora: str = "fp32") -> Iterator[Case]:
    """Give what terms read on the way there and on the way back."""
    for inputs, gathered, transposed, shared in (
        (sizes.hidden, True, False, False),
        (sizes.inner, False, False, True),
        (sizes.hidden, True, True, False),
        (2 * sizes.inner, False, True, False),
    ):
        constants = {
            "INPUTS": inputs,
            "RANK": rank,
            "TOP_K": sizes.top_k,
            "BLOCK_ROWS": 32,
            "BLOCK_IN": 64,
            "BLOCK_RANK": rank_tile(rank),
            "GATHERED": gathered,
            "TRANSPOSED": transposed,
            "SHARED": shared,
            "STAGES": 3,
            "COMPUTE": COMPUTE[dtype],
        }
        signature = types(f"rows:T matrix:{lora} share:fp32 reads:T {PLACES}", dtype)
        signature["scale"] = "fp32"
        request = Request(ROOM + "rank_reads:rank_reads_kernel", signature, constants, 4, 3, arch)
        yield Case(f"rank_reads {dtype}", request, products=dtype != "fp32")


def all_cases() -> Iterator[Case]:
    for arch in (80, 90, 100):
        dense, wide = choose_training("dense", Device(arch)), choose_training("fp32", Device(arch))
        for sizes in (MIXTRAL, OLMOE):
            for rank in (0, 12, 64):
                yield from step(sizes, arch, dense, "bf16", rank)
                if rank:
                    yield from reads(sizes, arch, "bf16", rank)
                    yield from outers(sizes, arch, dense, "bf16", rank)
        yield from step(MIXTRAL, arch, dense, "fp16", 16, "fp16")
        yield from outers(MIXTRAL, arch, dense, "fp16", 16)
        yield from step(MIXTRAL, arch, dense, "bf16", 80)
        yield from step(MIXTRAL, arch, wide, "fp32", 16)
        yield from reads(MIXTRAL, arch, "fp32", 16)
        yield from outers(MIXTRAL, arch, wide, "fp32", 16)


def sample() -> Iterator[Case]:
    choice = choose_training("dense", Device(90))
    yield from step(MIXTRAL, 90, choice, "bf16", 16)
    yield outer(MIXTRAL, 90, choice, "bf16", 2 * MIXTRAL.inner, MIXTRAL.hidden, 1)
    yield from list(reads(MIXTRAL, 90, "bf16", 16))[:1]


SAMPLE = list(named(sample()).values())
EVERYTHING = [case for name, case in named(all_cases()).items() if name not in named(sample())]
