"""The kernels as one of transformers' implementations of experts: ``model.set_experts_implementation("moe_kernels")``.

For models that nothing was done to: any whose experts are stacks of gate and up rows and of down matrices, inside
``generate`` too. Compressed layers find their way by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_kernels import mix_experts
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_lightning.experts.kernel_path import KernelInputs, KernelWeights, kernel_inputs, mix_by_kernels, why_torch

NAME = "moe_kernels"
_SLOTS = "_moe_kernels_slots"


def moe_kernels_experts_forward(experts: Any, hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Mix experts as transformers' own implementations do: by Triton kernels on a GPU, else by grouped products.

    The kernels are taken where they are switched on, see :mod:`moe_lightning.experts.kernel_path`.

    Args:
        experts: A module of transformers with stacks ``gate_up_proj`` and ``down_proj``.
        hidden_NH: Input of the block after its norm, ``[tokens, hidden]``.
        index_NK: Experts chosen by the router, int64 ``[tokens, k]``.
        weight_NK: Routing weights, ``[tokens, k]``.

    Returns:
        ``[tokens, hidden]`` in the type of ``hidden_NH``. Differentiable, then by the grouped products.

    Raises:
        ValueError: Experts of another kind: with biases, transposed stacks, or a gate of their own.
    """
    reason = _why_not_these(experts)
    if reason is not None:
        raise ValueError(
            f'experts_implementation="{NAME}" does not know {type(experts).__name__} ({reason}): take "grouped_mm"'
        )
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if why_torch(hidden_NH, weight_NK, (gate_up, down), experts.act_fn) is None:
        inputs = stock_inputs(experts, hidden_NH)
        if inputs is not None:
            return mix_by_kernels(hidden_NH, index_NK, weight_NK, inputs)
    slot_map = _one_slot_each(experts, gate_up.shape[0], hidden_NH.device)
    return mix_experts(hidden_NH, index_NK, weight_NK, gate_up, down, slot_map, None, experts.act_fn)


def stock_inputs(experts: Any, hidden_NH: Tensor) -> KernelInputs | None:
    """Return what the kernels take of an experts module of transformers; None where they do not know it.

    Args:
        experts: A module with stacks ``gate_up_proj`` and ``down_proj``, as `moe_kernels_experts_forward` takes it.
        hidden_NH: Input of the block after its norm.
    """
    gate_up, down = experts.gate_up_proj, experts.down_proj
    slot_map = _one_slot_each(experts, gate_up.shape[0], hidden_NH.device)
    return kernel_inputs(hidden_NH, slot_map, KernelWeights([gate_up], [down]))


def _why_not_these(experts: Any) -> str | None:
    if getattr(experts, "has_bias", False):
        return "it has biases"
    if getattr(experts, "is_transposed", False) or not getattr(experts, "is_concatenated", True):
        return "its stacks are laid out in another way"
    if getattr(experts, "has_post_expert_norm", False):
        return "it has a norm of its own"
    # A class may bring its own product of the two halves: clamped, or with other factors.
    gate = getattr(type(experts), "_apply_gate", _default_apply_gate)
    if not getattr(experts, "has_gate", True) or gate is not _default_apply_gate:
        return "it has another gate"
    return None


def _one_slot_each(experts: Any, slots: int, device: torch.device) -> Tensor:
    """Return the numbers ``0 ... S - 1`` on a device, made once for each module."""
    held = getattr(experts, _SLOTS, None)
    if held is not None and held.device == device and held.shape[0] == slots:
        return held
    with torch.inference_mode(False):
        numbers_E = torch.arange(slots, device=device)
    # What is made while a graph is recorded, or traced, belongs to the graph.
    if not torch.compiler.is_compiling() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        setattr(experts, _SLOTS, numbers_E)
    return numbers_E


def register_with_transformers() -> None:
    """Let ``set_experts_implementation`` know the name. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, moe_kernels_experts_forward)


register_with_transformers()
