"""Say what the kernels cost on a GPU, from compiling them without one: registers, shared memory, instructions.

    python benchmarks/compiled.py --arch 90

These are no times. A row is a kernel as Mixtral-8x7B in bf16 uses it, with the sizes of tiles that are shipped; the
tests hold the same figures under bounds (`make test` a sample, `make test-all` all of them on three architectures).
"""

import argparse
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import markdown

RANK = 16
"""Of the low-rank terms, where a kernel has some."""

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

OTHER_MODEL = {"HIDDEN": 2048, "INNER": 1024, "EXPERTS": 64, "BLOCK_SLOTS": 64, "INPUTS": 2048, "OUTPUTS": 2048}
"""Constants of the kernels for OLMoE, which are compiled in the tests too."""


def table(arch: int) -> str:
    """Compile and return the table."""
    from moe_kernels.triton_kernels.compile_only import SHARED_BYTES_LIMIT, resources_of

    lists = [
        importlib.import_module(f"tests.kernels.triton.{path.stem}")
        for path in sorted((ROOT / "tests" / "kernels" / "triton").glob("compiled_*.py"))
    ]
    cases = [
        case
        for module in lists
        for case in [*module.SAMPLE, *module.EVERYTHING]
        if case.request.arch == arch
        and not case.name.partition(" sm_")[0].endswith(("fp16", "fp32"))
        and case.request.constants.get("COMPUTE", "tl.bfloat16") == "tl.bfloat16"
        and case.request.constants.get("RANK", RANK) == RANK
        and not any(case.request.constants.get(name) == value for name, value in OTHER_MODEL.items())
    ]
    # A kernel may be compiled for several sizes with one tile: the most of each is what counts.
    most: dict[tuple[str, str], tuple[float, ...]] = {}
    for case, found in zip(cases, resources_of([case.request for case in cases]), strict=True):
        warps = case.request.num_warps
        per_weight = found.per_weight(warps, case.weights) if case.weights else 0.0
        products = 2 * found.has_wgmma or int(found.has_mma)
        here = (warps, found.registers, found.spills, found.shared_bytes, products, per_weight)
        key = _names(case.name, case.request.constants)
        most[key] = tuple(map(max, here, most.get(key, here)))
    lines = []
    for names, (warps, registers, spills, shared, products, per_weight) in most.items():
        cells = [f"{number:,}" for number in (warps, registers, spills)]
        cells += [f"{shared:,} ({shared / SHARED_BYTES_LIMIT[arch]:.0%})", ("-", "mma", "wgmma")[int(products)]]
        lines.append([*names, *cells, f"{per_weight:.2f}" if per_weight else "-"])
    header = [
        "kernel",
        "tile",
        "warps",
        "registers",
        "spills",
        "shared memory [B]",
        "products",
        "instructions a weight",
    ]
    return markdown(header, sorted(lines, key=_by_size), left=2)


def _by_size(line: Sequence[str]) -> list[object]:
    return [line[0], *(int(number) for number in reversed(re.findall(r"\d+", line[1])))]


def _names(name: str, constants: Mapping[str, Any]) -> tuple[str, str]:
    words = {"BLOCK_OUT": "out", "BLOCK_IN": "in", "BLOCK_TOKENS": "tokens", "BLOCK_ROWS": "rows", "SPLITS": "parts"}
    tile = ", ".join(f"{constants[key]} {word}" for key, word in words.items() if key in constants)
    return name.partition(" sm_")[0].removesuffix(" bf16").replace("_", " "), tile or "-"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for a GPU that need not be there.")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), default=90)
    options = parser.parse_args(arguments)
    print(table(options.arch))


if __name__ == "__main__":
    main()
