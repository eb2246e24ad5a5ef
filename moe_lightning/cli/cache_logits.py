"""``moe-lightning cache-logits``: a teacher predicts once, so that recovery needs no second model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_lightning.checkpoints import from_pretrained
from moe_lightning.cli.commands import begun, check_vocabulary, device_named, dtype_named, inspected, run_command
from moe_lightning.cli.run_of_cache import steps_of_run, with_options_of_run
from moe_lightning.data import TextDataModule
from moe_lightning.recovery.logit_cache import CacheHeader, Storage
from moe_lightning.recovery.logit_cache_writer import MAX_SHARD_BYTES, LogitCacheWriter, check_cache_folder
from moe_lightning.recovery.teachers import ModelTeacher
from moe_lightning.statistics.fingerprint import fingerprint


def cache_logits(
    model: str,
    output: str,
    data: TextDataModule,
    steps: int | None = None,
    from_step: int = 0,
    accumulate_grad_batches: int = 1,
    devices: int = 1,
    top_k: int = 64,
    temperature: float = 1.0,
    storage: Storage = "float16",
    batch_size: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
    run: str | None = None,
) -> None:
    """Write a teacher's predictions of the training text to files: a stage of recovery takes them for its teacher.

    They are those of exactly the blocks that a run with the same data options (and seed) sees in the steps given, and
    are found by their tokens: order and batch size do not matter afterwards. A folder that holds some of them already,
    because the command was interrupted or for other steps, gets those that are missing. The simplest way to the blocks
    of a run is to name its config: --run CONFIG.

    Args:
        model: Hugging Face folder of the teacher, a Mixtral, compressed or not.
        output: Folder to write; it becomes the option teacher of a stage.
        data: The text that the run will train on, with its batch_size and seed. Its tokenizer is the model folder's
            unless one is given.
        steps: Optimizer steps of the run whose blocks are wanted; with run, all from from_step on when not given.
        from_step: The first of them.
        accumulate_grad_batches: The trainer's.
        devices: Processes of the run, over all machines.
        top_k: Likeliest words of each prediction that are kept; all others are one bucket.
        temperature: By which predictions are softened; the stage's temperature must be the same.
        storage: Type of the log-probabilities, float16 or float32.
        batch_size: Blocks that the teacher reads at a time; data.eval_batch_size when not given.
        max_shard_bytes: Largest size of a file, in bytes. What an interruption costs is at most one.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: Type of the teacher's weights; auto keeps the one they were saved in.
        overwrite: Delete a cache of something else that the folder holds.
        run: Config of the run, a file or the name of a packaged one, as fit takes it: its data options, its
            trainer.accumulate_grad_batches, devices and num_nodes (where they are numbers) and max_steps hold where
            nothing else is given here.

    Raises:
        ValueError: Something does not fit; found before the first prediction.
        FileNotFoundError: The model or the text is not there.
        FileExistsError: The output folder holds something that is no cache.
    """
    if steps is None and run is None:
        raise ValueError("--steps is missing: say how many optimizer steps of the run, or name its config by --run")
    if steps is None:
        assert run is not None
        steps = steps_of_run(run) - from_step
    for name, value, least in (
        ("steps", steps, 1),
        ("from_step", from_step, 0),
        ("accumulate_grad_batches", accumulate_grad_batches, 1),
        ("devices", devices, 1),
        ("batch_size", 1 if batch_size is None else batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}")
    where = device_named(device)
    shape, _ = inspected(model)
    check_vocabulary(data, shape, model)
    kind = dtype_named(dtype, model)
    header = CacheHeader(shape.vocab_size, data.block_size, top_k, temperature, storage)
    check_cache_folder(output, header, overwrite)
    numbers = _block_numbers(data, from_step, steps, accumulate_grad_batches, devices)
    print(f"model    {model} on {where}, {str(kind).removeprefix('torch.')}")
    print(f"data     {len(numbers):,} blocks of {data.block_size} tokens in steps {from_step} to {from_step + steps}")
    size = len(numbers) * header.bytes_per_block
    print(f"size     {size / 2**20:,.1f} MiB: {header.bytes_per_block:,} bytes a block, the {top_k} likeliest words")
    print(f"output   {output}", flush=True)
    with begun():
        teacher = from_pretrained(model, kind, where)
    header = CacheHeader(
        *(shape.vocab_size, data.block_size, top_k, temperature, storage),
        teacher={"folder": model, "fingerprint": fingerprint(teacher)},
        data=data.describe(),
    )
    check_cache_folder(output, header, overwrite)
    with begun():
        with LogitCacheWriter(output, header, max_shard_bytes, overwrite) as writer:
            _write(writer, ModelTeacher(teacher), data, numbers, batch_size or data.eval_batch_size, where)
        written = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
    if writer.header.coverage:
        print(f"kept     {writer.header.coverage}")
    print(f"wrote {output}: {len(writer):,} blocks, {written / 2**20:,.1f} MiB")


def _block_numbers(
    data: TextDataModule, from_step: int, steps: int, accumulate_grad_batches: int, devices: int
) -> list[int]:
    """Return the numbers of the blocks that a run sees in some steps, in their order, each once."""
    stream = data.train_dataloader()
    # All processes together take what one would with larger batches.
    stream = type(stream)(stream.blocks, data.batch_size * devices, seed=data.order_seed)
    indices = range(from_step * accumulate_grad_batches, (from_step + steps) * accumulate_grad_batches)
    return list(dict.fromkeys(int(number) for index in indices for number in stream.block_numbers(index)))


def _missing(writer: LogitCacheWriter, data: TextDataModule, numbers: list[int], size: int) -> Iterator[list[int]]:
    """Yield, a batch at a time, the numbers of the blocks that are not cached."""
    blocks, waiting = data.blocks("train"), list[int]()
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        there = writer.holds(blocks.batch(np.array(some))["input_ids"])
        waiting += [number for number, found in zip(some, there, strict=True) if not found]
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def _write(
    writer: LogitCacheWriter,
    teacher: ModelTeacher,
    data: TextDataModule,
    numbers: list[int],
    size: int,
    device: torch.device,
) -> None:
    blocks, found = data.blocks("train"), len(writer)
    batches = list(_missing(writer, data, numbers, size))
    total = sum(map(len, batches))
    if found:
        print(
            f"found    {len(numbers) - total:,} of these blocks in {writer.folder}: {total:,} are missing", flush=True
        )
    bar = tqdm(total=total, desc="predicting", unit="block", disable=None, leave=False)
    for count, batch in enumerate(batches):
        start = time.perf_counter()
        tensors = blocks.batch(np.array(batch))
        inputs: dict[str, Tensor] = {
            name: tensors[name].to(device) for name in ("input_ids", "attention_mask") if name in tensors
        }
        predictions = teacher.targets(inputs, writer.header.temperature, hidden=False).predictions
        assert isinstance(predictions, Tensor)
        writer.add(inputs["input_ids"], predictions)
        if count == 0:
            # What was added has come to the CPU: the device is done.
            seconds = (time.perf_counter() - start) / len(batch) * total
            bar.write(f"time     about {seconds:,.0f} s, by the first batch")
        bar.update(len(batch))
    bar.close()


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0, or 2 where the options do not fit.
    """
    try:
        arguments = with_options_of_run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"moe-lightning cache-logits: error: {error}", file=sys.stderr)
        return 2
    return run_command("cache-logits", cache_logits, arguments, flags=("--overwrite",))
