"""The calibration pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from moe_lightning.architectures import architecture_of
from moe_lightning.architectures.modes import evaluation_mode
from moe_lightning.plan import ModelShape
from moe_lightning.statistics.metrics import OutputStatistics, RoutingStatistics
from moe_lightning.statistics.observer import ExpertObserver, RoutedOutputs
from moe_lightning.statistics.statistics import GROUPS, Statistics


def check_needs(needs: Iterable[str] | None) -> frozenset[str]:
    """Return the groups asked for, all of them for None.

    Raises:
        ValueError: An unknown group.
    """
    wanted = frozenset(GROUPS) if needs is None else frozenset(needs)
    unknown = wanted - frozenset(GROUPS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}: choose from {sorted(GROUPS)}")
    return wanted


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"the model lies on {', '.join(sorted(map(str, devices)))}: statistics need all of it on one device, "
            "not offloaded: load it without device_map"
        )
    return devices.pop()


def _padding(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.bool().all()):
        return None
    return mask.bool()


def _check_finite(values: dict[str, Tensor], shape: ModelShape) -> None:
    bad = torch.zeros(len(shape.layouts), dtype=torch.bool)
    for tensor in values.values():
        bad |= ~torch.isfinite(tensor).reshape(tensor.shape[0], -1).all(1)
    if bool(bad.any()):
        layers = [shape.moe_layers[row] for row in bad.nonzero().squeeze(-1).tolist()]
        raise ValueError(f"statistics are not finite in layers {layers}: the model's weights or activations overflow")


def _over_all_ranks(number: int, device: torch.device) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    total = torch.tensor(number, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    needs: Iterable[str] | None = None,
    *,
    progress: bool = True,
) -> Statistics:
    """Run calibration batches through a model and sum up what its experts do, in one pass.

    The model is in eval mode for the pass and without gradients; afterwards it is as before. Padding (zeros of
    ``attention_mask``) is left out. The sums do not depend on how the tokens were split into batches. In a distributed
    run every rank gets the sums over all ranks.

    Args:
        model: A Mixtral with its language head, compressed or not.
        batches: Dicts with ``input_ids`` ``[batch, sequence]`` and optional ``attention_mask`` (0 = padding).
        needs: Groups of statistics, of ``routing`` and ``outputs``; None takes both.
        progress: Show a progress bar.

    Returns:
        The statistics, on the CPU.

    Raises:
        ValueError: No batches, no tokens, a batch without ``input_ids``, unknown groups, or sums that are not finite.

    Source: 2406.02500 and 2507.00390 (what is measured); the sums are in float64.

    Cost: one forward pass plus about ``10 * tokens * k * hidden`` float64 operations a layer.
    """
    wanted = check_needs(needs)
    if isinstance(batches, Mapping):
        raise ValueError("batches must be a list or another iterable of batches, not one batch: pass [batch]")
    architecture = architecture_of(model)
    shape = architecture.shape(model)
    device = _device_of(model)
    columns = [torch.tensor(layout.router, device=device) for layout in shape.layouts]
    routing = RoutingStatistics(len(columns), shape.num_experts).to(device)
    outputs = OutputStatistics(len(columns), shape.num_experts, shape.hidden_size).to(device)

    def sink(row: int, routed: RoutedOutputs) -> None:
        if "routing" in wanted:
            routing.update(row, columns[row], routed.logits_NR, routed.weight_NK, routed.index_NK)
        if "outputs" in wanted:
            outputs.update(row, columns[row], routed)

    num_batches = 0
    bar = tqdm(batches, desc="calibration", unit="batch", disable=None if progress else True, leave=False)
    with evaluation_mode(model), ExpertObserver(model, architecture, sink).attached() as observer:
        for batch in bar:
            if "input_ids" not in batch:
                raise ValueError(f"calibration batch {num_batches} has no 'input_ids', only {sorted(batch)}")
            mask = _padding(batch)
            observer.keep_N = None if mask is None else mask.reshape(-1).to(device)
            inputs = batch["input_ids"].to(device)
            # The decoder without its head: nothing here reads the logits.
            model.model(  # type: ignore[operator]
                input_ids=inputs, attention_mask=None if mask is None else mask.long().to(device), use_cache=False
            )
            num_batches += 1
    # Every rank learns the same number before one of them may stop: a rank without batches waits for the others' sums.
    num_batches = _over_all_ranks(num_batches, device)
    if not num_batches:
        raise ValueError("there are no calibration batches: give at least one (calibration_batches >= 1)")
    values: dict[str, Tensor] = {}
    if "routing" in wanted:
        values |= routing.sums()
    if "outputs" in wanted:
        values |= outputs.sums()
    values = {name: tensor.cpu() for name, tensor in values.items()}
    _check_finite(values, shape)
    count = values["count" if "routing" in wanted else "output_count"]
    if float(count.sum()) == 0:
        raise ValueError("the calibration batches hold no token outside the padding")
    statistics = Statistics(shape, values, {"batches": num_batches})
    absent = ~statistics.known
    for name, tensor in values.items():
        if tensor.ndim >= 2:
            tensor[absent] = torch.nan
        if name in ("coactivation", "output_gram"):
            tensor.transpose(1, 2)[absent] = torch.nan
    return statistics
