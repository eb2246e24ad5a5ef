"""The sum over experts of a mixture-of-experts block, in plain torch.

``y = sum_i g_i(x) * E_i(x)`` where ``E_i`` is either a real expert (a SwiGLU network held in a slot of the
weight stack; several experts may share one), a novice (a constant vector, perhaps with a low-rank map), or nothing.
``slot_map[expert]`` says which: ``>= 0`` is a slot, from ``-V`` to ``-1`` novice ``-1 - slot_map[expert]``, below that
nothing.

Legend of shape suffixes: N tokens, H hidden, I intermediate, E experts the router knows, K top-k, S real experts
(slots), P routed (token, expert) pairs that reach a real expert, V novices, R ranks of all novices' maps together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.cpu_dense import cpu_grouped_linear, cpu_product_pays
from moe_kernels.cpu_kernels.pairs import compiled_combine, compiled_sort

Activation = Callable[[Tensor], Tensor]

# F.grouped_mm takes these types only, and wants every stride but the last to be a multiple of 16 bytes.
_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_STRIDE_BYTES = 16


ABSENT = -(2**31)
"""Entry of a slot map for an expert that contributes nothing."""


class NoviceMaps(NamedTuple):
    """Low-rank maps of the novices of a layer, stacked: novice ``v`` gives ``sum_r <x, in_r> out_r`` over its rows.

    Attributes:
        in_RH: What each row reads of the input, ``[R, H]``.
        out_RH: What it adds to the output, ``[R, H]``.
        novice_R: Number of the novice that each row belongs to, int64 ``[R]``.
    """

    in_RH: Tensor
    out_RH: Tensor
    novice_R: Tensor


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
    compiled = compiled_sort(index_NK, slot_map_E, num_slots)
    if compiled is not None:
        return RoutedPairs(*compiled, index_NK.shape[-1])
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

    Takes ``F.grouped_mm`` where it can, and a loop over groups for float64 and for strides that it refuses; on a CPU,
    where no gradient is wanted, what `moe_kernels.cpu_dense` knows to be faster.

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
    if cpu_product_pays(rows_PX, weight_SOX):
        return cpu_grouped_linear(rows_PX, weight_SOX, offsets_S)
    # The backward pass multiplies with rows of the output's size, which then need aligned strides, too.
    aligned = weight_SOX.shape[1] * weight_SOX.element_size() % _STRIDE_BYTES == 0 or not torch.is_grad_enabled()
    # While a compiler traces, F.grouped_mm has no other type than bf16.
    traced = torch.compiler.is_compiling() and rows_PX.dtype != torch.bfloat16
    if aligned and not traced and _groupable(rows_PX, weight_SOX):
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
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Compute ``E_i(x)`` of every routed pair, before the routing weight.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        pairs: From :func:`sort_pairs`.
        gate_up_S2IH: Gate rows, then up rows, ``[S, 2I, H]``.
        down_SHI: ``[S, H, I]``.
        activation: Activation of the gate half.
        bias_SH: Added to every output of a slot, ``[S, H]``, or None.

    Returns:
        ``[P, H]``, in the order of ``pairs``.
    """
    return project_channels(expert_channels(hidden_NH, pairs, gate_up_S2IH, activation), pairs, down_SHI, bias_SH)


def expert_channels(hidden_NH: Tensor, pairs: RoutedPairs, gate_up_S2IH: Tensor, activation: Activation) -> Tensor:
    """Compute the inner activations ``act(gate x) * up x`` of every routed pair, ``[P, I]``; see `expert_outputs`."""
    gate_PI, up_PI = grouped_linear(hidden_NH[pairs.tokens], gate_up_S2IH, pairs.offsets).chunk(2, dim=-1)
    return activation(gate_PI) * up_PI


def project_channels(
    channels_PI: Tensor, pairs: RoutedPairs, down_SHI: Tensor, bias_SH: Tensor | None = None
) -> Tensor:
    """Compute the outputs of routed pairs from their inner activations, ``[P, H]``; see `expert_outputs`."""
    return add_bias(grouped_linear(channels_PI, down_SHI, pairs.offsets), pairs, bias_SH)


def add_bias(outputs_PH: Tensor, pairs: RoutedPairs, bias_SH: Tensor | None) -> Tensor:
    """Add to the outputs of routed pairs the bias of their slot; as they are where there is none."""
    if bias_SH is None or not bias_SH.shape[0]:
        return outputs_PH
    place_P = torch.arange(outputs_PH.shape[0], device=outputs_PH.device)
    slot_P = torch.bucketize(place_P, pairs.offsets, right=True)
    return outputs_PH + bias_SH[slot_P].to(outputs_PH.dtype)


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


