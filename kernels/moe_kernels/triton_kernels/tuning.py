"""Find sizes of tiles off-line, and write the table that `dispatch` reads.

    python -m moe_kernels.triton_kernels.tuning --form int4 --hidden 4096 --intermediate 14336 --experts 8 --top-k 2

compiles every candidate first and keeps the ones that may be fast (see `tuning_candidates`), runs and times those on
the GPU (see `trials`), and writes ``configs/DEVICE-triton-X.Y.json``. Forms that the file holds already stay. Without a
GPU, ``--compile-only`` prints what compiling says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from tqdm import tqdm

from moe_kernels.triton_kernels import dispatch
from moe_kernels.triton_kernels.block import device_of
from moe_kernels.triton_kernels.dispatch import Choice, Device, Tiles, check_rows, table_name
from moe_kernels.triton_kernels.interpreting import INTERPRETED
from moe_kernels.triton_kernels.tuning_candidates import (
    DECODE_TOKENS,
    GROUPED_TOKENS,
    PROJECTIONS,
    SPLITS,
    Figures,
    Problem,
    Projection,
    Way,
    as_lines,
    best,
    candidates,
    figures,
)
from moe_kernels.triton_kernels.weight_forms import Form

TOKENS = (8, 16, 32, 64, 128, 512, 2048)
"""Numbers of tokens that are timed by default: each is the end of a row."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Measure = Callable[[Choice, int], float]
"""Seconds of a layer's call; infinite where it does not run or is wrong."""


@dataclass(frozen=True)
class Timed:
    """What was best for a number of tokens.

    Attributes:
        tokens: N.
        choice: Kernels and tiles.
        seconds: Of a layer's call.
    """

    tokens: int
    choice: Choice
    seconds: float


Tick = Callable[[], object]
"""Called after each measurement."""

Kernel = tuple[Way, int, Projection]
"""Path, tokens of a tile and projection."""

Kept = dict[tuple[Way, int], dict[Projection, list[Tiles]]]
"""Tiles that may be fast: by path and tokens of a tile, then by projection, from the fewest instructions up."""


def block_tokens_for(problem: Problem, tokens: int) -> list[tuple[Way, int]]:
    """Return paths and tokens of a tile to try for a number of tokens.

    Args:
        problem: The layer.
        tokens: N.
    """
    decode: list[tuple[Way, int]] = [("decode", size) for size in DECODE_TOKENS if size >= tokens][:1]
    grouped: list[tuple[Way, int]] = [("grouped", size) for size in GROUPED_TOKENS[problem.dtype]]
    return decode + grouped


def tune(problem: Problem, tokens: Sequence[int], kept: Kept, measure: Measure, tick: Tick) -> list[Timed]:
    """Find the best choice for each number of tokens: first tiles of the one projection, then those of the other.

    Args:
        problem: The layer.
        tokens: Numbers of tokens.
        kept: Tiles to try.
        measure: What times a choice.
        tick: Called after each measurement.

    Returns:
        The best of each number, from the lowest up.

    Raises:
        RuntimeError: Nothing ran for a number of tokens.
    """
    found = []
    for number in sorted(set(tokens)):
        timed = []
        for path, block_tokens in block_tokens_for(problem, number):
            tiles = kept[path, block_tokens]
            if all(tiles[projection] for projection in PROJECTIONS):
                timed.append(_best_of_path(number, path, block_tokens, tiles, measure, tick))
        fastest = min(timed, key=lambda one: one.seconds, default=None)
        if fastest is None or fastest.seconds == float("inf"):
            raise RuntimeError(f"no tiles ran for {number} tokens: see the reasons that were printed")
        found.append(fastest)
    return found


def _best_of_path(
    tokens: int,
    path: Any,
    block_tokens: int,
    tiles: dict[Projection, list[Tiles]],
    measure: Measure,
    tick: Callable[[], object],
) -> Timed:
    """Time all tiles of one projection with the first of the other, then the other way round with the best."""

    def fastest(choices: Iterable[Choice]) -> Timed:
        timed = []
        for choice in choices:
            timed.append(Timed(tokens, choice, measure(choice, tokens)))
            tick()
        return min(timed, key=lambda one: one.seconds)

    start = Choice(path, block_tokens, tiles["gate_up"][0], tiles["down"][0])
    first = fastest(replace(start, gate_up=one) for one in tiles["gate_up"])
    splits = SPLITS if path == "decode" else (1,)
    downs = [replace(one, splits=number) for one in tiles["down"] for number in splits]
    second = fastest(replace(first.choice, down=one) for one in downs)
    return min(first, second, key=lambda one: one.seconds)


