"""The sum over experts, and the whole block with its router, as one operation each, for inference.

torch sees one opaque operation with a known shape of result: it is traced by ``torch.compile(fullgraph=True)`` with any
number of tokens, and nothing in it waits for the GPU.

Legend: N tokens, H hidden, I intermediate, E experts, K top-k, S slots, V novices, R ranks of their maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from moe_kernels.experts import NoviceMaps, add_novices, combine_pairs, expert_outputs, sort_pairs
from moe_kernels.triton_kernels.combine import combine
from moe_kernels.triton_kernels.dense_down import dense_down
from moe_kernels.triton_kernels.dense_gate_up import dense_gate_up
from moe_kernels.triton_kernels.dispatch import Choice, Device, choose, format_of
from moe_kernels.triton_kernels.grouped_down import grouped_down
from moe_kernels.triton_kernels.grouped_gate_up import grouped_gate_up
from moe_kernels.triton_kernels.int4_down import int4_down
from moe_kernels.triton_kernels.int4_gate_up import int4_gate_up
from moe_kernels.triton_kernels.int4_layout import Int4Tiles
from moe_kernels.triton_kernels.interpreting import INTERPRETED
from moe_kernels.triton_kernels.router import choose_experts
from moe_kernels.triton_kernels.routing import decode_routing
from moe_kernels.triton_kernels.schedule import make_schedule
from moe_kernels.triton_kernels.sparse24_down import sparse24_down
from moe_kernels.triton_kernels.sparse24_gate_up import sparse24_gate_up
from moe_kernels.triton_kernels.sparse24_layout import Sparse24Tiles
from moe_kernels.triton_kernels.weight_forms import (
    Matrices,
    form_of,
    matrices_of,
    outputs_of,
    to_dense,
    to_dense_twin,
    why_no_form,
)

Result = TypeVar("Result")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _on_its_device(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Make the GPU of the first argument the current one, on which triton launches: layers may lie on several."""

    @functools.wraps(compute)
    def on_its_device(hidden_NH: Tensor, *arguments: Any, **options: Any) -> Result:
        if hidden_NH.device.type != "cuda" or hidden_NH.device.index == torch.cuda.current_device():
            return compute(hidden_NH, *arguments, **options)
        with torch.cuda.device(hidden_NH.device):
            return compute(hidden_NH, *arguments, **options)

    return on_its_device


@torch.library.custom_op("moe_kernels::mix_experts", mutates_args=())
@_on_its_device
def mix_experts_op(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    novices: list[Tensor],
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
) -> Tensor:
    """Compute the whole sum over real experts and novices.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        index_NK: Experts chosen by the router, int64 ``[N, K]``; numbers outside ``[0, E)`` mean nobody.
        weight_NK: Their routing weights.
        slot_map_E: Slot (``>= 0``), novice (``-1 - number``) or ``ABSENT`` of each expert, int64 ``[E]``.
        gate_up: ``[S, 2I, H]`` in the type of the input, alone; or words and pairs of `Int4Tiles`; or values, in the
            type of the input, and metadata of `Sparse24Tiles`.
        down: ``[S, H, I]`` in the same form.
        novices: Nothing; or vectors ``[V, H]``; or those and the fields of `NoviceMaps`.
        bias_SH: Bias of each slot, or None.
        residual_NH: Added to everything, or None.

    Returns:
        ``[N, H]`` in the type of the input. Not differentiable.

    Raises:
        ValueError: Sizes or types that the kernels do not know; see :func:`why_not`.
    """
    reason = why_not(hidden_NH, gate_up, down)
    if reason is not None:
        raise ValueError(f"the kernels cannot compute this: {reason}")
    num_tokens, hidden_size = hidden_NH.shape
    form = form_of(gate_up)
    assert form is not None
    inner_size = outputs_of(matrices_of(gate_up)) // 2
    device = device_of(hidden_NH.device)
    choice = choose(num_tokens, format_of(form, hidden_NH.dtype), hidden_size, inner_size, device)
    return mix_as_chosen(
        choice, hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, novices, bias_SH, residual_NH
    )


