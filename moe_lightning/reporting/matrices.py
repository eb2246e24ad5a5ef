"""What became of every matrix that was made smaller: in a line, in a few lines, in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from moe_lightning.compression import ModuleStatus

MOST_NAMED = 6
"""Matrices named in a line, of those whose status is not that of most."""

Modules = Mapping[str, ModuleStatus]


def _kind(status: str) -> str:
    """Return a status without its reason: ``rtn fallback: 3 tokens`` counts as ``rtn fallback``."""
    return status.partition(":")[0]


def _counts(statuses: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(map(_kind, statuses)).most_common()


def _in_words(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts)


def matrix_summary(modules: Modules) -> str:
    """Count the matrices of all modules by status: ``64 matrices: 60 gptq, 4 gptq damp x10``.

    Args:
        modules: Modules by name.

    Returns:
        One line; empty where no matrix was made smaller.
    """
    statuses = [status for module in modules.values() for status in module.matrices.values()]
    return f"{len(statuses):,} matrices: {_in_words(_counts(statuses))}" if statuses else ""


def module_line(module: ModuleStatus) -> str:
    """Say what happened to a module in one line, however many matrices it has.

    Args:
        module: The module.

    Returns:
        Its status, how many matrices ended how, which ones ended otherwise than most, and the largest error.
    """
    if not module.matrices:
        return module.status
    counts = _counts(module.matrices.values())
    usual = counts[0][0]
    others = [f"{name}: {status}" for name, status in module.matrices.items() if _kind(status) != usual]
    line = f"{module.status}; {_in_words(counts)}"
    if others:
        more = f"; and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        line += f" ({'; '.join(others[:MOST_NAMED])}{more})"
    if module.errors:
        worst = max(module.errors, key=lambda name: module.errors[name])
        mean = sum(module.errors.values()) / len(module.errors)
        line += f"; relative error {mean:.2%} on average, at most {module.errors[worst]:.2%} ({worst})"
    return line


def matrix_table(modules: Modules) -> str:
    """Return a Markdown table with a row for each matrix; empty where no matrix was made smaller.

    Args:
        modules: Modules by name.
    """
    summary = matrix_summary(modules)
    if not summary:
        return ""
    lines = [summary, "", "| module | matrix | tokens | status | relative error |", "|---|---|--:|---|--:|"]
    for name, module in modules.items():
        for matrix, status in module.matrices.items():
            owner = matrix.partition(".")[0]
            tokens = module.tokens.get(int(owner)) if owner.isdigit() else None
            error = module.errors.get(matrix)
            lines.append(
                f"| {name} | {matrix} | {'' if tokens is None else f'{tokens:,}'} | {status} "
                f"| {'' if error is None else f'{error:.3%}'} |"
            )
    return "\n".join(lines) + "\n"