def measurements(problem: Problem, tokens: Sequence[int], kept: Kept) -> int:
    """Return how many times :func:`tune` measures."""
    total = 0
    for number in set(tokens):
        for path, block_tokens in block_tokens_for(problem, number):
            tiles = kept[path, block_tokens]
            if all(tiles.values()):
                total += len(tiles["gate_up"]) + len(tiles["down"]) * (len(SPLITS) if path == "decode" else 1)
    return total


def rows_of(timed: Sequence[Timed], measure: Measure) -> list[dict[str, Any]]:
    """Turn the best choices into rows of a table.

    The end of the last row for few tokens is searched between the last number at which it was faster and the first at
    which it was not, as far as its tiles hold the tokens. Rows with the same tiles become one.

    Args:
        timed: From the lowest number up.
        measure: What times a choice.

    Raises:
        ValueError: Few tokens only: the last row must hold any number of them.
    """
    if timed[-1].choice.path != "grouped":
        raise ValueError(f"{timed[-1].tokens} tokens still want the kernels for few: tune for more, 2048 say")
    # Once sorting pays, it does for all larger numbers: a slower one in between is noise.
    last = max((place for place, one in enumerate(timed) if one.choice.path == "decode"), default=-1)
    timed = [one for place, one in enumerate(timed) if place > last or one.choice.path == "decode"]
    last = max((place for place, one in enumerate(timed) if one.choice.path == "decode"), default=-1)
    rows: list[dict[str, Any]] = []
    for place, one in enumerate(timed):
        limit: int | None = one.tokens
        if place == len(timed) - 1:
            limit = None
        elif place == last:
            limit = _crossover(one, timed[place + 1], measure)
        elif one.choice.path == "decode":
            limit = min(one.choice.block_tokens, timed[place + 1].tokens - 1)
            limit = max(limit, one.tokens)
        row = {"up_to_tokens": limit, **_as_row(one.choice)}
        if rows and {**rows[-1], "up_to_tokens": limit} == row:
            rows.pop()
        rows.append(row)
    check_rows(rows)
    return rows


def _crossover(few: Timed, many: Timed, measure: Measure) -> int:
    """Return the largest number of tokens for which the kernels for few are found faster, by halving."""
    low, high = few.tokens, min(few.choice.block_tokens + 1, many.tokens)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if measure(few.choice, middle) <= measure(many.choice, middle):
            low = middle
        else:
            high = middle
    return low


def _as_row(choice: Choice) -> dict[str, Any]:
    row = dataclasses.asdict(choice)
    for projection in PROJECTIONS:
        if choice.path == "grouped":
            row[projection].pop("splits")
    return row


