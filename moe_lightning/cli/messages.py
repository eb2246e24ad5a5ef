"""What the commands print beside their own lines: warnings that read well, and none of what no user can act on."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"


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
        warnings.formatwarning = _format_warning
        for message in (*WARNINGS_OF_NO_USE, *(() if command == "fit" else WARNINGS_OF_FIT)):
            warnings.filterwarnings("ignore", message=message)
        logger.addFilter(_note_is_of_use)
        try:
            yield
        finally:
            warnings.formatwarning = format_before
            logger.removeFilter(_note_is_of_use)
