"""When a sum over experts goes through the Triton kernels, and the way there.

Nothing else changes: state dicts, float64 and everything on a CPU go the way of plain torch, which says the same.
``MOE_KERNELS_GPU=auto`` switches the kernels on for a process, `use_kernels` for a stretch of code. They are off by
themselves as long as no GPU has run their tests: until then they were only interpreted and compiled.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from moe_kernels import NoviceMaps
from moe_kernels.experts import Activation
from torch import Tensor, nn

from moe_lightning.experts.stacks import Int4, Sparse24
from moe_lightning.experts.storage import Dense, Packed

VARIABLE = "MOE_KERNELS_GPU"
"""Environment variable read at import: ``off`` (the default) or ``auto``."""

Use = Literal["auto", "off", "always"]
"""``auto``: on a GPU. ``always``: on a CPU too, in triton's interpreter (for tests)."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Volta and Turing have no bf16, and no table of tiles.
_LEAST_CAPABILITY = 8


def _said(word: str) -> Use:
    found = next((use for use in get_args(Use) if use == word), None)
    if found is None:
        raise ValueError(f"{VARIABLE}={word}: give auto, off or always")
    return found


_use: Use = _said(os.environ.get(VARIABLE, "off"))


@contextmanager
def use_kernels(use: Use) -> Iterator[None]:
    """Decide about the kernels inside a ``with`` block, in all threads.

    Args:
        use: ``auto``, ``off`` or ``always``.

    Raises:
        ValueError: Another word.
    """
    global _use
    before, _use = _use, _said(use)
    try:
        yield
    finally:
        _use = before


def current_use() -> Use:
    """Say what was decided about the kernels: ``auto``, ``off`` or ``always``."""
    return _use


class KernelWeights(NamedTuple):
    """Weights of real experts as the kernels take them.

    Attributes:
        gate_up: ``[S, 2I, H]`` alone; or words and pairs of int4 tiles; or values and metadata of 2:4.
        down: ``[S, H, I]`` in the same form.
        bias: ``[S, H]`` or None.
    """

    gate_up: list[Tensor]
    down: list[Tensor]
    bias: Tensor | None = None


class KernelInputs(NamedTuple):
    """What the operations take of a layer's experts, in the order in which they take it after the routing.

    Attributes:
        slot_map_E: Slot or novice of each expert.
        gate_up: Of `KernelWeights`.
        down: Of `KernelWeights`.
        novices: Nothing; or vectors; or those and the fields of `NoviceMaps`.
        bias_SH: Bias of each slot, or None.
    """

    slot_map_E: Tensor
    gate_up: list[Tensor]
    down: list[Tensor]
    novices: list[Tensor]
    bias_SH: Tensor | None


def why_torch(
    hidden_NH: Tensor, weight_NK: Tensor | None, parameters: Iterable[Tensor | None], activation: Activation
) -> str | None:
    """Say why a sum over experts does not go through the kernels for inference; None where nothing is against it.

    Whether the kernels know the weights is another question: `storage_weights`, and ``why_not`` of the kernels.

    Args:
        hidden_NH: Input of the block.
        weight_NK: Routing weights; None where the router is among what is asked about.
        parameters: Everything that might be trained.
        activation: Of the gate half.
    """
    if _use != "off" and wants_gradient(hidden_NH, weight_NK, parameters):
        return "a gradient is wanted"
    return why_no_kernels(hidden_NH, activation)


def why_no_kernels(hidden_NH: Tensor, activation: Activation) -> str | None:
    """Say why neither the kernels for inference nor those with gradients are taken; None where nothing is against it.

    Args:
        hidden_NH: Input of the block.
        activation: Of the gate half.
    """
    if _use == "off":
        return "the kernels are switched off"
    if hidden_NH.device.type != "cuda" and _use != "always":
        return f"the input is on {hidden_NH.device.type}"
    if not _HAS_TRITON:
        return "triton is not installed"
    if torch.is_autocast_enabled(hidden_NH.device.type):
        return "autocast decides about types"
    if not is_silu(activation):
        return f"the activation is {activation}, and the kernels know SiLU"
    if hidden_NH.device.type == "cuda" and _capability(hidden_NH.device) < _LEAST_CAPABILITY:
        return "the GPU is older than the kernels know"
    return None


