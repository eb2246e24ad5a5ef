"""Texts that every Python brings along: the sources of its library, and the topics of its help."""

import os
import sysconfig
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"
PYTHON_TOPICS = "python-topics"

# Not source text of a person: tests, generated tables and configuration, other people's packages.
_STDLIB_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "turtledemo", "__pycache__"}
    | {"ensurepip", "encodings", "pydoc_data"}
)


def python_stdlib_files() -> list[Path]:
    """Return the source files of the running Python's standard library, sorted.

    Tests, IDLE, bundled and installed packages, generated tables (`encodings`, `pydoc_data`, `_sysconfigdata*`) and
    the few files that are not UTF-8 are left out.

    Returns:
        The files.

    Raises:
        FileNotFoundError: When this Python carries no library sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_EXCLUDED]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                files.append(Path(folder) / name)
    files = [file for file in files if _is_utf8(file)]
    if not files:
        raise FileNotFoundError(
            f"--data.sources {PYTHON_STDLIB}: this Python has no library sources in {root}; name text files instead"
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def python_topics() -> dict[str, str]:
    """Return the topics of the running Python's `help`, sorted by name: English prose about the language.

    They are about 80, half a megabyte in all; none of it is in `python_stdlib_files`.

    Returns:
        The texts by the names of the topics.

    Raises:
        FileNotFoundError: When this Python carries no topics (some distributions put them into a package of their own).
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise FileNotFoundError(
            f"--data.sources {PYTHON_TOPICS}: this Python has no topics of help() (module pydoc_data.topics); "
            "name text files instead"
        ) from error
    return dict(sorted(topics.topics.items()))


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, PermissionError):
        return False
    return True
