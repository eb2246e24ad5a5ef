"""Where tokenizers and packed blocks are kept between runs: folders under a key, written whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Part of every key: raise it when the layout of what is cached changes, and old folders are simply not found any more.
CACHE_FORMAT = 1


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder for cached tokenizers and blocks.

    Args:
        cache_dir: A folder; `None` means `$XDG_CACHE_HOME/moe_lightning`, or `~/.cache/moe_lightning` without that.

    Returns:
        The folder, which need not exist yet.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_lightning"


def key_of(**settings: Any) -> str:
    """Return a key (32 hex digits) of plain settings, the same in every process.

    Args:
        **settings: Plain values, lists or dicts of them.

    Returns:
        The key.
    """
    text = json.dumps({"format": CACHE_FORMAT, **settings}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its name when the block ends without an exception.

    A process that dies in the middle leaves no folder of the final name, and of two processes that write the same
    folder at once one wins and the other's copy is dropped (both hold the same content: the name is its key).

    Args:
        target: The final folder.

    Yields:
        The folder to write into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
