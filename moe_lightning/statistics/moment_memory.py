"""How much memory the inputs of layers and their moments take, known before anything is measured."""

from __future__ import annotations

from typing import Literal

MomentKind = Literal["diagonal", "full"]
"""``sum x_j^2``, or ``sum x x^T``."""

SOLVING = 3
"""Matrices of the size of a full moment that solving with one takes beside it: two for the inverse factor and one for
the weights, where there are no more outputs than inputs."""

AT_ONCE = 1 << 26
"""Numbers of the moments that are solved with at once on a GPU, or those of one matrix where it has more."""


def layer_input_bytes(
    tokens: int, hidden_size: int, top_k: int, weight_bytes: int, *, ahead: bool = False, experts: bool = True
) -> int:
    """Return the memory that the inputs of one layer after another take (``LayerInputs``), attention masks left out.

    Args:
        tokens: Calibration tokens of this process, padding included.
        hidden_size: H.
        top_k: K.
        weight_bytes: Bytes of a number in the model's type.
        ahead: Outputs are computed before a layer is changed, and so kept beside the inputs.
        experts: The inputs of experts are asked for: hidden states, and K rows and routing weights a token.

    Returns:
        Bytes.
    """
    streams = 1 + experts + ahead
    return tokens * (streams * hidden_size * weight_bytes + (top_k * (8 + 4) if experts else 0))


def moment_bytes(inputs: int, kind: MomentKind, weight_bytes: int = 4) -> int:
    """Return the memory of the moments of one matrix: ``I`` or ``I^2`` numbers in fp32, or float64 where weights are.

    Args:
        inputs: I.
        kind: Which moments.
        weight_bytes: Bytes of a number in the model's type.
    """
    return (inputs if kind == "diagonal" else inputs**2) * max(4, weight_bytes)


def solving_bytes(inputs: int, kind: MomentKind, weight_bytes: int = 4, *, slots: int = 1) -> int:
    """Return the memory that a method takes beside the moments to solve with those of one matrix, or of several.

    Args:
        inputs: I.
        kind: Which moments; nothing is solved with diagonals.
        weight_bytes: Bytes of a number in the model's type.
        slots: Matrices that there are: on a GPU as many of them are solved at once as :data:`AT_ONCE` allows.
    """
    if kind == "diagonal":
        return 0
    return SOLVING * min(slots, solved_at_once(inputs)) * moment_bytes(inputs, kind, weight_bytes)


def solved_at_once(inputs: int) -> int:
    """Return how many matrices are solved with at once at most."""
    return max(1, AT_ONCE // inputs**2)


def slot_groups(slots: int, one_bytes: int, max_bytes: int) -> list[list[int]]:
    """Cut slots into lists whose moments fit into memory, or of one slot where not even one fits.

    Args:
        slots: S.
        one_bytes: Memory of one slot's moments.
        max_bytes: Memory for those of a list.
    """
    size = max(1, max_bytes // one_bytes)
    return [list(range(start, min(start + size, slots))) for start in range(0, slots, size)]