def mix_as_chosen(
    choice: Choice,
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    novices: list[Tensor],
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
) -> Tensor:
    """Compute what :func:`mix_experts_op` does with given kernels and tiles, as a tuner tries them out.

    Args:
        choice: Kernels and tiles that fit the sizes; for few tokens, tiles of at least as many.
        hidden_NH: See :func:`mix_experts_op` for this and what follows.
        index_NK: Experts chosen by the router.
        weight_NK: Their routing weights.
        slot_map_E: Slot or novice of each expert.
        gate_up: Weights.
        down: Weights.
        novices: Weights.
        bias_SH: Bias of each slot, or None.
        residual_NH: Added to everything, or None.

    Returns:
        ``[N, H]`` in the type of the input.
    """
    hidden_NH, index_NK = hidden_NH.contiguous(), index_NK.contiguous()
    vectors_VH = novices[0].contiguous() if novices else None
    maps = NoviceMaps(*(tensor.contiguous() for tensor in novices[1:])) if len(novices) > 1 else None
    weight_NK = weight_NK.float().contiguous()
    slots = gate_up[0].shape[0]
    both = (matrices_of(gate_up), matrices_of(down))
    if choice.path == "decode":
        parts, slot_NK = _decode(hidden_NH, index_NK, weight_NK, slot_map_E, both, slots, choice)
    else:
        parts, slot_NK = _grouped(hidden_NH, index_NK, weight_NK, slot_map_E, both, slots, choice)
    residual_NH = None if residual_NH is None else residual_NH.contiguous()
    bias_SH = None if bias_SH is None else bias_SH.contiguous()
    return combine(parts, slot_NK, weight_NK, hidden_NH, vectors_VH, maps, bias_SH, residual_NH)


