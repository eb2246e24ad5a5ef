"""What lies around the products of a block, compiled: pairs sorted by slot; outputs weighed and added up.

Legend: N tokens, K top-k, E experts, S slots, P routed pairs that reach a slot, H hidden, V novices.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_kernels.cpu_kernels.build import library
from moe_kernels.cpu_kernels.calls import FLOATS, plain_tensors, threads_for
from moe_kernels.machine import this_machine


def _taken(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the compiled functions if they can be called with these tensors."""
    return library("pairs") if plain_tensors(*tensors) and this_machine().compiled else None


def compiled_sort(index_NK: Tensor, slot_map_E: Tensor, num_slots: int) -> tuple[Tensor, Tensor] | None:
    """Sort routed pairs by slot; see `moe_kernels.experts.sort_pairs`, of which this is the compiled form.

    Args:
        index_NK: Experts chosen by the router, int64 ``[N, K]``.
        slot_map_E: Slot or novice of each expert, int64 ``[E]``.
        num_slots: S.

    Returns:
        Order, int64 ``[P]``, and offsets, int32 ``[S]``; None where it cannot be called.

    Raises:
        IndexError: The map names a slot that is not there.
    """
    found = _taken(index_NK, slot_map_E)
    if found is None or index_NK.dtype != torch.int64 or slot_map_E.dtype != torch.int64:
        return None
    index_NK, slot_map_E = index_NK.contiguous(), slot_map_E.contiguous()
    order = torch.empty(index_NK.numel(), dtype=torch.int64, device="cpu")
    offsets_S = torch.empty(num_slots, dtype=torch.int32, device="cpu")
    reached = found.moe_sort_pairs(
        index_NK.data_ptr(),
        slot_map_E.data_ptr(),
        index_NK.numel(),
        slot_map_E.numel(),
        num_slots,
        order.data_ptr(),
        offsets_S.data_ptr(),
    )
    if reached < 0:
        raise IndexError(f"a slot map {slot_map_E.tolist()} for {num_slots} slots")
    return order[:reached], offsets_S


def compiled_combine(
    outputs_PH: Tensor,
    order_P: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
) -> Tensor | None:
    """Weigh the outputs of pairs, and novices, and add them up for each token, in the order of its choices.

    Args:
        outputs_PH: Outputs of the pairs, ``[P, H]``.
        order_P: From :func:`compiled_sort`.
        index_NK: Experts chosen by the router, int64.
        weight_NK: Their routing weights.
        slot_map_E: Slot or novice of each expert.
        novices_VH: Novice vectors, or None.

    Returns:
        ``[N, H]`` in fp32; None where it cannot be called: other types, or a gradient is wanted.
    """
    given = [outputs_PH, weight_NK, *([] if novices_VH is None else [novices_VH])]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return None
    found = _taken(*given, order_P, index_NK, slot_map_E)
    if found is None or any(tensor.dtype not in FLOATS for tensor in given):
        return None
    if any(tensor.dtype != torch.int64 for tensor in (order_P, index_NK, slot_map_E)):
        return None
    (tokens, top_k), hidden = index_NK.shape, outputs_PH.shape[1]
    # In names, so that they are there until the call has returned.
    outputs, weight = outputs_PH.contiguous(), weight_NK.contiguous()
    order, index, slot_map = order_P.contiguous(), index_NK.contiguous(), slot_map_E.contiguous()
    novices = None if novices_VH is None else novices_VH.contiguous()
    sums_NH = torch.empty(tokens, hidden, dtype=torch.float32, device="cpu")
    places = torch.empty(tokens * top_k, dtype=torch.int32, device="cpu")
    found.moe_combine(
        outputs.data_ptr(),
        order.data_ptr(),
        weight.data_ptr(),
        index.data_ptr(),
        slot_map.data_ptr(),
        None if novices is None else novices.data_ptr(),
        sums_NH.data_ptr(),
        places.data_ptr(),
        order.numel(),
        tokens,
        top_k,
        slot_map_E.numel(),
        0 if novices is None else novices.shape[0],
        hidden,
        outputs.dtype == torch.float32,
        weight.dtype == torch.float32,
        novices is None or novices.dtype == torch.float32,
        threads_for(tokens * top_k * hidden),
    )
    return sums_NH
