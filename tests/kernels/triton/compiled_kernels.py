"""The kernels as models of known sizes use them, with every shipped size of tiles, and what each may cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moe_kernels.triton_kernels.compile_only import Request
from moe_kernels.triton_kernels.dispatch import Choice, Device, choose

ROOM = "moe_kernels.triton_kernels."
COMPUTE = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}


@dataclass(frozen=True)
class Case:
    """A kernel to compile, and bounds.

    Attributes:
        name: For the test's name.
        request: What to compile.
        weights: Weights that one pass of the loop reads; 0 where nobody counts.
        per_weight: Most instructions a weight.
        products: It multiplies on tensor cores.
        wgmma: With whole groups of warps.
        spills: Most loads and stores of registers that did not fit, all of them outside the loop.
    """

    name: str
    request: Request
    weights: int = 0
    per_weight: float = 0.0
    products: bool = True
    wgmma: bool = False
    spills: int = 0


@dataclass(frozen=True)
class Sizes:
    """Hidden and intermediate size of a model, experts that a token chooses, and all experts."""

    hidden: int
    inner: int
    top_k: int
    experts: int
    group: int = 128


MIXTRAL, OLMOE = Sizes(4096, 14336, 2, 8), Sizes(2048, 1024, 8, 64)

# Instructions a weight, a little above what was found, by tokens of a tile. Gate-up at 16 tokens on sm_90: 1.98.
# The budget of an H200 is 3.5.
INT4_GATE_UP = {8: 2.1, 16: 2.1, 32: 2.6, 64: 3.5}
INT4_DOWN = {8: 2.4, 16: 2.6, 32: 3.0, 64: 3.5}


def int4_gate_up(sizes: Sizes, arch: int, choice: Choice, dtype: str = "bf16") -> Case:
    tiles = choice.gate_up
    request = Request(
        ROOM + "int4_gate_up:int4_gate_up_kernel",
        types(
            "hidden:T sums:fp32 words:i32 pairs:i32 slot:i32 reached:i32 inner:T inner_sums:fp32", dtype, "num_tokens"
        ),
        {
            "HIDDEN": sizes.hidden,
            "INNER": sizes.inner,
            "TOP_K": sizes.top_k,
            "GROUP": sizes.group,
            "BLOCK_OUT": tiles.block_out,
            "BLOCK_TOKENS": choice.block_tokens,
            "SUM_OVER": min(tiles.block_out, sizes.group),
            "STAGES": tiles.num_stages,
            "COMPUTE": COMPUTE[dtype],
        },
        tiles.num_warps,
        tiles.num_stages,
        arch,
    )
    return int4_case("int4 gate-up", request, 2 * tiles.block_out * sizes.group, INT4_GATE_UP[choice.block_tokens])


def int4_down(sizes: Sizes, arch: int, choice: Choice, dtype: str = "bf16") -> Case:
    tiles = choice.down
    request = Request(
        ROOM + "int4_down:int4_down_kernel",
        types(
            "inner:T inner_sums:fp32 words:i32 pairs:i32 slot:i32 weight:fp32 reached:i32 parts:fp32",
            dtype,
            "num_tokens",
        ),
        {
            "HIDDEN": sizes.hidden,
            "INNER": sizes.inner,
            "TOP_K": sizes.top_k,
            "GROUP": sizes.group,
            "SPLITS": tiles.splits,
            "BLOCK_OUT": tiles.block_out,
            "BLOCK_TOKENS": choice.block_tokens,
            "SUM_OVER": min(choice.gate_up.block_out, sizes.group),
            "STAGES": tiles.num_stages,
            "COMPUTE": COMPUTE[dtype],
        },
        tiles.num_warps,
        tiles.num_stages,
        arch,
    )
    return int4_case("int4 down", request, tiles.block_out * sizes.group, INT4_DOWN[choice.block_tokens])


def int4_case(name: str, request: Request, weights: int, per_weight: float) -> Case:
    """Numbers in fp16 take one shift more in four."""
    if request.constants["COMPUTE"] == "tl.float16":
        per_weight += 0.3
    wgmma = request.arch == 90 and request.num_warps == 4
    return Case(name, request, weights, per_weight, wgmma=wgmma)


def dense_decode(sizes: Sizes, arch: int, choice: Choice, dtype: str = "bf16") -> Iterator[Case]:
    for name, tiles, arguments, constants in (
        ("dense_gate_up", choice.gate_up, "hidden:T weight:T slot:i32 reached:i32 inner:T", {}),
        (
            "dense_down",
            choice.down,
            "inner:T weight:T slot:i32 share:fp32 reached:i32 parts:fp32",
            {"SPLITS": choice.down.splits},
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
        yield Case(name, request, wgmma=arch == 90)


def grouped(sizes: Sizes, arch: int, choice: Choice, dtype: str = "bf16") -> Iterator[Case]:
    for name, tiles, first, last, constants in (
        ("grouped_gate_up", choice.gate_up, "hidden:T", "inner:T", {"TOP_K": sizes.top_k}),
        ("grouped_down", choice.down, "inner:T share:fp32", "parts:fp32", {}),
    ):
        signature = types(f"{first} order:i32 ends:i32 tile_slot:i32 tile_first:i32 num_tiles:i32 {last}", dtype)
        described = f"tensordesc<{dtype}[{tiles.block_out},{tiles.block_in}]>"
        signature["weights"] = described if arch >= 90 else f"*{dtype}"
        constants = {
            **constants,
            "HIDDEN": sizes.hidden,
            "INNER": sizes.inner,
            "BLOCK_ROWS": choice.block_tokens,
            "BLOCK_OUT": tiles.block_out,
            "BLOCK_IN": tiles.block_in,
            "TILES_TOGETHER": 16,
            "STAGES": tiles.num_stages,
            "DESCRIPTORS": arch >= 90,
            "COMPUTE": COMPUTE[dtype],
        }
        request = Request(f"{ROOM}{name}:{name}_kernel", signature, constants, tiles.num_warps, tiles.num_stages, arch)
        yield Case(name, request, wgmma=arch == 90)


def around(sizes: Sizes, arch: int) -> Iterator[Case]:
    """Give the kernels before and after the products."""
    slots = {"BLOCK_SLOTS": sizes.experts}
    for name, kernel, arguments, numbers, constants in (
        (
            "router",
            "router",
            "logits:bf16 index:i64 weight:fp32",
            "num_tokens",
            {"EXPERTS": sizes.experts, "RENORMALIZE": True, "BLOCK_TOKENS": 16, "BLOCK_EXPERTS": sizes.experts}
            | {"TOP_K": sizes.top_k, "BLOCK_K": sizes.top_k},
        ),
        (
            "routing",
            "routing",
            "hidden:bf16 index:i64 slot_map:i64 slot:i32 reached:i32 sums:fp32",
            "num_tokens num_slots num_experts",
            {"TOP_K": sizes.top_k, "ABSENT_SLOT": -(2**31), "HIDDEN": sizes.hidden, "GROUP": sizes.group}
            | {"BLOCK_PAIRS": 64 * sizes.top_k, "BLOCK_SLOTS": 16, "BLOCK_GROUPS": 16},
        ),
        (
            "schedule",
            "count",
            "index:i64 slot_map:i64 slot:i32 counts:i32",
            "num_pairs num_experts",
            {**slots, "ABSENT_SLOT": -(2**31), "BLOCK_PAIRS": 256},
        ),
        (
            "schedule",
            "plan",
            "counts:i32 ends:i32 tile_slot:i32 tile_first:i32 num_tiles:i32",
            "num_blocks num_slots most_tiles",
            {**slots, "TILE_ROWS": 128, "BLOCK_TILES": 64},
        ),
        ("schedule", "place", "slot:i32 places:i32 order:i32", "num_pairs num_slots", {**slots, "BLOCK_PAIRS": 256}),
        (
            "int4_dequantize",
            "int4_dequantize",
            "words:i32 pairs:i32 dense:bf16",
            "",
            {"OUTPUTS": 2 * sizes.inner, "INPUTS": sizes.hidden, "GROUP": sizes.group, "BLOCK_OUT": 64},
        ),
    ):
        request = Request(f"{ROOM}{name}:{kernel}_kernel", types(arguments, "", numbers), constants, arch=arch)
        yield Case(kernel, request, products=False)
    arguments = "parts:fp32 slot:i32 weight:fp32 bias:bf16 vectors:bf16 reads:bf16 novice:i64 gives:bf16 residual:bf16"
    constants = {"HIDDEN": sizes.hidden, "TOP_K": sizes.top_k, "SPLITS": 4, "NOVICES": 4, "RANKS": 64}
    constants |= {"BLOCK_TOKENS": 16, "BLOCK_OUT": 128, "BLOCK_RANKS": 16, "COMPUTE": "tl.bfloat16"}
    constants |= {"HAS_BIAS": True, "HAS_RESIDUAL": True}
    signature = types(f"{arguments} mixed:bf16", "", "num_tokens")
    yield Case("combine", Request(f"{ROOM}combine:combine_kernel", signature, constants, arch=arch))


def types(pointers: str, dtype: str, numbers: str = "") -> dict[str, Any]:
    """Write types of arguments from ``name:type`` (``T`` is the type of the activations) and names of integers."""
    pairs = (pointer.split(":") for pointer in pointers.split())
    found = {f"{name}_ptr": "*" + (dtype if kind == "T" else kind) for name, kind in pairs}
    return found | dict.fromkeys(numbers.split(), "i32")


def choice_of(tokens: int, form: str, sizes: Sizes, arch: int) -> Choice:
    return choose(tokens, form, sizes.hidden, sizes.inner, Device(arch))  # type: ignore[arg-type]


def in_fp32(arch: int) -> Iterator[Case]:
    """Give the products of fp32 numbers: no tensor cores."""
    few = choice_of(16, "int4 fp32", MIXTRAL, arch)
    cases = [int4_gate_up(MIXTRAL, arch, few, "fp32"), int4_down(MIXTRAL, arch, few, "fp32")]
    for tokens in (16, 64):
        cases += dense_decode(MIXTRAL, arch, choice_of(tokens, "dense fp32", MIXTRAL, arch), "fp32")
    cases += grouped(MIXTRAL, arch, choice_of(65, "dense fp32", MIXTRAL, arch), "fp32")
    for case in cases:
        yield replace(case, weights=0, products=False, wgmma=False)


def all_cases() -> Iterator[Case]:
    for arch in (80, 90, 100):
        yield from in_fp32(arch)
        for sizes in (MIXTRAL, OLMOE):
            for tokens in (8, 16, 32, 64):
                choice = choice_of(tokens, "int4", sizes, arch)
                for dtype in ("bf16", "fp16"):
                    yield int4_gate_up(sizes, arch, choice, dtype)
                    yield int4_down(sizes, arch, choice, dtype)
            for tokens in (16, 64):
                yield from dense_decode(sizes, arch, choice_of(tokens, "dense", sizes, arch))
            yield from grouped(sizes, arch, choice_of(65, "dense", sizes, arch))
            yield from around(sizes, arch)


def sample() -> Iterator[Case]:
    choice = choice_of(16, "int4", MIXTRAL, 90)
    yield int4_gate_up(MIXTRAL, 90, choice)
    yield int4_down(MIXTRAL, 90, choice)
    yield from grouped(MIXTRAL, 90, choice_of(65, "dense", MIXTRAL, 90))


def named(cases: Iterator[Case]) -> dict[str, Case]:
    """Give every case a name of its own; the same request twice is one case."""
    found = {}
    for case in cases:
        request = case.request
        sizes = [f"{name}={value}" for name, value in request.constants.items()]
        found[f"{case.name} sm_{request.arch} {' '.join(sizes)}"] = case
    return {name: replace(case, name=name) for name, case in found.items()}


SAMPLE = list(named(sample()).values())
EVERYTHING = [case for name, case in named(all_cases()).items() if name not in named(sample())]
