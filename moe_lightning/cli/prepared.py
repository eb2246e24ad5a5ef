"""What ``moe-lightning compress`` finds out before the work begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from moe_lightning.architectures import architecture_of
from moe_lightning.checkpoints import (
    Format,
    check_format,
    has_weights,
    may_be_uneven,
    plain_structure,
    stored_bytes,
    weights_bytes,
    written_shape,
)
from moe_lightning.cli.commands import check_block_size, check_vocabulary, device_named, dtype_named, inspected
from moe_lightning.compression import trial_edits
from moe_lightning.compression.layerwise import measures, need_batches
from moe_lightning.compression.replay import replays
from moe_lightning.data import TextDataModule
from moe_lightning.method import Method
from moe_lightning.plan import CompressionPlan, ModelShape, Sparsify, WeightFormat
from moe_lightning.recovery import LoRA, MergeLoRA
from moe_lightning.sizes import ModelSize, measure
from moe_lightning.slimming.policy import SlimmingPolicy
from moe_lightning.surgery import apply_plan, build, open_stacks, plan_of


@dataclass
class Prepared:
    """Everything that was checked before the work begins."""

    folder: Path
    output: Path | None
    shape_before: ModelShape
    shape_after: ModelShape
    size_before: ModelSize
    size_after: ModelSize
    disk_before: int
    """Bytes of the weight files of the folder, whatever type they are loaded in."""
    held_before: int
    """The same without their tables of contents."""
    disk_after: int
    """Bytes of the weights that are written, in the format and the type in which they are."""
    written: Literal["native", "transformers"]
    """What is written unless layers come out with different numbers of experts."""
    format: Format
    plan: CompressionPlan | None
    methods: list[Method]
    data: TextDataModule
    calibration_batches: int | None
    policy: SlimmingPolicy
    device: torch.device
    dtype: torch.dtype
    only_sizes: bool
    """Whether there are neither weights nor text, but only the sizes of both."""

    @property
    def calibration_blocks(self) -> int:
        """Blocks of text that are measured on."""
        if not self.only_sizes:
            return len(self.calibration) * self.data.eval_batch_size
        if not need_batches(self.methods):
            return 0
        return blocks_by_options(self.data, "calibration", self.calibration_batches)

    @property
    def test_blocks(self) -> int:
        """Blocks of text that are tested on."""
        if not self.only_sizes:
            return len(self.data.test_dataloader()) * self.data.eval_batch_size
        return blocks_by_options(self.data, "test")

    @property
    def calibration(self) -> Any:
        """Calibration batches; none where nothing is measured."""
        if not need_batches(self.methods):
            return []
        return self.data.calibration_batches(self.calibration_batches)


def blocks_by_options(data: TextDataModule, split: str, batches: int | None = None) -> int:
    """Return how many blocks a split will have, without its text.

    Args:
        data: The data, which need not be there.
        split: Name of the split.
        batches: Batches that are taken of it; all when None.

    Raises:
        ValueError: That depends on the text, or fewer are asked for than there will be.
    """
    blocks, share = data.options.num_blocks(split), data.options.sizes[split]
    if not blocks:
        raise ValueError(
            f"--data.{split} {share:g}: how many blocks of text that is depends on a text, which a dry run on a "
            "config.json alone does not look at: give it as a number of blocks, e.g. 128"
        )
    wanted = blocks if batches is None else batches * data.eval_batch_size
    if wanted > blocks:
        raise ValueError(
            f"{batches} {split} batches of {data.eval_batch_size} blocks were asked for, but --data.{split} is "
            f"{blocks} blocks: raise it, or ask for at most {blocks // data.eval_batch_size}"
        )
    return wanted


def check_zeros(shape: ModelShape, methods: Sequence[Method]) -> None:
    """Make sure that every method that prunes sets a weight to zero at all.

    Args:
        shape: Shape of the model as it is.
        methods: Methods in the order in which they are applied.

    Raises:
        ValueError: The share of zeros that one of them asks for rounds to none.
    """
    for method in methods:
        edits, after = trial_edits(shape, [method])
        pruning = [edit for edit in edits if isinstance(edit, Sparsify)]
        sizes: set[tuple[int, int]] = set()
        if pruning and not any(_sets_zeros(edit, shape, sizes) for edit in pruning):
            matrices = " and ".join(f"[{outputs}, {inputs}]" for outputs, inputs in sorted(sizes))
            raise ValueError(
                f"{method} would set no weight to zero: its share rounds to none in matrices of {matrices}: ask for "
                "more zeros"
            )
        shape = after


def _sets_zeros(edit: Sparsify, shape: ModelShape, seen: set[tuple[int, int]]) -> bool:
    format = WeightFormat(sparsity=edit.sparsity, pattern=edit.pattern, scope=edit.scope)
    sizes = shape.attention_sizes if edit.target == "attention" else shape.expert_sizes(shape.layout(edit.layer))
    seen.update(sizes.values())
    return any(format.kept(outputs, inputs) < outputs * inputs for outputs, inputs in sizes.values())


def _read_plan(plan: str, model: str, carried: CompressionPlan) -> CompressionPlan:
    """Read a plan that is to be replayed on a model that carries another one, or none."""
    if carried:
        raise ValueError(
            f"--plan {plan}: the model in {model} is compressed already: replay a plan on the uncompressed model "
            "that it was made for"
        )
    path = Path(plan)
    if not path.is_file():
        raise FileNotFoundError(f"--plan {plan}: there is no such file")
    try:
        return CompressionPlan.from_json(path.read_text())
    except ValueError as error:  # not text, not JSON, or no plan
        raise ValueError(f"--plan {plan} is no plan that compress, fit or plan wrote: {error}") from None


def _first_entry(shape: ModelShape, methods: Sequence[Method]) -> str:
    """Return what to write first into the list of methods where a model has low-rank terms that nobody merges."""
    unmerged = any(shape.lora(block, "attention") for block in shape.blocks) or any(
        layout.lora for layout in shape.layouts
    )
    if not unmerged or any(isinstance(method, LoRA | MergeLoRA) for method in methods):
        return ""
    return ". This model has such terms: let the list begin with 'methods: [{class_path: MergeLoRA}, ...]'"


def prepare(
    model: str,
    data: TextDataModule,
    output: str | None,
    methods: Sequence[Method],
    plan: str | None,
    calibration_batches: int | None,
    policy: SlimmingPolicy,
    device: str,
    dtype: str,
    format: Format,
    dry_run: bool = False,
) -> Prepared:
    """Find everything that can be wrong, before any work.

    A dry run on a folder that holds a ``config.json`` and no weights reads neither weights nor text.

    Args:
        model: Folder of the model.
        data: Text for calibration and test.
        output: Folder to write, or None.
        methods: Methods in order.
        plan: Plan file to replay in their place, or None.
        calibration_batches: Batches of the calibration split; all of them when None.
        policy: What holds for measurements; further batches are added where it asks for them.
        device: Name of the device.
        dtype: Name of the type of the weights.
        format: What is written.
        dry_run: Nothing but the sizes is wanted.

    Raises:
        ValueError: Something does not fit.
        FileNotFoundError: The model, the plan or the text is not there.
    """
    if not methods and plan is None:
        raise ValueError("there is nothing to do: give --methods (see configs/compress.yaml) or --plan plan.json")
    where = device_named(device)
    only_sizes = dry_run and Path(model).is_dir() and not has_weights(model)
    shape, carried = inspected(model, weights=not only_sizes)
    replayed = None if plan is None else _read_plan(plan, model, carried)
    chosen = list(methods) if replayed is None else replays(replayed)
    try:
        edits, after = trial_edits(shape, chosen)
    except ValueError as error:
        raise ValueError(f"{error}{_first_entry(shape, chosen)}") from None
    written = check_format(after, format)
    check_zeros(shape, chosen)
    if not edits:
        raise ValueError(
            f"nothing would go: {', '.join(map(str, chosen))} rounds to no change on this model: ask for more"
        )
    uneven = [type(method).__name__ for method in chosen if may_be_uneven(method)]
    if format == "transformers" and uneven:
        raise ValueError(
            f"--format transformers needs the same number of experts in every layer, which {', '.join(uneven)} with "
            "scope=global does not promise: use scope=layer or --format auto"
        )
    if only_sizes:
        check_block_size(data, model)
    else:
        check_vocabulary(data, shape, model)
    if not only_sizes and policy.starved == "top_up" and any(measures(method) for method in chosen):
        try:
            policy = dataclasses.replace(policy, top_up=data.further_batches(calibration_batches))
        except ValueError as error:
            raise ValueError(f"--starved top_up: {error}") from None
    kind = dtype_named(dtype, model)
    default = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device("meta"):
            empty = build(AutoConfig.from_pretrained(model))
            open_stacks(empty)  # as a folder is loaded
            size_before = measure(empty, data.block_size)
            apply_plan(empty, architecture_of(empty).plan_of_config(empty.config).extended(edits))
            open_stacks(empty)
            plain = format == "transformers" and bool(plan_of(empty))
            size_after = measure(plain_structure(empty) if plain else empty, data.block_size)
    finally:
        torch.set_default_dtype(default)
    shape_before, shape_after = (dataclasses.replace(item, weight_bytes=kind.itemsize) for item in (shape, after))
    prepared = Prepared(
        folder=Path(model),
        output=None if output is None else Path(output),
        shape_before=shape_before,
        shape_after=shape_after,
        size_before=size_before,
        size_after=size_after,
        disk_before=shape_before.bytes if only_sizes else stored_bytes(model),
        held_before=shape_before.bytes if only_sizes else weights_bytes(model),
        disk_after=written_shape(shape_after, written).bytes,
        written=written,
        format=format,
        plan=replayed,
        methods=chosen,
        data=data,
        calibration_batches=calibration_batches,
        policy=policy,
        device=where,
        dtype=kind,
        only_sizes=only_sizes,
    )
    # There are as many batches as are asked for.
    _ = prepared.calibration_blocks, prepared.test_blocks
    return prepared
