"""Which text the quality of a run was measured on: numbers of different texts say nothing about each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_lightning.reporting.report.blocks import Cell
from moe_lightning.reporting.report.columns import main_text
from moe_lightning.reporting.report.read import Run
from moe_lightning.reporting.run_comparison import last_moment

ON_A_TEXT = ("perplexity", "perplexity_ratio", "bits_per_byte", "divergence", "agreement")
"""Numbers that hold for the text that they were measured on."""

SHOWN = 8
"""Letters of a fingerprint that are shown."""


@dataclass(frozen=True)
class MeasuredText:
    """What a run was measured on. What is not known is empty.

    Attributes:
        name: Of the text.
        blocks: Fingerprint of the blocks' token ids.
        split: Fingerprint of the documents of the test split, and how many blocks it has.
        tokenizer: Fingerprint of the tokenizer.
    """

    name: str = ""
    blocks: str = ""
    split: str = ""
    tokenizer: str = ""

    def is_same(self, other: MeasuredText) -> bool:
        """Say whether both are known to be the same tokens.

        Args:
            other: The other one.
        """
        if self.blocks and other.blocks:
            return self.blocks == other.blocks
        same = bool(self.split and self.split == other.split)
        return same and bool(self.tokenizer) and self.tokenizer == other.tokenizer

    @property
    def words(self) -> str:
        """What it is, with the beginnings of its fingerprints."""
        blocks = self.blocks or self.split
        told = [repr(self.name) if self.name else "a text", f"blocks {blocks[:SHOWN] or 'not known'}"]
        return ", ".join([*told, f"tokenizer {self.tokenizer[:SHOWN] or 'not known'}"])


def measured_text(run: Run) -> MeasuredText | None:
    """Return what the numbers of a run are of; None where it has none.

    Args:
        run: The run.
    """
    end = last_moment(run.quality)
    name = main_text(run)
    data: Mapping[str, Any] = {}
    if run.quality is not None and isinstance(run.quality.context.get("data"), dict):
        data = run.quality.context["data"]
    else:
        for record in run.compressions:
            for step in record.history:
                found = (step.get("calibration") or {}).get("data")
                data = found if isinstance(found, dict) else data
    blocks = ""
    if end is not None and name in end.texts:
        blocks = end.texts[name].fingerprint
    elif run.offline is None and not run.tested and not run.validated:
        return None
    splits = data.get("splits")
    kind = "validation" if name == "validation" or (not name and not run.tested and run.validated) else "test"
    split = splits.get(kind) if isinstance(splits, dict) and name in ("", kind) else None
    split = f"{split.get('fingerprint')} {split.get('blocks')}" if isinstance(split, dict) else ""
    return MeasuredText(name or kind, blocks, split, str(data.get("tokenizer") or ""))


def texts_of(named: Mapping[str, Run]) -> dict[str, tuple[str, MeasuredText]]:
    """Return letter and text of every run that was measured; runs with the same letter were measured on the same.

    Args:
        named: The runs by name.
    """
    found: dict[str, tuple[str, MeasuredText]] = {}
    groups: list[MeasuredText] = []
    for name, run in named.items():
        text = measured_text(run)
        if text is None:
            continue
        place = next((place for place, known in enumerate(groups) if known.is_same(text)), len(groups))
        if place == len(groups):
            groups.append(text)
        found[name] = (_letter(place), text)
    return found


def differ(texts: Mapping[str, tuple[str, MeasuredText]]) -> bool:
    """Say whether there is more than one text.

    Args:
        texts: Letters and texts.
    """
    return len({letter for letter, _ in texts.values()}) > 1


def told_texts(texts: Mapping[str, tuple[str, MeasuredText]]) -> str:
    """Return the warning that numbers of different texts do not compare.

    Args:
        texts: Letters and texts of the runs.
    """
    groups: dict[str, list[str]] = {}
    for name, (letter, _) in texts.items():
        groups.setdefault(letter, []).append(name)
    words = {letter: text.words for letter, text in reversed(list(texts.values()))}
    listed = "; ".join(f"({letter}) {words[letter]}: {', '.join(names)}" for letter, names in groups.items())
    told = (
        "These runs were not measured on the same text, or are not known to be: perplexity, bits per byte, KL and "
        f"agreement of runs with different letters must not be compared. {listed}."
    )
    if len({text.tokenizer for _, text in texts.values()}) > 1:
        told += (
            " Their tokenizers differ: perplexity is per token, so that it does not compare between tokenizers even on "
            "one text. Bits per byte do, but only where the text is the same."
        )
    return told


def marked(cell: Cell, letter: str) -> Cell:
    """Return a cell that says which text it is of.

    Args:
        cell: The cell.
        letter: Of the text.
    """
    return cell if cell.text in ("", "-") else replace(cell, text=f"{cell.text} ({letter})")


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"{place + 1}"
