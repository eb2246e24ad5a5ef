"""What the commands print beside their own lines: warnings that read well, and none of what no user can act on."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from moe_lightning.cli.errors import TRACEBACK_VARIABLE

WARNINGS_OF_NO_USE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
    r"Precision .* is not supported by the model summary",
)
"""Beginnings of warnings that dependencies give about themselves."""

WARNINGS_OF_FIT = (r"Be aware that when using `ckpt_path`, callbacks",)
"""Beginnings of warnings that mean something where a run is resumed, and nothing where a checkpoint is only read."""

NOTES_OF_NO_USE = re.compile("litlogger|^TPU available")
"""Lightning's advertisement, and hardware that is not there."""


def _note_is_of_use(record: logging.LogRecord) -> bool:
    return not NOTES_OF_NO_USE.search(record.getMessage())


IN_OPTIONS = (
    ("give more batches to top_up, other text,", "raise --data.calibration, give other text,"),
    ("top_up is exhausted", "the calibration split is exhausted"),
    ("batches of top_up in a row", "further calibration batches in a row"),
)
"""What ml.compress says in words of its arguments, and how it is called on the command line."""

_RARE_VALIDATION = re.compile(
    r" ?`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\).*",
    re.S,
)
"""What Lightning says where an epoch is shorter than the time between two validations."""

MOST_NAMED = 8
"""Experts or matrices named in a message."""

_ITEM = r"[\w.]+(?: \(\d+\))?"
_LAYER = rf"layer \d+: (?:experts )?{_ITEM}(?:, {_ITEM})*"
_LAYERS = re.compile(rf"{_LAYER}(?:; {_LAYER})*")


def _shortened(found: re.Match[str]) -> str:
    left, parts, named = MOST_NAMED, [], 0
    for part in found[0].split("; "):
        head, colon, listed = part.partition(": ")
        items = listed.split(", ")
        named += len(items)
        if left > 0:
            parts.append(f"{head}{colon}{', '.join(items[:left])}")
        left -= len(items)
    more = f" and {named - MOST_NAMED} more" if named > MOST_NAMED else ""
    return "; ".join(parts) + more


def for_the_command(text: str, command: str) -> str:
    """Say what ml.compress says in words of the command line, with lists of experts that end.

    Args:
        text: A warning or an error.
        command: Name of the command that runs.
    """
    for ours, theirs in IN_OPTIONS:
        text = text.replace(ours, theirs)
    text = _RARE_VALIDATION.sub(
        r"--trainer.val_check_interval \1 is more than the \2 batches of an epoch: set it to \2 or less, or do not "
        "validate, by --trainer.limit_val_batches 0",
        text,
    )
    # In fit it is an option of Compress, which has no words of its own on the command line.
    text = re.sub(r"starved='(\w+)'", r"starved: \1" if command == "fit" else r"--starved \1", text)
    return _LAYERS.sub(_shortened, text)


def _format_warning(command: str, message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {for_the_command(str(message), command)}\n"


@contextmanager
def readable_messages(command: str) -> Iterator[None]:
    """Print warnings as one line without a place in the code, and leave out what no user can act on.

    With the environment variable MOE_LIGHTNING_TRACEBACK everything is printed, and where it comes from.

    Args:
        command: Name of the command that runs.

    Yields:
        Nothing; everything is as before after the ``with`` block.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        yield
        return
    logger, format_before = logging.getLogger("lightning.pytorch.utilities.rank_zero"), warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = partial(_format_warning, command)
        for message in (*WARNINGS_OF_NO_USE, *(() if command == "fit" else WARNINGS_OF_FIT)):
            warnings.filterwarnings("ignore", message=message)
        logger.addFilter(_note_is_of_use)
        try:
            yield
        finally:
            warnings.formatwarning = format_before
            logger.removeFilter(_note_is_of_use)
