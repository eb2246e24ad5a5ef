"""The calibration pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lightning.architectures import Architecture, architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.plan import ModelShape
from moe_lightning.statistics.batches import Batches, checked_counts, inputs_and_mask, size_in_words
from moe_lightning.statistics.channels import ChannelStatistics, channel_weight_square
from moe_lightning.statistics.fingerprint import fingerprint
from moe_lightning.statistics.groups import (
    ENTRIES,
    MAY_BE_NAN,
    STREAMED_GROUPS,
    check_needs,
    mark_absent,
    sizes_of,
    statistics_bytes,
)
from moe_lightning.statistics.interventions import collect_interventions
from moe_lightning.statistics.low_rank import collect_low_rank_error
from moe_lightning.statistics.metrics import SumMetric
from moe_lightning.statistics.observer import ExpertObserver, RoutedOutputs
from moe_lightning.statistics.outputs import OutputStatistics, PairStatistics
from moe_lightning.statistics.routing import RoutingStatistics
from moe_lightning.statistics.second_moments import MAX_BYTES
from moe_lightning.statistics.similarity import BlockSimilarity, HiddenSimilarity, LayerSimilarity, StreamObserver
from moe_lightning.statistics.statistics import Statistics
from moe_lightning.statistics.subsets import check_subset_experts, collect_subsets


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"the model lies on {', '.join(sorted(map(str, devices)))}: statistics need all of it on one device, "
            "not offloaded: load it without device_map"
        )
    return devices.pop()


def _check_finite(values: dict[str, Tensor], shape: ModelShape) -> None:
    for letter, numbers, what in (("L", shape.moe_layers, "layers"), ("B", shape.blocks, "blocks")):
        bad = torch.zeros(len(numbers), dtype=torch.bool)
        for name, tensor in values.items():
            if ENTRIES[name].dims.startswith(letter):
                bad |= ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
        if bool(bad.any()):
            found = [numbers[row] for row in bad.nonzero().squeeze(-1).tolist()]
            raise ValueError(
                f"statistics are not finite in {what} {found}: the model's weights or activations overflow"
            )
    others = sorted(name for name, tensor in values.items() if not bool(torch.isfinite(tensor).all()))
    if others:
        raise ValueError(f"statistics {others} are not finite: the model's weights or activations overflow")


class _Pass:
    """The metrics of one streamed pass."""

    def __init__(self, shape: ModelShape, wanted: frozenset[str], device: torch.device) -> None:
        self.shape = shape
        rows, experts, hidden, blocks = sizes_of(shape, "LEHB")
        kinds: dict[str, SumMetric] = {
            "routing": RoutingStatistics(rows, experts),
            "layers": LayerSimilarity(rows),
            "blocks": BlockSimilarity(blocks),
            "similarity": HiddenSimilarity(blocks),
        }
        # The wide ones only where they are asked for.
        if "outputs" in wanted:
            kinds["outputs"] = OutputStatistics(rows, experts, hidden)
        if "pairs" in wanted:
            kinds["pairs"] = PairStatistics(rows, experts, hidden)
        if "channels" in wanted:
            kinds["channels"] = ChannelStatistics(rows, experts, *sizes_of(shape, "I"))
        self.metrics: dict[str, Any] = {name: kinds[name].to(device) for name in sorted(wanted)}
        self.columns = [torch.tensor(layout.router, device=device) for layout in shape.layouts]

    def sink(self, row: int, routed: RoutedOutputs) -> None:
        columns_R = self.columns[row]
        for group in ("outputs", "pairs"):
            if group in self.metrics:
                self.metrics[group].update(row, columns_R, routed)
        if "routing" in self.metrics:
            self.metrics["routing"].update(row, columns_R, routed.logits_NR, routed.weight_NK, routed.index_NK)
        if "channels" in self.metrics:
            self.metrics["channels"].update(row, self.shape.layouts[row].real, routed)

    def attached(self, model: nn.Module, architecture: Architecture, stack: ExitStack) -> tuple[Any, Any]:
        """Attach the observers that the metrics need."""
        experts = stream = None
        if self.metrics.keys() & {"routing", "outputs", "pairs", "channels"}:
            observer = ExpertObserver(model, architecture, self.sink, with_channels="channels" in self.metrics)
            experts = stack.enter_context(observer.attached())
        if self.metrics.keys() & {"layers", "blocks", "similarity"}:
            watched = (self.metrics.get(name) for name in ("layers", "blocks", "similarity"))
            stream = stack.enter_context(StreamObserver(model, architecture, *watched).attached())
        return experts, stream

    def sums(self, model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
        values = {name: tensor.cpu() for metric in self.metrics.values() for name, tensor in metric.sums().items()}
        if "channels" in self.metrics:
            squares = torch.zeros(sizes_of(self.shape, "LEI"), dtype=torch.float64, device="cpu")
            for row, layer in enumerate(architecture.moe_layers(model)):
                square_SI = channel_weight_square(architecture.open_experts(layer).down_proj).cpu()
                squares[row, list(self.shape.layouts[row].real), : square_SI.shape[1]] = square_SI
            values["channel_weight_square"] = squares
        return values


def _run(
    model: nn.Module,
    architecture: Architecture,
    shape: ModelShape,
    batches: Batches,
    wanted: frozenset[str],
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """Make one pass for all streamed groups; return the sums and the number of batches."""
    running = _Pass(shape, wanted, device)
    # The first batch tells how large the batches are, so that the memory is known before the pass begins.
    length = len(batches) if isinstance(batches, Sized) else None
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    tokens = max((batch["input_ids"].numel() for batch in first if "input_ids" in batch), default=0)
    memory = size_in_words(statistics_bytes(shape, wanted, tokens))
    bar = tqdm(
        chain(first, iterator),
        desc=f"calibration ({', '.join(sorted(wanted))}; {memory})",
        unit="batch",
        total=length,
        disable=None if progress else True,
        leave=False,
    )
    num_batches = num_tokens = 0
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        experts, stream = running.attached(model, architecture, stack)
        for batch in bar:
            inputs, mask = inputs_and_mask(batch, num_batches, device)
            if experts is not None:
                experts.keep_N = None if mask is None else mask.reshape(-1)
            if stream is not None:
                stream.start_batch(mask)
            # The decoder without its head: nothing here reads the logits.
            model.model(  # type: ignore[operator]
                input_ids=inputs, attention_mask=None if mask is None else mask.long(), use_cache=False
            )
            if stream is not None:
                stream.end_batch()
            num_batches += 1
            num_tokens += inputs.numel() if mask is None else int(mask.sum())
    num_batches = checked_counts(num_batches, num_tokens, device)
    return running.sums(model, architecture), num_batches


def _counted(batches: Batches, device: torch.device) -> int:
    """Count and check batches that no streamed pass goes over."""
    num_batches = num_tokens = 0
    for batch in batches:
        inputs, mask = inputs_and_mask(batch, num_batches, device)
        num_batches += 1
        num_tokens += inputs.numel() if mask is None else int(mask.sum())
    return checked_counts(num_batches, num_tokens, device)


def collect(
    model: nn.Module,
    batches: Batches,
    needs: Iterable[str] | None = None,
    *,
    progress: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Statistics:
    """Run calibration batches through a model and sum up what its experts and layers do.

    One pass measures all groups but three: ``low_rank``, ``interventions`` and ``subsets`` make passes of their own.
    The model is in eval mode and without gradients; afterwards it is as before. Padding (zeros of ``attention_mask``)
    is left out. The sums do not depend on how the tokens were split into batches. In a distributed run every rank gets
    the sums over all ranks. The progress bar says what is measured and how much memory that takes
    (:func:`statistics_bytes`).

    Args:
        model: A Mixtral with its language head, compressed or not.
        batches: Dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask`` (0 = padding). An
            iterator is read into a list where several passes are made.
        needs: Groups of statistics (keys of ``GROUPS``); None takes ``routing``, ``outputs``, ``layers`` and
            ``blocks``.
        progress: Show a progress bar.
        max_bytes: Memory that ``low_rank`` may take at a time for its second moments; less memory, more passes.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: No batches, no tokens, a batch without ``input_ids``, unknown groups, or sums that are not finite.

    Source: 2406.02500 and 2507.00390 (what is measured); the sums are in float64.

    Cost: one forward pass plus about ``10 * tokens * k * hidden`` float64 operations a layer; ``low_rank`` one pass for
    as many experts as ``max_bytes`` holds; ``interventions`` one for each layer and expert; ``subsets`` one with all
    experts at work.
    """
    wanted = check_needs(needs)
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a list or another iterable of batches, not one batch: pass [batch]")
    if "subsets" in wanted:
        check_subset_experts(architecture_of(model).shape(model).num_experts)
    if "sensitivity" in wanted:
        raise ValueError("'sensitivity' needs a method to try out: give scope='sensitivity' to a method of compress")
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    device = _device_of(model)
    if wanted - STREAMED_GROUPS:
        batches = list(batches)
    streamed = wanted & STREAMED_GROUPS
    if streamed:
        values, num_batches = _run(model, architecture, shape, batches, streamed, device, progress)
    else:
        values, num_batches = {}, _counted(batches, device)
    if "low_rank" in wanted:
        values |= collect_low_rank_error(model, batches, shape, progress=progress, max_bytes=max_bytes)
    if "subsets" in wanted:
        values |= collect_subsets(model, batches, shape, progress=progress)
    if "interventions" in wanted:
        values |= collect_interventions(model, batches, shape, progress=progress)
    _check_finite({name: tensor for name, tensor in values.items() if name not in MAY_BE_NAN}, shape)
    mark_absent(shape, values)
    return Statistics(shape, values, {"batches": num_batches, "weights": fingerprint(model)})
