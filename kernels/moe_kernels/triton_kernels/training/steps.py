"""The forward and the backward pass of the sum over real experts, kernel after kernel.

Nothing waits for the GPU, nothing is added up in an order of chance, and of the gradients only those that are wanted
are computed. int4 matrices are dequantised once for each pass and let go again.

Legend: N tokens, H hidden, I intermediate, E experts, K top-k, S slots, P places of pairs sorted by slot, M tiles, R
ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.triton_kernels.block import device_of
from moe_kernels.triton_kernels.combine import combine
from moe_kernels.triton_kernels.int4_dequantize import int4_dequantize
from moe_kernels.triton_kernels.int4_layout import Int4Tiles
from moe_kernels.triton_kernels.schedule import Schedule, make_schedule
from moe_kernels.triton_kernels.training.choose import TrainingChoice, choose_training
from moe_kernels.triton_kernels.training.down_backward import down_backward
from moe_kernels.triton_kernels.training.gate_up import training_gate_up
from moe_kernels.triton_kernels.training.pairs_product import pairs_product
from moe_kernels.triton_kernels.training.rank_reads import rank_reads
from moe_kernels.triton_kernels.training.slot_outer import slot_outer


class Experts(NamedTuple):
    """What the experts are made of.

    Attributes:
        gate_up: ``[S, 2I, H]`` alone; or words and pairs of `Int4Tiles`.
        down: ``[S, H, I]`` in the same form.
        lora: Nothing; or what the terms of gate and up read ``[S, R, H]`` and give ``[S, 2I, R]``, and those of down,
            ``[S, R, I]`` and ``[S, H, R]``.
        up_scale: Factor of the first term.
        down_scale: Factor of the second.
        bias_SH: Bias of each slot, or None.
    """

    gate_up: list[Tensor]
    down: list[Tensor]
    lora: list[Tensor]
    up_scale: float
    down_scale: float
    bias_SH: Tensor | None

    @property
    def slots(self) -> int:
        """S."""
        return self.gate_up[0].shape[0]


class Kept(NamedTuple):
    """What the forward pass keeps for the way back.

    Attributes:
        pre_P2I: Pre-activations, in the type of the input.
        reads_up_PR: Scaled reads of the low-rank terms of gate and up; empty where there are none.
        reads_down_PR: Scaled reads of those of down, times the routing weight.
        slot_NK: See `Schedule` for this and what follows.
        order_P: Pairs.
        ends_S: Ends.
        tile_slot_M: Slots of tiles; as many as there can be with full slots, whatever the tokens.
        tile_first_M: Their first places.
        num_tiles: Tiles.
    """

    pre_P2I: Tensor
    reads_up_PR: Tensor
    reads_down_PR: Tensor
    slot_NK: Tensor
    order_P: Tensor
    ends_S: Tensor
    tile_slot_M: Tensor
    tile_first_M: Tensor
    num_tiles: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    gate_up: bool
    down: bool
    lora: list[bool]
    bias: bool


def choice_for(hidden_NH: Tensor) -> TrainingChoice:
    """Return the sizes of tiles for an input."""
    return choose_training("fp32" if hidden_NH.dtype == torch.float32 else "dense", device_of(hidden_NH.device))


def dense_of(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return a stack as it is, or dequantised."""
    return int4_dequantize(Int4Tiles(*matrices), dtype) if len(matrices) == 2 else matrices[0]


def most_tiles(num_pairs: int, slots: int, block_rows: int) -> int:
    """Return how many tiles to keep: no minimum of the two sizes, on which a compiler would have to decide."""
    return num_pairs // block_rows + slots


def forward(
    hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, slot_map_E: Tensor, experts: Experts
) -> tuple[Tensor, Kept]:
    """Compute the sum over real experts, fp32 ``[N, H]``, and what the way back needs.

    Args:
        hidden_NH: Input of the block after its norm, contiguous.
        index_NK: Experts chosen by the router, int64, contiguous.
        weight_NK: Their routing weights, fp32, contiguous.
        slot_map_E: Slot or novice of each expert.
        experts: Their matrices, contiguous.
    """
    choice, slots = choice_for(hidden_NH), max(experts.slots, 1)
    schedule = make_schedule(index_NK, slot_map_E, slots, choice.block_rows)
    reads_up = reads_down = None
    gives_up = gives_down = None
    if experts.lora:
        reads, gives_up = experts.lora[:2]
        reads_up = rank_reads(hidden_NH, reads, schedule, experts.up_scale, gathered=True)
    gate_up = dense_of(experts.gate_up, hidden_NH.dtype)
    pre_P2I, inner_PI = training_gate_up(hidden_NH, gate_up, schedule, choice.gate_up, reads_up, gives_up)
    del gate_up
    if experts.lora:
        reads, gives_down = experts.lora[2:]
        reads_down = rank_reads(inner_PI, reads, schedule, experts.down_scale, gathered=False, weight_NK=weight_NK)
    down = dense_of(experts.down, hidden_NH.dtype)
    parts = pairs_product(inner_PI, down, schedule, choice.down, False, weight_NK, reads_down, gives_down)
    like_result = torch.empty(0, dtype=torch.float32, device=hidden_NH.device)
    mixed_NH = combine(parts, schedule.slot_NK, weight_NK, like_result, bias_SH=experts.bias_SH)
    tiles = most_tiles(index_NK.numel(), slots, choice.block_rows)
    kept = Kept(
        pre_P2I,
        hidden_NH.new_empty(0) if reads_up is None else reads_up,
        hidden_NH.new_empty(0) if reads_down is None else reads_down,
        schedule.slot_NK,
        schedule.order_P,
        schedule.ends_S,
        _filled_up(schedule.tile_slot_M, tiles),
        _filled_up(schedule.tile_first_M, tiles),
        schedule.num_tiles,
    )
    return mixed_NH, kept