def wants_gradient(hidden_NH: Tensor, weight_NK: Tensor | None, parameters: Iterable[Tensor | None]) -> bool:
    """Say whether autograd is on and any of these takes part; see `why_torch`."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (hidden_NH, weight_NK, *parameters))


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major


def is_silu(activation: Activation) -> bool:
    """Say whether an activation is ``x * sigmoid(x)``, by its name: transformers has a class of its own."""
    return activation is nn.functional.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


def storage_weights(storage: Dense | Packed, hidden_NH: Tensor) -> KernelWeights | str:
    """Return the weights of a storage as the kernels take them, or say why they cannot.

    int4 stacks take the form of the kernels at the first call; those with the pattern 2:4 are read as they are stored.

    Args:
        storage: Weights of the real experts.
        hidden_NH: Input of the block.
    """
    if not storage.num_slots:
        # Only novices, whatever real experts would be stored as.
        empty = hidden_NH.new_empty(0, 16, storage.hidden_size)
        return KernelWeights([empty], [empty.new_empty(0, storage.hidden_size, 8)])
    first, second = storage.gate_up_proj, storage.down_proj
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return KernelWeights([first], [second], storage.bias)
    if isinstance(first, Sparse24) and isinstance(second, Sparse24):
        return KernelWeights([first.values, first.metadata], [second.values, second.metadata], storage.bias)
    if not isinstance(first, Int4) or not isinstance(second, Int4):
        return f"the kernels do not know {storage.gate_up_proj}"
    if _has_cut_terms(storage, first, second):
        return "low-rank terms beside pruned weights are cut to those that are left, and the kernels add them whole"
    reason = first.why_no_tiles() or second.why_no_tiles()
    if reason is not None:
        return reason
    gate_up, down = first.tiles(), second.tiles()
    return KernelWeights([gate_up.words_SGOW, gate_up.pairs_SGO], [down.words_SGOW, down.pairs_SGO], storage.bias)


def _has_cut_terms(storage: Dense | Packed, *stacks: Int4) -> bool:
    """Say whether a stack was pruned before it was rounded, and has terms beside it; see `adapted_linear`."""
    terms = (storage.gate_up_lora, storage.down_lora)
    return any(term is not None and stack.is_pruned for stack, term in zip(stacks, terms, strict=True))


def kernel_inputs(
    hidden_NH: Tensor,
    slot_map_E: Tensor,
    weights: KernelWeights,
    novices_VH: Tensor | None = None,
    maps: NoviceMaps | None = None,
) -> KernelInputs | None:
    """Put together what the kernels take of a layer's experts.

    Args:
        hidden_NH: Input of the block.
        slot_map_E: Slot or novice of each expert.
        weights: Of the real experts.
        novices_VH: Novice vectors, or None.
        maps: Their low-rank maps, or None.

    Returns:
        The inputs; None where the kernels do not know these types or sizes.
    """
    # Not before it is needed: triton is slow to import, and is not everywhere.
    from moe_kernels.triton_kernels.block import why_not

    if why_not(hidden_NH, weights.gate_up, weights.down) is not None:
        return None
    novices = [] if novices_VH is None else [novices_VH, *(maps or ())]
    return KernelInputs(slot_map_E, weights.gate_up, weights.down, novices, weights.bias)


def mix_by_kernels(
    hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, inputs: KernelInputs, residual_NH: Tensor | None = None
) -> Tensor:
    """Compute a sum over experts by the kernels.

    Args:
        hidden_NH: Input of the block.
        index_NK: Experts chosen by the router.
        weight_NK: Their routing weights.
        inputs: Of the experts.
        residual_NH: Added to everything, or None.

    Returns:
        ``[N, H]`` in the type of the input.
    """
    from moe_kernels.triton_kernels.block import mix_experts_op

    return mix_experts_op(hidden_NH, index_NK, weight_NK, *inputs, residual_NH)


def train_by_kernels(
    hidden_NH: Tensor, index_NK: Tensor, weight_NK: Tensor, inputs: KernelInputs, storage: Dense | Packed
) -> Tensor | None:
    """Compute a sum over experts by the kernels so that it can be differentiated, low-rank terms included.

    Args:
        hidden_NH: Input of the block.
        index_NK: Experts chosen by the router.
        weight_NK: Their routing weights.
        inputs: Of the experts.
        storage: What holds the weights, for its low-rank terms.

    Returns:
        ``[N, H]`` in the type of the input; None where these kernels do not know the weights.
    """
    from moe_kernels.triton_kernels.training.operation import train_experts_with_novices, why_not_train
    from moe_kernels.triton_kernels.weight_forms import form_of

    if not storage.num_slots:
        return None  # its empty stacks get gradients there, which DDP waits for
    lora, scales = _lora_inputs(storage)
    # They read no 2:4 weights: what an expansion made would have to be kept for the way back.
    if form_of(inputs.gate_up) == "sparse24" or why_not_train(hidden_NH, inputs.gate_up, inputs.down, lora) is not None:
        return None
    slot_map_E, gate_up, down, novices, bias_SH = inputs
    maps = NoviceMaps(*novices[1:]) if len(novices) > 1 else None
    vectors_VH = novices[0] if novices else None
    return train_experts_with_novices(
        hidden_NH, index_NK, weight_NK, slot_map_E, gate_up, down, lora, scales, vectors_VH, maps, bias_SH
    ).to(hidden_NH.dtype)


def _lora_inputs(storage: Dense | Packed) -> tuple[list[Tensor], list[float]]:
    """Return the low-rank terms of both projections, or nothing; a term that is not there is one of zeros."""
    if storage.gate_up_lora is None and storage.down_lora is None:
        return [], []
    lora, scales = [], []
    hidden_size, slots = storage.hidden_size, storage.num_slots
    inner_size = storage.num_weights // (3 * max(slots, 1) * hidden_size)
    sizes = ((2 * inner_size, hidden_size), (hidden_size, inner_size))
    terms = (storage.gate_up_lora, storage.down_lora)
    like = next(term.lora_A for term in terms if term is not None)
    for term, (outputs, inputs) in zip(terms, sizes, strict=True):
        if term is None:
            lora += [like.new_zeros(slots, 1, inputs), like.new_zeros(slots, outputs, 1)]
            scales.append(1.0)
        else:
            lora += [term.lora_A, term.lora_B]
            scales.append(term.scale)
    return lora, scales


def block_by_kernels(
    hidden_NH: Tensor,
    router_EH: Tensor,
    top_k: int,
    renormalize: bool,
    inputs: KernelInputs,
    residual_NH: Tensor | None = None,
) -> Tensor:
    """Compute a whole block by the kernels: router, sum over experts and residual.

    Args:
        hidden_NH: Input of the block.
        router_EH: Weight of the router.
        top_k: Experts of a token.
        renormalize: Make the routing weights of a token add up to one.
        inputs: Of the experts.
        residual_NH: Added to everything, or None.

    Returns:
        ``[N, H]`` in the type of the input.
    """
    from moe_kernels.triton_kernels.block import moe_block_op

    return moe_block_op(hidden_NH, router_EH, top_k, renormalize, *inputs, residual_NH)[0]
