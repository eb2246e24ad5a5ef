"""The sum over experts of a mixture-of-experts block, in plain torch.

``y = sum_i g_i(x) * E_i(x)`` where ``E_i`` is either a real expert (a SwiGLU network held in a slot of the
weight stack) or a novice (a constant vector). ``slot_map[expert]`` says which: ``>= 0`` is a slot, ``< 0`` is novice
``-1 - slot_map[expert]``.

Legend of shape suffixes: N tokens, H hidden, I intermediate, E experts the router knows, K top-k, S real experts
(slots), P routed (token, expert) pairs that reach a real expert, V novices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

# F.grouped_mm takes these types only, and wants every stride but the last to be a multiple of 16 bytes.
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16


class RoutedPairs(NamedTuple):
    """Routed pairs of real experts, sorted by slot.

    Attributes:
        order: Index of each pair in the flattened ``[N * K]`` routing table, int64 ``[P]``, grouped by slot; inside a
            slot in the order of the tokens.
        offsets: End of each slot's pairs in ``order``, int32 ``[S]``.
        top_k: K, to turn a pair into its token.
    """

    order: Tensor
    offsets: Tensor
    top_k: int

    @property
    def tokens(self) -> Tensor:
        """Token of every pair, int64 ``[P]``."""
        return self.order // self.top_k


def sort_pairs(index_NK: Tensor, slot_map_E: Tensor, num_slots: int) -> RoutedPairs:
    """Group the routed pairs that reach a real expert by slot.

    Args:
        index_NK: Expert numbers chosen by the router, int64 ``[N, K]``. Numbers outside ``[0, E)`` mean "nobody", as in
            transformers, and are left out.
        slot_map_E: Slot or novice of each expert, int64 ``[E]``.
        num_slots: S.

    Returns:
        The pairs; novices' pairs are not among them.
    """
    num_experts = slot_map_E.shape[0]
    flat = index_NK.reshape(-1)
    known = (flat >= 0) & (flat < num_experts)
    slot = torch.where(known, slot_map_E[flat.clamp(0, num_experts - 1)], -1)
    reached = (slot >= 0).nonzero().squeeze(-1)
    slot = slot[reached]
    order = reached[torch.argsort(slot, stable=True)]
    offsets = torch.bincount(slot, minlength=num_slots).cumsum(0).to(torch.int32)
    return RoutedPairs(order, offsets, index_NK.shape[-1])


def _groupable(*tensors: Tensor) -> bool:
    for tensor in tensors:
        if tensor.dtype not in _GROUPED_TYPES or tensor.dtype != tensors[0].dtype:
            return False
        strides = tensor.stride()
        if strides[-1] != 1 or any(stride * tensor.element_size() % _STRIDE_BYTES for stride in strides[:-1]):
            return False
    return True


def grouped_linear(rows_PX: Tensor, weight_SOX: Tensor, offsets_S: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix: ``rows[group s] @ weight[s].T``.

    Takes ``F.grouped_mm`` where it can, and a loop over groups for float64 and for strides that it refuses.

    Args:
        rows_PX: Rows sorted by group, ``[P, X]``.
        weight_SOX: One matrix for each group, ``[S, O, X]``.
        offsets_S: End of each group, int32 ``[S]``; the last one equals P.

    Returns:
        ``[P, O]``.
    """
    if weight_SOX.shape[0] == 0 or rows_PX.shape[0] == 0:
        nothing_PO = rows_PX.new_zeros(rows_PX.shape[0], weight_SOX.shape[1])
        # Keeps the graph, through the rows too (a second product gets the empty rows of a first): the gradient of
        # weights that nothing reached is zero, not missing (ranks must agree on that).
        return nothing_PO + 0 * (weight_SOX.sum() + rows_PX.sum()) if torch.is_grad_enabled() else nothing_PO
    if _groupable(rows_PX, weight_SOX):
        return F.grouped_mm(rows_PX, weight_SOX.transpose(-2, -1), offs=offsets_S)
    ends = offsets_S.tolist()
    starts = [0, *ends[:-1]]
    parts = [F.linear(rows_PX[a:b], weight) for a, b, weight in zip(starts, ends, weight_SOX.unbind(0), strict=True)]
    return torch.cat(parts)


def expert_outputs(
    hidden_NH: Tensor,
    pairs: RoutedPairs,
    gate_up_S2IH: Tensor,
    down_SHI: Tensor,
    activation: Activation,
) -> Tensor:
    """Compute ``E_i(x)`` of every routed pair, before the routing weight.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        pairs: From :func:`sort_pairs`.
        gate_up_S2IH: Gate rows, then up rows, ``[S, 2I, H]``.
        down_SHI: ``[S, H, I]``.
        activation: Activation of the gate half.

    Returns:
        ``[P, H]``, in the order of ``pairs``.
    """
    rows_PH = hidden_NH[pairs.tokens]
    gate_PI, up_PI = grouped_linear(rows_PH, gate_up_S2IH, pairs.offsets).chunk(2, dim=-1)
    return grouped_linear(activation(gate_PI) * up_PI, down_SHI, pairs.offsets)


