"""Tables in Markdown from what `gpu.py` and `cpu.py` measured; from the JSON alone, without torch."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

THEIRS = ("eager", "grouped_mm", "batched_mm")
"""transformers' implementations; they exist for dense weights, and every format of ours is compared with them."""

INT4_LOOP = "int4 loop"
"""A loop over experts with torch's own int4 product."""

TARGETS = {
    **{("int4", tokens): share for tokens, share in ((1, 0.56), (4, 0.75), (16, 0.75), (64, 0.73))},
    **{("int4", tokens): share for tokens, share in ((2048, 0.55), (8192, 0.70))},
    **{("bf16", tokens): share for tokens, share in ((1, 0.70), (16, 0.80), (64, 0.80), (2048, 0.70), (8192, 0.78))},
}
"""Share of the floor that a format shall reach on a GPU with so many tokens, routed uniformly."""


def ours_by_case(rows: Iterable[Row]) -> dict[tuple[str, str, int], Row]:
    """Return our rows by routing, format and tokens, in the order measured, where they were timed."""
    return {
        (row["routing"], row["format"], row["tokens"]): row
        for row in rows
        if row["implementation"] == "ours" and "microseconds" in row
    }


def others_by_case(rows: Iterable[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """Return everybody else's rows by routing and tokens, then by implementation, where they were timed."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["implementation"] != "ours" and "microseconds" in row:
            found.setdefault((row["routing"], row["tokens"]), {})[row["implementation"]] = row
    return found


def ratio(row: Row, other: Row | None) -> float | None:
    """Return how many times as fast a row is as another one."""
    return None if other is None else other["microseconds"] / row["microseconds"]


def formats_of(rows: Iterable[Row]) -> list[str]:
    """Return the formats in the order measured."""
    return list(dict.fromkeys(row["format"] for row in rows))


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first columns stand left and all others right."""
    rules = "---|" * left + "--:|" * (len(header) - left)
    return "\n".join([_line(header), f"|{rules}", *map(_line, lines)])


def layer_table(rows: Sequence[Row], routing: str, on_gpu: bool = True) -> str:
    """Return the table of one routing: for every format and number of tokens, ours against floor and everybody."""
    ours, others = ours_by_case(rows), others_by_case(rows)
    columns = [name for name in (*THEIRS, INT4_LOOP) if any(name in found for found in others.values())]
    header = ["format", "tokens", "ours [us]", "floor [us]", "ours / floor", *(f"x {name}" for name in columns)]
    targets = TARGETS if on_gpu and routing == "uniform" else {}
    if targets:
        header.insert(5, "target")
    lines = []
    for form in formats_of(rows):
        for (of_routing, of_form, tokens), row in ours.items():
            if (of_routing, of_form) != (routing, form):
                continue
            cells = [form, str(tokens), _number(row["microseconds"]), _number(row["floor_microseconds"])]
            cells.append(f"{row['share_of_floor']:.0%}")
            if targets:
                target = targets.get((form, tokens))
                cells.append("" if target is None else f"{target:.0%}")
            here = others.get((routing, tokens), {})
            for name in columns:
                # torch's int4 product is an opponent of int4 alone.
                wanted = name != INT4_LOOP or form.startswith("int4")
                times = ratio(row, here.get(name)) if wanted else None
                cells.append("-" if times is None else f"{times:.2f}")
            lines.append(cells)
    return markdown(header, lines)


def summary_table(rows: Sequence[Row], routing: str) -> str:
    """Return a small table, formats against tokens: share of the floor, and how many times as fast as transformers."""
    ours, others = ours_by_case(rows), others_by_case(rows)
    tokens = sorted({key[2] for key in ours if key[0] == routing})
    lines = []
    for form in formats_of(rows):
        cells = [form]
        for number in tokens:
            row, here = ours.get((routing, form, number)), others.get((routing, number), {})
            if row is None:
                cells.append("-")
                continue
            times = [ratio(row, here.get(name)) for name in THEIRS]
            ratios = " / ".join("-" if value is None else f"{value:.1f}" for value in times)
            cells.append(f"{row['share_of_floor']:.0%}; {ratios}")
        lines.append(cells)
    return markdown(["format", *(f"{number} token{'s' * (number > 1)}" for number in tokens)], lines)


def training_table(rows: Sequence[Row]) -> str:
    """Return the table of training steps: time, memory, and how many times as fast ours is."""
    has_peak = any(row.get("peak_bytes") is not None for row in rows)
    peak = ["all else at the peak [MiB]"] if has_peak else []
    header = ["base", "tokens", "implementation", "step [ms]", "weights [MiB]", *peak, "ours"]
    lines = []
    for row in rows:
        if "microseconds" not in row:
            continue
        ours = next(
            (
                other
                for other in rows
                if other["implementation"] == "ours"
                and (other["format"], other["tokens"]) == (row["format"], row["tokens"])
            ),
            None,
        )
        times = None if ours is None or "microseconds" not in ours else ratio(ours, row)
        lines.append(
            [
                row["format"],
                str(row["tokens"]),
                row["implementation"],
                f"{row['microseconds'] / 1e3:,.2f}",
                _mebibytes(row.get("weight_bytes")),
                *([_mebibytes(row.get("peak_bytes"))] if has_peak else []),
                "-" if times is None else f"{times:.2f}x as fast",
            ]
        )
    return markdown(header, lines, left=1)


def short_of_target(rows: Sequence[Row]) -> list[str]:
    """Return a line for every case that was not timed or does not reach its share of the floor."""
    ours = ours_by_case(rows)
    lines = []
    for (form, tokens), target in TARGETS.items():
        row = ours.get(("uniform", form, tokens))
        if row is None:
            lines.append(f"{form}, {tokens} tokens: not timed")
        elif row["share_of_floor"] < target:
            lines.append(f"{form}, {tokens} tokens: {row['share_of_floor']:.0%} of the floor, {target:.0%} wanted")
    return lines


def left_out(rows: Iterable[Row]) -> list[str]:
    """Return a line for everything that was refused or is not there, each reason once for an implementation."""
    found: dict[str, list[str]] = {}
    for row in rows:
        reason = f"refused: {row['refused']}" if "refused" in row else row.get("unavailable")
        if reason is not None:
            case = f"{row['tokens']} tokens" + (f", {row['routing']}" if "routing" in row else "")
            found.setdefault(f"{row['implementation']}, {row['format']}: {reason}", []).append(case)
    return [f"{what} ({'; '.join(cases)})" for what, cases in found.items()]


def document(result: dict[str, Any]) -> str:
    """Return everything as one Markdown text."""
    rows, on_gpu = result["rows"], result.get("threads") is None
    ceilings, sizes = result["ceilings"], result["sizes"]
    routings = list(dict.fromkeys(row["routing"] for row in rows))
    lines = [
        f"# One MoE layer on {result['device']}",
        "",
        f"{result['date']}, commit {result['commit']}, {result['dtype'].removeprefix('torch.')}, torch "
        f"{result['torch']}, triton {result['triton']}, transformers {result['transformers']}" + ".",
        *_about_cpu(result),
        f"Hidden {sizes['hidden']}, intermediate {sizes['inner']}, {sizes['experts']} experts, top-{sizes['top_k']}. "
        f"Ceilings measured in this run: copy {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s, product "
        f"{ceilings['flops_per_second'] / 1e12:,.2f} TFLOP/s.",
        "The floor is the larger of the fewest bytes at the speed of the copy and the operations at that of the",
        "product. `x eager`: how many times as fast as that implementation of transformers on the dense weights of all",
        "experts; `x int4 loop`: as a loop over experts with torch's own int4 product. Every output was compared with",
        "float32 before it was timed.",
        "",
        f"## In short, {routings[0]} routing",
        "",
        f"Floor / ours, then how many times as fast as transformers' {' / '.join(THEIRS)}.",
        "",
        summary_table(rows, routings[0]),
    ]
    for routing in routings:
        lines += ["", f"## Routing: {routing}", "", layer_table(rows, routing, on_gpu)]
    if result.get("training"):
        lines += [
            "",
            "## A training step with LoRA",
            "",
            "Forward and backward of the sum over experts, frozen base, rank "
            f"{result['training'][0].get('rank')} for every expert; not recorded as a graph.",
            "",
            training_table(result["training"]),
        ]
    if on_gpu:
        short = short_of_target(rows)
        lines += ["", "## Short of the target", "", *([f"* {line}" for line in short] or ["Nothing."])]
    missing = left_out([*rows, *result.get("training", [])])
    missing += [f"{case['tokens']} tokens, {case['routing']}: no time was left" for case in result.get("left_out", [])]
    if missing:
        lines += ["", "## Not timed", "", *(f"* {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def _about_cpu(result: dict[str, Any]) -> list[str]:
    if result.get("threads") is None:
        return []
    emulated = "emulated" if result["machine"]["bf16_emulated"] else "native"
    return [
        f"{result['threads']} thread{'s' * (result['threads'] > 1)}, {result['clock']} clock, bf16 {emulated}; load of "
        f"the machine {result['load_before']:.1f} before and {result['load_after']:.1f} after."
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"
