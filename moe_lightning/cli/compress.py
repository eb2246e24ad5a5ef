"""``moe-lightning compress``: a checkpoint is calibrated, compressed, tested before and after, and saved."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from moe_lightning.checkpoints import (
    Format,
    from_pretrained,
    may_be_uneven,
    save_pretrained,
    stored_bytes,
)
from moe_lightning.cli.commands import WorkFailed, begun, run_command
from moe_lightning.cli.prepared import Prepared, prepare
from moe_lightning.compression import CompressionResult, calibration_bytes, compress, made_bytes
from moe_lightning.compression.layerwise import need_batches
from moe_lightning.data import TextDataModule
from moe_lightning.evaluation import LikelihoodResult, evaluate, tokens_per_second
from moe_lightning.files import check_output_folder, written_folder
from moe_lightning.method import Method
from moe_lightning.plan import formats_of
from moe_lightning.reporting import matrix_summary, module_line
from moe_lightning.reporting.statistics_figures import FIGURE_NEEDS
from moe_lightning.sizes import ModelSize, measure
from moe_lightning.slimming.policy import SlimmingPolicy, Starved, TooFewTokens


def compress_checkpoint(
    model: str,
    data: TextDataModule,
    output: str | None = None,
    methods: Sequence[Method] = (),
    plan: str | None = None,
    calibration_batches: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    format: Format = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    min_tokens: int = SlimmingPolicy.min_tokens,
    starved: Starved = SlimmingPolicy.starved,
    max_fallback: float = SlimmingPolicy.max_fallback,
    max_moment_bytes: int = SlimmingPolicy.max_moment_bytes,
) -> dict[str, Any]:
    """Compress a checkpoint that exists already, without training.

    Calibrate, decide, apply, test before and after on the same held-out text, save, and load again to prove it.
    Everything that can be wrong is found before the calibration pass; the output folder appears when all is done.

    Args:
        model: Hugging Face folder of a Mixtral, per-expert or fused tensors, compressed before or not.
        data: Text for calibration and test. Its tokenizer is the model folder's unless one is given.
        output: Folder to write. Not needed with dry_run.
        methods: Methods in the order in which they are applied, e.g. [{class_path: Novices, init_args: {ratio: 0.25}}]
            or [{class_path: GPTQ, init_args: {bits: 4}}].
        plan: Plan file (plan.json) to replay; it takes the place of methods.
        calibration_batches: Batches of the calibration split; all of them when not given.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: Type of the weights; auto keeps the one they were saved in.
        format: auto (a plain Mixtral where whole experts were dropped uniformly), native, or transformers.
        overwrite: Replace an output folder that holds something.
        dry_run: Say what would be done, its sizes, memory and time, and do nothing. With a config.json alone in the
            folder of the model, for sizes of models that are not here, neither weights nor text are looked at.
        min_tokens: For methods that measure the inputs of experts' matrices: an expert that fewer calibration tokens
            reach is starved.
        starved: What becomes of it. warn: it is made from what there is. top_up: further batches of the calibration
            split, behind calibration_batches, are drawn that reach it. fallback: as if no token reached it (rounding to
            nearest, magnitudes). error: nothing is written.
        max_fallback: Largest share of a method's matrices that may be made without measurement, from 0 to 1.
        max_moment_bytes: Memory for the moments of inputs that are measured at a time, in bytes: with less, fewer
            experts are measured at a time.

    Returns:
        The numbers that are printed and written to compression.json.

    Raises:
        ValueError: Something does not fit; found before the calibration pass.
        FileNotFoundError: The model, the plan or the text is not there.
        FileExistsError: The output folder holds something.
    """
    if output is None and not dry_run:
        raise ValueError("--output is missing: name the folder to write, or pass --dry_run true")
    if output is not None:
        check_output_folder(output, overwrite, "--overwrite true")
    # Whether there are further batches is known when there are data.
    policy = SlimmingPolicy(min_tokens, starved, (), max_fallback, max_moment_bytes)
    prepared = prepare(model, data, output, methods, plan, calibration_batches, policy, device, dtype, format, dry_run)
    _print_plan(prepared)
    if dry_run:
        return _dry_run(prepared)
    assert prepared.output is not None
    with begun():
        return _run(prepared, overwrite)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _print_plan(prepared: Prepared) -> None:
    before, after = prepared.size_before, prepared.size_after
    share = after.parameters / before.parameters
    steps = (
        ["replay of a plan, in the place of methods"]
        if prepared.plan is not None
        else [str(method) for method in prepared.methods]
    )
    print(f"model    {prepared.folder} on {prepared.device}, {str(prepared.dtype).removeprefix('torch.')}")
    for step in steps:
        print(f"method   {step}")
    print(f"size     {before.parameters:,} -> {after.parameters:,} parameters ({share:.1%})")
    print(f"         {_mib(before.bytes)} -> {_mib(after.bytes)} of weights in memory")
    disk = prepared.disk_before, prepared.disk_after
    print(f"         {_mib(disk[0])} -> {_mib(disk[1])} of weights on disk ({disk[1] / disk[0]:.1%})")
    formats, likely, held = formats_of(prepared.shape_after), prepared.written, prepared.held_before
    for words in formats:
        print(f"weights  {words}")
    if formats and likely == "transformers":
        print("note     a plain Mixtral holds zeros like other weights: they make nothing smaller; --format auto would")
    note = "loads after 'import moe_lightning'" if likely == "native" else "a plain Mixtral"
    uneven = likely != "native" and any(map(may_be_uneven, prepared.methods))
    if uneven and prepared.format == "auto":
        note = "a plain Mixtral if all layers keep the same number of experts, otherwise native"
    print(f"format   {note}")
    print(f"output   {prepared.output or '-'}", flush=True)
    if disk[1] > held:
        kind = str(prepared.dtype).removeprefix("torch.")
        why = "; what is stored beside the weights takes more than they save" if formats else ""
        warnings.warn(
            f"the weights get larger on disk, from {held:,} to {disk[1]:,} bytes, as {after.parameters:,} parameters "
            f"in {kind}{why}",
            stacklevel=2,
        )


def _probe_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return this machine's rate for a matrix product, in FLOP/s, by doing one."""
    size = 4096 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product = left @ left
        product.sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _dry_run(prepared: Prepared) -> dict[str, Any]:
    data = prepared.data
    calibration, tested = prepared.calibration_blocks, prepared.test_blocks
    shape = prepared.shape_before
    # All or nothing: every layer is kept as it was until the last method is done.
    old_bytes = prepared.size_before.bytes
    new_bytes = made_bytes(shape, prepared.methods)
    measured_bytes = calibration_bytes(
        shape,
        prepared.methods,
        data.eval_batch_size * data.block_size,
        calibration * data.block_size,
        prepared.policy.max_moment_bytes,
    )
    logits_bytes = data.eval_batch_size * data.block_size * shape.vocab_size * 8
    memory = old_bytes + new_bytes + measured_bytes + logits_bytes
    # Calibration and the test before run the whole model, the test after runs what is left.
    flops = (calibration + tested) * prepared.size_before.flops + tested * prepared.size_after.flops
    rate = _probe_flops(prepared.device, prepared.dtype)
    # Small products, statistics and the rest: half of the rate of a large product is what a pass gets at best.
    seconds = 2 * flops / rate
    print(f"data     {calibration} calibration blocks, {tested} test blocks of {data.block_size} tokens")
    print(f"memory   about {memory / 2**20:,.0f} MiB, and the activations of a batch:")
    print(f"         {_mib(old_bytes)} of weights before, kept until all is done; {_mib(new_bytes)} that are made,")
    print(f"         {_mib(measured_bytes + logits_bytes)} to measure with")
    print(f"time     at least {seconds:,.0f} s (probe: {rate / 1e9:,.0f} GFLOP/s)")
    if prepared.only_sizes:
        print(f"note     {prepared.folder} holds no weights: only sizes were looked at, neither weights nor text")
    print("dry run: nothing was calibrated, nothing was written")
    return {
        "dry_run": True,
        "parameters_before": prepared.size_before.parameters,
        "parameters_after": prepared.size_after.parameters,
        "memory_bytes": memory,
        "seconds": seconds,
    }


