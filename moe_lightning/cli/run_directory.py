"""The folder that holds what a run leaves, and what becomes of an earlier run in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FOLDERS = ("checkpoints", "logs", "models", "quality", "results")
FILES = ("config.*.yaml", "predictions*.jsonl")
ASIDE = ".replaced"


class RunDirectory:
    """A run directory whose earlier content is given up only when the new run has really begun.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.existed = self.path.exists()
        self._aside = self.path / ASIDE
        self._has_set_aside = False

    def content(self) -> list[Path]:
        """Return the files and folders that runs leave here, and nothing that others put beside them."""
        found = [self.path / name for name in FOLDERS] + [path for name in FILES for path in self.path.glob(name)]
        return sorted(path for path in found if path.exists())

    def set_aside(self) -> None:
        """Make room for a new run."""
        content = self.content()
        if not content:
            return
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir()
        for path in content:
            os.replace(path, self._aside / path.name)
        self._has_set_aside = True

    def begin(self) -> None:
        """Give up what was set aside: the new run works."""
        shutil.rmtree(self._aside, ignore_errors=True)
        self._has_set_aside = False

    def undo(self) -> None:
        """Put everything back as it was before a run that never began."""
        if not self.existed:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self._has_set_aside:
            for path in self.content():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in self._aside.iterdir():
                os.replace(path, self.path / path.name)
            self._aside.rmdir()
            self._has_set_aside = False
