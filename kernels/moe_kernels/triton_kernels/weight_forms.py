"""The forms in which weights come to the kernels: a list of tensors that says by their number and types what it is.

Operations of torch take tensors and lists of them, no classes of ours.

Legend: S matrices (slots), O outputs, I inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moe_kernels.triton_kernels.int4_dequantize import int4_dequantize
from moe_kernels.triton_kernels.int4_layout import GROUPS, Int4Tiles, dequantize_tiles
from moe_kernels.triton_kernels.sparse24_expand import sparse24_expand
from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles, expand_tiles, why_no_tiles

Form = Literal["dense", "int4", "sparse24"]

Matrices = Tensor | Int4Tiles | Sparse24Tiles


def form_of(weights: list[Tensor]) -> Form | None:
    """Say what a list of tensors is; None where it is nothing that the kernels know.

    Args:
        weights: One tensor ``[S, O, I]``: dense. Two, the first of int32: the fields of `Int4Tiles`. Two, the first in
            floating point: those of `Sparse24Tiles`.
    """
    if len(weights) == 1:
        return "dense"
    if len(weights) != 2:
        return None
    if weights[0].dtype == torch.int32:
        return "int4"
    return "sparse24" if weights[0].is_floating_point() else None


def why_no_form(weights: list[Tensor], dtype: torch.dtype) -> str | None:
    """Say why tensors are no weights for activations of a type; None where they are.

    Args:
        weights: See :func:`form_of`.
        dtype: Of the activations.
    """
    form = form_of(weights)
    if form is None:
        types = ", ".join(str(tensor.dtype) for tensor in weights)
        return (
            f"weights come as {len(weights)} tensors ({types}): one for dense, int32 words and pairs for int4, values "
            "and metadata for 2:4"
        )
    if form != "int4" and weights[0].dtype != dtype:
        return f"weights are {weights[0].dtype}, the input is {dtype}"
    if any(not tensor.is_contiguous() for tensor in weights):
        return "weights are not contiguous"
    return why_no_tiles(*weights) if form == "sparse24" else None


def matrices_of(weights: list[Tensor]) -> Matrices:
    """Return tensors as what they are: a tensor ``[S, O, I]``, or tiles."""
    form = form_of(weights)
    if form == "int4":
        return Int4Tiles(*weights)
    return Sparse24Tiles(*weights) if form == "sparse24" else weights[0]


def outputs_of(matrices: Matrices) -> int:
    """Return O."""
    return matrices.shape[1] if isinstance(matrices, Tensor) else matrices.outputs


def to_dense(matrices: Matrices, dtype: torch.dtype) -> Tensor:
    """Return ``[S, O, I]``, made by the kernels: for so many tokens that the weights do not count."""
    if isinstance(matrices, Int4Tiles):
        return int4_dequantize(matrices, dtype)
    return sparse24_expand(matrices) if isinstance(matrices, Sparse24Tiles) else matrices


def to_dense_twin(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Say the same in plain torch, in any type of floating point."""
    matrices = matrices_of(weights)
    if isinstance(matrices, Int4Tiles):
        return dequantize_tiles(matrices, dtype)
    return expand_tiles(matrices, dtype) if isinstance(matrices, Sparse24Tiles) else matrices.to(dtype)


def empty_weights(
    form: Form, slots: int, outputs: int, inputs: int, dtype: torch.dtype, group: int, device: torch.device
) -> list[Tensor]:
    """Return weights of a form that hold nothing yet, or never will: on the meta device, or where nobody reads them.

    Args:
        form: See :func:`form_of`.
        slots: S.
        outputs: O.
        inputs: I.
        dtype: Of the activations.
        group: Weights of an int4 scale: 128 or 64.
        device: Where to.

    Raises:
        ValueError: Groups that the int4 kernels do not know.
    """
    if form == "dense":
        return [torch.empty(slots, outputs, inputs, dtype=dtype, device=device)]
    if form == "sparse24":
        kept = torch.empty(slots, outputs, inputs // 2, dtype=dtype, device=device)
        return [kept, torch.empty(slots, outputs, inputs // 8, dtype=torch.uint8, device=device)]
    if group not in GROUPS or inputs % group:
        raise ValueError(f"groups of {group} of {inputs} inputs: int4 kernels want {' or '.join(map(str, GROUPS))}")
    words = torch.empty(slots, inputs // group, outputs, group // 8, dtype=torch.int32, device=device)
    return [words, words.new_empty(words.shape[:3])]