def _grouped(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    both: tuple[Matrices, Matrices],
    slots: int,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    """Return the parts of real experts and the table of slots, for many tokens."""
    gate_up, down = (to_dense(matrices, hidden_NH.dtype) for matrices in both)
    schedule = make_schedule(index_NK, slot_map_E, max(slots, 1), choice.block_tokens)
    first, second = choice.gate_up, choice.down
    inner_PI = grouped_gate_up(
        hidden_NH,
        gate_up,
        schedule,
        first.block_out,
        first.block_in,
        num_warps=first.num_warps,
        num_stages=first.num_stages,
    )
    parts = grouped_down(
        inner_PI,
        down,
        weight_NK,
        schedule,
        second.block_out,
        second.block_in,
        num_warps=second.num_warps,
        num_stages=second.num_stages,
    )
    return parts, schedule.slot_NK


def _decode(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    both: tuple[Matrices, Matrices],
    slots: int,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    """Return the parts of real experts and the table of slots, for few tokens."""
    first, second = choice.gate_up, choice.down
    common = {"block_tokens": choice.block_tokens}
    gate_up_options = {"block_out": first.block_out, "num_warps": first.num_warps, "num_stages": first.num_stages}
    down_options = {
        "splits": second.splits,
        "block_out": second.block_out,
        "num_warps": second.num_warps,
        "num_stages": second.num_stages,
    }
    gate_up, down = both
    group = gate_up.group if isinstance(gate_up, Int4Tiles) else None
    routing = decode_routing(hidden_NH, index_NK, weight_NK, slot_map_E, slots, group)
    if isinstance(gate_up, Int4Tiles):
        assert isinstance(down, Int4Tiles) and routing.sums_NG is not None
        sum_over = min(first.block_out, down.group)
        inner_SNI, sums_SNB = int4_gate_up(
            hidden_NH, routing.sums_NG, gate_up, routing, sum_over, **gate_up_options, **common
        )
        return int4_down(inner_SNI, sums_SNB, down, routing, **down_options, **common), routing.slot_NK
    gate_up_options["block_in"], down_options["block_in"] = first.block_in, second.block_in
    if isinstance(gate_up, Sparse24Tiles):
        assert isinstance(down, Sparse24Tiles)
        inner_SNI = sparse24_gate_up(hidden_NH, gate_up, routing, **gate_up_options, **common)
        parts = sparse24_down(inner_SNI, down, routing, **down_options, **common)
    else:
        assert isinstance(down, Tensor)
        inner_SNI = dense_gate_up(hidden_NH, gate_up, routing, **gate_up_options, **common)
        parts = dense_down(inner_SNI, down, routing, **down_options, **common)
    return parts, routing.slot_NK


@mix_experts_op.register_fake
def _(hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, novices, bias_SH=None, residual_NH=None):
    return torch.empty(hidden_NH.shape, dtype=hidden_NH.dtype, device=hidden_NH.device)


@torch.library.custom_op("moe_kernels::moe_block", mutates_args=())
@_on_its_device
def moe_block_op(
    hidden_NH: Tensor,
    router_EH: Tensor,
    top_k: int,
    renormalize: bool,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    novices: list[Tensor],
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a whole mixture-of-experts block: router, experts, sum and residual.

    Args:
        hidden_NH: Input of the block after its norm, ``[N, H]``.
        router_EH: Weight of the router.
        top_k: K.
        renormalize: Make the routing weights of a token add up to one.
        slot_map_E: See :func:`mix_experts_op` for this and what follows.
        gate_up: Weights.
        down: Weights.
        novices: Weights.
        bias_SH: Bias of each slot, or None.
        residual_NH: Added to everything, or None.

    Returns:
        ``[N, H]`` in the type of the input, and the router's logits ``[N, E]``. Not differentiable.
    """
    logits_NE = torch.nn.functional.linear(hidden_NH, router_EH)
    index_NK, weight_NK = choose_experts(logits_NE, top_k, renormalize)
    mixed_NH = mix_experts_op(hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, novices, bias_SH, residual_NH)
    return mixed_NH, logits_NE


@moe_block_op.register_fake
def _(
    hidden_NH,
    router_EH,
    top_k,
    renormalize,
    slot_map_E,
    gate_up,
    down,
    novices,
    bias_SH=None,
    residual_NH=None,
):
    logits_NE = hidden_NH.new_empty(hidden_NH.shape[0], router_EH.shape[0])
    return torch.empty(hidden_NH.shape, dtype=hidden_NH.dtype, device=hidden_NH.device), logits_NE


def mix_experts_twin(
    hidden_NH: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    slot_map_E: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    novices: list[Tensor],
    bias_SH: Tensor | None = None,
    residual_NH: Tensor | None = None,
) -> Tensor:
    """Say the same as :func:`mix_experts_op` in plain torch, in fp32 or wider."""
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    gate_up_S2IH, down_SHI = to_dense_twin(gate_up, wide), to_dense_twin(down, wide)
    hidden_NH = hidden_NH.to(wide)
    pairs = sort_pairs(index_NK, slot_map_E, gate_up_S2IH.shape[0])
    bias_SH = None if bias_SH is None else bias_SH.to(wide)
    outputs_PH = expert_outputs(hidden_NH, pairs, gate_up_S2IH, down_SHI, torch.nn.functional.silu, bias_SH)
    mixed_NH = combine_pairs(outputs_PH, pairs, weight_NK)
    vectors_VH = novices[0].to(wide) if novices else None
    maps = NoviceMaps(novices[1].to(wide), novices[2].to(wide), novices[3]) if len(novices) > 1 else None
    mixed_NH = add_novices(mixed_NH, index_NK, weight_NK, slot_map_E, vectors_VH, hidden_NH, maps)
    return mixed_NH if residual_NH is None else mixed_NH + residual_NH.to(wide)


def why_not(hidden_NH: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> str | None:
    """Say why the kernels cannot compute a sum over experts; None where they can.

    Args:
        hidden_NH: Input.
        gate_up: See :func:`mix_experts_op`.
        down: See there.
    """
    if hidden_NH.dtype not in _DTYPES:
        return f"numbers are {hidden_NH.dtype}, and the kernels know {', '.join(map(str, _DTYPES))}"
    reason = why_no_form(gate_up, hidden_NH.dtype) or why_no_form(down, hidden_NH.dtype)
    if reason is not None:
        return reason
    if form_of(gate_up) != form_of(down):
        return f"weights are {form_of(gate_up)} and {form_of(down)}: the kernels want both stacks in one form"
    if any(tensor.device != hidden_NH.device for tensor in (*gate_up, *down)):
        return f"weights are on {gate_up[0].device} and {down[0].device}, the input is on {hidden_NH.device}"
    if hidden_NH.device.type == "cpu" and not INTERPRETED:
        return "there is no GPU, and kernels were not imported for the interpreter (TRITON_INTERPRET=1)"
    return None


@functools.cache
def device_of(device: torch.device) -> Device:
    """Say what `dispatch` must know of a device."""
    version = ".".join(triton.__version__.split(".")[:2])
    if device.type != "cuda":
        return Device(0, triton=version)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(10 * major + minor, torch.cuda.get_device_name(device), version)