def _test(model: PreTrainedModel, data: TextDataModule) -> tuple[LikelihoodResult, float]:
    likelihood = evaluate(model, data.test_dataloader())
    sample = next(iter(data.test_dataloader()))["input_ids"]
    return likelihood, tokens_per_second(model, sample)


def _run(prepared: Prepared, overwrite: bool) -> dict[str, Any]:
    data, output = prepared.data, prepared.output
    assert output is not None
    model = from_pretrained(prepared.folder, prepared.dtype, prepared.device)
    before, speed_before = _test(model, data)
    origin = {
        "data": data.describe(),
        "calibration_batches": prepared.calibration_batches,
        "base_model": str(prepared.folder),
    }
    start = time.perf_counter()
    arguments: dict[str, Any] = {"plan": prepared.plan} if prepared.plan is not None else {"methods": prepared.methods}
    policy = {item.name: getattr(prepared.policy, item.name) for item in dataclasses.fields(prepared.policy)}
    try:
        also = FIGURE_NEEDS if need_batches(prepared.methods) else ()
        result = compress(model, prepared.calibration, origin=origin, also=also, **arguments, **policy)
    except TooFewTokens as error:
        raise WorkFailed(f"{error}. Nothing was written") from None
    seconds = time.perf_counter() - start
    after, speed_after = _test(model, data)
    tokenizer = data.options.tokenizer
    source = tokenizer if tokenizer is not None and Path(tokenizer).is_dir() else data.tokenizer
    with written_folder(output, overwrite, "--overwrite true") as folder:
        save_pretrained(model, folder, source, prepared.format, overwrite=True)
        proof, size = _prove(model, folder, data, prepared)
        numbers: dict[str, Any] = {
            "model": str(prepared.folder),
            "sequence_length": data.block_size,
            "before": _row(before, prepared.size_before, prepared.disk_before, speed_before),
            "after": _row(after, size, stored_bytes(folder), speed_after),
            "shape_before": result.shape_before.to_dict(),
            "shape_after": result.shape_after.to_dict(),
            "compression": result.summary(),
            "compression_seconds": seconds,
            "loaded_again_max_logit_difference": proof,
        }
        (folder / "compression.json").write_text(json.dumps(numbers, indent=2) + "\n")
        (folder / "plan.json").write_text(result.plan.to_json())
        if result.statistics is not None:
            result.statistics.save(folder / "statistics.safetensors")
    _print_result(result, numbers, output)
    return numbers


