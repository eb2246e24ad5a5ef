"""``moe-lightning benchmark``: how fast models are against each other, and how far from what the machine allows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig

from moe_lightning.checkpoints import from_pretrained, stored_bytes
from moe_lightning.cli.collect import words
from moe_lightning.cli.commands import WorkFailed, begun, device_named, dtype_named, inspected, run_command
from moe_lightning.data import holds_tokenizer
from moe_lightning.data.sources import open_sources
from moe_lightning.data.tokenizers import TextEncoder, load_tokenizer
from moe_lightning.evaluation.benchmark import (
    IMPLEMENTATIONS,
    Entrant,
    ceilings_of,
    described_model,
    described_run,
    entrants_of,
    num_steps,
    run_benchmark,
)
from moe_lightning.evaluation.benchmark_rows import BenchmarkRecord, Settings, TimedRow, told_context
from moe_lightning.files import check_writable, distinct_names
from moe_lightning.sizes import data_size

USUAL_CONTEXTS = (128, 512)
TEXT = "python-stdlib"


def benchmark_models(
    model: str,
    against: str | list[str] | None = None,
    batch_sizes: str | int | list[int] = "1,4",
    contexts: str | int | list[int] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    warmup: int = 2,
    implementations: str | list[str] | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    threads: int | None = None,
    output: str | None = None,
    markdown: bool = False,
    overwrite: bool = False,
) -> None:
    """Time models against each other: prefill and decode, memory, and the least that the machine allows.

    Every model is compared with a slow computation of what its weights say before it is timed, on the same tokens; one
    that computes something else is not timed, and the command ends with status 1. Models take turns in every repeat.
    The text is Python's standard library in the model's own tokens, or random tokens where no folder has a tokenizer.

    Args:
        model: Hugging Face folder of a Mixtral, compressed or not.
        against: Folders of models with the same vocabulary to compare with, one or more: usually the uncompressed one.
        batch_sizes: Sequences at a time, with commas between them.
        contexts: Tokens of each sequence, with commas between them: that go in (prefill), or that are there before
            (decode). 128,512 when not given, as far as the models' longest sequence allows.
        new_tokens: Tokens of each sequence that a repeat decodes.
        repeats: Runs that are timed; the median counts, the slowest and the fastest are told.
        warmup: Runs before that.
        implementations: How uncompressed models compute their experts, with commas between them: moe_lightning, and
            eager, grouped_mm and batched_mm of transformers; all of them when not given. Compressed models have ours.
        tolerance: Largest relative error of a token in the comparison; by the type of the weights when not given.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: Type of the weights; auto keeps the ones they were saved in.
        threads: CPU threads; torch's number when not given.
        output: JSON file to write; the table goes beside it as Markdown.
        markdown: Print the table in Markdown.
        overwrite: Replace files that are there.

    Ctrl-C ends it with status 130; the phases of a batch size and context that were done are printed and written, with
    ``"interrupted": true`` in the context.

    Raises:
        ValueError: Something does not fit; found before a model is loaded.
        FileNotFoundError: A model is not there.
        FileExistsError: The output is there.
        WorkFailed: A model was not timed.
        KeyboardInterrupt: Ctrl-C; the message says what was kept.
    """
    target = _checked_output(output, overwrite)
    folders = _labels([model, *(words(against) or [])])
    wanted = words(implementations) or list(IMPLEMENTATIONS)
    unknown = [name for name in wanted if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"--implementations {unknown[0]}: choose from {', '.join(IMPLEMENTATIONS)}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: it must be at least 1")
    where = device_named(device)
    shapes = {label: inspected(folder) for label, folder in folders.items()}
    vocabulary = {label: shape.vocab_size for label, (shape, _) in shapes.items()}
    if len(set(vocabulary.values())) > 1:
        told = ", ".join(f"{folders[label]} has {size}" for label, size in vocabulary.items())
        raise ValueError(f"--against: the models have different vocabularies ({told}): name models of one family")
    settings = _settings(folders, batch_sizes, contexts, new_tokens, repeats, warmup, tolerance)
    kinds = {label: dtype_named(dtype, folder) for label, folder in folders.items()}
    ids, source = token_ids(
        list(folders.values()), max(settings.batch_sizes), settings.length, min(vocabulary.values())
    )
    for label, folder in folders.items():
        shape, plan = shapes[label]
        kind = str(kinds[label]).removeprefix("torch.")
        what = "compressed" if plan else "uncompressed"
        # Codes, scales and bits of packed weights take as much in every type.
        size = replace(shape, weight_bytes=kinds[label].itemsize).bytes
        print(f"model    {label}: {folder}, {what}, {kind}, {data_size(size)}")
    print(f"text     {source}", flush=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with begun():
            record = _measured(folders, kinds, wanted, where, ids, source, settings)
            if target is not None and record.rows:
                record.save(target)
    finally:
        torch.set_num_threads(before)
    if record.rows:
        print(record.markdown() if markdown else f"{told_context(record.context)}\n\n{record.text()}")
        if target is not None:
            print(f"wrote {target} and {target.with_suffix('.md').name}", flush=True)
    if record.interrupted:
        raise KeyboardInterrupt(_told_interrupt(record, target))
    if record.failures:
        first = record.failures[0]
        raise WorkFailed(
            f"{len(record.failures)} of {len(record.rows)} measurements were refused; the first is {first.name}: "
            f"{first.refused}"
        )


def _told_interrupt(record: BenchmarkRecord, target: Path | None) -> str:
    done, wanted = len(record.rows), record.context["measurements"]
    if not done:
        return "interrupted before the first measurement was done: there is nothing to write"
    kept = f"in {target}, marked as interrupted" if target else "printed above, and nowhere else: --output writes them"
    return f"interrupted after {done} of {wanted} measurements, which are {kept}; the one that ran is lost"


def _checked_output(output: str | None, overwrite: bool) -> Path | None:
    if output is None:
        return None
    target = Path(output)
    if target.suffix != ".json":
        raise ValueError(f"--output {output}: name a .json file; the table goes beside it as .md")
    for path in (target, target.with_suffix(".md")):
        if path.is_dir():
            raise FileExistsError(f"--output {output}: {path} is a folder: choose another file")
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"--output {output}: {path} is there already: choose another file or pass --overwrite"
            )
    check_writable(target)
    return target


def _labels(folders: Sequence[str]) -> dict[str, str]:
    """Return short names for folders: their last part, or as many of the last parts as make a difference."""
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} is named twice: --model and --against name each model once")
    return dict(zip(distinct_names(folders), folders, strict=True))


def _numbers(option: str, value: str | int | list[int]) -> tuple[int, ...]:
    try:
        given = [value] if isinstance(value, int) else [int(word) for word in words(value) or []]  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(f"--{option} {value}: give whole numbers with commas between them, e.g. 1,4") from None
    if not given or min(given) < 1:
        raise ValueError(f"--{option} {value}: give numbers from 1 on")
    return tuple(dict.fromkeys(given))


def _settings(
    folders: dict[str, str],
    batch_sizes: str | int | list[int],
    contexts: str | int | list[int] | None,
    new_tokens: int,
    repeats: int,
    warmup: int,
    tolerance: float | None,
) -> Settings:
    for name, value, least in (("new_tokens", new_tokens, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"--{name} {value}: it must be at least {least}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"--tolerance {tolerance}: it is a relative error, between 0 and 1")
    longest, folder = min((_longest(folder), folder) for folder in folders.values())
    if new_tokens >= longest:
        raise ValueError(f"--new_tokens {new_tokens}: the longest sequence of {folder} has {longest}: lower it")
    if contexts is None:
        fitting = tuple(context for context in USUAL_CONTEXTS if context + new_tokens <= longest)
        chosen = fitting or (int(longest) - new_tokens,)
    else:
        chosen = _numbers("contexts", contexts)
    if max(chosen) + new_tokens > longest:
        raise ValueError(
            f"--contexts {max(chosen)} and --new_tokens {new_tokens} are more than the longest sequence of {folder}, "
            f"{longest}: set --contexts to at most {int(longest) - new_tokens}"
        )
    return Settings(_numbers("batch_sizes", batch_sizes), chosen, new_tokens, repeats, warmup, tolerance)


def _longest(folder: str) -> float:
    longest = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    return float("inf") if longest is None else longest


def token_ids(folders: Sequence[str], batch: int, length: int, vocab_size: int) -> tuple[Tensor, str]:
    """Return text in the tokens of the models: speed depends on it by the experts that tokens are routed to.

    Args:
        folders: Of the models; the first one with a tokenizer gives it.
        batch: Sequences.
        length: Tokens of each.
        vocab_size: Tokens that all models know.

    Returns:
        Token ids [batch, length], and where they are from.

    Raises:
        ValueError: The tokenizer has more tokens than the models know.
    """
    folder = next((folder for folder in folders if holds_tokenizer(folder)), None)
    if folder is None:
        ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        return ids, "random tokens, seed 0, which are routed unlike text: no folder holds a tokenizer"
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, the models know {vocab_size}")
    encoder, corpus = TextEncoder(tokenizer), open_sources([TEXT])
    found: list[np.ndarray] = []
    tokens = 0
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()
    for number in order:
        ((document, _),) = encoder.encode([corpus[number].text])
        found.append(document.astype(np.int64))
        tokens += len(document)
        if tokens >= batch * length:
            break
    else:
        # A very large batch: the library once more.
        found *= -(-batch * length // tokens)
    joined = torch.from_numpy(np.concatenate(found)[: batch * length].copy())
    return joined.view(batch, length), f"{TEXT} in the tokens of {folder}"


def _measured(
    folders: dict[str, str],
    kinds: dict[str, torch.dtype],
    implementations: Sequence[str],
    device: torch.device,
    ids: Tensor,
    source: str,
    settings: Settings,
) -> BenchmarkRecord:
    try:
        models = {label: from_pretrained(folder, kinds[label], device) for label, folder in folders.items()}
    except torch.OutOfMemoryError:
        raise WorkFailed("the models do not fit into memory together: name fewer by --against") from None
    entrants: list[Entrant] = [
        entrant for label, model in models.items() for entrant in entrants_of(label, model, implementations)
    ]
    context = described_run(device, [str(kind).removeprefix("torch.") for kind in kinds.values()], source, settings)
    ceilings = ceilings_of(entrants)
    described: dict[str, dict[str, Any]] = {
        label: described_model(model, folders[label], settings, ceilings[label], ids) for label, model in models.items()
    }
    for label, folder in folders.items():
        described[label]["bytes_on_disk"] = stored_bytes(folder)
    bar = tqdm(total=num_steps(entrants, settings), desc="benchmark", unit="step", disable=None, leave=False)

    def progress(what: str) -> None:
        bar.set_postfix_str(what)
        bar.update()

    context["measurements"] = settings.num_rows(len(entrants))
    rows: list[TimedRow] = []
    try:
        with bar:
            run_benchmark(entrants, ids, settings, ceilings, progress, rows)
    except KeyboardInterrupt:
        context["interrupted"] = True
    return BenchmarkRecord(context, described, rows)


def gathered(arguments: Sequence[str], option: str) -> list[str]:
    """Let an option take several words, or stand several times: ``--against A B --against C``.

    Args:
        arguments: Command-line arguments.
        option: The option.

    Returns:
        The arguments with one such option, a list.
    """
    kept: list[str] = []
    found: list[str] = []
    taking = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == option:
            taking = not equals
            found += words(value) or [] if equals else []
        elif taking and not argument.startswith("-"):
            found += words(argument) or []
        else:
            taking = False
            kept.append(argument)
    return [*kept, f"{option}={json.dumps(found)}"] if found else kept


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: Options.

    Returns:
        Exit status: 0; 1 where a model was not timed; 2 where the options do not fit.
    """
    return run_command(
        "benchmark", benchmark_models, gathered(arguments, "--against"), flags=("--overwrite", "--markdown")
    )
