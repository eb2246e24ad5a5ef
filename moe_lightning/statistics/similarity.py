"""How little layers and blocks change the hidden states: cosines, summed token by token.

Legend: L MoE layers, B decoder layers, C = B + 1 places between them, N tokens without padding, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_lightning.architectures import Architecture
from moe_lightning.statistics.metrics import SumMetric

# Numbers that are worked on at a time: they stay in the cache.
_CHUNK = 2**18


def _chunks(tensors: Sequence[Tensor], least: int = 1) -> Iterator[list[Tensor]]:
    """Cut tensors ``[N, H]`` along their tokens."""
    step = max(least, _CHUNK // max(1, len(tensors) * tensors[0].shape[1]))
    for start in range(0, tensors[0].shape[0], step):
        yield [tensor[start : start + step] for tensor in tensors]


def cosine_sum(left_NH: Tensor, right_NH: Tensor) -> Tensor:
    """Sum the cosines of two hidden states of each token, in float64.

    Args:
        left_NH: Before.
        right_NH: After.

    Returns:
        Scalar; a state that is zero has cosine 0 with any other.
    """
    total = torch.zeros((), dtype=torch.float64, device=left_NH.device)
    for left, right in _chunks((left_NH, right_NH)):
        left, right = left.double(), right.double()
        norms = torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
        total += (torch.linalg.vecdot(left, right) / norms.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    return total


def all_cosines(states_NCH: Tensor) -> Tensor:
    """Return the cosines of all pairs of hidden states of each token: ``[N, C, C]`` float64, 1 on the diagonal.

    The products are in fp32 where the states are narrower: 1e-7 in the cosine, 4e-4 in an angle close to zero.
    """
    states_NCH = states_NCH.to(torch.promote_types(states_NCH.dtype, torch.float32))
    inner_NCC = (states_NCH @ states_NCH.transpose(1, 2)).double()
    norm_NC = inner_NCC.diagonal(dim1=1, dim2=2).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    cosine_NCC = inner_NCC / (norm_NC.unsqueeze(1) * norm_NC.unsqueeze(2)).clamp(min=tiny)
    # NaN stays NaN: a state that overflowed has no cosine, not even with itself.
    cosine_NCC.diagonal(dim1=1, dim2=2).copy_(torch.where(norm_NC.isfinite(), 1.0, torch.nan))
    return cosine_NCC


def angles(cosine: Tensor) -> Tensor:
    """Return ``arccos(cosine) / pi``, between 0 and 1."""
    return cosine.clamp(-1, 1).arccos() / math.pi


class LayerSimilarity(SumMetric):
    """What every MoE layer adds to the residual stream.

    States ``[L]``: ``moe_tokens``; ``moe_cosine_sum`` (cosine of the stream after attention, and of that plus the
    layer's output).
    """

    moe_tokens: Tensor
    moe_cosine_sum: Tensor

    def __init__(self, num_layers: int) -> None:
        """Start from zero.

        Args:
            num_layers: L.
        """
        super().__init__()
        self.add_zeros("moe_tokens", num_layers)
        self.add_zeros("moe_cosine_sum", num_layers)

    def update(self, row: int, before_NH: Tensor, after_NH: Tensor) -> None:
        """Add the tokens of one layer's call."""
        self.moe_tokens[row] += before_NH.shape[0]
        self.moe_cosine_sum[row] += cosine_sum(before_NH, after_NH)


class BlockSimilarity(SumMetric):
    """What every decoder layer does to its input.

    States ``[B]``: ``block_tokens``; ``block_cosine_sum`` (cosine of input and output).
    """

    block_tokens: Tensor
    block_cosine_sum: Tensor

    def __init__(self, num_blocks: int) -> None:
        """Start from zero.

        Args:
            num_blocks: B.
        """
        super().__init__()
        self.add_zeros("block_tokens", num_blocks)
        self.add_zeros("block_cosine_sum", num_blocks)

    def update(self, row: int, before_NH: Tensor, after_NH: Tensor) -> None:
        """Add the tokens of one block's call."""
        self.block_tokens[row] += before_NH.shape[0]
        self.block_cosine_sum[row] += cosine_sum(before_NH, after_NH)


class HiddenSimilarity(SumMetric):
    """Similarity of the hidden states at all pairs of places in the stack.

    Place 0 is the input of the first block, place B the output of the last one, before the final norm.

    States: ``similarity_tokens``, ``similarity_sequences`` ``[1]``; ``hidden_cosine_sum``, ``hidden_angle_sum``
    (``arccos / pi``) over tokens, ``hidden_last_angle_sum`` over the last token of each sequence ``[C, C]``.
    """

    similarity_tokens: Tensor
    similarity_sequences: Tensor
    hidden_cosine_sum: Tensor
    hidden_angle_sum: Tensor
    hidden_last_angle_sum: Tensor

    def __init__(self, num_blocks: int) -> None:
        """Start from zero.

        Args:
            num_blocks: B.
        """
        super().__init__()
        for name in ("similarity_tokens", "similarity_sequences"):
            self.add_zeros(name, 1)
        for name in ("hidden_cosine_sum", "hidden_angle_sum", "hidden_last_angle_sum"):
            self.add_zeros(name, num_blocks + 1, num_blocks + 1)

    def update(self, states: Sequence[Tensor], mask: Tensor | None) -> None:
        """Add a batch.

        Args:
            states: The hidden states of the batch at all places, C times ``[batch, sequence, hidden]``.
            mask: Which tokens count, bool ``[batch, sequence]``; None where all do.
        """
        flat = [state.reshape(-1, state.shape[-1]) for state in states]
        batch, length = states[0].shape[:2]
        if mask is None:
            last = torch.arange(1, batch + 1, device=flat[0].device) * length - 1 if length else None
        else:
            place = torch.arange(1, batch * length + 1, device=mask.device).view(batch, length)
            last = (place * mask).amax(1) - 1 if length else None
            last = None if last is None else last[mask.any(1)]
            flat = [state[mask.reshape(-1)] for state in flat]
            # Places among the tokens that are left.
            last = None if last is None else mask.reshape(-1).cumsum(0)[last] - 1
        self.similarity_tokens += flat[0].shape[0]
        for chunk in _chunks(flat, 64):
            cosine_NCC = all_cosines(torch.stack(chunk, 1))
            self.hidden_cosine_sum += cosine_NCC.sum(0)
            self.hidden_angle_sum += angles(cosine_NCC).sum(0)
        if last is not None and last.shape[0]:
            self.similarity_sequences += last.shape[0]
            for chunk in _chunks([state[last] for state in flat], 64):
                self.hidden_last_angle_sum += angles(all_cosines(torch.stack(chunk, 1))).sum(0)


class StreamObserver:
    """Watches the residual stream: inputs and outputs of decoder layers, and what goes into their MoE layers."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        layers: LayerSimilarity | None,
        blocks: BlockSimilarity | None,
        hidden: HiddenSimilarity | None,
    ) -> None:
        """Prepare to watch a model; nothing is changed until :meth:`attached`.

        Args:
            model: The model.
            architecture: Its architecture.
            layers: Gets what MoE layers do, or None.
            blocks: Gets what blocks do, or None.
            hidden: Gets all hidden states of a batch at its end, or None.
        """
        self.model = model
        self.architecture = architecture
        self.layers = layers
        self.blocks = blocks
        self.hidden = hidden
        self.mask: Tensor | None = None
        """Which tokens of the running batch count, bool ``[batch, sequence]``; None where all do."""
        self._states: list[Tensor] = []

    @contextmanager
    def attached(self) -> Iterator[StreamObserver]:
        """Watch inside a ``with`` block."""
        undo: list[Callable[[], object]] = []
        try:
            if self.blocks is not None or self.hidden is not None:
                for row, block in enumerate(self.architecture.decoder_layers(self.model)):
                    undo.append(block.register_forward_hook(partial(self._block, row), with_kwargs=True).remove)
            if self.layers is not None:
                for row, layer in enumerate(self.architecture.moe_layers(self.model)):
                    seen: dict[str, Tensor] = {}
                    # What the norm before the MoE layer gets is the stream after attention.
                    norm = layer.norm
                    undo.append(norm.register_forward_pre_hook(partial(_remember, seen)).remove)
                    undo.append(layer.decoder_layer.register_forward_hook(partial(self._layer, row, seen)).remove)
            yield self
        finally:
            self._states.clear()
            for step in reversed(undo):
                step()

    def start_batch(self, mask: Tensor | None) -> None:
        """Say which tokens of the coming batch count."""
        self.mask = mask
        self._states.clear()

    def end_batch(self) -> None:
        """Work off what was held of the batch."""
        if self.hidden is not None and self._states:
            with torch.no_grad(), torch.autocast(self._states[0].device.type, enabled=False):
                self.hidden.update(self._states, self.mask)
        self._states.clear()

    def _kept(self, states: Tensor) -> Tensor:
        return states.reshape(-1, states.shape[-1]) if self.mask is None else states[self.mask]

    def _block(self, row: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        with torch.no_grad(), torch.autocast(after.device.type, enabled=False):
            if self.blocks is not None:
                self.blocks.update(row, self._kept(before), self._kept(after))
        if self.hidden is not None:
            self._states.extend([before, after] if row == 0 else [after])

    def _layer(self, row: int, seen: dict[str, Tensor], _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.layers is not None
        after = output[0] if isinstance(output, tuple) else output
        with torch.no_grad(), torch.autocast(after.device.type, enabled=False):
            self.layers.update(row, self._kept(seen.pop("stream")), self._kept(after))


def _remember(seen: dict[str, Tensor], _module: nn.Module, args: tuple[Any, ...]) -> None:
    seen["stream"] = args[0]