def _prove(model: PreTrainedModel, folder: Path, data: TextDataModule, prepared: Prepared) -> tuple[float, ModelSize]:
    """Load what was written and compare logits; return the largest difference, and the size of what was loaded."""
    batch = next(iter(data.test_dataloader()))["input_ids"][:1].to(prepared.device)
    again = from_pretrained(folder, prepared.dtype, prepared.device)
    with torch.no_grad():
        expected, got = model(batch).logits.float(), again(batch).logits.float()
    difference = float((expected - got).abs().max())
    # The plain class adds up its experts in another order.
    tolerance = 1e-4 if prepared.dtype == torch.float32 else 5e-2
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise RuntimeError(
            f"the folder written does not give the model's logits (difference {difference}): nothing was kept"
        )
    return difference, measure(again, data.block_size)


def _row(likelihood: LikelihoodResult, size: ModelSize, disk: int, speed: float) -> dict[str, float]:
    return {
        "perplexity": likelihood.perplexity,
        "bits_per_byte": likelihood.bits_per_byte,
        "tokens": likelihood.num_tokens,
        **asdict(size),
        "bytes_on_disk": disk,
        "tokens_per_second": speed,
    }


def _print_result(result: CompressionResult, numbers: Mapping[str, Any], output: Path) -> None:
    for name, module in result.modules.items():
        print(f"  {name}: {module_line(module)}")
    print(str(result))
    if matrices := matrix_summary(result.modules):
        print(matrices)
    print(
        f"{'':8}{'perplexity':>12}{'bits/byte':>11}{'parameters':>16}{'in memory':>14}{'on disk':>14}{'tokens/s':>10}"
    )
    for name in ("before", "after"):
        row = numbers[name]
        print(
            f"{name:8}{row['perplexity']:12.3f}{row['bits_per_byte']:11.4f}{row['parameters']:16,}"
            f"{_mib(row['bytes']):>14}{_mib(row['bytes_on_disk']):>14}{row['tokens_per_second']:10,.0f}"
        )
    print(f"wrote {output}; loaded again, largest logit difference {numbers['loaded_again_max_logit_difference']:.1e}")


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0, or 2 where the options do not fit.
    """
    flags, lists = ("--overwrite", "--dry_run"), ("--methods",)
    return run_command("compress", compress_checkpoint, arguments, flags=flags, lists=lists)
