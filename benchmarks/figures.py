"""Draw what `gpu.py` or `cpu.py` measured, and write its tables.

    python benchmarks/figures.py benchmarks/results/gpu-nvidia-h200.json --output benchmarks/results

For every file: share of the floor against tokens, latency against tokens with the floor, how many times as fast as
transformers, memory against speed, training steps, and all cases as Markdown. Figures without data are not drawn.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from tables import INT4_LOOP, TARGETS, THEIRS, Row, document, formats_of, others_by_case, ours_by_case, ratio

from moe_lightning.reporting.style import (
    CATEGORICAL,
    EMPTY,
    FAINT,
    FONT_POINTS,
    INK,
    MARKERS,
    SMALL_POINTS,
    axis_label,
    save_figure,
)

FORMATS = ("bf16", "int4", "2:4", "novices 50 %", "novices 25 %", "int4 + novices 50 %")
"""In this order they have their colours and markers, in all figures."""

OTHERS = {"eager": (INK, ":"), "grouped_mm": (INK, "--"), "batched_mm": (FAINT, "-."), INT4_LOOP: (FAINT, "--")}
WIDTH, HEIGHT = 8.2, 3.6
"""Inches: 900 pixels, what a README shows."""


def look(form: str) -> dict[str, Any]:
    """Return colour and marker of a format."""
    place = FORMATS.index(form) if form in FORMATS else len(FORMATS) - 1
    return {"color": CATEGORICAL[place], "marker": MARKERS[place]}


def panels(
    titles: Sequence[str], heading: str, height: float = HEIGHT, share_y: bool = False
) -> tuple[Figure, list[Any]]:
    """Return a figure of the README's width with panels beside one another."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=FONT_POINTS + 1, x=0.01, ha="left", color=INK)
    found = list(figure.subplots(1, len(titles), squeeze=False, sharey=share_y)[0])
    for axes, title in zip(found, titles, strict=True):
        axes.set_title(title, fontsize=FONT_POINTS, loc="left", color=INK)
        axes.tick_params(labelsize=SMALL_POINTS, length=2.5, color=FAINT)
        axes.grid(axis="y", color=EMPTY, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(FAINT)
    return figure, found


def tokens_axis(axes: Any, tokens: Sequence[int]) -> None:
    """Make the x-axis one of tokens, doubled at even steps."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{number:,}" for number in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(axis_label("tokens in a call", ""), fontsize=FONT_POINTS)


def legend_below(figure: Figure, panels: Sequence[Any], columns: int) -> None:
    """Put one legend under all panels, each entry once."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=SMALL_POINTS, frameon=False
    )


def factor(value: float, _: object = None) -> str:
    """Return a label of an axis of factors: ``4x``, ``1/4x``."""
    return f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"


def name_of(result: dict[str, Any]) -> str:
    """Return what the figures say it was measured on."""
    threads = "" if result.get("threads") is None else f", {result['threads']} thread{'s' * (result['threads'] > 1)}"
    return f"{result['device']}{threads}"


def share_of_floor(result: dict[str, Any], routing: str) -> Figure | None:
    """Draw floor / time of ours, and of transformers' grouped_mm."""
    ours = {key[1:]: row for key, row in ours_by_case(result["rows"]).items() if key[0] == routing}
    if not ours:
        return None
    tokens = sorted({key[1] for key in ours})
    figure, (axes,) = panels([""], f"How near to the floor: one MoE layer, {routing} routing, {name_of(result)}")
    for form in (form for form in FORMATS if form in formats_of(result["rows"])):
        line = [(number, 100 * ours[form, number]["share_of_floor"]) for number in tokens if (form, number) in ours]
        axes.plot(*zip(*line, strict=True), label=f"ours, {form}", linewidth=1.8, markersize=5.5, **look(form))
        wanted = [(number, 100 * TARGETS[form, number]) for number in tokens if (form, number) in TARGETS]
        if wanted and result.get("threads") is None and routing == "uniform":
            axes.scatter(*zip(*wanted, strict=True), s=85, facecolors="none", edgecolors=look(form)["color"], zorder=3)
    others = others_by_case(result["rows"])
    theirs = [(number, others.get((routing, number), {}).get("grouped_mm")) for number in tokens]
    line = [(number, 100 * row["share_of_floor"]) for number, row in theirs if row is not None]
    if line:
        axes.plot(*zip(*line, strict=True), label="grouped_mm, bf16", color=INK, linestyle="--", linewidth=1.2)
    if result.get("threads") is None and routing == "uniform":
        axes.scatter([], [], s=85, facecolors="none", edgecolors=INK, label="target, in its colour")
    tokens_axis(axes, tokens)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(axis_label("floor / time", "%"), fontsize=FONT_POINTS)
    legend_below(figure, [axes], 4)
    return figure


