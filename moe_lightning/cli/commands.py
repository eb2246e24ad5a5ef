"""What the commands that are plain functions share: their parser, their errors of one line, device, type and data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from transformers import AutoConfig

from moe_lightning.architectures import architecture_named
from moe_lightning.checkpoints import check_checkpoint, has_weights, read_config, stored_dtype
from moe_lightning.cli import after_interrupt
from moe_lightning.cli.arguments import with_bare_flags, with_replaced_lists
from moe_lightning.cli.config_files import resolve_configs
from moe_lightning.cli.errors import TRACEBACK_VARIABLE, OneLineErrors, in_one_line
from moe_lightning.cli.messages import for_the_command, readable_messages
from moe_lightning.data import TextDataModule, holds_tokenizer
from moe_lightning.plan import CompressionPlan, ModelShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CommandParser(OneLineErrors, ArgumentParser):
    """A parser with errors of one line."""


class WorkFailed(RuntimeError):
    """The options fit and the work began, but some of it did not succeed; the message says it all."""


def command_parser(name: str, function: Callable[..., Any]) -> CommandParser:
    """Return a parser for the arguments of a function.

    Args:
        name: Of the command.
        function: Its argument ``data``, if there is one, takes the options of :class:`TextDataModule`.
    """
    description = (function.__doc__ or "").splitlines()[0]
    parser = CommandParser(prog=f"moe-lightning {name}", description=description, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file with options, or the name of a packaged one."
    )
    skip: set[str | int] = set()
    if "data" in function.__annotations__:
        parser.add_class_arguments(TextDataModule, "data")
        skip = {"data"}
    parser.add_function_arguments(function, skip=skip)
    return parser


def run_command(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[str],
    *,
    flags: Sequence[str] = (),
    lists: Sequence[str] = (),
) -> int:
    """Parse the options of a command and run its function.

    Args:
        name: Of the command.
        function: What it does. ``ValueError``, ``TypeError`` and ``OSError`` are mistakes in the options unless the
            work has begun (:func:`begun`).
        arguments: Command-line arguments.
        flags: Options that may stand alone for true.
        lists: Options that hold lists of objects.

    Returns:
        Exit status: 0; 1 where part of the work failed; 2 where the options do not fit; 130 after Ctrl-C.
    """
    try:
        resolved, _ = resolve_configs(arguments)
    except FileNotFoundError as error:
        print(f"moe-lightning {name}: error: {error}", file=sys.stderr)
        return 2
    parser = command_parser(name, function)
    options = parser.parse_args(with_replaced_lists(with_bare_flags(resolved, flags), lists))
    if "data" in options and options.get("model"):
        _use_own_tokenizer(options)
    try:
        with readable_messages(name):
            values = vars(parser.instantiate(options))
            values.pop("config", None)
            function(**values)
    except WorkFailed as error:
        print(f"moe-lightning {name}: {for_the_command(str(error), name)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return after_interrupt(name, error)
    except BrokenPipeError:
        raise  # no mistake in the options: nobody reads what is printed, see moe_lightning.cli.main
    except (ValueError, TypeError, OSError) as error:
        if _BEGUN in getattr(error, "__notes__", ()) or os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"moe-lightning {name}: error: {in_one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


_BEGUN = "the work had begun"


class begun:
    """Mark what fails inside the block as no mistake in the options: where it comes from is worth reading."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(_BEGUN)


def _use_own_tokenizer(options: Namespace) -> None:
    """Take the model folder's tokenizer where none was named."""
    folder = Path(options.model)
    if options.data.tokenizer is None and holds_tokenizer(folder):
        options.data.tokenizer = str(folder)


def device_named(name: str) -> torch.device:
    """Return the device that an option means.

    Args:
        name: ``auto`` (a GPU where there is one), or as torch names it.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: use auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no CUDA device here: use auto or cpu")
    return device


def dtype_named(name: str, model: str) -> torch.dtype:
    """Return the type of the weights that an option means.

    Args:
        name: ``auto`` takes the one that they were saved in.
        model: Folder of the model.

    Raises:
        ValueError: Nothing in the folder says it.
    """
    kind = DTYPES.get(name) or getattr(AutoConfig.from_pretrained(model), "dtype", None)
    if kind is None and not has_weights(model):
        raise ValueError(f"--dtype {name}: {model} holds no weights, and its config.json names no type: name one")
    return kind or stored_dtype(model)


def inspected(model: str, weights: bool = True) -> tuple[ModelShape, CompressionPlan]:
    """Look at a model's folder without loading it.

    Args:
        model: Folder of the model.
        weights: Its weights must be there, whole; otherwise its ``config.json`` is enough.

    Returns:
        Its shape, and its plan, which is empty for an uncompressed model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged, or of another family.
    """
    raw = check_checkpoint(model) if weights else read_config(model)
    config = AutoConfig.from_pretrained(model)
    architecture = architecture_named(raw["model_type"])
    return architecture.shape_of_config(config), architecture.plan_of_config(config)


def check_vocabulary(data: TextDataModule, shape: ModelShape, model: str) -> None:
    """Make sure that the data's tokens are the model's, and that there is a tokenizer at all.

    Args:
        data: The data; they are prepared.
        shape: Shape of the model.
        model: Its folder, for the message.

    Raises:
        ValueError: No tokenizer, one with more tokens than the model knows, or blocks longer than its sequences.
    """
    if data.options.tokenizer is None:
        raise ValueError(
            f"{model} holds no tokenizer: name the one that the model was trained with by --data.tokenizer"
        )
    check_block_size(data, model)
    data.prepare()
    if data.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {data.vocab_size} tokens, the model knows {shape.vocab_size}: name the model's own "
            "tokenizer by --data.tokenizer"
        )


def check_block_size(data: TextDataModule, model: str) -> None:
    """Make sure that the blocks of text are no longer than the model's sequences.

    Args:
        data: The data; they need not be there.
        model: Folder of the model.

    Raises:
        ValueError: They are.
    """
    longest = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    if longest is not None and data.options.block_size > longest:
        raise ValueError(
            f"--data.block_size {data.options.block_size} is more than the model's longest sequence: set it to at most "
            f"{longest}"
        )
