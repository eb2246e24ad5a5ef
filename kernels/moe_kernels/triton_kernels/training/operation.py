"""The sum over real experts as one differentiable operation.

torch sees two opaque operations, forward and backward, with known shapes of results: both are traced by
``torch.compile(fullgraph=True)`` with any number of tokens, and nothing in them waits for the GPU. Kept for the way
back are the input, the pre-activation and small things: no weights, no inner activations, nothing dequantised.

Legend: N tokens, H hidden, I intermediate, E experts, K top-k, S slots, P places of pairs, V novices, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.experts import NoviceMaps, add_bias, add_novices, combine_pairs, grouped_linear, sort_pairs
from moe_kernels.lora import GroupedLora, lora_term
from moe_kernels.triton_kernels.block import why_not
from moe_kernels.triton_kernels.int4_layout import Int4Tiles, dequantize_tiles
from moe_kernels.triton_kernels.training import steps
from moe_kernels.triton_kernels.training.steps import Experts, Kept, Wanted, choice_for, most_tiles

_KEPT = len(Kept._fields)


def train_experts(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    lora_scales: list[float],
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Compute the sum over real experts, ``sum_k w_k E_k(x)`` with SiLU, so that it can be differentiated.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``: bfloat16, float16 or float32.
        index_NK: Experts chosen by the router, int64 ``[N, K]``; numbers outside ``[0, E)`` mean nobody.
        weight_NK: Their routing weights, any floating type.
        slot_map_E: Slot (``>= 0``), novice (``-1 - number``) or ``ABSENT`` of each expert, int64 ``[E]``.
        gate_up: ``[S, 2I, H]`` in the type of the input, alone; or words and pairs of `Int4Tiles`.
        down: ``[S, H, I]`` in the same form.
        lora: Nothing; or what the terms of gate and up read ``[S, R, H]`` and give ``[S, 2I, R]``, and those of down,
            ``[S, R', I]`` and ``[S, H, R']``; each of any floating type, which its gradient has, too.
        lora_scales: Nothing, or the factors of both terms.
        bias_SH: Bias of each slot, any floating type, or None.

    Returns:
        fp32 ``[N, H]``, without novices; see :func:`train_experts_with_novices`. Differentiable once in every
        floating-point tensor; what a routing weight of a novice is worth is not part of it (zero here).

    Raises:
        ValueError: Sizes or types that the kernels do not know; see :func:`why_not_train`.

    Cost: ``12 N K H I`` operations to go back to the input with frozen weights (forward included) and ``18 N K H I``
    with gradients of dense stacks; ``2 P I`` numbers kept beside the input.
    """
    up_scale, down_scale = lora_scales or (1.0, 1.0)
    return train_experts_op(
        hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, lora, up_scale, down_scale, bias_SH
    )[0]