def combine_with_novices(
    outputs_PH: Tensor,
    pairs: RoutedPairs,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    hidden_NH: Tensor | None = None,
    maps: NoviceMaps | None = None,
) -> Tensor:
    """Weigh the pairs' outputs and add them up with the novices' share: `combine_pairs`, then `add_novices`.

    Args and Returns are those of the two. Where no gradient is wanted on a CPU with compiled products, constants are
    added in the same pass, each in its turn.
    """
    constants = novices_VH is None or maps is None or not maps.in_RH.shape[0]
    vectors_VH = novices_VH if constants else None
    summed_NH = compiled_combine(outputs_PH, pairs.order, index_NK, weight_NK, slot_map_E, vectors_VH)
    if summed_NH is None:
        summed_NH = combine_pairs(outputs_PH, pairs, weight_NK)
    elif constants:
        return summed_NH
    return add_novices(summed_NH, index_NK, weight_NK, slot_map_E, novices_VH, hidden_NH, maps)


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
    is_novice = known & (slot < 0) & (slot >= -num_novices)
    column = torch.where(is_novice, -1 - slot, 0)
    table = weight_NK.new_zeros(index_NK.shape[0], num_novices)
    return table.scatter_add(1, column, weight_NK * is_novice.to(weight_NK.dtype))


def add_novices(
    mixed_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    hidden_NH: Tensor | None = None,
    maps: NoviceMaps | None = None,
) -> Tensor:
    """Add the novices' share, ``sum_{i novice} g_i(x) (v_i + map_i(x))``, to the sum over real experts.

    The maps of all novices together are two dense products: ``((x in^T) * w) out`` with the routing weight of each
    row's novice in between.

    Args:
        mixed_NH: From :func:`combine_pairs`, in fp32 or wider.
        index_NK: Experts chosen by the router, ``[N, K]``.
        weight_NK: Their routing weights, ``[N, K]``.
        slot_map_E: Slot or novice of each expert.
        novices_VH: Novice vectors ``[V, H]``, or None.
        hidden_NH: Input of the block, ``[N, H]``; only maps read it.
        maps: The novices' low-rank maps, or None.

    Returns:
        ``[N, H]`` in the type of ``mixed_NH``, under autocast too.
    """
    if novices_VH is None or not novices_VH.shape[0]:
        return mixed_NH
    with torch.autocast(mixed_NH.device.type, enabled=False):
        wide = mixed_NH.dtype
        weights_NV = novice_weights(index_NK, weight_NK, slot_map_E, novices_VH.shape[0]).to(wide)
        mixed_NH = mixed_NH + weights_NV @ novices_VH.to(wide)
        if maps is None or not maps.in_RH.shape[0]:
            return mixed_NH
        assert hidden_NH is not None
        # Both products in the type of the weights, where matrix units are fast; the weights between them are wide.
        read_NR = hidden_NH.to(maps.in_RH.dtype) @ maps.in_RH.T
        weighted_NR = (read_NR.to(wide) * weights_NV[:, maps.novice_R]).to(maps.out_RH.dtype)
        return mixed_NH + (weighted_NR @ maps.out_RH).to(wide)


def mix_experts(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    gate_up_S2IH: Tensor,
    down_SHI: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    activation: Activation,
    maps: NoviceMaps | None = None,
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Compute the whole sum over real experts and novices by grouped products.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        index_NK: Experts chosen by the router, int64 ``[N, K]``.
        weight_NK: Their routing weights, ``[N, K]``.
        gate_up_S2IH: Real experts' gate and up rows, ``[S, 2I, H]``.
        down_SHI: Real experts' down matrices, ``[S, H, I]``.
        slot_map_E: Slot (``>= 0``), novice (``-1 - number``) or nothing (``ABSENT``) of each expert, int64 ``[E]``.
        novices_VH: Novice vectors ``[V, H]``, or None where there are none.
        activation: Activation of the gate half.
        maps: Low-rank maps of the novices, or None.
        bias_SH: Bias of each slot, ``[S, H]``, or None.

    Returns:
        ``[N, H]`` in the type of ``hidden_NH``. Differentiable in everything but the integers.

    Source: 2406.02500 eq. 7 (the sum over the experts that are left), 2507.00390 (novices keep their routing weight).
    """
    pairs = sort_pairs(index_NK, slot_map_E, gate_up_S2IH.shape[0])
    outputs_PH = expert_outputs(hidden_NH, pairs, gate_up_S2IH, down_SHI, activation, bias_SH)
    return combine_with_novices(outputs_PH, pairs, index_NK, weight_NK, slot_map_E, novices_VH, hidden_NH, maps).to(
        hidden_NH.dtype
    )


def mix_experts_by_loop(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    gate_up_S2IH: Tensor,
    down_SHI: Tensor,
    slot_map_E: Tensor,
    novices_VH: Tensor | None,
    activation: Activation,
    maps: NoviceMaps | None = None,
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Say the same as :func:`mix_experts` token by token and pair by pair: the oracle of the tests.

    Args and Returns are those of :func:`mix_experts`.
    """
    wide = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_NK.dtype), torch.float32)
    num_novices = 0 if novices_VH is None else novices_VH.shape[0]
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
                if bias_SH is not None:
                    output = output + bias_SH[slot]
            elif slot < -num_novices:
                continue
            else:
                assert novices_VH is not None
                output = novices_VH[-1 - slot]
                if maps is not None:
                    for reads, gives, novice in zip(maps.in_RH, maps.out_RH, maps.novice_R.tolist(), strict=True):
                        if novice == -1 - slot:
                            output = output + (hidden_H @ reads) * gives
            row = row + weight.to(wide) * output.to(wide)
        rows.append(row.to(hidden_NH.dtype))
    return torch.stack(rows) if rows else torch.zeros_like(hidden_NH)