def combine_pairs(outputs_PH: Tensor, pairs: RoutedPairs, weight_NK: Tensor) -> Tensor:
    """Weigh the pairs' outputs and add them up for each token, in a fixed order and without atomics.

    Args:
        outputs_PH: From :func:`expert_outputs`.
        pairs: The same pairs.
        weight_NK: Routing weights, ``[N, K]``.

    Returns:
        ``[N, H]``, in fp32 or the wider of the two types.
    """
    (num_tokens, top_k), hidden_size = weight_NK.shape, outputs_PH.shape[-1]
    wide = torch.promote_types(torch.promote_types(outputs_PH.dtype, weight_NK.dtype), torch.float32)
    weighted_PH = outputs_PH.to(wide) * weight_NK.reshape(-1)[pairs.order, None].to(wide)
    table = weighted_PH.new_zeros(num_tokens * top_k, hidden_size)
    # No -1 in the view: with zero tokens it would be ambiguous.
    return table.index_copy(0, pairs.order, weighted_PH).view(num_tokens, top_k, hidden_size).sum(1)


def novice_weights(index_NK: Tensor, weight_NK: Tensor, slot_map_E: Tensor, num_novices: int) -> Tensor:
    """Scatter the routing weights of the novices' pairs into a table ``[N, V]``.

    Args:
        index_NK: Experts chosen by the router, ``[N, K]``; distinct in a row.
        weight_NK: Their weights, ``[N, K]``.
        slot_map_E: Slot or novice of each expert.
        num_novices: V.

    Returns:
        ``[N, V]``: the weight of each novice for each token, zero where it was not chosen.
    """
    num_experts = slot_map_E.shape[0]
    known = (index_NK >= 0) & (index_NK < num_experts)
    slot = slot_map_E[index_NK.clamp(0, num_experts - 1)]
    is_novice = known & (slot < 0)
    column = torch.where(is_novice, -1 - slot, 0)
    table = weight_NK.new_zeros(index_NK.shape[0], num_novices)
    return table.scatter_add(1, column, weight_NK * is_novice.to(weight_NK.dtype))


def add_novices(
    mixed_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, slot_map_E: Tensor, novices_VH: Tensor | None
) -> Tensor:
    """Add the novices' share, ``sum_{i novice} g_i(x) v_i``, to the sum over real experts.

    Args:
        mixed_NH: From :func:`combine_pairs`, in fp32 or wider.
        index_NK: Experts chosen by the router, ``[N, K]``.
        weight_NK: Their routing weights, ``[N, K]``.
        slot_map_E: Slot or novice of each expert.
        novices_VH: Novice vectors ``[V, H]``, or None.

    Returns:
        ``[N, H]`` in the type of ``mixed_NH``, under autocast too.
    """
    if novices_VH is None or not novices_VH.shape[0]:
        return mixed_NH
    with torch.autocast(mixed_NH.device.type, enabled=False):
        weights_NV = novice_weights(index_NK, weight_NK, slot_map_E, novices_VH.shape[0]).to(mixed_NH.dtype)
        return mixed_NH + weights_NV @ novices_VH.to(mixed_NH.dtype)


def mix_experts(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    gate_up_S2IH: Tensor,
    down_SHI: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Compute the whole sum over real experts and novices by grouped products.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        index_NK: Experts chosen by the router, int64 ``[N, K]``.
        weight_NK: Their routing weights, ``[N, K]``.
        gate_up_S2IH: Real experts' gate and up rows, ``[S, 2I, H]``.
        down_SHI: Real experts' down matrices, ``[S, H, I]``.
        slot_map_E: Slot (``>= 0``) or novice (``-1 - number``) of each expert, int64 ``[E]``.
        novices_VH: Novice vectors ``[V, H]``, or None where there are none.
        activation: Activation of the gate half.

    Returns:
        ``[N, H]`` in the type of ``hidden_NH``. Differentiable in everything but the integers.

    Source: 2406.02500 eq. 7 (the sum over the experts that are left), 2507.00390 (novices keep their routing weight).
    """
    pairs = sort_pairs(index_NK, slot_map_E, gate_up_S2IH.shape[0])
    outputs_PH = expert_outputs(hidden_NH, pairs, gate_up_S2IH, down_SHI, activation)
    mixed_NH = combine_pairs(outputs_PH, pairs, weight_NK)
    return add_novices(mixed_NH, index_NK, weight_NK, slot_map_E, novices_VH).to(hidden_NH.dtype)


def mix_experts_by_loop(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    gate_up_S2IH: Tensor,
    down_SHI: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Say the same as :func:`mix_experts` token by token and pair by pair: the oracle of the tests.

    Args and Returns are those of :func:`mix_experts`.
    """
    wide = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_NK.dtype), torch.float32)
    rows = []
    for hidden_H, experts, weights in zip(hidden_NH, index_NK.tolist(), weight_NK, strict=True):
        row = torch.zeros_like(hidden_H, dtype=wide)
        for expert, weight in zip(experts, weights, strict=True):
            if not 0 <= expert < slot_map_E.shape[0]:
                continue
            slot = int(slot_map_E[expert])
            if slot >= 0:
                gate, up = (gate_up_S2IH[slot] @ hidden_H).chunk(2)
                output = down_SHI[slot] @ (activation(gate) * up)
            else:
                assert novices_VH is not None
                output = novices_VH[-1 - slot]
            row = row + weight.to(wide) * output.to(wide)
        rows.append(row.to(hidden_NH.dtype))
    return torch.stack(rows) if rows else torch.zeros_like(hidden_NH)
