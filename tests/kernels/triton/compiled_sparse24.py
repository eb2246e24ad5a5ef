"""The 2:4 kernels as models of known sizes use them, with every shipped size of tiles, and what each may cost."""

from collections.abc import Iterator

from moe_kernels.triton_kernels.compile_only import Request
from moe_kernels.triton_kernels.dispatch import Choice

from tests.kernels.triton.compiled_kernels import (
    COMPUTE,
    MIXTRAL,
    OLMOE,
    ROOM,
    Case,
    Sizes,
    choice_of,
    named,
    types,
)

# Instructions a weight, zeros included, a little above what was found, by tokens of a tile. To read 1.125 bytes a
# weight takes an H200 as long as 7.6 of them.
GATE_UP = {8: 4.1, 16: 4.3, 32: 5.0, 64: 6.6}
DOWN = {8: 4.3, 16: 4.6, 32: 5.3, 64: 7.7}


def decode(sizes: Sizes, arch: int, choice: Choice, dtype: str = "bf16") -> Iterator[Case]:
    """Give both projections of few tokens."""
    counted = dtype != "fp32"
    for name, tiles, arguments, constants, stacks, bounds in (
        (
            "sparse24_gate_up",
            choice.gate_up,
            "hidden:T words:i64 metadata:u8 slot:i32 reached:i32 inner:T",
            {},
            2,
            GATE_UP,
        ),
        (
            "sparse24_down",
            choice.down,
            "inner:T words:i64 metadata:u8 slot:i32 share:fp32 reached:i32 parts:fp32",
            {"SPLITS": choice.down.splits},
            1,
            DOWN,
        ),
    ):
        constants = {
            **constants,
            "HIDDEN": sizes.hidden,
            "INNER": sizes.inner,
            "TOP_K": sizes.top_k,
            "BLOCK_OUT": tiles.block_out,
            "BLOCK_IN": tiles.block_in,
            "BLOCK_TOKENS": choice.block_tokens,
            "STAGES": tiles.num_stages,
            "COMPUTE": COMPUTE[dtype],
        }
        signature = types(arguments, dtype, "num_tokens")
        request = Request(f"{ROOM}{name}:{name}_kernel", signature, constants, tiles.num_warps, tiles.num_stages, arch)
        # Down projections of few channels are no loop there, but tiles one after another.
        small = arch == 100 and choice.block_tokens == 64 and sizes.inner < 4096
        weights = stacks * tiles.block_out * tiles.block_in
        yield Case(
            f"{name} {dtype}",
            request,
            weights=weights if counted and not (small and stacks == 1) else 0,
            per_weight=bounds[choice.block_tokens],
            products=counted,
            wgmma=counted and arch == 90 and tiles.num_warps == 4,
            spills=4 if small and stacks == 2 else 0,
        )


def expand(sizes: Sizes, arch: int, dtype: str) -> Case:
    """Give the expansion before the products of many tokens."""
    constants = {"ROWS": sizes.experts * sizes.hidden, "INPUTS": sizes.inner, "BLOCK_OUT": 32, "BLOCK_IN": 256}
    signature = types("words:i64 metadata:u8 dense:T", dtype)
    request = Request(f"{ROOM}sparse24_expand:sparse24_expand_kernel", signature, constants, 4, 3, arch)
    return Case(f"sparse24_expand {dtype}", request, products=False)


def all_cases() -> Iterator[Case]:
    for arch in (80, 90, 100):
        for sizes in (MIXTRAL, OLMOE):
            for tokens in (8, 16, 32, 64):
                for dtype in ("bf16", "fp16"):
                    yield from decode(sizes, arch, choice_of(tokens, "sparse24", sizes, arch), dtype)
        for tokens in (16, 64):
            yield from decode(MIXTRAL, arch, choice_of(tokens, "sparse24 fp32", MIXTRAL, arch), "fp32")
        for dtype in ("bf16", "fp32"):
            yield expand(MIXTRAL, arch, dtype)


def sample() -> Iterator[Case]:
    yield from decode(MIXTRAL, 90, choice_of(16, "sparse24", MIXTRAL, 90))
    yield expand(MIXTRAL, 90, "bf16")


SAMPLE = list(named(sample()).values())
EVERYTHING = [case for name, case in named(all_cases()).items() if name not in named(sample())]