def write_table(path: Path, form: str, rows: list[dict[str, Any]], made: dict[str, Any]) -> None:
    """Write the rows of a form; other forms that the file holds stay, and a reader sees the old file or the new one.

    Args:
        path: The file.
        form: Of the rows.
        rows: Of the table.
        made: How: device, versions, date, sizes.

    Raises:
        ValueError: The rows are not whole.
    """
    check_rows(rows)
    held: dict[str, Any] = {}
    if path.exists():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{path} cannot be read and is replaced", file=sys.stderr)
        held = held if isinstance(held, dict) else {}
    before = held.get("made")
    kept = {name: rows for name, rows in held.items() if name in get_args(dispatch.Format)}
    header = {**(before if isinstance(before, dict) else {}), form: made}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps({"made": header, **kept, form: rows}, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    dispatch._table.cache_clear()


def compiled(problem: Problem, tokens: Sequence[int], arch: int) -> dict[Kernel, list[Figures]]:
    """Compile all candidates for some numbers of tokens; what may run comes with its figures.

    Args:
        problem: The layer.
        tokens: Numbers of tokens.
        arch: 80, 90 or 100.
    """
    blocks = sorted({block for number in tokens for block in block_tokens_for(problem, number)})
    todo = [
        (path, block_tokens, projection, tiles)
        for path, block_tokens in blocks
        for projection in PROJECTIONS
        for tiles in candidates(problem, path, projection)
    ]
    found: dict[Kernel, list[Figures]] = {}
    for path, block_tokens, projection, tiles in tqdm(todo, "compiling", disable=None):
        figure = figures(problem, path, block_tokens, projection, tiles, arch)
        found.setdefault((path, block_tokens, projection), []).append(figure)
    return found


def kept_of(found: dict[Kernel, list[Figures]], keep: int) -> Kept:
    """Return the best tiles of each kernel.

    Args:
        found: From :func:`compiled`.
        keep: Most of each.
    """
    kept: Kept = {}
    for (path, block_tokens, projection), figures_ in found.items():
        kept.setdefault((path, block_tokens), {})[projection] = [figure.tiles for figure in best(figures_, keep)]
    return kept


def by_figures(found: dict[Kernel, list[Figures]]) -> Measure:
    """Return a stand-in for time where nothing runs: few tokens by the kernels for few, then by instructions.

    It knows nothing of memory, latency or how many programs a GPU holds at a time.

    Args:
        found: From :func:`compiled`.
    """
    figures_ = {(*key, figure.tiles): figure for key, several in found.items() for figure in several}

    def measure(choice: Choice, tokens: int) -> float:
        # All splits alike: they change no instruction.
        total = 0.0
        for projection in PROJECTIONS:
            down = projection == "down"
            splits = 4 if choice.path == "decode" and down else 1
            tiles = replace(choice.down if down else choice.gate_up, splits=splits)
            total += figures_[choice.path, choice.block_tokens, projection, tiles].per_weight
        total += abs(choice.down.splits - 4) * 1e-6 if choice.path == "decode" else 0
        return total + (1e3 if choice.path == "grouped" else 0)

    return measure


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m moe_kernels.triton_kernels.tuning", description=summary)
    parser.add_argument("--form", required=True, choices=get_args(Form), help="format of the weights")
    parser.add_argument("--dtype", default="bf16", choices=_DTYPES, help="type of the activations")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size")
    parser.add_argument("--intermediate", type=int, required=True, help="intermediate size")
    parser.add_argument("--experts", type=int, required=True, help="experts of a layer")
    parser.add_argument("--top-k", type=int, required=True, help="experts of a token")
    parser.add_argument("--group", type=int, default=128, help="weights of an int4 scale")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="ends of the rows")
    parser.add_argument("--keep", type=int, default=4, help="candidates of each kernel that run after compiling")
    parser.add_argument("--compile-only", action="store_true", help="print what compiling says, without a GPU")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), help="architecture for --compile-only")
    parser.add_argument("--output", type=Path, help="file to write instead of the one that dispatch reads")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune as the command line says; return the exit status."""
    parse = parser()
    given = parse.parse_args(arguments)
    if INTERPRETED:
        parse.error("TRITON_INTERPRET is set: kernels in the interpreter cannot be compiled")
    if min(given.tokens) < 1 or given.keep < 1 or not 0 < given.top_k <= given.experts:
        parse.error("--tokens, --keep and --top-k are at least 1, and no token chooses more experts than there are")
    if not given.compile_only and not torch.cuda.is_available():
        parse.error("there is no GPU: give --compile-only --arch 90 to see what compiling alone says")
    if given.compile_only and given.arch is None:
        parse.error("--compile-only wants an --arch: 80, 90 or 100")
    sizes = (given.hidden, given.intermediate, given.experts, given.top_k)
    problem = Problem(given.form, *sizes, _DTYPES[given.dtype], given.group)
    device = Device(given.arch) if given.compile_only else device_of(torch.device("cuda", torch.cuda.current_device()))
    arch = max(arch for arch in (80, 90, 100) if arch <= device.arch)
    found = compiled(problem, given.tokens, arch)
    if given.compile_only:
        for (path, block_tokens, projection), figures_ in found.items():
            print(f"\n{problem.format}, {path}, {block_tokens} tokens a tile, {projection}, sm_{arch}")
            print("\n".join(as_lines(figures_)))
    kept = kept_of(found, given.keep)
    made = {
        "device": device.name or f"sm_{arch}, compiled only: nothing was timed",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": {
            "hidden": problem.hidden,
            "inner": problem.inner,
            "experts": problem.experts,
            "top_k": problem.top_k,
            "group": problem.group,
        },
        "tokens": sorted(set(given.tokens)),
    }
    if given.compile_only:
        if given.output is not None:
            measure = by_figures(found)
            rows = rows_of(tune(problem, given.tokens, kept, measure, lambda: None), measure)
            write_table(given.output, problem.format, rows, made)
        return 0
    measure = _on_the_gpu(problem)
    with tqdm(total=measurements(problem, given.tokens, kept), desc="timing", disable=None) as bar:
        timed = tune(problem, given.tokens, kept, measure, bar.update)
    made["microseconds"] = {one.tokens: round(one.seconds * 1e6, 1) for one in timed}
    output = given.output or dispatch.FOLDER / table_name(device)
    write_table(output, problem.format, rows_of(timed, measure), made)
    print(f"wrote {output}")
    return 0


def _on_the_gpu(problem: Problem) -> Measure:
    """Return what times on the GPU, and says what does not run or is wrong."""
    from moe_kernels.triton_kernels.trials import Trials

    trials = Trials(problem, torch.device("cuda", torch.cuda.current_device()))

    def measure(choice: Choice, tokens: int) -> float:
        try:
            return trials.seconds(choice, tokens)
        except Exception as error:  # of these tiles; the others go on
            tqdm.write(f"left out: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            return float("inf")

    return measure


if __name__ == "__main__":
    sys.exit(main())
