"""The least time that a machine allows for a pass: by the operations that it takes, and by the bytes that it must read.

    floor = max(FLOPs / speed of a large product, bytes / speed of a copy)

Both speeds are measured in the same run (:func:`product_speed`, :func:`copy_speed`). What is counted:

* FLOPs: those of ``moe_lightning.measure`` at that length, for the share of the routed pairs that real experts got.
  Two things are counted otherwise: a query must look at no more than the tokens before it and at itself, half of the
  square that ``measure`` counts, and of the novices only those that a token picked are of use to it, however many
  products an implementation computes. Integers are multiplied as if they were floating-point numbers.
* Bytes of weights: everything once for each pass, packed weights packed; but of a layer's experts and novices only
  those that some token of the pass reached, and of the embedding only the rows of the words that come up. A step of
  decoding with one sequence reads ``k`` of ``E`` experts, one with many reads nearly all; how many is counted in the
  run itself.
* Bytes of the key/value cache, once for each step of decoding.
* Bytes of the logits, which are written.

Activations may stay in caches and are not counted. So a pass cannot be faster than its floor, except where the weights
themselves stay in a cache from pass to pass: then they are read faster than memory allows. The copy that is measured is
as large as the weights, up to 256 MiB, so that it is in the cache just when they are; and one that only reads can be a
little faster than a copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from moe_kernels import ABSENT
from torch import Tensor, nn

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.base import OpenExperts
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.evaluation.benchmark_check import Phase
from moe_lightning.evaluation.speed import Work
from moe_lightning.experts import Masked
from moe_lightning.sizes import measure

_LARGEST_COPY, _SMALLEST_COPY = 1 << 28, 1 << 20
_PRODUCT = {"cuda": 8192, "cpu": 1024}
_SECONDS = 0.2
_FEWEST = 5


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best, measured.

    Attributes:
        flops_per_second: Of a large product, in the type of the weights or in fp32, whichever is faster: some CPUs
            emulate bf16, and implementations then compute in fp32.
        bytes_per_second: Read and written by a copy.
    """

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class RoutedShares:
    """Where the tokens of a pass went, on average over the passes of a run; an entry for each MoE layer.

    Attributes:
        real: Share of the picks (k for each token) that real experts got; the rest went to novices or to nobody. Of
            experts that share their weights one counts for a token.
        reached: Real experts with their own weights that some token reached.
        novices_reached: Numbers that the novices hold that some token reached: their vectors and their maps.
        novices_picked: The same of the novices that a token picked, on average over the tokens.
        words: Different words of a pass; only this is one number for all layers.
    """

    real: list[float]
    reached: list[float]
    novices_reached: list[float]
    novices_picked: list[float]
    words: float


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs a second of a large product: the fastest of several.

    Args:
        device: Where.
        dtype: Type of the weights. Where a CPU emulates it, implementations compute in fp32: measured, too.

    Cost:
        Half a second.
    """
    size = _PRODUCT.get(device.type, _PRODUCT["cpu"])
    fastest = float("inf")
    for kind in dict.fromkeys((dtype, torch.float32)):
        left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        result = torch.empty_like(left)
        fastest = min(fastest, _least_seconds(partial(torch.mm, left, right, out=result), device))
    return 2 * size**3 / fastest


def copy_speed(device: torch.device, weight_bytes: int) -> float:
    """Measure the bytes a second that a copy reads and writes: the fastest of several.

    Args:
        device: Where.
        weight_bytes: Bytes of the model whose floors are wanted: on a CPU the copy is as large.

    Cost:
        Half a second.
    """
    copied = min(max(weight_bytes, _SMALLEST_COPY), _LARGEST_COPY) if device.type == "cpu" else _LARGEST_COPY
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _FEWEST or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def routed_shares(model: Any, work: Work) -> RoutedShares:
    """Count where the tokens of a run go; it is not timed.

    Args:
        model: The model.
        work: What it runs.
    """
    architecture = architecture_of(model)
    layers = architecture.moe_layers(model)
    top_k = architecture.shape(model).top_k
    opened = [architecture.open_experts(layer) for layer in layers]
    slots = [experts.slot_map for experts in opened]
    held = [_novice_numbers(experts) for experts in opened]
    found: list[list[tuple[float, ...]]] = [[] for _ in layers]
    words: list[int] = []

    def note(number: int, index_NK: Tensor) -> None:
        places_NK = slots[number][index_NK].sort(dim=-1).values
        again_NK = torch.zeros_like(places_NK, dtype=torch.bool)
        again_NK[:, 1:] = places_NK[:, 1:] == places_NK[:, :-1]
        real = places_NK[(places_NK >= 0) & ~again_NK]
        novices = -1 - places_NK[(places_NK < 0) & (places_NK != ABSENT)]
        tokens = index_NK.shape[0]
        reached, picked = (float(held[number][which].sum()) for which in (novices.unique(), novices))
        found[number].append((real.numel() / (tokens * top_k), real.unique().numel(), reached, picked / tokens))

    def note_words(_embedding: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        words.append(arguments[0].unique().numel())

    with evaluation_mode(model):
        work.prepare()
        handle = model.get_input_embeddings().register_forward_pre_hook(note_words)
        try:
            with _hooks(layers, note):
                work.run()
        finally:
            handle.remove()
    means = [[statistics.fmean(column) for column in zip(*calls, strict=True)] for calls in found]
    real, reached, novices_reached, novices_picked = ([means_of[part] for means_of in means] for part in range(4))
    return RoutedShares(real, reached, novices_reached, novices_picked, statistics.fmean(words))


def _novice_numbers(experts: OpenExperts) -> Tensor:
    """Return how many numbers each novice of a layer holds, ``[novices]``."""
    if experts.novices is None:
        return torch.zeros(0)
    numbers = torch.full((experts.novices.shape[0],), float(experts.novices.shape[1]), device=experts.novices.device)
    if experts.maps is not None:
        a_row = experts.maps.in_RH.shape[1] + experts.maps.out_RH.shape[1]
        numbers += a_row * experts.maps.novice_R.bincount(minlength=numbers.numel())
    return numbers


@contextmanager
def _hooks(layers: list[Any], note: Callable[[int, Tensor], None]) -> Iterator[None]:
    handles = [
        layer.router.register_forward_hook(lambda _router, _arguments, output, number=number: note(number, output[2]))
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensor_bytes(module: nn.Module) -> int:
    """Count the bytes of what a module reads when it works, in the form in which it works now; shared tensors once.

    Args:
        module: A model or a part of one.
    """
    # Not by their names: to ask packed weights for a buffer of another form would change the form.
    # The bits of open masked matrices are not read in evaluation, whose zeros are written out.
    tensors = [
        tensor
        for inner in module.modules()
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items())
        if tensor is not None and not (name == "bits" and isinstance(inner, Masked) and inner.weight is not None)
    ]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def pass_flops(model: Any, phase: Phase, work: Work, shares: RoutedShares) -> float:
    """Count the operations that one pass must do; see the top of this file.

    Args:
        model: The model.
        phase: Prefill, or a step of decoding.
        work: What runs.
        shares: Of the same run.
    """
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    layers = len(architecture.decoder_layers(model))
    a_key = 4 * shape.num_attention_heads * shape.head_dim * layers
    # At one token measure counts one key.
    products = float(measure(model, 1, [1 - share for share in shares.real]).flops - a_key)
    # Nor are the novices that a token did not pick of any use to it.
    experts = (architecture.open_experts(layer) for layer in architecture.moe_layers(model))
    products += 2 * (sum(shares.novices_picked) - sum(float(_novice_numbers(each).sum()) for each in experts))
    window = getattr(model.config, "sliding_window", None)
    if phase == "prefill":
        seen = min(window or work.context, work.context)
        keys = seen * (seen + 1) / 2 + (work.context - seen) * seen
        return work.batch * (work.context * products + keys * a_key)
    return work.batch * (products + _keys(work, window) * a_key)


def _keys(work: Work, window: int | None) -> float:
    """Return the tokens that a step of decoding looks at, itself included, on average over the steps."""
    keys = [work.context + step + 1 for step in range(work.steps)]
    return statistics.fmean(keys if window is None else [min(count, window) for count in keys])


def pass_bytes(model: Any, phase: Phase, work: Work, shares: RoutedShares) -> float:
    """Count the bytes that one pass must read and write; see the top of this file.

    Args:
        model: The model.
        phase: Prefill, or a step of decoding.
        work: What runs.
        shares: Of the same run.
    """
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    opened = [architecture.open_experts(layer) for layer in architecture.moe_layers(model)]
    storages = [experts.storage for experts in opened]
    held_by_experts = [tensor_bytes(storage) for storage in storages]
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = float(tensor_bytes(model) - sum(held_by_experts))
    if embedding is not head:
        total += (shares.words - embedding.shape[0]) * shape.hidden_size * embedding.element_size()
    for storage, held, reached in zip(storages, held_by_experts, shares.reached, strict=True):
        if storage.num_slots:
            total += held * reached / storage.num_slots
    for experts, reached in zip(opened, shares.novices_reached, strict=True):
        if experts.novices is not None:
            total += (reached - float(_novice_numbers(experts).sum())) * experts.novices.element_size()
    number = head.element_size()
    tokens = work.batch * (work.context if phase == "prefill" else 1)
    total += tokens * shape.vocab_size * number
    if phase == "decode":
        a_token = 2 * shape.num_key_value_heads * shape.head_dim * number * len(architecture.decoder_layers(model))
        total += work.batch * _keys(work, getattr(model.config, "sliding_window", None)) * a_token
    return total


def floor_seconds(model: Any, phase: Phase, work: Work, shares: RoutedShares, ceilings: Ceilings) -> float:
    """Return the least time that one pass can take; see the top of this file.

    Args:
        model: The model.
        phase: Prefill, or a step of decoding.
        work: What runs.
        shares: Of the same run.
        ceilings: Of the machine.
    """
    return max(
        pass_flops(model, phase, work, shares) / ceilings.flops_per_second,
        pass_bytes(model, phase, work, shares) / ceilings.bytes_per_second,
    )
