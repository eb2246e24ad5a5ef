"""What became of every matrix that was made smaller: in a line, in a few lines, in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_lightning.compression import ModuleStatus

MOST_NAMED = 6
"""Matrices named in a line, of those whose status is not that of most."""

Modules = Mapping[str, ModuleStatus]


_THEN = re.compile(r",? then ")
_DAMPING = re.compile(r"(.*?),? damp(?:ing)? x([\d.e+]+)")


@dataclass(frozen=True)
class _Said:
    """What a status says, taken apart: ``sparsegpt damp x2.4, then rtn fallback: 3 tokens``.

    Attributes:
        kind: Without reasons and numbers: ``sparsegpt then rtn fallback``.
        damping: The largest damping of it, in units of the one asked for; 1 where it says nothing.
    """

    kind: str
    damping: float


def _said(status: str) -> _Said:
    kinds, dampings = [], [1.0]
    for part in _THEN.split(status):
        kind = part.partition(":")[0]
        if damped := _DAMPING.fullmatch(kind):
            kind = damped[1]
            dampings.append(float(damped[2]))
        kinds.append(kind)
    return _Said(" then ".join(kinds), max(dampings))


def _groups(statuses: Iterable[str]) -> list[tuple[str, list[float]]]:
    """Return kinds with the dampings of their matrices, the most frequent kind first."""
    groups: dict[str, list[float]] = {}
    for said in map(_said, statuses):
        groups.setdefault(said.kind, []).append(said.damping)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _in_words(groups: Iterable[tuple[str, list[float]]]) -> str:
    told = []
    for kind, dampings in groups:
        low, high = min(dampings), max(dampings)
        words = f"{len(dampings):,} {kind}"
        if high > 1:
            words += f", damping x{low:g}" + (f" to x{high:g}" if high > low else "")
        told.append(words)
    return "; ".join(told)


def matrix_summary(modules: Modules) -> str:
    """Count the matrices of all modules by status: ``64 matrices: 60 gptq, damping x1 to x8.4; 4 rtn fallback``.

    Args:
        modules: Modules by name.

    Returns:
        One line; empty where no matrix was made smaller.
    """
    statuses = [status for module in modules.values() for status in module.matrices.values()]
    return f"{len(statuses):,} matrices: {_in_words(_groups(statuses))}" if statuses else ""


def module_line(module: ModuleStatus) -> str:
    """Say what happened to a module in one line, however many matrices it has.

    Args:
        module: The module.

    Returns:
        Its status, how many matrices ended how, which ones ended otherwise than most, and the largest error.
    """
    if not module.matrices:
        return module.status
    groups = _groups(module.matrices.values())
    usual = groups[0][0]
    others = [f"{name}: {status}" for name, status in module.matrices.items() if _said(status).kind != usual]
    line = f"{module.status}; {_in_words(groups)}"
    if others:
        more = f"; and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        line += f" ({'; '.join(others[:MOST_NAMED])}{more})"
    if module.errors:
        worst = max(module.errors, key=lambda name: module.errors[name])
        mean = sum(module.errors.values()) / len(module.errors)
        line += f"; relative error {mean:.2%} on average, at most {module.errors[worst]:.2%} ({worst})"
    return line


@dataclass(frozen=True)
class KindRow:
    """The matrices of a module that were made in the same way.

    Attributes:
        module: Name of the module.
        matrices: How many they are.
        made_by: How, e.g. ``gptq, damping x1 to x8.4``.
        largest_error: The largest of their relative errors; None where none was measured.
    """

    module: str
    matrices: int
    made_by: str
    largest_error: float | None


@dataclass(frozen=True)
class MatrixRow:
    """One matrix.

    Attributes:
        module: Name of the module.
        matrix: Name of the matrix in it.
        tokens: Calibration tokens that reached its expert; None where it has none, or they were not counted.
        status: How it was made smaller.
        error: Its relative error; None where it was not measured.
        loss: Share of a low-rank term that rounding took; None where none was folded in.
    """

    module: str
    matrix: str
    tokens: int | None
    status: str
    error: float | None
    loss: float | None


def kind_rows(modules: Modules) -> list[KindRow]:
    """Return the kinds of status of every module.

    Args:
        modules: Modules by name.
    """
    rows = []
    for name, module in modules.items():
        for kind, dampings in _groups(module.matrices.values()):
            mine = [matrix for matrix, status in module.matrices.items() if _said(status).kind == kind]
            words = _in_words([(kind, dampings)]).partition(" ")[2]
            errors = [module.errors[matrix] for matrix in mine if matrix in module.errors]
            rows.append(KindRow(name, len(mine), words, max(errors, default=None)))
    return rows


def matrix_rows(modules: Modules) -> list[MatrixRow]:
    """Return every matrix that was made smaller.

    Args:
        modules: Modules by name.
    """
    rows = []
    for name, module in modules.items():
        for matrix, status in module.matrices.items():
            owner = matrix.partition(".")[0]
            tokens = module.tokens.get(int(owner)) if owner.isdigit() else None
            rows.append(MatrixRow(name, matrix, tokens, status, module.errors.get(matrix), module.losses.get(matrix)))
    return rows


def matrix_table(modules: Modules) -> str:
    """Return Markdown tables, a row for each kind of status and one for each matrix; empty where none was made smaller.

    Args:
        modules: Modules by name.
    """
    summary = matrix_summary(modules)
    if not summary:
        return ""
    lines = [summary, "", "| module | matrices | made by | largest relative error |", "|---|--:|---|--:|"]
    for kind in kind_rows(modules):
        lines.append(f"| {kind.module} | {kind.matrices:,} | {kind.made_by} | {_in_percent(kind.largest_error)} |")
    lines += ["", "| module | matrix | tokens | status | relative error |", "|---|---|--:|---|--:|"]
    for row in matrix_rows(modules):
        tokens = "" if row.tokens is None else f"{row.tokens:,}"
        lines.append(f"| {row.module} | {row.matrix} | {tokens} | {row.status} | {_in_percent(row.error)} |")
    return "\n".join(lines) + "\n"


def _in_percent(error: float | None) -> str:
    return "" if error is None else f"{error:.3%}"