def latency(result: dict[str, Any], routing: str) -> Figure | None:
    """Draw the time of a layer against tokens, a panel for each format, with the floor."""
    ours, others = ours_by_case(result["rows"]), others_by_case(result["rows"])
    shown = [form for form in FORMATS[:3] if any(key[:2] == (routing, form) for key in ours)]
    if not shown:
        return None
    heading = f"Latency: one MoE layer, {routing} routing, {name_of(result)}"
    figure, found = panels(shown, heading, height=HEIGHT + 0.4, share_y=True)
    least = min(row["floor_microseconds"] for key, row in ours.items() if key[0] == routing and key[1] in shown)
    for axes, form in zip(found, shown, strict=True):
        mine = {key[2]: row for key, row in ours.items() if key[:2] == (routing, form)}
        tokens = sorted(mine)
        floors = [mine[number]["floor_microseconds"] for number in tokens]
        axes.plot(tokens, floors, color=FAINT, linewidth=1.0, label="floor")
        axes.fill_between(tokens, floors, least / 1.5, color=EMPTY, linewidth=0)
        for name, (color, dashes) in OTHERS.items():
            if name == INT4_LOOP and form != "int4":
                continue
            rows = [(number, others.get((routing, number), {}).get(name)) for number in tokens]
            line = [(number, row["microseconds"]) for number, row in rows if row is not None]
            if line:
                label = f"torch's {name}" if name == INT4_LOOP else f"{name}, bf16"
                axes.plot(*zip(*line, strict=True), color=color, linestyle=dashes, linewidth=1.3, label=label)
        times = [mine[number]["microseconds"] for number in tokens]
        style = {**look(form), "label": f"ours, {form}"}
        axes.plot(tokens, times, linewidth=2.0, markersize=5, **style)
        axes.set_yscale("log")
        tokens_axis(axes, tokens)
        axes.tick_params(axis="x", labelrotation=45)
    found[0].set_ylim(bottom=least / 1.5)
    found[0].set_ylabel(axis_label("time of a layer", "\N{MICRO SIGN}s"), fontsize=FONT_POINTS)
    found[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend_below(figure, found, 4)
    return figure


def times_as_fast(result: dict[str, Any], routing: str) -> Figure | None:
    """Draw bars: how many times as fast as transformers' eager loop and its grouped_mm."""
    ours, others = ours_by_case(result["rows"]), others_by_case(result["rows"])
    cases = {key[1:]: row for key, row in ours.items() if key[0] == routing}
    tokens, shown = (
        sorted({number for _, number in cases}),
        [form for form in FORMATS if form in formats_of(result["rows"])],
    )
    opponents = [name for name in THEIRS[:2] if any(name in others.get((routing, number), {}) for number in tokens)]
    if not cases or not opponents:
        return None
    titles = [f"against transformers' {name}, bf16" for name in opponents]
    heading = f"How many times as fast: one MoE layer, {routing} routing, {name_of(result)}"
    figure, found = panels(titles, heading, share_y=True)
    width = 0.84 / len(shown)
    for axes, name in zip(found, opponents, strict=True):
        for place, form in enumerate(shown):
            bars = []
            for number_place, number in enumerate(tokens):
                row = cases.get((form, number))
                times = None if row is None else ratio(row, others.get((routing, number), {}).get(name))
                if times is not None:
                    bars.append((number_place + (place - (len(shown) - 1) / 2) * width, times))
            if bars:
                places, values = zip(*bars, strict=True)
                # From one, up or down: the axis has even steps for equal factors.
                heights = [value - 1 for value in values]
                axes.bar(places, heights, width * 0.92, bottom=1, color=look(form)["color"], label=form)
        axes.axhline(1, color=INK, linewidth=0.9)
        axes.set_yscale("log", base=2)
        axes.set_xticks(range(len(tokens)), [f"{number:,}" for number in tokens])
        axes.set_xlabel("tokens in a call", fontsize=FONT_POINTS)
    found[0].set_ylabel(axis_label("their time / our time", ""), fontsize=FONT_POINTS)
    found[0].yaxis.set_major_formatter(FuncFormatter(factor))
    found[0].yaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, found, len(shown))
    return figure