def _filled_up(tiles_M: Tensor, size: int) -> Tensor:
    """Return a list of tiles with more places: only where there are fewer pairs than slots."""
    return tiles_M if tiles_M.shape[0] == size else torch.nn.functional.pad(tiles_M, (0, size - tiles_M.shape[0]))


def backward(
    grad_NH: Tensor, hidden_NH: Tensor, weight_NK: Tensor, experts: Experts, kept: Kept, wanted: Wanted
) -> list[Tensor]:
    """Compute gradients of input, routing weights, both stacks, the four matrices of low-rank terms, and bias.

    Args:
        grad_NH: Gradient of the sum.
        hidden_NH: Input of the block after its norm, contiguous.
        weight_NK: Routing weights, fp32, contiguous.
        experts: Their matrices, contiguous.
        kept: From the forward pass.
        wanted: What to compute.

    Returns:
        Nine tensors, each in the type of what it is the gradient of (that of routing weights in fp32); those that are
        not wanted are empty.
    """
    choice, dtype, slots = choice_for(hidden_NH), hidden_NH.dtype, experts.slots
    schedule = Schedule(*kept[3:], tile_rows=choice.block_rows)
    grad_wide_NH, grad_NH = grad_NH.float(), grad_NH.to(dtype).contiguous()
    nothing = [hidden_NH.new_empty(0) for _ in range(9)]
    d_hidden, d_weight, d_gate_up, d_down, *d_lora, d_bias = nothing

    want_pre = wanted.hidden or wanted.gate_up or any(wanted.lora[:2])
    want_inner = wanted.down or wanted.lora[2]
    back_down = back_up = None
    if experts.lora and (want_pre or want_inner or wanted.weight):
        back_down = rank_reads(grad_NH, experts.lora[3], schedule, experts.down_scale, gathered=True, transposed=True)
    if want_pre or want_inner or wanted.weight:
        grad_pre_P2I, weighted_inner_PI, parts_CNK = down_backward(
            grad_NH,
            dense_of(experts.down, dtype),
            kept.pre_P2I,
            weight_NK,
            schedule,
            choice.down_backward,
            back_down,
            experts.lora[2] if experts.lora else None,
            want_pre,
            want_inner,
            wanted.weight,
        )
    if experts.lora and (wanted.hidden or wanted.lora[0]):
        back_up = rank_reads(grad_pre_P2I, experts.lora[1], schedule, experts.up_scale, gathered=False, transposed=True)

    def outer(left: Tensor, right: Tensor, of: Tensor, left_gathered: bool = False, right_gathered: bool = False):
        return slot_outer(left, right, schedule, slots, choice.outer, of.dtype, left_gathered, right_gathered)

    if wanted.hidden:
        gate_up = dense_of(experts.gate_up, dtype)
        reads = experts.lora[0] if experts.lora else None
        parts = pairs_product(
            grad_pre_P2I, gate_up, schedule, choice.gate_up_backward, True, reads_PR=back_up, gives=reads
        )
        d_hidden = combine(parts, schedule.slot_NK, weight_NK, hidden_NH.new_empty(0))
    if wanted.weight:
        d_weight = _weight_gradient(parts_CNK, grad_wide_NH, schedule.slot_NK, experts.bias_SH)
    if wanted.gate_up:
        d_gate_up = outer(grad_pre_P2I, hidden_NH, experts.gate_up[0], right_gathered=True)
    if wanted.down:
        d_down = outer(grad_NH, weighted_inner_PI, experts.down[0], left_gathered=True)
    if wanted.lora[0]:
        assert back_up is not None
        d_lora[0] = outer(back_up, hidden_NH, experts.lora[0], right_gathered=True)
    if wanted.lora[1]:
        d_lora[1] = outer(grad_pre_P2I, kept.reads_up_PR, experts.lora[1])
    if wanted.lora[2]:
        assert back_down is not None
        d_lora[2] = outer(back_down, weighted_inner_PI, experts.lora[2])
    if wanted.lora[3]:
        d_lora[3] = outer(grad_NH, kept.reads_down_PR, experts.lora[3], left_gathered=True)
    if wanted.bias:
        assert experts.bias_SH is not None
        d_bias = _bias_gradient(grad_wide_NH, weight_NK, schedule.slot_NK, experts.bias_SH)
    return [d_hidden, d_weight, d_gate_up, d_down, *d_lora, d_bias]


def _weight_gradient(parts_CNK: Tensor, grad_NH: Tensor, slot_NK: Tensor, bias_SH: Tensor | None) -> Tensor:
    """Add up parts and what the bias gives; zero for choices of no real expert, whose parts were not written."""
    grad_NK = parts_CNK.sum(0)
    if bias_SH is not None and bias_SH.shape[0]:
        grad_NK = grad_NK + (grad_NH @ bias_SH.float().T).gather(1, slot_NK.clamp(min=0).long())
    return torch.where(slot_NK >= 0, grad_NK, 0)


def _bias_gradient(grad_NH: Tensor, weight_NK: Tensor, slot_NK: Tensor, bias_SH: Tensor) -> Tensor:
    """Return ``sum_n weight_ns grad_n``. Two experts of a token may share a slot: compared, not scattered."""
    numbers_S = torch.arange(bias_SH.shape[0], device=slot_NK.device)
    weight_NS = (weight_NK[..., None] * (slot_NK[..., None] == numbers_S)).sum(1)
    return (weight_NS.T @ grad_NH).to(bias_SH.dtype)