def train_experts_with_novices(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    lora_scales: list[float],
    novices_VH: Tensor | None,
    maps: NoviceMaps | None = None,
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Compute the whole sum over real experts and novices; see :func:`train_experts`.

    The novices' share is two dense products, and so are its derivatives (``dc_v = sum_n w_nv dO_n``): plain torch.

    Args:
        hidden_NH: See :func:`train_experts` for this and what is not named here.
        index_NK: Experts chosen by the router, distinct in a row.
        weight_NK: Their routing weights.
        slot_map_E: Slot or novice of each expert.
        gate_up: Weights.
        down: Weights.
        lora: Low-rank terms.
        lora_scales: Their factors.
        novices_VH: Novice vectors ``[V, H]``, or None.
        maps: Low-rank maps of the novices, or None.
        bias_SH: Bias of each slot, or None.

    Returns:
        fp32 ``[N, H]``.
    """
    mixed_NH = train_experts(hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, lora, lora_scales, bias_SH)
    return add_novices(mixed_NH, index_NK, weight_NK, slot_map_E, novices_VH, hidden_NH, maps)


# No argument with a default: torch leaves those out of what the gradients are compared with.
@torch.library.custom_op("moe_kernels::train_experts", mutates_args=())
def train_experts_op(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    up_scale: float,
    down_scale: float,
    bias_SH: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the sum, and what its backward pass needs: see :func:`train_experts` and `Kept`."""
    reason = why_not_train(hidden_NH, gate_up, down, lora)
    if reason is not None:
        raise ValueError(f"the kernels cannot compute this: {reason}")
    experts = _experts(gate_up, down, lora, up_scale, down_scale, bias_SH)
    # Layers may lie on several GPUs, and triton launches on the current one.
    with torch.cuda.device_of(hidden_NH):
        mixed_NH, kept = steps.forward(
            hidden_NH.contiguous(), index_NK.contiguous(), weight_NK.float().contiguous(), slot_map_E, experts
        )
    return mixed_NH, *kept


@train_experts_op.register_fake
def _(hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, lora, up_scale, down_scale, bias_SH):
    slots, places = max(gate_up[0].shape[0], 1), index_NK.shape[0] * index_NK.shape[1]
    rows = Int4Tiles(*gate_up).outputs if len(gate_up) == 2 else gate_up[0].shape[1]
    tiles = most_tiles(places, slots, choice_for(hidden_NH).block_rows)

    def integers(*size):
        return torch.empty(size, dtype=torch.int32, device=hidden_NH.device)

    return (
        torch.empty(hidden_NH.shape, dtype=torch.float32, device=hidden_NH.device),
        hidden_NH.new_empty(places, rows),
        hidden_NH.new_empty((places, lora[0].shape[1]) if lora else 0),
        hidden_NH.new_empty((places, lora[2].shape[1]) if lora else 0),
        integers(*index_NK.shape),
        integers(places),
        integers(slots),
        integers(tiles),
        integers(tiles),
        integers(1),
    )


@torch.library.custom_op("moe_kernels::train_experts_backward", mutates_args=())
def train_experts_backward_op(
    grad_NH: Tensor,
    hidden_NH: Tensor,
    weight_NK: Tensor,
    kept: list[Tensor],
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    up_scale: float,
    down_scale: float,
    bias_SH: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Compute the gradients; see `steps.backward`. ``wanted`` holds one flag for each of the nine."""
    experts = _experts(gate_up, down, lora, up_scale, down_scale, bias_SH)
    with torch.cuda.device_of(hidden_NH):
        return steps.backward(
            grad_NH,
            hidden_NH.contiguous(),
            weight_NK.float().contiguous(),
            experts,
            Kept(*kept),
            Wanted(wanted[0], wanted[1], wanted[2], wanted[3], wanted[4:8], wanted[8]),
        )


@train_experts_backward_op.register_fake
def _(grad_NH, hidden_NH, weight_NK, kept, gate_up, down, lora, up_scale, down_scale, bias_SH, wanted):
    tensors = [hidden_NH, weight_NK, gate_up[0], down[0], *(lora or [None] * 4), bias_SH]
    found = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if want else hidden_NH.new_empty(0)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]
    if wanted[1]:
        found[1] = found[1].float()
    return found


def _experts(
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    up_scale: float,
    down_scale: float,
    bias_SH: Tensor | None,
) -> Experts:
    lora = [matrix.contiguous() for matrix in lora]
    return Experts(gate_up, down, lora, up_scale, down_scale, None if bias_SH is None else bias_SH.contiguous())


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden_NH, _, weight_NK, _, gate_up, down, lora, up_scale, down_scale, bias_SH = inputs
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    # The gradients of what is kept are never made, not even as zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_NH, weight_NK, bias_SH, *kept, *gate_up, *down, *lora)
    ctx.parts, ctx.scales = (len(gate_up), len(lora)), (up_scale, down_scale)


def _differentiate(ctx: Any, grad_NH: Tensor | None, *_: None) -> tuple:
    (matrices, terms), scales = ctx.parts, ctx.scales
    hidden_NH, weight_NK, bias_SH, *rest = ctx.saved_tensors
    kept, gate_up = rest[:_KEPT], rest[_KEPT : _KEPT + matrices]
    down, lora = rest[_KEPT + matrices : _KEPT + 2 * matrices], rest[_KEPT + 2 * matrices :]
    needs = ctx.needs_input_grad
    if grad_NH is None:
        return None, None, None, None, [None] * matrices, [None] * matrices, [None] * terms, None, None, None
    wanted = [needs[0], needs[2], needs[4][0], needs[5][0], *(needs[6] or [False] * 4), needs[9]]
    found = train_experts_backward_op(
        grad_NH, hidden_NH, weight_NK, list(kept), list(gate_up), list(down), list(lora), *scales, bias_SH, wanted
    )
    d_hidden, d_weight, d_gate_up, d_down, *d_lora, d_bias = (
        gradient if want else None for gradient, want in zip(found, wanted, strict=True)
    )
    if d_weight is not None:
        d_weight = d_weight.to(weight_NK.dtype)
    others = [None] * (matrices - 1)
    return d_hidden, None, d_weight, None, [d_gate_up, *others], [d_down, *others], d_lora[:terms], None, None, d_bias


train_experts_op.register_autograd(_differentiate, setup_context=_keep)


def train_experts_twin(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    lora: list[Tensor],
    lora_scales: list[float],
    bias_SH: Tensor | None = None,
) -> Tensor:
    """Say the same as :func:`train_experts` in plain torch, in fp32 or wider, with the derivatives of autograd."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gate_up_S2IH, down_SHI = (
        dequantize_tiles(Int4Tiles(*form), wide) if len(form) == 2 else form[0].to(wide) for form in (gate_up, down)
    )
    terms = [GroupedLora(lora[i], lora[i + 1], lora_scales[i // 2]) for i in range(0, len(lora), 2)]
    pairs = sort_pairs(index_NK, slot_map_E, gate_up_S2IH.shape[0])
    rows_PH = hidden_NH.to(wide)[pairs.tokens]
    pre_P2I = grouped_linear(rows_PH, gate_up_S2IH, pairs.offsets)
    if terms:
        pre_P2I = pre_P2I + lora_term(rows_PH, pairs.offsets, terms[0])
    gate_PI, up_PI = pre_P2I.chunk(2, -1)
    inner_PI = torch.nn.functional.silu(gate_PI) * up_PI
    outputs_PH = grouped_linear(inner_PI, down_SHI, pairs.offsets)
    if terms:
        outputs_PH = outputs_PH + lora_term(inner_PI, pairs.offsets, terms[1])
    return combine_pairs(add_bias(outputs_PH, pairs, bias_SH), pairs, weight_NK)


def why_not_train(hidden_NH: Tensor, gate_up: list[Tensor], down: list[Tensor], lora: list[Tensor]) -> str | None:
    """Say why the kernels cannot compute a sum over experts and its derivatives; None where they can.

    Args:
        hidden_NH: Input.
        gate_up: See :func:`train_experts`.
        down: See there.
        lora: See there.
    """
    if len(lora) not in (0, 4):
        return f"low-rank terms come as {len(lora)} tensors: none, or two for each projection"
    if any(matrix.device != hidden_NH.device for matrix in lora):
        return f"low-rank terms are on {lora[0].device}, the input is on {hidden_NH.device}"
    if lora:
        slots = gate_up[0].shape[0]
        inner_size = (Int4Tiles(*gate_up).outputs if len(gate_up) == 2 else gate_up[0].shape[1]) // 2
        up_rank, down_rank, hidden_size = lora[0].shape[1], lora[2].shape[1], hidden_NH.shape[1]
        want = [
            (slots, up_rank, hidden_size),
            (slots, 2 * inner_size, up_rank),
            (slots, down_rank, inner_size),
            (slots, hidden_size, down_rank),
        ]
        if [tuple(matrix.shape) for matrix in lora] != want:
            return f"low-rank terms are {[tuple(matrix.shape) for matrix in lora]}, and {want} fit the experts"
    return why_not(hidden_NH, gate_up, down)
