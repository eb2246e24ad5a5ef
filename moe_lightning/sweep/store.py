"""What a sweep leaves on disk: one file for each finished cell, and what they belong to. A second run goes on there."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.evaluation.comparison import BlockScores
from moe_lightning.files import write_atomically
from moe_lightning.plan import CompressionPlan
from moe_lightning.sizes import ModelSize
from moe_lightning.sweep.notes import Measured

ORIGINAL = "original"
"""Key of the uncompressed model among the cells."""


@dataclass(frozen=True)
class CellResult:
    """What came out of a cell.

    Attributes:
        settings: The cell's own, so that the file says what it is.
        plan: What was decided.
        size: Parameters, bytes and FLOPs of the model, counted in its tensors.
        scores: What it makes of the held-out text.
        statuses: What happened to each module.
        seconds: Time that the cell took.
        measured: How much of it was made from measurements.
    """

    settings: dict[str, Any]
    plan: CompressionPlan
    size: ModelSize
    scores: BlockScores
    statuses: dict[str, str]
    seconds: float
    measured: Measured = field(default_factory=Measured)

    def to_json(self) -> str:
        """Return the result as text."""
        values = {
            "settings": self.settings,
            "plan": self.plan.to_dict(),
            "size": asdict(self.size),
            "scores": self.scores.to_dict(),
            "statuses": self.statuses,
            "seconds": self.seconds,
            "measured": asdict(self.measured),
        }
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CellResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: It is not whole.
        """
        try:
            values = json.loads(text)
            return cls(
                values["settings"],
                CompressionPlan.from_dict(values["plan"]),
                ModelSize(**values["size"]),
                BlockScores.from_dict(values["scores"]),
                values["statuses"],
                values["seconds"],
                Measured(**values["measured"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a whole result of a cell: {error}") from None


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def statistics_path(self) -> Path:
        """Where the shared statistics are."""
        return self.path / "statistics.safetensors"

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Make sure that what the folder holds belongs to the same model and data.

        Args:
            fingerprint: Everything besides a cell's settings that its result depends on, by a name that a user knows.

        Raises:
            FileExistsError: It holds a sweep of something else, or no sweep at all.
        """
        if self.path.is_file():
            raise FileExistsError(f"--output {self.path} is a file, not a folder: choose another one")
        head = self.path / "sweep.json"
        if not head.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise FileExistsError(f"--output {self.path} holds something that is no sweep: choose another folder")
            return
        try:
            before = json.loads(head.read_text())["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise FileExistsError(
                f"--output {self.path}: sweep.json in it cannot be read: choose another folder, or delete this one"
            ) from None
        changed = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
        if changed:
            told = ", ".join(f"{name} (was {before.get(name)}, is {fingerprint.get(name)})" for name in changed)
            raise FileExistsError(
                f"--output {self.path} holds a sweep of something else; different are: {told}. Its cells cannot be "
                "compared with new ones: choose another folder"
            )

    def begin(self, fingerprint: Mapping[str, Any], description: Mapping[str, Any]) -> None:
        """Write what the folder's cells belong to.

        Args:
            fingerprint: As for :meth:`check`.
            description: What else to keep: names and sizes, plain types.
        """
        head = {"fingerprint": dict(fingerprint), **description}
        write_atomically(self.path / "sweep.json", json.dumps(head, indent=2) + "\n")

    def read(self, key: str) -> CellResult | None:
        """Return the result of a cell, or None where it is not there or not whole.

        Args:
            key: Of the cell.
        """
        path = self._file(key)
        if not path.is_file():
            return None
        try:
            return CellResult.from_json(path.read_text())
        except ValueError:
            warnings.warn(f"{path} is not whole: the cell is done again", stacklevel=2)
            return None

    def write(self, key: str, result: CellResult) -> None:
        """Write the result of a cell, whole or not at all.

        Args:
            key: Of the cell.
            result: What came out.
        """
        write_atomically(self._file(key), result.to_json())

    def _file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"


def folder_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return a hash of a checkpoint's config and weights.

    Args:
        folder: In Hugging Face layout.

    Cost: reads all of it once, about a second a GB.
    """
    digest = hashlib.blake2b(digest_size=10)
    for path in sorted(Path(folder).iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
