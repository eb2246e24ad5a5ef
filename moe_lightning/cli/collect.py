"""``moe-lightning collect``: calibrate once, decide later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moe_lightning import __version__
from moe_lightning.checkpoints import from_pretrained
from moe_lightning.cli.commands import begun, check_vocabulary, device_named, dtype_named, inspected, run_command
from moe_lightning.criteria import collect
from moe_lightning.data import TextDataModule
from moe_lightning.files import check_writable
from moe_lightning.method import Method
from moe_lightning.statistics.groups import GROUPS, check_needs, statistics_bytes


def words(value: str | list[str] | None) -> list[str] | None:
    """Return a list that may stand on the command line with commas.

    Args:
        value: ``routing,outputs`` or a list; None stays None.
    """
    if value is None or isinstance(value, list):
        return value
    return [word.strip() for word in value.strip("[] ").split(",") if word.strip()]


def collect_statistics(
    model: str,
    output: str,
    data: TextDataModule,
    needs: str | list[str] | None = None,
    methods: Sequence[Method] = (),
    calibration_batches: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
) -> None:
    """Measure on calibration text what compression decides by, and save it: plan and sweep read it.

    Args:
        model: Hugging Face folder of a Mixtral, compressed before or not.
        output: File to write, e.g. statistics.safetensors.
        data: Text for calibration. Its tokenizer is the model folder's unless one is given.
        needs: Groups of statistics with commas between them, of routing, outputs, pairs, channels, layers, blocks,
            similarity, low_rank, interventions, subsets; routing, outputs, layers and blocks when not given.
        methods: Methods whose needs are measured as well, so that the configuration of compress can be given as it is.
        calibration_batches: Batches of the calibration split; all of them when not given.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: Type of the weights; auto keeps the one they were saved in.
        overwrite: Replace a file that is there.

    Raises:
        ValueError: Something does not fit; found before the pass.
        FileNotFoundError: The model or the text is not there.
        FileExistsError: The output is there.
    """
    target = Path(output)
    if target.is_dir():
        raise FileExistsError(f"--output {output} is a folder: name a file, e.g. {target / 'statistics.safetensors'}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"--output {output} is there already: choose another file or pass --overwrite true")
    check_writable(target)
    listed = words(needs)
    if listed is not None and not listed:
        raise ValueError("--needs is empty: leave it out for the usual groups")
    if "sensitivity" in (listed or ()):
        possible = sorted(set(GROUPS) - {"sensitivity"})
        raise ValueError(
            f"--needs sensitivity: it is measured by compress itself, for a method; choose from {possible}"
        )
    sensitive = [type(method).__name__ for method in methods if method.measures_sensitivity]
    if sensitive:
        print(
            f"note     scope=sensitivity of {', '.join(sensitive)} is measured by moe-lightning compress and sweep, "
            "which try the method out on every layer; this file will not hold it"
        )
    wanted = check_needs(listed).union(*(method.needs for method in methods))
    where = device_named(device)
    shape, plan = inspected(model)
    check_vocabulary(data, shape, model)
    batches = list(data.calibration_batches(calibration_batches))
    kind = dtype_named(dtype, model)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    largest = max(batch["input_ids"].numel() for batch in batches)
    statistics_memory, weights = statistics_bytes(shape, wanted, largest), shape.parameters * kind.itemsize
    print(f"model    {model} on {where}, {str(kind).removeprefix('torch.')}")
    print(f"data     {tokens:,} tokens in {len(batches)} batches")
    print(f"measured {', '.join(sorted(wanted))}")
    print(
        f"memory   about {statistics_memory / 2**20:,.1f} MiB beside the model ({weights / 2**20:,.1f} MiB) and the "
        "activations of a batch",
        flush=True,
    )
    with begun():
        statistics = collect(from_pretrained(model, kind, where), batches, wanted)
        statistics.info |= {
            "base_model": model,
            "data": data.describe(),
            "calibration_batches": calibration_batches,
            "version": __version__,
            "plan": plan.to_dict(),
        }
        statistics.save(target)
    print(f"wrote {target} ({target.stat().st_size / 2**20:,.1f} MiB)")


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0, or 2 where the options do not fit.
    """
    return run_command("collect", collect_statistics, arguments, flags=("--overwrite",), lists=("--methods",))