def memory_and_speed(result: dict[str, Any], routing: str) -> Figure | None:
    """Draw the memory of the experts' weights against speed, for few and for many tokens."""
    cases = {key[1:]: row for key, row in ours_by_case(result["rows"]).items() if key[0] == routing}
    others = others_by_case(result["rows"])
    tokens = sorted({number for _, number in cases if "grouped_mm" in others.get((routing, number), {})})
    if not tokens:
        return None
    few = max([number for number in tokens if number <= 16], default=tokens[0])
    shown = list(dict.fromkeys([few, max([number for number in tokens if number <= 2048])]))
    heading = f"Memory against speed: one MoE layer, {routing} routing, {name_of(result)}"
    figure, found = panels([f"{number:,} token{'s' * (number > 1)}" for number in shown], heading, share_y=True)
    for axes, number in zip(found, shown, strict=True):
        theirs = others[routing, number]["grouped_mm"]
        full = theirs["weight_bytes"]
        axes.scatter([100], [1], color=INK, marker="x", s=45, label="transformers' grouped_mm, bf16", zorder=3)
        for form in FORMATS:
            row = cases.get((form, number))
            times = None if row is None else ratio(row, theirs)
            if row is not None and times is not None:
                axes.scatter([100 * row["weight_bytes"] / full], [times], s=48, label=form, zorder=3, **look(form))
        axes.axhline(1, color=FAINT, linewidth=0.8)
        axes.set_xlim(0, 112)
        axes.set_yscale("log", base=2)
        axes.set_xlabel(axis_label("memory of the experts' weights", "% of bf16"), fontsize=FONT_POINTS)
    found[0].set_ylabel("times as fast as grouped_mm", fontsize=FONT_POINTS)
    found[0].yaxis.set_major_formatter(FuncFormatter(factor))
    legend_below(figure, found, 4)
    return figure


def training(result: dict[str, Any]) -> Figure | None:
    """Draw time and memory of training steps."""
    rows: list[Row] = [row for row in result.get("training", []) if "microseconds" in row]
    if not rows:
        return None
    has_memory = any(row.get("peak_bytes") is not None for row in rows)
    cases = list(dict.fromkeys((row["format"], row["tokens"]) for row in rows))
    ways = list(dict.fromkeys(row["implementation"] for row in rows))
    titles = ["time of a step", "memory: weights (pale), then all else at the peak"][: 1 + has_memory]
    heading = f"A training step with LoRA, base frozen: one MoE layer, {name_of(result)}"
    figure, found = panels(titles, heading)
    width = 0.8 / len(ways)
    for place, way in enumerate(ways):
        mine = {(row["format"], row["tokens"]): row for row in rows if row["implementation"] == way}
        spots = [number + (place - (len(ways) - 1) / 2) * width for number, case in enumerate(cases) if case in mine]
        here = [mine[case] for case in cases if case in mine]
        color = {"ours": CATEGORICAL[0], "whole stack": FAINT}.get(way, INK)
        found[0].bar(spots, [row["microseconds"] / 1e3 for row in here], width * 0.92, color=color, label=way)
        if has_memory:
            weights = [row["weight_bytes"] / 2**30 for row in here]
            peaks = [(row["peak_bytes"] or 0) / 2**30 for row in here]
            found[1].bar(spots, weights, width * 0.92, color=color, alpha=0.35)
            found[1].bar(spots, peaks, width * 0.92, bottom=weights, color=color)
    for axes, unit in zip(found, ("ms", "GiB"), strict=False):
        labels = [f"{form}\n{number:,} tokens" for form, number in cases]
        axes.set_xticks(range(len(cases)), labels, fontsize=SMALL_POINTS)
        axes.set_ylabel(axis_label("time" if unit == "ms" else "memory", unit), fontsize=FONT_POINTS)
    legend_below(figure, found, len(ways))
    return figure


def write(path: Path, folder: Path) -> list[Path]:
    """Write the tables and all figures of one file of results."""
    result = json.loads(path.read_text(encoding="utf-8"))
    routing = next((row["routing"] for row in result["rows"]), "uniform")
    figures = {
        "floor": share_of_floor(result, routing),
        "latency": latency(result, routing),
        "ratios": times_as_fast(result, routing),
        "memory": memory_and_speed(result, routing),
        "training": training(result),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{path.stem}.md"]
    written[0].write_text(document(result), encoding="utf-8")
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{path.stem}-{name}.png")
            save_figure(figure, written[-1])
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what was measured, and write its tables.")
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of gpu.py or cpu.py")
    parser.add_argument("--output", type=Path, default=None, help="folder; where left out, that of each file")
    options = parser.parse_args(arguments)
    for path in options.results:
        for written in write(path, options.output or path.parent):
            print(f"wrote {written}")


if __name__ == "__main__":
    main()
