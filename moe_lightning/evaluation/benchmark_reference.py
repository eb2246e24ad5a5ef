"""What a Mixtral's layers ought to give, computed slowly: what a benchmark compares with before it times anything.

Nothing here goes the ways that are timed. Attention is written out without a cache, experts are a loop over slots with
matrices spelled out one at a time in fp32 (fp64 for a model in fp64), and who stands where in a layer is read from the
plan. So a second model in fp32 never exists, whatever the size. Only the rotary embedding is transformers' module.

Each layer is computed for an input that is given, not for what the reference itself made of the layer before: rounding
does not add up over the layers, and a router that finds two experts equally good to a hair, and takes the other one,
does not make everything after it different.

Legend: B sequences, S tokens of each, H hidden, N tokens, K top-k, R router rows, A other choices that are as good, O
outputs, X inputs.

Source: Mixtral of Experts (2401.04088); 2406.02500 eq. 7 with the novices of 2507.00390 for compressed layers.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lightning.architectures import MoELayer, architecture_of
from moe_lightning.experts import LoraStack, PackedLinear, WeightStack
from moe_lightning.plan import ABSENT, ExpertLayout

_QUERIES = 256  # of a sequence whose scores exist at a time


class LayerReference(NamedTuple):
    """What a decoder layer ought to give.

    Attributes:
        output: ``[B, S, H]``.
        added: How much attention and experts add to the residual stream: the sum of both norms, ``[B, S]``.
        others: What it may give as well where a router finds experts equally good within the margin, ``[A, H]``.
        token: Of which token (sequences one after the other) each of ``others`` is, int64 ``[A]``.
    """

    output: Tensor
    added: Tensor
    others: Tensor
    token: Tensor


class Reference:
    """The layers of a model, computed slowly.

    Attributes:
        dtype: Type that everything is computed in.
    """

    def __init__(self, model: Any) -> None:
        """Look at a model.

        Args:
            model: A Mixtral with its language head, compressed or not. Its weights are read when a layer is asked for.

        Raises:
            ValueError: Another family.
        """
        self.model = model
        self._architecture = architecture_of(model)
        shape = self._architecture.shape(model)
        self._layouts = {layout.layer: layout for layout in shape.layouts}
        self._blocks = shape.blocks
        self._heads, self._kv_heads, self._width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self._top_k = shape.top_k
        self._moe = {layer.index: layer for layer in self._architecture.moe_layers(model)}
        wide = next(model.parameters()).dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32

    @property
    def num_layers(self) -> int:
        """Decoder layers that the plan leaves."""
        return len(self._blocks)

    def embedded(self, ids_BS: Tensor) -> Tensor:
        """Return what ought to enter the first layer, ``[B, S, H]``.

        Args:
            ids_BS: Token ids.
        """
        return self.model.get_input_embeddings().weight[ids_BS.to(self._device)].to(self.dtype)

    def layer(self, place: int, entering_BSH: Tensor, margin: float) -> LayerReference:
        """Return what a decoder layer ought to give for whole sequences that enter it.

        Args:
            place: Of the layer in the model as it is.
            entering_BSH: What enters, in any type.
            margin: Two experts are equally good where their logits differ by less than this share of the largest.
        """
        layer = self._architecture.decoder_layers(self.model)[place]
        hidden_BSH = entering_BSH.to(self.dtype)
        attended_BSH = self._attention(layer, hidden_BSH)
        hidden_BSH, added_BS = hidden_BSH + attended_BSH, attended_BSH.norm(dim=-1)
        number = self._blocks[place]
        if number not in self._moe:
            token_A = torch.zeros(0, dtype=torch.int64, device=hidden_BSH.device)
            return LayerReference(hidden_BSH, added_BS, hidden_BSH[0, :0], token_A)
        moe = self._moe[number]
        normed_NH = _norm(moe.norm, hidden_BSH).flatten(0, 1)
        mixed_NH, others_AH, token_A = self._mixed(moe, self._layouts[number], normed_NH, margin)
        mixed_BSH = mixed_NH.view(hidden_BSH.shape)
        others_AH = others_AH + hidden_BSH.flatten(0, 1)[token_A]
        return LayerReference(hidden_BSH + mixed_BSH, added_BS + mixed_BSH.norm(dim=-1), others_AH, token_A)

    def logits(self, leaving_BSH: Tensor) -> Tensor:
        """Return the logits that ought to follow from what leaves the last layer, ``[B, S, vocabulary]``.

        Args:
            leaving_BSH: What leaves the last layer, in any type.
        """
        return _norm(self.model.model.norm, leaving_BSH.to(self.dtype)) @ self._head.T

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _head(self) -> Tensor:
        return self.model.get_output_embeddings().weight.to(self.dtype)

    def _attention(self, layer: Any, hidden_BSH: Tensor) -> Tensor:
        batch, length = hidden_BSH.shape[:2]
        normed = _norm(self._architecture.attention_norm(layer), hidden_BSH)
        linears = self._architecture.attention_linears(layer)

        def heads(name: str, count: int) -> Tensor:
            return _product(linears[name], normed).view(batch, length, count, self._width).transpose(1, 2)

        query, key, value = (
            heads("q_proj", self._heads),
            heads("k_proj", self._kv_heads),
            heads("v_proj", self._kv_heads),
        )
        places = torch.arange(length, device=hidden_BSH.device)
        cos, sin = self.model.model.rotary_emb(normed, places[None])
        query, key = (_rotated(part, cos[:, None], sin[:, None]) for part in (query, key))
        shared = self._heads // self._kv_heads
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
        window = getattr(self.model.config, "sliding_window", None) or length
        result = torch.empty_like(query)
        for start in range(0, length, _QUERIES):
            asking = places[start : start + _QUERIES, None]
            hidden_keys = (places > asking) | (places <= asking - window)
            scores = query[:, :, start : start + _QUERIES] @ key.transpose(2, 3) * self._width**-0.5
            result[:, :, start : start + _QUERIES] = scores.masked_fill(hidden_keys, -torch.inf).softmax(-1) @ value
        return _product(linears["o_proj"], result.transpose(1, 2).flatten(2))

    def _mixed(
        self, moe: MoELayer, layout: ExpertLayout, normed_NH: Tensor, margin: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_NR = normed_NH @ moe.router.weight.to(self.dtype).T
        picks = min(self._top_k, logits_NR.shape[1])
        index_NK = logits_NR.sort(dim=-1, descending=True, stable=True).indices[:, :picks]
        token_A, index_AK = _other_choices(logits_NR, picks, margin)
        index_MK, token_M = torch.cat([index_NK, index_AK]), torch.cat([_numbers(index_NK), token_A])
        chosen_MK = logits_NR.softmax(-1)[token_M].gather(1, index_MK)
        weight_MK = chosen_MK / chosen_MK.sum(-1, keepdim=True)
        mixed_MH = self._sum_of_experts(moe, layout, normed_NH[token_M], index_MK, weight_MK)
        output_NH, others_AH = mixed_MH.split([len(normed_NH), len(token_A)])
        return output_NH, others_AH, token_A

    def _sum_of_experts(
        self, moe: MoELayer, layout: ExpertLayout, rows_NH: Tensor, index_NK: Tensor, weight_NK: Tensor
    ) -> Tensor:
        opened = self._architecture.open_experts(moe)
        result_NH = torch.zeros_like(rows_NH)
        novices, maps = opened.novices, opened.maps
        owners = torch.tensor(layout.novice_map, dtype=torch.int64, device=rows_NH.device)
        for row, place in enumerate(layout.slot_map):
            tokens, choice = (index_NK == row).nonzero(as_tuple=True)
            if place == ABSENT or not len(tokens):
                continue
            inputs_TH = rows_NH[tokens]
            if place >= 0:
                storage = opened.storage
                gate_up = _matrix(storage.gate_up_proj, storage.gate_up_lora, place, self.dtype)
                gate, up = (inputs_TH @ gate_up.T).chunk(2, -1)
                down = _matrix(storage.down_proj, storage.down_lora, place, self.dtype)
                output_TH = (opened.activation(gate) * up) @ down.T
                if storage.bias is not None:
                    output_TH = output_TH + storage.bias[place].to(self.dtype)
            else:
                assert novices is not None
                output_TH = novices[-1 - place].to(self.dtype).expand(len(tokens), -1)
                if maps is not None:
                    reads, gives = (part[owners == -1 - place].to(self.dtype) for part in maps[:2])
                    output_TH = output_TH + (inputs_TH @ reads.T) @ gives
            result_NH.index_add_(0, tokens, output_TH * weight_NK[tokens, choice, None])
        return result_NH


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _other_choices(logits_NR: Tensor, picks: int, margin: float) -> tuple[Tensor, Tensor]:
    """Find what a router may choose as well where logits differ by less than a margin.

    Tried are all choices among the last two that it ought to pick and the two behind them.

    Args:
        logits_NR: Of the router.
        picks: K.
        margin: Share of the largest logit of a token.

    Returns:
        Tokens ``[A]``, and the experts that may be chosen for them ``[A, K]``.
    """
    ranked = logits_NR.sort(dim=-1, descending=True, stable=True)
    sure = max(0, picks - 2)
    open_ranks = range(sure, min(picks + 2, logits_NR.shape[1]))
    tokens, choices = [_numbers(logits_NR)[:0]], [ranked.indices[:0, :picks]]
    for taken in itertools.combinations(open_ranks, picks - sure):
        left = [rank for rank in open_ranks if rank not in taken]
        if not left or taken == tuple(range(sure, picks)):
            continue
        gap_N = ranked.values[:, left].amax(-1) - ranked.values[:, list(taken)].amin(-1)
        (token_T,) = (gap_N < margin * logits_NR.abs().amax(-1)).nonzero(as_tuple=True)
        tokens.append(token_T)
        choices.append(ranked.indices[token_T][:, [*range(sure), *taken]])
    return torch.cat(tokens), torch.cat(choices)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    scale = (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return norm.weight.to(hidden.dtype) * (hidden * scale)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin


def _product(linear: Any, inputs: Tensor) -> Tensor:
    weight = linear.stack if isinstance(linear, PackedLinear) else linear.weight[None]
    result = inputs @ _matrix(weight, getattr(linear, "lora", None), 0, inputs.dtype).T
    bias = getattr(linear, "bias", None)
    return result if bias is None else result + bias.to(inputs.dtype)


def _matrix(weight: Tensor | WeightStack, lora: LoraStack | None, slot: int, dtype: torch.dtype) -> Tensor:
    """Spell out one matrix with the low-rank term beside it, ``[O, X]``."""
    kept_OX = None
    if isinstance(weight, WeightStack):
        one = weight.slot(slot)
        matrix_OX, kept = one.dense(dtype)[0], one.zeros_kept()
        kept_OX = None if kept is None else kept[0]
    else:
        matrix_OX = weight[slot].to(dtype)
    if lora is None:
        return matrix_OX
    term_OX = lora.alpha / lora.rank * (lora.lora_B[slot].to(dtype) @ lora.lora_A[slot].to(dtype))
    # Beside pruned weights a term adds nothing to those that were pruned.
    return matrix_OX + (term_OX if kept_OX is None else term_OX * kept_OX)
