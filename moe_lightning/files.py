"""Writing files and folders whole or not at all. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing in between.

    Args:
        path: File to write; its folder is made.
        data: Bytes, or text for UTF-8.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file or folder can be made, before the work whose result it is.

    Args:
        path: What is to be made; folders above it that are not there yet are made then.

    Raises:
        PermissionError: The nearest folder above it that exists takes no new files, or is none.
    """
    parent = Path(path).absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    probe = parent / f".{os.getpid()}.probe"
    try:
        with probe.open("wb"):
            pass
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"{path} cannot be written ({parent}: {error.strerror}): choose another output") from None


def check_output_folder(path: str | os.PathLike[str], overwrite: bool, option: str) -> Path:
    """Make sure that a folder may be written, before the work that fills it.

    Args:
        path: The folder.
        overwrite: Whether one that holds something may be replaced.
        option: Name of the option that asks for overwriting, for the message.

    Returns:
        The path.

    Raises:
        FileExistsError: It exists, is not empty, and ``overwrite`` is not set, or it is a file.
        PermissionError: It cannot be written.
    """
    target = Path(path)
    check_writable(target)
    if target.is_file() or target.is_symlink():
        raise FileExistsError(f"{target} is a file or a link, not a folder: choose another output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty: choose another folder or pass {option}")
    return target


@contextmanager
def written_folder(
    path: str | os.PathLike[str], overwrite: bool = False, option: str = "overwrite=True"
) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block ends well, and vanishes when it fails.

    Args:
        path: The folder to write.
        overwrite: Whether one that holds something may be replaced.
        option: Name of the option that asks for overwriting, for the message.

    Yields:
        The folder to fill.

    Raises:
        FileExistsError: As :func:`check_output_folder`.
    """
    target = check_output_folder(path, overwrite, option)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def distinct_names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the shortest ends of paths that tell folders apart: ``a/run`` and ``b/run``, or ``one`` and ``two``.

    Args:
        folders: The folders.

    Returns:
        A name for each; equal ones only where the folders are.
    """
    paths = [Path(folder).resolve().parts for folder in folders]
    deepest = max(map(len, paths), default=0)
    for depth in range(1, deepest + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return ["/".join(parts) for parts in paths]
