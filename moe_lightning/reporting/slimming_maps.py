"""How well every matrix could be made smaller, and how many calibration tokens there were to do it by.

Legend: L layers, E experts, K kinds of matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_lightning.compression import ModuleStatus
from moe_lightning.reporting.heat_maps import heat_map
from moe_lightning.slimming.view import FALLBACKS


def slimming_figures(
    modules: Mapping[str, ModuleStatus], title: str = "", layers: Sequence[int] | None = None
) -> dict[str, Figure]:
    """Draw the errors of all matrices that were made smaller, and the tokens that reached each expert.

    Args:
        modules: Modules by name, from `moe_lightning.CompressionResult`.
        title: Added to the titles, e.g. ``step 600``.
        layers: Original numbers of the decoder layers that the names count; 0, 1, ... when None.

    Returns:
        By name, as far as there is something to draw: ``error_gate_up_proj`` and ``error_down_proj`` (layers by
        experts, in one scale of colours), ``error_attention`` (layers by matrices), ``calibration_tokens`` (layers by
        experts). Errors are squared, in percent of the squared output. Matrices that fell back on rounding or
        magnitudes have a coloured corner.
    """
    ending = f", {title}" if title else ""
    experts = {place: module for name, module in modules.items() if (place := _place(name, "mlp.experts")) is not None}
    attention = {place: module for name, module in modules.items() if (place := _place(name, "self_attn")) is not None}
    experts = {place: module for place, module in experts.items() if module.matrices}
    attention = {place: module for place, module in attention.items() if module.matrices}
    figures: dict[str, Figure] = {}
    if experts:
        kinds = list(dict.fromkeys(name.partition(".")[2] for m in experts.values() for name in m.matrices))
        errors = [100 * error for m in experts.values() for error in m.errors.values() if 0 < error < math.inf]
        limits = (min(errors), max(errors)) if errors else (None, None)
        for kind in kinds if errors else ():
            values_LE, known_LE, fallback_LE = _of_experts(experts, kind)
            figures[f"error_{kind}"] = _error_map(
                f"{kind}{ending}", values_LE, known_LE, fallback_LE, _numbers(experts, layers), limits
            )
        counts_LE, known_LE, fallback_LE = _of_experts(experts, None)
        if numpy.isfinite(counts_LE).any():
            figures["calibration_tokens"] = heat_map(
                counts_LE,
                title=f"Tokens that reached each expert{ending}",
                value_label="calibration tokens",
                layers=_numbers(experts, layers),
                dropped=~known_LE,
                dropped_label="no matrix of its own",
                marked=fallback_LE,
                marked_label=MARKED,
                logarithmic=True,
                number_format=".0f",
            )
    if any(module.errors for module in attention.values()):
        names = list(dict.fromkeys(name for module in attention.values() for name in module.matrices))
        rows = list(attention.values())
        figures["error_attention"] = _error_map(
            f"attention{ending}",
            numpy.array([[100 * module.errors.get(name, math.nan) for name in names] for module in rows]),
            numpy.array([[name in module.matrices for name in names] for module in rows]),
            numpy.array([[_fell_back(module.matrices.get(name, "")) for name in names] for module in rows]),
            _numbers(attention, layers),
            columns=names,
        )
    return figures


MARKED = "fell back on rounding or magnitudes"


def _error_map(
    what: str,
    values: NDArray[numpy.float64],
    known: NDArray[numpy.bool_],
    fallback: NDArray[numpy.bool_],
    layers: list[int],
    limits: tuple[float | None, float | None] = (None, None),
    columns: list[str] | None = None,
) -> Figure:
    return heat_map(
        values,
        title=f"Error of {what}",
        value_label="squared output error",
        unit="%",
        layers=layers,
        dropped=~known,
        dropped_label="no matrix of its own",
        undefined_label="not measured",
        limits=limits,
        number_format=".2g",
        columns=columns,
        column_label="expert" if columns is None else "matrix",
        marked=fallback,
        marked_label=MARKED,
        logarithmic=True,
    )


def _place(name: str, part: str) -> int | None:
    """Return the number in the name of a part of a decoder layer, or None."""
    found = re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(part)}", name)
    return int(found[1]) if found else None


def _numbers(modules: Mapping[int, ModuleStatus], layers: Sequence[int] | None) -> list[int]:
    return [place if layers is None else layers[place] for place in modules]


def _fell_back(status: str) -> bool:
    # Of two methods both are told.
    return any(part.startswith(FALLBACKS) for part in status.split(", then "))


def _of_experts(
    modules: Mapping[int, ModuleStatus], kind: str | None
) -> tuple[NDArray[numpy.float64], NDArray[numpy.bool_], NDArray[numpy.bool_]]:
    """Return of each layer and expert the error of a matrix (or its tokens), whether it is there, and if it fell back.

    Args:
        modules: Experts of the layers that were made smaller.
        kind: Of matrix; None for tokens, and for all kinds together.

    Returns:
        ``[L, E]`` each.
    """
    owners = [
        {int(owner) for owner, _, _ in (name.partition(".") for name in module.matrices) if owner.isdigit()}
        for module in modules.values()
    ]
    size = (len(modules), 1 + max(max(group, default=0) for group in owners))
    values_LE, known_LE, fallback_LE = numpy.full(size, numpy.nan), numpy.zeros(size, bool), numpy.zeros(size, bool)
    for row, module in enumerate(modules.values()):
        for name, status in module.matrices.items():
            owner, _, matrix = name.partition(".")
            if not owner.isdigit() or kind not in (None, matrix):
                continue
            known_LE[row, int(owner)] = True
            fallback_LE[row, int(owner)] |= _fell_back(status)
            value = module.tokens.get(int(owner)) if kind is None else 100 * module.errors.get(name, math.nan)
            values_LE[row, int(owner)] = math.nan if value is None else value
    return values_LE, known_LE, fallback_LE
