"""Make the kernels of a model ready before its first call.

Legend: N tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_lightning.experts.compressed import CompressedExperts
from moe_lightning.experts.kernel_path import KernelInputs, block_by_kernels, mix_by_kernels, why_torch


@dataclass(frozen=True)
class ModelWarmup:
    """What was made ready.

    Attributes:
        layers: Layers whose experts go through the kernels, by the names of their blocks.
        kernels: Names of the kernels that were compiled, one for each specialisation; none where all were there.
        seconds: How long it took.
        reasons: Why blocks were left out, by their names.
    """

    layers: tuple[str, ...]
    kernels: tuple[str, ...]
    seconds: float
    reasons: dict[str, str]

    def __str__(self) -> str:
        """Say it in a line."""
        if not self.layers:
            why = sorted(set(self.reasons.values())) or ["the model has no experts"]
            return f"no kernels to warm up: {'; '.join(why)}"
        return f"{len(self.layers)} layers ready: {len(self.kernels)} kernels compiled in {self.seconds:.1f} s"


@dataclass(frozen=True)
class _Block:
    """A block with experts that the kernels know."""

    name: str
    router: Any
    inputs: KernelInputs
    fused: bool

    @property
    def signature(self) -> tuple[object, ...]:
        """What decides which kernels are compiled for it: those of layers that agree are the same."""
        stacks = [self.inputs.slot_map_E, *self.inputs.gate_up, *self.inputs.down]
        tensors = [*stacks, *self.inputs.novices, self.inputs.bias_SH, self.router.weight]
        kinds = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        return (kinds, self.router.top_k, self.fused)


def warmup(model: nn.Module, max_tokens: int = 512) -> ModelWarmup:
    """Compile the kernels of all layers of a model for calls with up to so many tokens, and load them.

    After it, int4 weights are in the form of the kernels, and a decode step can be recorded in a CUDA graph. Layers of
    the same sizes share their kernels, so one of them is tried, with every row of the table of tiles that so few tokens
    reach.

    Args:
        model: A compressed model, or one of transformers with ``set_experts_implementation("moe_kernels")``.
        max_tokens: Tokens of the largest call to come: batch times prompt, in prefill.

    Returns:
        What was made ready, and why layers were left out: on a machine without a GPU, or where the kernels are switched
        off, all of them.

    Raises:
        ValueError: Less than one token.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: give the tokens of the largest call to come, at least 1")
    reasons: dict[str, str] = {}
    with torch.no_grad():
        blocks = list(_blocks(model, reasons))
        distinct = {block.signature: block for block in blocks}
        warmed = [_warm_up_block(block, max_tokens) for block in distinct.values()]
    kernels = tuple(name for names, _ in warmed for name in names)
    return ModelWarmup(tuple(block.name for block in blocks), kernels, sum(seconds for _, seconds in warmed), reasons)


def _blocks(model: nn.Module, reasons: dict[str, str]) -> Iterator[_Block]:
    """Find the blocks that the kernels know, and say of the others why not."""
    # Not with this module: transformers' models are slow to import.
    from moe_lightning.architectures.mixtral_layer import CompressedMixtralDecoderLayer
    from moe_lightning.experts.implementation import NAME, stock_inputs

    fused = {layer.mlp for layer in model.modules() if isinstance(layer, CompressedMixtralDecoderLayer)}
    for name, block in model.named_modules():
        experts: Any = getattr(block, "experts", None)
        router: Any = getattr(block, "gate", None)
        if experts is None or not hasattr(router, "top_k"):
            continue
        compressed = isinstance(experts, CompressedExperts)
        implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        if not compressed and block not in fused and implementation != NAME:
            reasons[name] = f'its experts_implementation is {implementation}: set_experts_implementation("{NAME}")'
            continue
        hidden_NH = router.weight.new_zeros(1, router.weight.shape[1])
        reason = why_torch(hidden_NH, None, (), experts.act_fn)
        if reason is None:
            inputs = experts.kernel_inputs(hidden_NH) if compressed else stock_inputs(experts, hidden_NH)
            if inputs is not None:
                yield _Block(name, router, inputs, block in fused)
                continue
            reason = "the kernels do not know its weights"
        reasons[name] = reason


def _warm_up_block(block: _Block, max_tokens: int) -> tuple[tuple[str, ...], float]:
    """Launch what a block launches; return the kernels that were compiled, and the seconds it took."""
    from moe_kernels.triton_kernels.block import device_of
    from moe_kernels.triton_kernels.dispatch import format_of
    from moe_kernels.triton_kernels.warmup import tokens_up_to, warm_up
    from moe_kernels.triton_kernels.weight_forms import form_of

    router_EH, inputs = block.router.weight, block.inputs
    form = form_of(inputs.gate_up)
    assert form is not None

    def run(tokens: int) -> None:
        hidden_NH = router_EH.new_zeros(tokens, router_EH.shape[1])
        if block.fused:
            block_by_kernels(hidden_NH, router_EH, block.router.top_k, True, inputs, hidden_NH)
        # Watched layers, and those of other architectures, come with their own routing and add the residual themselves.
        index_NK = torch.zeros(tokens, block.router.top_k, dtype=torch.int64, device=router_EH.device)
        mix_by_kernels(hidden_NH, index_NK, torch.zeros_like(index_NK, dtype=hidden_NH.dtype), inputs)

    numbers = tokens_up_to(format_of(form, router_EH.dtype), device_of(router_EH.device), max_tokens)
    done = warm_up(run, numbers)
    return done.kernels, done.seconds
